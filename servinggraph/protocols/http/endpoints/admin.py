"""Routers read and changed while they serve, and the audit log."""

from __future__ import annotations

import os
from dataclasses import asdict
from hmac import compare_digest
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from servinggraph.errors import InvalidRequest
from servinggraph.interfaces import FrontEndOptions
from servinggraph.lifecycle import RouterSeat, ServedGraph, Serving
from servinggraph.lifecycle.control import seat_of
from servinggraph.protocols.http.endpoints.routing import Endpoint, json_object, json_response, route

__all__ = ["routes"]

_LONGEST = 4096
"""Most characters of who asks for a change, and why."""

_GRAPH = "/admin/graphs/{name:segment}"


def routes(serving: Serving) -> list[Route]:
    """Return the routes."""
    catalog, control = serving.catalog, serving.control
    token = serving.options.admin_token or os.environ.get("SERVINGGRAPH_ADMIN_TOKEN", "")

    def guarded(endpoint: Endpoint) -> Endpoint:
        return _guarded(endpoint, token) if token else endpoint

    def graph_of(request: Request) -> ServedGraph:
        return catalog.get(request.path_params["name"], request.query_params.get("version", ""))

    def graphs(request: Request) -> Response:
        return json_response([_graph(graph) for graph in catalog.graphs()])

    def graph(request: Request) -> Response:
        return json_response(_graph(graph_of(request)))

    def routers(request: Request) -> Response:
        return json_response([_router(seat) for seat in graph_of(request).seats.values()])

    def router(request: Request) -> Response:
        return json_response(_router(_seat(graph_of(request), request)))

    async def change(request: Request) -> Response:
        document = await json_object(request, serving.options.max_body_bytes)
        seat = _seat(graph_of(request), request)
        settings, who, why, revision = _change(document)
        control.change(seat, settings, who, why, revision)
        return json_response(_router(seat))

    def audit(request: Request) -> Response:
        query = request.query_params
        limit = query.get("limit", "100")
        if not limit.isdecimal() or len(limit) > 6:
            raise InvalidRequest(f"'limit' is a whole number, got {limit[:20]!r}")
        return json_response([asdict(c) for c in control.audit.last(query.get("graph", ""), query.get("node", ""), int(limit))])

    if not _is_on(serving.options, token):
        # Who follows the documents on a server that others reach is told why; who switched it off need not be.
        return [route("/admin/{rest:path}", _closed, "GET", "PATCH")] if serving.options.admin == "auto" else []
    return [
        route("/admin/graphs", guarded(graphs), "GET"),
        route(_GRAPH, guarded(graph), "GET"),
        route(_GRAPH + "/routers", guarded(routers), "GET"),
        route(_GRAPH + "/routers/{node:segment}", guarded(router), "GET"),
        route(_GRAPH + "/routers/{node:segment}", guarded(change), "PATCH"),
        route("/admin/audit", guarded(audit), "GET"),
    ]


def _is_on(options: FrontEndOptions, token: str) -> bool:
    """Tell whether /admin is there; by itself only where nobody but this machine, or a holder of the token, reaches it."""
    if options.admin != "auto":
        return options.admin == "on"
    return bool(token) or getattr(options, "host", "127.0.0.1") in ("127.0.0.1", "::1", "localhost")


def _closed(request: Request) -> Response:
    text = (
        "/admin is off where other machines reach the server (--host), unless it has a token: "
        "--admin-token or SERVINGGRAPH_ADMIN_TOKEN"
    )
    return json_response({"error": text}, 404)


def _guarded(endpoint: Endpoint, token: str) -> Endpoint:
    expected = f"Bearer {token}".encode()

    def check(request: Request) -> Any:
        if not compare_digest(request.headers.get("authorization", "").encode(), expected):
            return json_response({"error": "/admin asks for 'Authorization: Bearer <token>' (--admin-token)"}, 401)
        return endpoint(request)

    return check


def _change(document: dict[str, Any]) -> tuple[dict[str, Any], str, str, int | None]:
    """Return settings, who, why and revision of a PATCH."""
    settings = document.get("settings")
    if type(settings) is not dict or set(document) - {"settings", "who", "why", "revision"}:
        raise InvalidRequest('expected {"settings": {...}, "who": "...", "why": "...", "revision": number}')
    who, why, revision = document.get("who", ""), document.get("why", ""), document.get("revision")
    if type(who) is not str or type(why) is not str or not (revision is None or type(revision) is int):
        raise InvalidRequest("'who' and 'why' are text, 'revision' is a whole number")
    if len(who) + len(why) > _LONGEST:  # the log of changes keeps a thousand in memory
        raise InvalidRequest(f"'who' and 'why' have {len(who) + len(why)} characters, {_LONGEST} at most")
    return settings, who, why, revision


def _seat(graph: ServedGraph, request: Request) -> RouterSeat:
    return seat_of(graph.seats, request.path_params["node"], graph.plan.name)


def _graph(graph: ServedGraph) -> dict[str, Any]:
    plan = graph.plan
    nodes = [{"name": node.name, "kind": node.kind, "is": node.work.describe()} for node in plan.every_node()]
    return {"graph": plan.name, "version": plan.version, "ready": graph.ready, "in_flight": graph.requests, "nodes": nodes}


def _router(seat: RouterSeat) -> dict[str, Any]:
    router = seat.router
    return {
        "node": router.name,
        "is": router.describe(),
        "revision": router.revision,
        "settings": router.settings(),
        "report": router.report(),
    }
