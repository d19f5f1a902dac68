"""Everything but inference: the endpoints put together, and the answers to wrong paths and methods."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import orjson
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from servinggraph.errors import ServingGraphError
from servinggraph.lifecycle import Serving
from servinggraph.protocols.http.endpoints import (
    admin,
    config,
    feedback,
    generate,
    health,
    invocations,
    metrics,
    repository,
    settings,
    shared_memory,
    statistics,
)
from servinggraph.protocols.http.endpoints.routing import json_response
from servinggraph.protocols.http.status import error_response

__all__ = ["make_app", "make_metrics_app"]

# Statistics before health: `/v2/models/stats` is not the metadata of a graph called stats.
_PARTS = (
    statistics,
    config,
    health,
    generate,
    invocations,
    repository,
    settings,
    shared_memory,
    feedback,
    admin,
    metrics,
)


def make_app(serving: Serving) -> Starlette:
    """Return the Starlette application for all routes but inference of graphs that are served."""
    routes = [route for part in _PARTS for route in part.routes(serving)]
    handlers: dict[Any, Callable[..., Response]] = {
        HTTPException: _on_http_error,
        ServingGraphError: _on_error,
        Exception: _on_defect,
    }
    app = Starlette(routes=routes, exception_handlers=handlers)
    app.router.redirect_slashes = False  # `/v2/models/x/` is no route, as in Triton
    return app


def make_metrics_app(serving: Serving) -> Starlette:
    """Return the application of a port for metrics alone."""
    handlers: dict[Any, Callable[..., Response]] = {HTTPException: _on_http_error}
    app = Starlette(routes=[metrics.metrics_route(serving)], exception_handlers=handlers)
    app.router.redirect_slashes = False
    return app


def _on_http_error(request: Request, error: HTTPException) -> Response:
    text = {404: "Not Found", 405: "Method Not Allowed"}.get(error.status_code, error.detail)
    return Response(orjson.dumps({"error": text}), error.status_code, error.headers, "application/json")


def _on_error(request: Request, error: ServingGraphError) -> Response:
    status, headers, body = error_response(error)
    return Response(body, status, {name.decode(): value.decode() for name, value in headers})


def _on_defect(request: Request, error: Exception) -> Response:
    return json_response({"error": "internal error"}, 500)
