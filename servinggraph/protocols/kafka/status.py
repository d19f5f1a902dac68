"""What becomes of a record whose request failed, by error code."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Final

from servinggraph.errors import ErrorCode, ServingGraphError

__all__ = ["KAFKA_OUTCOME", "Outcome", "outcome_of"]


class Outcome(Enum):
    """What becomes of a record."""

    RETRY = "retry"
    """Tried again after a pause, up to the limit of attempts; then given up."""
    GIVE_UP = "give up"
    """Its error goes to whoever asked for the answer, or the record to the dead letters."""


KAFKA_OUTCOME: Final[Mapping[ErrorCode, Outcome]] = {
    ErrorCode.INVALID_REQUEST: Outcome.GIVE_UP,
    ErrorCode.NOT_FOUND: Outcome.GIVE_UP,
    ErrorCode.CONFLICT: Outcome.GIVE_UP,
    ErrorCode.LIMIT_EXCEEDED: Outcome.RETRY,
    ErrorCode.TOO_LARGE: Outcome.GIVE_UP,
    # Of a node or the graph: it may be quicker next time. Once the record's own deadline has passed, it is given up.
    ErrorCode.DEADLINE_EXCEEDED: Outcome.RETRY,
    ErrorCode.CANCELLED: Outcome.GIVE_UP,
    ErrorCode.UNAVAILABLE: Outcome.RETRY,
    ErrorCode.UNSUPPORTED: Outcome.GIVE_UP,
    ErrorCode.UNSUPPORTED_TYPE: Outcome.GIVE_UP,
    ErrorCode.NOT_ACCEPTABLE: Outcome.GIVE_UP,
    ErrorCode.INTERNAL: Outcome.GIVE_UP,
}


def outcome_of(error: ServingGraphError) -> Outcome:
    """Return what becomes of a record; a step that says that a retry can help is believed."""
    return Outcome.RETRY if error.retryable else KAFKA_OUTCOME[error.code]
