"""What each member of a batch gets: its rows of the result, or an error of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from servinggraph.batching.members import Waiter
from servinggraph.batching.rows import slice_rows
from servinggraph.errors import DeadlineExceeded, ServingGraphError, StepFailed, Unavailable
from servinggraph.interfaces import BatchPolicy

__all__ = ["expired", "own_error", "shares"]


def shares(
    batch: Sequence[Waiter], result: Mapping[str, Any], errors: Mapping[int, str | BaseException], node: str
) -> list[Any]:
    """Return for each member its rows of a result, or an error where one of them has one.

    Args:
        batch: the members, in the order of their rows.
        result: arrays that have as many rows as all of them.
        errors: what is wrong with rows, by their number.
        node: the node's name, for error texts.
    """
    found: list[Any] = []
    start = 0
    for waiter in batch:
        stop = start + waiter.rows
        bad = next((row for row in range(start, stop) if row in errors), None) if errors else None
        if bad is None:
            found.append(slice_rows(result, start, stop))
        else:
            found.append(_row_error(waiter.first_row + bad - start, errors[bad], node))
        start = stop
    return found


def _row_error(row: int, reason: str | BaseException, node: str) -> ServingGraphError:
    if isinstance(reason, BaseException):
        return own_error(reason, node, f"row {row}: ")
    return StepFailed(f"row {row}: {reason}").at(node)


def own_error(error: BaseException, node: str, place: str = "") -> ServingGraphError:
    """Return a failure as an error that one caller alone may raise.

    One object raised in several tasks would collect all their tracebacks.
    """
    if isinstance(error, ServingGraphError):
        return error.copy().at(node)
    return StepFailed.because_of(error, place).at(node)


def expired(waiter: Waiter, now: float, policy: BatchPolicy) -> ServingGraphError:
    """Return why a request that has waited may wait no longer."""
    if waiter.deadline is not None and waiter.deadline <= now:
        return DeadlineExceeded("Request timeout expired while it waited for a batch")
    limit = f"limit 'batch.queue_timeout_ms' = {policy.queue_timeout_ms:g}"
    return Unavailable(f"Request timeout expired: it waited for a batch too long ({limit})")
