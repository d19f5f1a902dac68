"""An answer that a router gives instead of running a branch: a declared error."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from servinggraph.errors import (
    GraphNotFound,
    InvalidRequest,
    LimitExceeded,
    ServingGraphError,
    Unavailable,
    Unsupported,
)
from servinggraph.interfaces import Options

__all__ = ["Refusal"]

_ERRORS: dict[str, type[ServingGraphError]] = {
    "invalid_request": InvalidRequest,
    "not_found": GraphNotFound,
    "limit_exceeded": LimitExceeded,
    "unavailable": Unavailable,
    "unsupported": Unsupported,
}


class Refusal(Options):
    """The error that a caller gets."""

    error: Literal["invalid_request", "not_found", "limit_exceeded", "unavailable", "unsupported"] = Field(
        "invalid_request", description="Its code: 400, 404, 503, 503 and 501 over HTTP."
    )
    message: str = Field(description="Its text.")

    def raised(self) -> ServingGraphError:
        """Return the error."""
        return _ERRORS[self.error](self.message)
