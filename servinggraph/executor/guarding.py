"""Puts guards around a node's operation: retries, circuit breaker, rate limit, at most so many calls at once.

From the outside in: retries, breaker, rate limit, places. So a retry meets a breaker that has
opened meanwhile, and a call that the breaker refuses takes no place.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from typing import Any, Final

from servinggraph.context import Context
from servinggraph.errors import ErrorCode, LimitExceeded, ServingGraphError, StepFailed, Unavailable
from servinggraph.guards import Breaker, BreakerState, RetryBudget, TokenBucket, backoff_s
from servinggraph.interfaces import Operation
from servinggraph.policies import BreakerPolicy, ConcurrencyPolicy, Guards, RateLimit, RetryPolicy

__all__ = ["guarded"]

logger = logging.getLogger("servinggraph.executor")

_EARLY_S: Final = 0.002
"""A timer of the event loop may be this early."""

_CALLERS_FAULT = frozenset(
    {
        ErrorCode.INVALID_REQUEST,
        ErrorCode.NOT_FOUND,
        ErrorCode.TOO_LARGE,
        ErrorCode.UNSUPPORTED,
        ErrorCode.UNSUPPORTED_TYPE,
        ErrorCode.NOT_ACCEPTABLE,
        ErrorCode.CANCELLED,
    }
)
"""Errors that say nothing about the node's health, and that no retry mends."""


def guarded(operation: Operation, guards: Guards, node: str) -> Operation:
    """Return an operation with the guards that its node asks for.

    Args:
        operation: what the node does.
        guards: its guards.
        node: its name, for error texts and the log.
    """
    if guards.max_concurrency is not None:
        operation = _Places(operation, guards.max_concurrency).operation()
    if guards.rate_limit is not None:
        operation = _rate_limited(operation, guards.rate_limit)
    if guards.circuit_breaker is not None:
        operation = _broken(operation, guards.circuit_breaker, node)
    if guards.retry is not None:
        operation = _retried(operation, guards.retry, node)
    return operation


class _Places:
    """At most so many calls at once; a place is free again when the call's work has really ended."""

    def __init__(self, operation: Operation, policy: ConcurrencyPolicy) -> None:
        self._call, self._suspends = operation.call, operation.suspends
        self._free = policy.limit
        self._policy = policy
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._loop = asyncio.get_running_loop()

    def operation(self) -> Operation:
        # A call that does not suspend is alone on the event loop: it cannot overlap with another.
        return Operation(self._run, suspends=True) if self._suspends else Operation(self._call, suspends=False)

    async def _run(self, value: Any, context: Context) -> Any:
        if self._free > 0 and not self._waiting:
            self._free -= 1
        else:
            await self._wait()
        inner = context.apart()
        try:
            return await self._call(value, inner)
        finally:
            inner.when_idle(self._leave)

    async def _wait(self) -> None:
        if len(self._waiting) >= self._policy.max_queue:
            raise LimitExceeded(
                f"{self._policy.limit} calls run (limit 'max_concurrency') and {len(self._waiting)} wait already "
                f"(limit 'max_concurrency.max_queue' = {self._policy.max_queue}); try again later",
                uncalled=True,
            )
        place = self._loop.create_future()
        self._waiting.append(place)
        try:
            await place
        except asyncio.CancelledError:
            if place.done() and not place.cancelled():
                self._leave()  # it was given the place in the same moment
            elif place in self._waiting:  # not when another call ended meanwhile and passed it over
                self._waiting.remove(place)
            raise

    def _leave(self) -> None:
        while self._waiting:
            place = self._waiting.popleft()
            if not place.done():
                place.set_result(None)
                return
        self._free += 1


def _rate_limited(operation: Operation, policy: RateLimit) -> Operation:
    clock = asyncio.get_running_loop().time
    bucket = TokenBucket(policy.per_s, policy.burst or max(1.0, policy.per_s), clock())
    call = operation.call
    full = f"more than {policy.per_s:g} calls a second (limit 'rate_limit.per_s'); try again later"

    def run(value: Any, context: Context) -> Any:
        if not bucket.take(clock()):
            raise LimitExceeded(full, uncalled=True)
        return call(value, context)

    if not operation.suspends:
        return Operation(run, suspends=False)

    async def wait(value: Any, context: Context) -> Any:
        return await run(value, context)

    return Operation(wait, suspends=True)


