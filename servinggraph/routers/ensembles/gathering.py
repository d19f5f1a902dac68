"""Waits for the members of an ensemble, as long as that can change something, and says who answered."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Collection, Sequence
from functools import partial
from typing import Any

from servinggraph.concurrency import cancel_all, run_all, started
from servinggraph.context import Context
from servinggraph.errors import InvalidRequest, Unavailable

__all__ = ["Gathering"]


class Gathering:
    """Waits for members.

    Args:
        names: the members.
        quorum: how many must answer.
        hedged: True to go on as soon as the quorum has answered.
        may_fail: members whose failure is not the request's.
        may_be_late: members that are not waited for once the quorum has answered, where that is asked for.
    """

    def __init__(
        self, names: Sequence[str], quorum: int, *, hedged: bool, may_fail: Collection[str], may_be_late: Collection[str]
    ) -> None:
        self._names = tuple(names)
        self._quorum = quorum
        self._spare = [name in may_fail for name in names]
        self._late = [hedged and name in may_be_late for name in names]
        self._all_must_answer = not any(self._spare) and not any(self._late)
        self._leaving: set[asyncio.Future[Any]] = set()

    async def answers(self, calls: Sequence[Awaitable[Any]], context: Context) -> dict[str, Any]:
        """Return what members gave, by name, in the order of the members.

        Args:
            calls: one for each member.
            context: the request's context; it holds the request's slot while a member that was let go runs on.

        Raises:
            Unavailable: fewer than the quorum answered.
            ServingGraphError: a member failed that may not.
        """
        if self._all_must_answer:
            try:
                return dict(zip(self._names, await run_all(calls), strict=True))
            finally:
                del calls  # one of them has the error, which holds this frame by its traceback
        futures = started(calls)
        try:
            pending: set[asyncio.Future[Any]] = {future for future in futures if not future.done()}
            while not self._decided(futures):
                _, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
        except BaseException:
            await cancel_all(futures)
            raise
        late = [future for future in futures if not future.done()]
        for future in late:
            self._let_go(future, context)
        answers: dict[str, Any] = {}
        failures: dict[str, BaseException] = {}
        fatal: BaseException | None = None
        for name, future, spare in zip(self._names, futures, self._spare, strict=True):
            if future in late:
                continue
            error = asyncio.CancelledError() if future.cancelled() else future.exception()
            if error is None:
                answers[name] = future.result()
            else:
                failures[name] = error  # of all of them: one that nobody looked at would be reported
                fatal = fatal or (None if spare else error)
        if fatal is not None:
            raise fatal
        if failures and context.runs_again:
            for error in failures.values():
                if not (getattr(error, "retryable", False) or getattr(error, "of_batch", False)):
                    raise error  # one request's row may be to blame: run by itself, the others keep this member
        if len(answers) < self._quorum:
            raise self._too_few(len(answers), failures)
        return answers

    async def end(self) -> None:
        """Wait for the members that were let go and have not ended yet."""
        if self._leaving:
            await asyncio.wait(set(self._leaving))

    def _decided(self, futures: Sequence[asyncio.Future[Any]]) -> bool:
        """Tell whether waiting longer changes nothing."""
        answered = pending = 0
        needed = False
        for future, spare, late in zip(futures, self._spare, self._late, strict=True):
            if not future.done():
                pending += 1
                needed = needed or not late
            elif not future.cancelled() and future.exception() is None:
                answered += 1
            elif not spare:
                return True
        if answered >= self._quorum:
            return not needed
        return answered + pending < self._quorum

    def _too_few(self, answered: int, failures: dict[str, BaseException]) -> BaseException:
        first = next(iter(failures.values()))
        if all(isinstance(error, InvalidRequest) for error in failures.values()):
            return first  # the caller's mistake, which no retry mends
        texts = "; ".join(f"{name}: {error}" for name, error in failures.items())
        text = f"only {answered} of {len(self._names)} members answered, quorum is {self._quorum} ({texts})"
        error = Unavailable(text)
        error.__cause__ = first
        return error

    def _let_go(self, future: asyncio.Future[Any], context: Context) -> None:
        """Cancel a member and do not wait: what it holds is freed when it has really ended, the request's slot included."""
        context.begin_work()
        self._leaving.add(future)
        future.add_done_callback(partial(self._left, context))
        future.cancel()

    def _left(self, context: Context, future: asyncio.Future[Any]) -> None:
        self._leaving.discard(future)
        if not future.cancelled():
            future.exception()  # looked at: its answer came too late to matter
        context.end_work()
