"""Feedback: what became of an earlier answer, for routers that learn from it."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from servinggraph.interfaces import Receipt
from servinggraph.lifecycle import Serving
from servinggraph.protocols.http.endpoints.routing import MODEL, VERSION, json_object, json_response, route

__all__ = ["routes"]


def routes(serving: Serving) -> list[Route]:
    """Return the routes."""

    async def feedback(request: Request) -> Response:
        document = await json_object(request, serving.options.max_body_bytes)
        receipts = serving.feedback(request.path_params["name"], document, request.path_params.get("version", ""))
        status = 202 if Receipt.PASSED_ON in receipts.values() else 200
        return json_response({"routers": {name: receipt.value for name, receipt in receipts.items()}}, status)

    return [route(MODEL + "/feedback", feedback, "POST"), route(VERSION + "/feedback", feedback, "POST")]