def _broken(operation: Operation, policy: BreakerPolicy, node: str) -> Operation:
    clock = asyncio.get_running_loop().time
    breaker = Breaker(policy.failures, policy.window or policy.failures, policy.open_ms / 1e3, policy.probes)
    call = operation.call

    def enter() -> int:
        now = clock()
        if not breaker.allows(now):
            left = breaker.retry_after(now)
            again = f"is tried again in {left:.1f} s" if left else "is being tried again"
            raise Unavailable(f"its circuit breaker is open after {policy.failures} failures: it {again}")
        return breaker.period

    def leave(period: int, error: BaseException | None, context: Context) -> None:
        before = breaker.state
        if error is None:
            breaker.worked(period)
        elif _is_failure(error) or (isinstance(error, asyncio.CancelledError) and _is_late(context, clock())):
            breaker.failed(period, clock())
        else:
            breaker.left(period)
        if breaker.state is not before and BreakerState.HALF_OPEN is not breaker.state:
            logger.warning("node '%s': circuit breaker %s", node, "closed" if error is None else f"opened: {_why(error)}")

    def run(value: Any, context: Context) -> Any:
        period = enter()
        try:
            result = call(value, context)
        except BaseException as error:
            leave(period, error, context)
            raise
        leave(period, None, context)
        return result

    if not operation.suspends:
        return Operation(run, suspends=False)

    async def wait(value: Any, context: Context) -> Any:
        period = enter()
        try:
            result = await call(value, context)
        except BaseException as error:
            leave(period, error, context)
            raise
        leave(period, None, context)
        return result

    return Operation(wait, suspends=True)


def _retried(operation: Operation, policy: RetryPolicy, node: str) -> Operation:
    loop = asyncio.get_running_loop()
    budget = RetryBudget(policy.budget, policy.burst)
    call, suspends = operation.call, operation.suspends
    codes = frozenset(ErrorCode(code) for code in policy.on)
    first_s, most_s = policy.backoff_ms / 1e3, policy.max_backoff_ms / 1e3

    async def run(value: Any, context: Context) -> Any:
        budget.request()
        attempt = 1
        while True:
            view = context.for_piece()  # what a run that failed has told is not the answer's
            try:
                result = call(value, view)
                result = await result if suspends else result
            except asyncio.CancelledError:
                raise
            except Exception as error:
                pause = _pause(error, attempt, context)
                if pause is None:
                    raise
                logger.debug("node '%s': attempt %d failed, again in %.0f ms: %s", node, attempt, pause * 1e3, error)
            else:
                context.response_parameters.update(view.response_parameters)
                return result
            if pause:
                await asyncio.sleep(pause)
            attempt += 1

    def _pause(error: Exception, attempt: int, context: Context) -> float | None:
        """Return how long to wait before the next attempt; None when there is none."""
        code = error.code if isinstance(error, ServingGraphError) else StepFailed.code
        if code not in codes or attempt >= policy.attempts or context.cancelled:
            return None
        pause = backoff_s(attempt, first_s, most_s, jitter=policy.jitter)
        if context.deadline is not None and loop.time() + pause >= context.deadline:
            return None  # the answer would come too late
        return pause if budget.retry() else None

    return Operation(run, suspends=True)


def _is_failure(error: BaseException) -> bool:
    """Tell whether an error speaks against the node: not a caller's mistake, not one who left, not one that a limit refused."""
    if isinstance(error, LimitExceeded):
        return not error.uncalled
    if isinstance(error, ServingGraphError):
        return error.code not in _CALLERS_FAULT
    return isinstance(error, Exception)


def _is_late(context: Context, now: float) -> bool:
    """Tell whether a call that was cancelled had used up its time: then the node was too slow, and no caller left."""
    return context.deadline is not None and now >= context.deadline - _EARLY_S


def _why(error: BaseException) -> str:
    return "it took too long" if isinstance(error, asyncio.CancelledError) else str(error)
