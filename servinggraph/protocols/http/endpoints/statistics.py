"""Statistics over HTTP. Source: Triton, extension_statistics."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from servinggraph.lifecycle import Serving
from servinggraph.protocols.http.endpoints.routing import MODEL, VERSION, json_response, route
from servinggraph.protocols.v2.statistics import model_statistics

__all__ = ["routes"]


def routes(serving: Serving) -> list[Route]:
    """Return the routes."""

    def statistics(request: Request) -> Response:
        parameters = request.path_params
        graphs = serving.catalog.graphs()
        return json_response(model_statistics(graphs, parameters.get("name", ""), parameters.get("version", "")))

    return [
        route("/v2/models/stats", statistics, "GET"),
        route(MODEL + "/stats", statistics, "GET"),
        route(VERSION + "/stats", statistics, "GET"),
    ]
