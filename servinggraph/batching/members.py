"""What a batch is made of: waiting requests, the context they share, and what happens when they leave."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Hashable, Mapping
from typing import Any, Final

from servinggraph.context import Context
from servinggraph.errors import StepFailed
from servinggraph.sequence import Turn
from servinggraph.statistics import NodeStatistics
from servinggraph.tensors import Array
from servinggraph.tracing import NODE_STAMPS, Batch

__all__ = ["Departures", "SharedContext", "Stamps", "Waiter", "awaited", "count_answers", "end_work"]

Stamps = tuple[int, int, int]
"""Since when there was room for a batch, when it began to be joined, and when its run began, by `perf_counter_ns`."""


_SHOWN: Final = 8
"""Requests of a batch that the log names."""


class Waiter:
    """One request, or one piece of a large one, on its way through a batch.

    Attributes:
        first_row: of a piece, where it begins in its request.
        whole: False for a piece.
        counts: False for all but the first piece of a request, and for one that runs again.
        arrived: when it came, by `perf_counter_ns`.
    """

    __slots__ = (
        "arrived", "context", "counts", "deadline", "first_row", "key", "priority", "result", "rows", "value", "whole",
    )  # fmt: skip

    def __init__(
        self,
        value: Mapping[str, Array],
        rows: int,
        key: Hashable,
        context: Context,
        result: asyncio.Future[Any],
        arrived: int,
        first_row: int = 0,
        whole: bool = True,
    ) -> None:
        self.value = value
        self.rows = rows
        self.key = key
        self.context = context
        self.priority = context.priority
        self.deadline = context.deadline
        self.result = result
        self.arrived = arrived
        self.first_row = first_row
        self.whole = whole
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


def count_answers(
    statistics: NodeStatistics, answered: list[Waiter], size: int, stamps: Stamps, ends: tuple[int, int], node: str
) -> None:
    """Count a batch that was executed, and the members that have their answer.

    Args:
        statistics: the node's counters.
        answered: those members.
        size: rows that were executed, padding included.
        stamps: when there was room, and when joining and running began, by `perf_counter_ns`.
        ends: when running and splitting ended.
        node: the node's name, for traces.
    """
    free, began, ran = stamps
    ended, split = ends
    batch = statistics.batch(size)
    batch.count += 1
    batch.infer_ns += ended - ran
    if ran != began or split != ended:
        batch.input_ns += ran - began
        batch.output_ns += split - ended
        statistics.input_ns += len(answered) * (ran - began)
        statistics.output_ns += len(answered) * (split - ended)
    busy = split - began
    statistics.busy_ns += len(answered) * busy
    statistics.last_ns = split
    arrivals = [waiter.arrived for waiter in answered]
    statistics.queue_ns += len(arrivals) * began - sum(arrivals)
    traced: Batch | None = None
    for waiter in answered:
        statistics.rows += waiter.rows
        if waiter.whole:
            statistics.success += 1
        else:
            statistics.piece_ns -= began - waiter.arrived + busy
        if waiter.context.trace is not None:
            traced = traced or Batch(size, len(answered))
            moments = (waiter.arrived, waiter.arrived, began, ran, *ends, split)
            waiter.context.trace.node(node, zip(NODE_STAMPS, moments, strict=True), traced)
    if statistics.durations is not None:
        statistics.durations.add_batch(arrivals, free, began, split)


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
        # What runs inside is traced for the first member that is.
        self.trace = next((waiter.context.trace for waiter in batch if waiter.context.trace is not None), None)
        # What a run counts, it counts once, however many members it has.
        self.meter = next((waiter.context.meter for waiter in batch if waiter.context.meter is not None), None)
        self._batch = batch

    @property
    def sequence(self) -> Turn | None:
        if turns := self.sequences:
            raise StepFailed(f"a batch has no sequence of its own: `context.sequences` has those of its {len(turns)} requests")
        return None

    @property
    def sequences(self) -> tuple[Turn, ...]:
        return tuple(turn for waiter in self._batch for turn in waiter.context.sequences)

    @property
    def label(self) -> str:
        labels = [waiter.context.label for waiter in self._batch[:_SHOWN]]
        more = len(self._batch) - len(labels)
        return ",".join(labels) + (f" and {more} more" if more else "")

    @property
    def cancelled(self) -> bool:
        return all(waiter.gone for waiter in self._batch)

    @property
    def shadow(self) -> bool:
        return all(waiter.context.shadow for waiter in self._batch)


async def awaited(awaitable: Awaitable[Any]) -> Any:
    """Await as a task of its own may: without ending the event loop."""
    try:
        return await awaitable
    except SystemExit as error:  # a task would let it through to the event loop, which then ends
        raise StepFailed.because_of(error) from error
