"""Paths that name a route inside a graph: `/v2/models/{graph}[/versions/{version}]/routes/{route}/infer` and the like.

The route is taken out of the path, and the request goes on as one to the graph; a `model` router reads the
route from the context. Only a path that no graph has comes here, so other requests pay nothing.
"""

from __future__ import annotations

import re
from typing import Final

from servinggraph.errors import GraphNotFound, ServingGraphError
from servinggraph.lifecycle import Catalog
from servinggraph.protocols.http.exchange import ROUTE, ASGIApp, Receive, Scope, Send, send_whole
from servinggraph.protocols.http.status import error_response

__all__ = ["RoutePaths"]

_PATH: Final = re.compile(
    r"(/v2/models/(?P<name>[^/]+)(?:/versions/(?P<version>[0-9]+))?)/routes/(?P<route>[^/]+)"
    r"(/(?:infer|infer_stream|generate|generate_stream|invocations))"
)


class RoutePaths:
    """ASGI application: sends requests to a route of a graph back to the front, and hands on the rest.

    Args:
        catalog: the graphs.
        others: application for all other paths.

    Attributes:
        front: application for what is left of a path without its route.
    """

    front: ASGIApp

    def __init__(self, catalog: Catalog, others: ASGIApp) -> None:
        self._catalog = catalog
        self._others = others

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        found = _PATH.fullmatch(scope["path"]) if scope["type"] == "http" and scope["method"] == "POST" else None
        if found is None:
            await self._others(scope, receive, send)
            return
        try:
            graph = self._catalog.get(found["name"], found["version"] or "")
            if not graph.plan.routes:
                raise GraphNotFound(
                    f"model '{found['name']}' has no routes: none of its routers is 'router: model' with 'by: path'"
                )
        except ServingGraphError as error:
            await send_whole(send, *error_response(error))
            return
        await self.front({**scope, "path": found[1] + found[5], ROUTE: found["route"]}, receive, send)
