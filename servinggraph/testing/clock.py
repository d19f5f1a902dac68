"""A clock that moves only when a test says so, and the event loop that believes it."""

from __future__ import annotations

import asyncio
import heapq
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

__all__ = ["ManualClock"]

ResultT = TypeVar("ResultT")

_STUCK_S = 20.0
_TURNS = 20


class ManualClock:
    """Runs coroutines on an event loop whose time stands still between calls of `advance`.

    Deadlines, time-outs and batch delays of servinggraph all read the loop's clock, so a
    test of them needs no sleep and no tolerance::

        clock = ManualClock()

        async def check():
            waiting = asyncio.ensure_future(server.infer(x=x))
            await clock.advance(0.010)
            assert waiting.done()

        clock.run(check())
    """

    def __init__(self, start: float = 1000.0) -> None:
        self._now = start
        self._moments: list[float] = []

    def time(self) -> float:
        """Return the time, in seconds."""
        return self._now

    async def advance(self, seconds: float) -> None:
        """Move the clock, stopping at every timer on the way until what it set off has come to rest."""
        end = self._now + seconds
        await self.settle()
        while self._moments and self._moments[0] <= end:
            self._now = max(self._now, heapq.heappop(self._moments))
            await self.settle()
        self._now = end
        await self.settle()

    async def settle(self) -> None:
        """Let the loop run what is ready, time standing still."""
        for _ in range(_TURNS):
            await asyncio.sleep(0)

    def run(self, main: Coroutine[Any, Any, ResultT]) -> ResultT:
        """Run a coroutine to its end on a loop of this clock."""
        with asyncio.Runner(loop_factory=lambda: _Loop(self)) as runner:
            return runner.run(main)

    def note(self, moment: float) -> None:
        """Remember when a timer is due; called by the loop."""
        heapq.heappush(self._moments, moment)


class _Loop(asyncio.SelectorEventLoop):
    def __init__(self, clock: ManualClock) -> None:
        self._manual = clock
        super().__init__(_PatientSelector())

    def time(self) -> float:
        return self._manual.time()

    def call_at(self, when: float, callback: Any, *args: Any, context: Any = None) -> asyncio.TimerHandle:  # type: ignore[override]  # any callback
        self._manual.note(when)
        return super().call_at(when, callback, *args, context=context)


class _PatientSelector(selectors.DefaultSelector):
    """Waits for I/O, worker threads included, however near the next timer seems to be."""

    def select(self, timeout: float | None = None) -> Any:
        if timeout is not None and timeout <= 0:
            return super().select(0)
        events = super().select(_STUCK_S)
        if not events:
            raise RuntimeError(f"nothing happened for {_STUCK_S:g} s while the manual clock stood still: advance it")
        return events
