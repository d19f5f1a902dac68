"""One case on the manual clock: its callers, who wait, leave or run out of time, and what must be true at the end.

A case has `graph(release)`, `callers`, `hangs`, and `works_behind`: True when work goes on behind an answer, and ends
with the graph.
"""

from __future__ import annotations

import asyncio
import gc
import threading
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

import numpy as np

from servinggraph.context import Context
from servinggraph.executor import Executor
from servinggraph.lifecycle import Admission
from servinggraph.lifecycle.control import Control
from servinggraph.testing import ManualClock

_STUCK_S = 20.0


@dataclass
class Caller:
    """Who calls when, with what, and when it loses patience (milliseconds after its start)."""

    number: int
    rows: list[int]
    starts_at: int
    deadline_ms: int | None
    cancel_ms: int | None
    priority: int


@dataclass
class Release:
    """Lets threads go that hang; set when the callers are done."""

    event: threading.Event = field(default_factory=threading.Event)


class Run:
    """One case on the manual clock."""

    def __init__(self, case: Any) -> None:
        self.case = case
        self.clock = ManualClock()
        self.release = Release()
        self.unhandled: list[Any] = []
        self.admission = Admission(1000)
        self.contexts: dict[int, Context] = {}
        self.outcomes: dict[int, Any] = {}

    def start(self) -> None:
        self.clock.run(self._all())
        gc.collect(1)

    async def _all(self) -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, what: self.unhandled.append(what))
        plan = self.case.graph(self.release).compile()
        executor = Executor(plan, Control().seats_of(plan))
        await executor.start()
        tasks = {caller.number: asyncio.ensure_future(self._caller(executor, caller)) for caller in self.case.callers}
        try:
            await self.clock.advance(0.1)
            await self._until(lambda: all(task.done() for task in tasks.values()) or self.case.hangs, "a caller waits")
        finally:
            self.release.event.set()
        await self._until(lambda: all(task.done() for task in tasks.values()), "a caller waits")
        for number, task in tasks.items():
            self.outcomes[number] = task.exception() if not task.cancelled() and task.exception() else task
        await self._until(lambda: self.admission.in_flight == 0, "a slot is not given back")
        for batcher in executor.batchers.values():
            await self._until(lambda batcher=batcher: batcher.queued == batcher.running == 0, "a batcher is not empty")
        if not self.case.works_behind:
            left = asyncio.all_tasks() - {asyncio.current_task()}
            assert not left, left
        await executor.stop()
        await self.clock.settle()
        left = asyncio.all_tasks() - {asyncio.current_task()}
        assert not left, left

    async def _until(self, condition: Any, otherwise: str) -> None:
        end = monotonic() + _STUCK_S
        while not condition():
            assert monotonic() < end, otherwise
            await self.clock.advance(0.005)

    async def _caller(self, executor: Executor, caller: Any) -> Any:
        await asyncio.sleep(caller.starts_at / 1e3)
        request = asyncio.ensure_future(self._request(executor, caller))
        if caller.cancel_ms is not None:
            await asyncio.wait([request], timeout=caller.cancel_ms / 1e3)
            request.cancel()
        return await request

    async def _request(self, executor: Executor, caller: Any) -> Any:
        deadline = None if caller.deadline_ms is None else self.clock.time() + caller.deadline_ms / 1e3
        context = self.contexts[caller.number] = Context(
            str(caller.number), deadline=deadline, priority=caller.priority, parameters={"n": caller.number}
        )
        rows = np.array(caller.rows, float)
        self.admission.enter()
        try:
            return await executor.run({"x": np.stack([np.full(len(rows), float(caller.number)), rows], axis=1)}, context)
        finally:
            context.when_idle(self.admission.leave)
