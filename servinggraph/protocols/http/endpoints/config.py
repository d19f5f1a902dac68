"""Model configuration over HTTP. Source: Triton, extension_model_configuration."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from servinggraph.lifecycle import Serving
from servinggraph.protocols.http.endpoints.routing import MODEL, VERSION, json_response, route
from servinggraph.protocols.v2.config import model_config

__all__ = ["routes"]


def routes(serving: Serving) -> list[Route]:
    """Return the routes."""

    def config(request: Request) -> Response:
        return json_response(model_config(serving.catalog, request.path_params["name"], request.path_params.get("version", "")))

    return [route(MODEL + "/config", config, "GET"), route(VERSION + "/config", config, "GET")]
