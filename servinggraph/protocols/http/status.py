"""Error code to HTTP status, and the body of an error."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import orjson

from servinggraph.errors import ErrorCode, ServingGraphError

__all__ = ["HTTP_STATUS", "error_response"]

HTTP_STATUS: Final[Mapping[ErrorCode, int]] = {
    ErrorCode.INVALID_REQUEST: 400,
    ErrorCode.NOT_FOUND: 404,
    ErrorCode.CONFLICT: 409,
    ErrorCode.LIMIT_EXCEEDED: 503,
    ErrorCode.TOO_LARGE: 413,
    ErrorCode.DEADLINE_EXCEEDED: 504,
    ErrorCode.CANCELLED: 499,  # nginx's "client closed request"; nobody is there to read it
    ErrorCode.UNAVAILABLE: 503,
    ErrorCode.UNSUPPORTED: 501,
    ErrorCode.UNSUPPORTED_TYPE: 415,
    ErrorCode.NOT_ACCEPTABLE: 406,
    ErrorCode.INTERNAL: 500,
}

Headers = list[tuple[bytes, bytes]]


def error_response(error: ServingGraphError) -> tuple[int, Headers, bytes]:
    """Return status, headers and body that tell a client of an error."""
    status = HTTP_STATUS[error.code]
    # Not application/json with a charset: KServe's client then hides the text.
    headers = [(b"content-type", b"application/json")]
    if status == 503 and error.retryable:
        headers.append((b"retry-after", b"1"))
    if status == 501:
        headers.append((b"accept-encoding", b"gzip, deflate"))
    # A text may quote what the client sent, lone surrogates included, which JSON cannot hold.
    text = str(error).encode("utf-8", "replace").decode()
    return status, headers, orjson.dumps({"error": text})
