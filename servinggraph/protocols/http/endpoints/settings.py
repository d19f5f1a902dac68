"""Trace and log settings over HTTP. Source: Triton, extension_trace and extension_logging."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from servinggraph.lifecycle import Serving
from servinggraph.protocols.http.endpoints.routing import MODEL, json_object, json_response, route

__all__ = ["routes"]


def routes(serving: Serving) -> list[Route]:
    """Return the routes."""
    tracing, logs, limit = serving.tracing, serving.logs, serving.options.max_body_bytes

    async def trace(request: Request) -> Response:
        graph = request.path_params.get("name", "")
        if request.method == "GET":
            return json_response(tracing.settings(graph))
        return json_response(tracing.update(await json_object(request, limit), graph))

    async def logging(request: Request) -> Response:
        if request.method == "GET":
            return json_response(logs.settings())
        return json_response(logs.update(await json_object(request, limit)))

    return [
        route("/v2/trace/setting", trace, "GET", "POST"),
        route(MODEL + "/trace/setting", trace, "GET", "POST"),
        route("/v2/logging", logging, "GET", "POST"),
    ]
