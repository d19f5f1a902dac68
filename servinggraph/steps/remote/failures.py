"""What a call of another server can end with, and which of our errors that is."""

from __future__ import annotations

from typing import Final

from servinggraph.errors import (
    DeadlineExceeded,
    InvalidRequest,
    RequestTooLarge,
    ServingGraphError,
    StepFailed,
    Unavailable,
    Unsupported,
)

__all__ = ["CallFailed", "broken", "garbage", "late", "refused", "unreachable"]

_LONGEST: Final = 500
"""Characters of another server's error text that are passed on."""


class CallFailed(Exception):
    """A call failed.

    Attributes:
        error: what the caller is told.
        sent: False when the other server cannot have seen the request.
        unhealthy: True when this speaks against the server, and not against the request.
    """

    def __init__(self, error: ServingGraphError, *, sent: bool, unhealthy: bool) -> None:
        super().__init__(str(error))
        # A server that refused a batch has not run it, and one member may be why. Else it may have run, or the server would be
        # asked as many times as there are members just when it is in trouble.
        error.of_batch = not isinstance(error, InvalidRequest | RequestTooLarge)
        self.error = error
        self.sent = sent
        self.unhealthy = unhealthy


def unreachable(where: str, reason: str) -> CallFailed:
    """Return the failure for a connection that could not be made."""
    return CallFailed(Unavailable(f"cannot connect to {where}: {_short(reason)}"), sent=False, unhealthy=True)


def broken(where: str, reason: str) -> CallFailed:
    """Return the failure for a connection that was lost after the request went out."""
    text = f"{where} closed the connection before its answer was there: {_short(reason)}"
    return CallFailed(Unavailable(text), sent=True, unhealthy=True)


def garbage(where: str, reason: str) -> CallFailed:
    """Return the failure for an answer that cannot be read."""
    return CallFailed(StepFailed(f"the answer of {where} cannot be read: {_short(reason)}"), sent=True, unhealthy=True)


def late(where: str) -> CallFailed:
    """Return the failure for a request whose time is up."""
    return CallFailed(DeadlineExceeded(f"{where} did not answer in time"), sent=True, unhealthy=True)


def refused(where: str, status: int, reason: str, named: str = "") -> CallFailed:
    """Return the failure for an answer with an error status.

    Args:
        where: the server.
        status: the status of HTTP.
        reason: what the server says.
        named: what the text calls the status, where it is not HTTP's.
    """
    text = f"{where} answered {named or status}: {_short(reason)}"
    if status in (408, 504):
        return CallFailed(DeadlineExceeded(text), sent=True, unhealthy=False)
    if status == 413:
        return CallFailed(RequestTooLarge(text), sent=True, unhealthy=False)
    if status in (429, 503):
        return CallFailed(Unavailable(text), sent=True, unhealthy=status == 503)
    if status == 501:
        return CallFailed(Unsupported(text), sent=True, unhealthy=False)
    # What is wrong with the address, the model's name or the credentials is not the caller's to mend.
    if 400 <= status < 500 and status not in (401, 403, 404, 405, 407, 421, 499):
        return CallFailed(InvalidRequest(text), sent=True, unhealthy=False)
    return CallFailed(StepFailed(text), sent=True, unhealthy=status == 502)


def _short(text: str) -> str:
    text = " ".join(text.split()) or "no reason given"
    return text if len(text) <= _LONGEST else text[:_LONGEST] + "..."
