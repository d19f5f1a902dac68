"""What a batch is made of: waiting requests, the context they share, and what happens when they leave."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Hashable, Mapping
from typing import Any

from servinggraph.context import Context
from servinggraph.errors import StepFailed
from servinggraph.tensors import Array

__all__ = ["Departures", "SharedContext", "Waiter", "awaited", "end_work"]


class Waiter:
    """One request, or one piece of a large one, on its way through a batch."""

    __slots__ = ("context", "counts", "deadline", "first_row", "key", "priority", "result", "rows", "value")

    def __init__(
        self,
        value: Mapping[str, Array],
        rows: int,
        key: Hashable,
        context: Context,
        result: asyncio.Future[Any],
        first_row: int = 0,
    ) -> None:
        self.value = value
        self.rows = rows
        self.key = key
        self.context = context
        self.priority = context.priority
        self.deadline = context.deadline
        self.result = result
        self.first_row = first_row  # of a piece: where it begins in its request
        self.counts = first_row == 0

    @property
    def gone(self) -> bool:
        return self.result.done()


class Departures:
    """Cancels a batch when the last of its members has gone: nobody waits for its result."""

    __slots__ = ("_members", "_running")

    def __init__(self, running: asyncio.Future[Any], members: int) -> None:
        self._running = running
        self._members = members

    def __call__(self, result: asyncio.Future[Any]) -> None:
        self._members -= 1
        if self._members == 0:
            self._running.cancel()


def end_work(batch: list[Waiter]) -> None:
    """Note for each member that the batch has ended."""
    for waiter in batch:
        waiter.context.end_work()


class SharedContext(Context):
    """The context of several members' run: worthless only when it is so for all of them."""

    __slots__ = ("_batch",)

    def __init__(self, batch: list[Waiter], *, isolate: bool) -> None:
        deadline: float | None = 0.0
        for waiter in batch:
            if waiter.deadline is None:
                deadline = None
                break
            deadline = max(deadline or 0.0, waiter.deadline)
        runs_again = isolate or any(waiter.context.runs_again for waiter in batch)
        super().__init__(graph=batch[0].context.graph, deadline=deadline, runs_again=runs_again)
        self._batch = batch

    @property
    def cancelled(self) -> bool:
        return all(waiter.gone for waiter in self._batch)


async def awaited(awaitable: Awaitable[Any]) -> Any:
    """Await as a task of its own may: without ending the event loop."""
    try:
        return await awaitable
    except SystemExit as error:  # a task would let it through to the event loop, which then ends
        raise StepFailed.because_of(error) from error
