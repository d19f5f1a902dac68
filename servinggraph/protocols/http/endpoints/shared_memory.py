"""Registering, unregistering and listing shared memory of clients. Source: Triton, extension_shared_memory."""

from __future__ import annotations

import binascii
from base64 import b64decode
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from servinggraph.errors import InvalidRequest
from servinggraph.lifecycle import Serving
from servinggraph.protocols.http.endpoints.routing import json_object, json_response, route
from servinggraph.protocols.v2.json_data import shown

__all__ = ["routes"]

_KINDS = ("system", "cuda")


def routes(serving: Serving) -> list[Route]:
    """Return the routes."""
    memory, limit = serving.memory, serving.options.max_body_bytes

    async def register_system(request: Request) -> Response:
        memory.check_allowed()
        body = await json_object(request, limit)
        key, size, offset = _text(body, "key"), _number(body, "byte_size"), _number(body, "offset", 0)
        memory.register_system(request.path_params["region"], key, offset, size)
        return Response()

    async def register_cuda(request: Request) -> Response:
        memory.check_allowed()
        body = await json_object(request, limit)
        handle, device, size = _handle(body), _number(body, "device_id"), _number(body, "byte_size")
        memory.register_cuda(request.path_params["region"], handle, device, size)
        return Response()

    made = []
    for kind in _KINDS:
        base = f"/v2/{kind}sharedmemory"
        region = base + "/region/{region:segment}"

        def status(request: Request, kind: Any = kind) -> Response:
            return json_response(memory.status(kind, request.path_params.get("region", "")))

        def unregister(request: Request, kind: Any = kind) -> Response:
            memory.unregister(kind, request.path_params.get("region", ""))
            return Response()

        made += [
            route(base + "/status", status, "GET"),
            route(region + "/status", status, "GET"),
            route(base + "/unregister", unregister, "POST"),
            route(region + "/unregister", unregister, "POST"),
            route(region + "/register", register_system if kind == "system" else register_cuda, "POST"),
        ]
    return made


def _text(body: dict[str, Any], key: str) -> str:
    value = body.get(key)
    if type(value) is not str or not value:
        raise InvalidRequest(f"Unable to parse '{key}' of the shared memory region: expected text, got {shown(value)}")
    return value


def _number(body: dict[str, Any], key: str, default: int | None = None) -> int:
    value = body.get(key, default)
    if type(value) is not int or value < 0:
        raise InvalidRequest(
            f"Unable to parse '{key}' of the shared memory region: expected a whole number from 0 on, got {shown(value)}"
        )
    return value


def _handle(body: dict[str, Any]) -> bytes:
    handle = body.get("raw_handle")
    encoded = handle.get("b64") if type(handle) is dict else None
    if type(encoded) is not str:
        raise InvalidRequest('Unable to parse \'raw_handle\' of the CUDA shared memory region: expected {"b64": "..."}')
    try:
        return b64decode(encoded, validate=True)
    except (binascii.Error, ValueError):
        raise InvalidRequest("Unable to parse 'raw_handle' of the CUDA shared memory region: 'b64' is no base64") from None
