"""The model repository: index, load, unload.

Source: Triton server docs/protocol/extension_model_repository.md.
"""

from __future__ import annotations

import base64
import binascii
from typing import Any

import orjson
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from servinggraph.errors import Cancelled, InvalidRequest, RequestTooLarge
from servinggraph.lifecycle import Serving
from servinggraph.protocols.http.endpoints.routing import json_response, route

__all__ = ["routes"]


def routes(serving: Serving) -> list[Route]:
    """Return the routes; each with and without a repository's name, which is not looked at: there is one."""
    limit = serving.options.max_body_bytes

    async def index(request: Request) -> Response:
        document = await _document(request, limit)
        ready = document.get("ready", False)
        if not isinstance(ready, bool):
            raise InvalidRequest(f"'ready' is true or false, got {ready!r}")
        return json_response([line._asdict() for line in await serving.repository.index(ready=ready)])

    async def load(request: Request) -> Response:
        parameters = _parameters(await _document(request, limit))
        name = request.path_params["name"]
        await serving.repository.load(name, {key: _load_parameter(key, value) for key, value in parameters.items()})
        return json_response({"name": name, "load": True})

    async def unload(request: Request) -> Response:
        parameters = _parameters(await _document(request, limit))
        name = request.path_params["name"]
        for key, value in parameters.items():
            if key != "unload_dependents":
                raise InvalidRequest(f"unrecognized unload parameter '{key}'; expected unload_dependents")
            if not isinstance(value, bool):  # no graph is another's dependent here
                raise InvalidRequest(f"'unload_dependents' is true or false, got {value!r}")
        await serving.repository.unload(name)
        return json_response({"name": name, "unload": True})

    return [
        route(prefix + path, endpoint, "POST")
        for prefix in ("/v2/repository", "/v2/repository/{repo:segment}")
        for path, endpoint in (
            ("/index", index),
            ("/models/{name:segment}/load", load),
            ("/models/{name:segment}/unload", unload),
        )
    ]


async def _document(request: Request, limit: int) -> dict[str, Any]:
    """Return a body that is a JSON object, or empty.

    Raises:
        RequestTooLarge: it is over the limit.
        InvalidRequest: it is something else.
    """
    parts = bytearray()
    try:
        async for part in request.stream():
            parts += part
            if len(parts) > limit:
                text = f"request size exceeds the maximum allowed: {limit} bytes (limit 'max_body_bytes')"
                raise RequestTooLarge(text)
    except ClientDisconnect:
        raise Cancelled("the client went away") from None
    if not parts.strip():
        return {}
    try:
        document = orjson.loads(parts)
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(f"failed to parse the request JSON buffer: {error}") from None
    if not isinstance(document, dict):
        raise InvalidRequest(f"failed to parse the request JSON buffer: expected an object, got {type(document).__name__}")
    return document


def _parameters(document: dict[str, Any]) -> dict[str, Any]:
    parameters = document.get("parameters") or {}
    if not isinstance(parameters, dict):
        raise InvalidRequest(f"'parameters' is an object, got {type(parameters).__name__}")
    return parameters


def _load_parameter(key: str, value: Any) -> str | bytes:
    if not isinstance(value, str):
        raise InvalidRequest(f"load parameter '{key}' is text, got {type(value).__name__}")
    if not key.startswith("file:"):
        return value
    try:
        return base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidRequest(f"load parameter '{key}' is not base64: {error}") from None
