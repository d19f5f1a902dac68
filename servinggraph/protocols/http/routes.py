"""Paths that name a route inside a graph: `/v2/models/{graph}[/versions/{version}]/routes/{route}/infer` and the like.

The route is taken out of the path, and the request goes on as one to the graph; a `model` router reads the
route from the context. Only a path that no graph has comes here, so other requests pay nothing.
"""

from __future__ import annotations

import re
from typing import Final

from servinggraph.errors import ServingGraphError
from servinggraph.lifecycle import Serving
from servinggraph.protocols.http.exchange import ROUTE, ASGIApp, Receive, Scope, Send, send_whole
from servinggraph.protocols.http.status import error_response
from servinggraph.protocols.v2.checks import check_routes

__all__ = ["RoutePaths"]

_PATH: Final = re.compile(
    r"/v2/models/(?P<name>[^/]+)(?:/versions/(?P<version>[0-9]+))?/routes/(?P<route>[^/]+)(?:/versions/(?P<behind>[0-9]+))?"
    r"/(?P<work>infer|infer_stream|generate|generate_stream|invocations)"
)


class RoutePaths:
    """ASGI application: sends requests to a route of a graph back to the front, and hands on the rest.

    Args:
        serving: the graphs.
        others: application for all other paths.

    Attributes:
        front: application for what is left of a path without its route.
    """

    front: ASGIApp

    def __init__(self, serving: Serving, others: ASGIApp) -> None:
        self._serving = serving
        self._others = others

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        found = _PATH.fullmatch(scope["path"]) if scope["type"] == "http" and scope["method"] == "POST" else None
        if found is None or (found["version"] and found["behind"]):
            await self._others(scope, receive, send)
            return
        # A client that takes `graph/routes/route` for a model's name puts the version behind it.
        version = found["version"] or found["behind"] or ""
        try:
            graph = self._serving.catalog.get(found["name"], version)
            check_routes(graph.plan)
        except ServingGraphError as error:
            self._serving.refused("http", error)
            await send_whole(send, *error_response(error))
            return
        path = f"/v2/models/{found['name']}{version and '/versions/'}{version}/{found['work']}"
        await self.front({**scope, "path": path, ROUTE: found["route"]}, receive, send)
