"""Metrics for Prometheus."""

from __future__ import annotations

import asyncio

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from servinggraph.lifecycle import Serving
from servinggraph.lifecycle.metrics import read_devices
from servinggraph.protocols.http.endpoints.routing import route

__all__ = ["metrics_route", "routes"]


def routes(serving: Serving) -> list[Route]:
    """Return the route; none where metrics are off, or have a port of their own."""
    own_port = getattr(serving.options, "metrics_port", None) is not None
    return [] if serving.options.metrics == "off" or own_port else [metrics_route(serving)]


def metrics_route(serving: Serving) -> Route:
    """Return the route of the metrics."""
    from servinggraph.metrics.exposition import write

    triton = serving.options.metrics_compat == "triton"

    async def metrics(request: Request) -> Response:
        readings = serving.metrics()  # at one moment; asking drivers and making text is not the event loop's business
        accept = request.headers.get("accept", "")

        def page() -> tuple[bytes, str]:
            read_devices(readings, triton=triton)
            return write(readings, accept)

        text, content_type = await asyncio.to_thread(page)
        return Response(text, headers={"content-type": content_type})

    return route("/metrics", metrics, "GET")
