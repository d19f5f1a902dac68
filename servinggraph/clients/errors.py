"""Errors of a server as exceptions again: the class that stands for a code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from servinggraph import errors
from servinggraph.errors import ErrorCode, ServingGraphError

__all__ = ["error_from"]

_CLASSES: Final[Mapping[ErrorCode, type[ServingGraphError]]] = {
    ErrorCode.INVALID_REQUEST: errors.InvalidRequest,
    ErrorCode.NOT_FOUND: errors.GraphNotFound,
    ErrorCode.CONFLICT: errors.Conflict,
    ErrorCode.LIMIT_EXCEEDED: errors.LimitExceeded,
    ErrorCode.TOO_LARGE: errors.RequestTooLarge,
    ErrorCode.DEADLINE_EXCEEDED: errors.DeadlineExceeded,
    ErrorCode.CANCELLED: errors.Cancelled,
    ErrorCode.UNAVAILABLE: errors.Unavailable,
    ErrorCode.UNSUPPORTED: errors.Unsupported,
    ErrorCode.UNSUPPORTED_TYPE: errors.UnsupportedType,
    ErrorCode.NOT_ACCEPTABLE: errors.NotAcceptable,
    ErrorCode.INTERNAL: errors.StepFailed,
}


def error_from(code: str, message: str, node: str | None = None) -> ServingGraphError:
    """Return the exception for what a server answered; a code that is not known counts as the server's fault.

    Args:
        code: value of an `ErrorCode`.
        message: the error's text.
        node: the node at fault.
    """
    try:
        known = ErrorCode(code)
    except ValueError:
        known, message = ErrorCode.INTERNAL, f"{message} (status '{code}')"
    error = _CLASSES[known](message)
    error.node = node
    return error
