"""Feedback: what became of an earlier answer, for routers that learn from it."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from servinggraph.errors import InvalidRequest
from servinggraph.interfaces import Feedback
from servinggraph.lifecycle import Serving
from servinggraph.lifecycle.control import give_feedback
from servinggraph.protocols.http.endpoints.routing import MODEL, VERSION, json_object, json_response, route

__all__ = ["routes"]


def routes(serving: Serving) -> list[Route]:
    """Return the routes."""

    async def feedback(request: Request) -> Response:
        document = await json_object(request, serving.options.max_body_bytes)
        found = serving.catalog.get(request.path_params["name"], request.path_params.get("version", ""))
        return json_response({"taken_by": give_feedback(found.seats, _feedback(document), found.plan.name)})

    return [route(MODEL + "/feedback", feedback, "POST"), route(VERSION + "/feedback", feedback, "POST")]


def _feedback(document: dict[str, Any]) -> Feedback:
    unknown = set(document) - {"id", "variant", "reward", "truth", "metric"}
    if unknown:
        raise InvalidRequest(f"unknown key '{min(unknown)}': expected id or variant, reward or truth, metric")
    request_id, variant, metric = document.get("id", ""), document.get("variant", ""), document.get("metric", "reward")
    if type(request_id) is not str or type(variant) is not str or type(metric) is not str or not (request_id or variant):
        raise InvalidRequest("feedback needs the 'id' of the request, or the 'variant' that answered, as text")
    reward, truth = document.get("reward"), document.get("truth")
    if (reward is None) == (truth is None):
        raise InvalidRequest("feedback has a 'reward' (a number) or a 'truth', one of the two")
    if reward is not None and type(reward) not in (int, float):
        raise InvalidRequest("'reward' is a number")
    return Feedback(request_id, variant, None if reward is None else float(reward), truth, metric)
