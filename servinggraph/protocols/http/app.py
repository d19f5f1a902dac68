"""Everything but inference: health, metadata, and the answers to wrong paths and methods."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import orjson
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from servinggraph.errors import ServingGraphError, Unavailable
from servinggraph.lifecycle import Catalog
from servinggraph.protocols.http.status import error_response
from servinggraph.protocols.v2 import model_metadata, server_metadata

__all__ = ["make_app"]

_MODEL = "/v2/models/{name:segment}"
_VERSION = _MODEL + "/versions/{version:digits}"


def make_app(catalog: Catalog, server_name: str, server_version: str) -> Starlette:
    """Return the Starlette application for all routes but inference of graphs that are served."""
    _register_convertors()

    def live(request: Request) -> Response:
        return _json({"live": True})

    def ready(request: Request) -> Response:
        return _json({"ready": catalog.ready}, 200 if catalog.ready else 503)

    def metadata(request: Request) -> Response:
        return _json(server_metadata(server_name, server_version))

    def models(request: Request) -> Response:
        return _json({"models": sorted({graph.plan.name for graph in catalog.graphs()})})

    def model(request: Request) -> Response:
        graph = catalog.get(request.path_params["name"], request.path_params.get("version", ""))
        chosen = request.path_params.get("version")
        return _json(model_metadata(graph.plan, [chosen] if chosen else catalog.versions(graph.plan.name)))

    def model_ready(request: Request) -> Response:
        name = request.path_params["name"]
        try:
            catalog.get(name, request.path_params.get("version", ""))
        except Unavailable:
            return _json({"name": name, "ready": False}, 503)
        # A server that is told to stop keeps answering, but nobody new should be sent here.
        return _json({"name": name, "ready": not catalog.draining}, 503 if catalog.draining else 200)

    def infer(request: Request) -> Response:
        # Reached only for what is not in the table of served graphs.
        catalog.get(request.path_params["name"], request.path_params.get("version", ""))
        raise Unavailable("the graph is being loaded")

    get = {"methods": ["GET"]}
    post = {"methods": ["POST"]}
    routes = [
        _route("/v2/health/live", live, **get),
        _route("/v2/health/ready", ready, **get),
        _route("/v2", metadata, **get),
        _route("/v2/", metadata, **get),
        _route("/v2/models", models, **get),
        _route(_MODEL, model, **get),
        _route(_VERSION, model, **get),
        _route(_MODEL + "/ready", model_ready, **get),
        _route(_VERSION + "/ready", model_ready, **get),
        _route(_MODEL + "/infer", infer, **post),
        _route(_VERSION + "/infer", infer, **post),
    ]
    handlers: dict[Any, Callable[..., Response]] = {
        HTTPException: _on_http_error,
        ServingGraphError: _on_error,
        Exception: _on_defect,
    }
    app = Starlette(routes=routes, exception_handlers=handlers)
    app.router.redirect_slashes = False  # `/v2/models/x/` is no route, as in Triton
    return app


def _route(path: str, endpoint: Callable[[Request], Response], methods: list[str]) -> Route:
    async def call(request: Request) -> Response:
        # In the event loop: a plain endpoint would cost a thread, and none of ours blocks.
        return endpoint(request)

    route = Route(path, call, methods=methods)
    route.methods = set(methods)  # Starlette adds HEAD, which V2 does not have
    return route


def _json(document: Any, status: int = 200) -> Response:
    return Response(orjson.dumps(document), status, media_type="application/json")


def _on_http_error(request: Request, error: HTTPException) -> Response:
    text = {404: "Not Found", 405: "Method Not Allowed"}.get(error.status_code, error.detail)
    return Response(orjson.dumps({"error": text}), error.status_code, error.headers, "application/json")


def _on_error(request: Request, error: ServingGraphError) -> Response:
    status, headers, body = error_response(error)
    return Response(body, status, {name.decode(): value.decode() for name, value in headers})


def _on_defect(request: Request, error: Exception) -> Response:
    return Response(orjson.dumps({"error": "internal error"}), 500, media_type="application/json")


def _register_convertors() -> None:
    from starlette.convertors import CONVERTOR_TYPES, StringConvertor

    class Digits(StringConvertor):
        regex = "[0-9]+"

    CONVERTOR_TYPES.setdefault("digits", Digits())
    CONVERTOR_TYPES.setdefault("segment", StringConvertor())
