"""Error code to gRPC status, and how an error's text travels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import grpc

from servinggraph.errors import ErrorCode, ServingGraphError

__all__ = ["GRPC_STATUS", "status_of"]

GRPC_STATUS: Final[Mapping[ErrorCode, grpc.StatusCode]] = {
    ErrorCode.INVALID_REQUEST: grpc.StatusCode.INVALID_ARGUMENT,
    ErrorCode.NOT_FOUND: grpc.StatusCode.NOT_FOUND,
    ErrorCode.CONFLICT: grpc.StatusCode.ABORTED,
    # As in Triton, and what clients retry; RESOURCE_EXHAUSTED is what gRPC itself says of messages that are too large.
    ErrorCode.LIMIT_EXCEEDED: grpc.StatusCode.UNAVAILABLE,
    ErrorCode.TOO_LARGE: grpc.StatusCode.RESOURCE_EXHAUSTED,
    ErrorCode.DEADLINE_EXCEEDED: grpc.StatusCode.DEADLINE_EXCEEDED,
    ErrorCode.CANCELLED: grpc.StatusCode.CANCELLED,
    ErrorCode.UNAVAILABLE: grpc.StatusCode.UNAVAILABLE,
    ErrorCode.UNSUPPORTED: grpc.StatusCode.UNIMPLEMENTED,
    ErrorCode.UNSUPPORTED_TYPE: grpc.StatusCode.INVALID_ARGUMENT,
    ErrorCode.NOT_ACCEPTABLE: grpc.StatusCode.INVALID_ARGUMENT,
    ErrorCode.INTERNAL: grpc.StatusCode.INTERNAL,
}

_LONGEST: Final = 2000
"""Bytes of an error's text. It travels as a header, where a client takes 8 KiB, and a byte may become three."""


def status_of(error: ServingGraphError) -> tuple[grpc.StatusCode, str]:
    """Return the status and the text that tell a client of an error."""
    return GRPC_STATUS[error.code], text_of(error)


def text_of(error: ServingGraphError) -> str:
    """Return an error's text as UTF-8 can carry it, and short enough for a header."""
    data = str(error).encode("utf-8", "replace")
    if len(data) > _LONGEST:
        return data[:_LONGEST].decode("utf-8", "ignore") + "..."
    return data.decode()
