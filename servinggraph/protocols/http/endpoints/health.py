"""Health, metadata, and the answer to inference on what is not served."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from servinggraph.errors import ServingGraphError, Unavailable, Unsupported
from servinggraph.lifecycle import Serving
from servinggraph.protocols.http.endpoints.routing import MODEL, VERSION, json_response, route
from servinggraph.protocols.v2 import model_metadata, server_metadata
from servinggraph.protocols.v2.checks import check_takes_tensors

__all__ = ["routes"]


def routes(serving: Serving) -> list[Route]:
    """Return the routes."""
    catalog = serving.catalog

    def live(request: Request) -> Response:
        return json_response({"live": True})

    def ready(request: Request) -> Response:
        return json_response({"ready": catalog.ready}, 200 if catalog.ready else 503)

    def metadata(request: Request) -> Response:
        return json_response(server_metadata(serving))

    def models(request: Request) -> Response:
        return json_response({"models": sorted({graph.plan.name for graph in catalog.graphs()})})

    def model(request: Request) -> Response:
        graph = catalog.get(request.path_params["name"], request.path_params.get("version", ""))
        chosen = request.path_params.get("version")
        return json_response(model_metadata(graph.plan, [chosen] if chosen else catalog.versions(graph.plan.name)))

    def model_ready(request: Request) -> Response:
        name = request.path_params["name"]
        try:
            catalog.get(name, request.path_params.get("version", ""))
        except Unavailable:
            return json_response({"name": name, "ready": False}, 503)
        # A server that is told to stop keeps answering, but nobody new should be sent here.
        return json_response({"name": name, "ready": not catalog.draining}, 503 if catalog.draining else 200)

    def infer(request: Request) -> Response:
        # Reached only for what is not in the inference route's table of served graphs.
        graph = None
        try:
            graph = catalog.get(request.path_params["name"], request.path_params.get("version", ""))
            check_takes_tensors(graph.plan)
            if graph.plan.decoupled:
                raise Unsupported("HTTP end point doesn't support models with decoupled transaction policy")
            raise Unavailable("the graph is being loaded")
        except ServingGraphError as error:
            if graph is not None and graph.traffic is not None:
                graph.traffic["http"].failed(error.code.value)
            else:
                serving.refused("http", error)
            raise

    return [
        route("/v2/health/live", live, "GET"),
        route("/v2/health/ready", ready, "GET"),
        route("/v2", metadata, "GET"),
        route("/v2/", metadata, "GET"),
        route("/v2/models", models, "GET"),
        route(MODEL, model, "GET"),
        route(VERSION, model, "GET"),
        route(MODEL + "/ready", model_ready, "GET"),
        route(VERSION + "/ready", model_ready, "GET"),
        route(MODEL + "/infer", infer, "POST"),
        route(VERSION + "/infer", infer, "POST"),
    ]
