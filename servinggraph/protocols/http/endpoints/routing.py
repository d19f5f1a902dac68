"""Routes and answers as V2 wants them: exact methods, JSON, no redirects."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Final

import orjson
from starlette.convertors import CONVERTOR_TYPES, StringConvertor
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from servinggraph.errors import InvalidRequest, RequestTooLarge
from servinggraph.protocols.v2.json_data import parse_json

__all__ = ["MODEL", "VERSION", "Endpoint", "json_object", "json_response", "route"]

MODEL: Final = "/v2/models/{name:segment}"
VERSION: Final = MODEL + "/versions/{version:digits}"

Endpoint = Callable[[Request], Response] | Callable[[Request], Awaitable[Response]]


class _Digits(StringConvertor):
    regex = "[0-9]+"


CONVERTOR_TYPES.setdefault("digits", _Digits())
CONVERTOR_TYPES.setdefault("segment", StringConvertor())


def route(path: str, endpoint: Endpoint, *methods: str) -> Route:
    """Return a route that takes exactly these methods; the endpoint may be plain or async.

    A plain endpoint runs on the event loop, so it must not block.
    """

    async def call(request: Request) -> Response:
        # Starlette would run a plain endpoint in a thread.
        answer = endpoint(request)
        return answer if isinstance(answer, Response) else await answer

    made = Route(path, call, methods=methods)
    made.methods = set(methods)  # Starlette adds HEAD, which V2 does not have
    return made


async def json_object(request: Request, limit: int) -> dict[str, Any]:
    """Read a body that is a JSON object; an empty one counts as an object without keys.

    Raises:
        RequestTooLarge: it has more than `limit` bytes.
        InvalidRequest: it is no JSON, or no object.
    """
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > limit:
            raise RequestTooLarge(f"request size exceeds the maximum allowed: {limit} bytes (limit 'max_body_bytes')")
    document = parse_json(bytes(body)) if body else {}
    if type(document) is not dict:
        raise InvalidRequest("failed to parse the request JSON buffer: expected an object at the top")
    return document


def json_response(document: Any, status: int = 200) -> Response:
    """Return a JSON answer; without a charset, which KServe's client stumbles over."""
    return Response(orjson.dumps(document), status, media_type="application/json")
