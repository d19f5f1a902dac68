"""What stands guard over a node: retry budget, circuit breaker, rate limit, places. Pure decisions; time comes in as numbers.

Sources: Nygard, Release It! (circuit breaker, bulkhead); gRPC A6 (retry throttling by tokens);
token bucket as in ITU-T I.371.
"""

from __future__ import annotations

from collections import deque
from enum import Enum
from random import random

__all__ = ["Breaker", "BreakerState", "RetryBudget", "TokenBucket", "backoff_s"]


class RetryBudget:
    """Lets retries be a share of the requests, so that a storm of failures does not multiply itself.

    Args:
        share: retries allowed for each request, in the long run.
        burst: retries allowed beyond that, at once.
    """

    __slots__ = ("_burst", "_share", "_tokens")

    def __init__(self, share: float, burst: int) -> None:
        self._share = share
        self._burst = float(burst)
        self._tokens = float(burst)

    def request(self) -> None:
        """Note a request."""
        self._tokens = min(self._burst, self._tokens + self._share)

    def retry(self) -> bool:
        """Take a retry from the budget; False when it is used up."""
        # Shares add up with rounding errors: five of 0.2 are one retry.
        if self._tokens < 1 - 1e-9:
            return False
        self._tokens -= 1
        return True


def backoff_s(attempt: int, first_s: float, most_s: float, *, jitter: bool) -> float:
    """Return how long to wait after attempt number `attempt`, from 1: doubled each time, and with jitter any part of it."""
    longest = min(most_s, first_s * 2.0 ** min(attempt - 1, 60))
    return longest * random() if jitter else longest  # noqa: S311  (spreads load, hides nothing)


class TokenBucket:
    """Lets a number of calls a second through, and a burst at once.

    Args:
        rate: calls a second.
        burst: calls at once after a pause.
        now: the time, seconds.
    """

    __slots__ = ("_at", "_burst", "_rate", "_tokens")

    def __init__(self, rate: float, burst: float, now: float) -> None:
        self._rate, self._burst = rate, float(burst)
        self._tokens, self._at = float(burst), now

    def take(self, now: float) -> bool:
        """Let one call through, or not."""
        self._tokens = min(self._burst, self._tokens + (now - self._at) * self._rate)
        self._at = now
        if self._tokens < 1 - 1e-9:
            return False
        self._tokens -= 1
        return True


class BreakerState(Enum):
    """What a circuit breaker does with calls."""

    CLOSED = "closed"
    """All go through."""
    OPEN = "open"
    """None goes through."""
    HALF_OPEN = "half_open"
    """A few go through, to see whether it works again."""


class Breaker:
    """Stops calls of what fails, and tries again after a pause.

    Opens when of the last `window` calls at least `failures` failed. After `open_s` seconds
    `probes` calls may try at a time: one that works closes it, one that fails opens it again. What became of a call
    counts only in the period that it began in: one that began before it opened is no probe.

    Args:
        failures: failed calls that open it.
        window: calls that are looked at.
        open_s: how long it stays open, seconds.
        probes: calls that may try at a time.

    Attributes:
        state: what it does with calls.
        period: counts the changes of the state.
        opened: counts how often it opened.
    """

    __slots__ = ("_failures", "_last", "_most", "_open_s", "_opened_at", "_probes", "_trying", "opened", "period", "state")

    def __init__(self, failures: int, window: int, open_s: float, probes: int) -> None:
        self._most = failures
        self._last: deque[bool] = deque(maxlen=window)
        self._failures = 0
        self._open_s = open_s
        self._probes = probes
        self._opened_at = 0.0
        self._trying = 0
        self.state = BreakerState.CLOSED
        self.period = self.opened = 0

    def allows(self, now: float) -> bool:
        """Say whether a call may begin; each that does notes `period`, and ends in one of `worked`, `failed` and `left`."""
        if self.state is BreakerState.CLOSED:
            return True
        if self.state is BreakerState.OPEN:
            if now - self._opened_at < self._open_s:
                return False
            self._change(BreakerState.HALF_OPEN)
            self._trying = 0
        if self._trying >= self._probes:
            return False
        self._trying += 1
        return True

    def retry_after(self, now: float) -> float:
        """Return after how many seconds a call may be worth another try."""
        return max(0.0, self._opened_at + self._open_s - now) if self.state is BreakerState.OPEN else 0.0

    def worked(self, period: int) -> None:
        """Note a call that worked, and the period that it began in."""
        if period != self.period:
            return
        if self.state is BreakerState.CLOSED:
            self._note(failed=False)
        elif self.state is BreakerState.HALF_OPEN:
            self._change(BreakerState.CLOSED)

    def failed(self, period: int, now: float) -> None:
        """Note a call that failed."""
        if period != self.period:
            return
        if self.state is BreakerState.CLOSED:
            self._note(failed=True)
            if self._failures >= self._most:
                self._open(now)
        elif self.state is BreakerState.HALF_OPEN:
            self._open(now)

    def left(self, period: int) -> None:
        """Note a call that says nothing: its caller went away, or its request was wrong."""
        if period == self.period and self.state is BreakerState.HALF_OPEN:
            self._trying -= 1

    def _note(self, *, failed: bool) -> None:
        if len(self._last) == self._last.maxlen:
            self._failures -= self._last[0]
        self._last.append(failed)
        self._failures += failed

    def _open(self, now: float) -> None:
        self._change(BreakerState.OPEN)
        self._opened_at = now
        self.opened += 1

    def _change(self, state: BreakerState) -> None:
        self.state = state
        self.period += 1
        self._last.clear()
        self._failures = 0
