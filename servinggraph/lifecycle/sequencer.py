"""Runs the requests of a graph with sequences, each when its turn has come.

The decisions are `SequenceTable`'s. A turn lasts until the request's work has really ended,
so that no two requests of a sequence are ever in a graph together; different sequences run
side by side, and may meet in a batch.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from functools import partial
from typing import Any, Final

from servinggraph.context import Context, ParameterValue
from servinggraph.errors import InvalidRequest
from servinggraph.interfaces import Handler, SequencePolicy
from servinggraph.lifecycle.sequences import Place, SequenceTable, Verdict
from servinggraph.plan import Plan

__all__ = ["Sequencer", "place_of"]

_MAX_ID_BYTES: Final = 128

_NEARLY_S: Final = 0.05
"""A gRPC call whose time is up is cancelled by its caller's clock, which may be a little ahead of ours."""


class Sequencer:
    """Keeps the sequences of one graph. Made on the running event loop.

    Args:
        plan: the graph.
        policy: its limits for sequences.
        run: runs one request through the graph.
        stream: the same for any number of answers.
    """

    def __init__(
        self, plan: Plan, policy: SequencePolicy, run: Handler, stream: Callable[[Any, Context], AsyncGenerator[Any, None]]
    ) -> None:
        self._graph = plan.name
        self._timeout_s = plan.timeout_s
        self._run = run
        self._stream = stream
        self._table = SequenceTable(plan.name, policy)
        self._waiters: dict[Place, asyncio.Future[None]] = {}
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._none_left: asyncio.Event | None = None

    def __len__(self) -> int:
        """Number of sequences, those that wait for a place included."""
        return len(self._table)

    async def run(self, value: Any, context: Context) -> Any:
        """Run one request once those of its sequence that arrived before it have ended.

        Args:
            value: the request's tensors.
            context: its identity and limits; its parameters say which sequence it belongs to.

        Raises:
            InvalidRequest: no sequence is named, or none that there is.
            LimitExceeded: too many sequences, or requests of this one, wait.
            Cancelled: another request of the sequence was cancelled.
            DeadlineExceeded: its time was up before its turn came.
            Unavailable: the same in the backlog, for all of the sequence; or the server is stopping.
            ServingGraphError: what the graph raises.
        """
        place = place_of(context.parameters, self._graph)
        inside = await self._enter(place, context)
        try:
            result = await self._run(value, inside)
        except BaseException as error:
            self._leave(place, inside, error)
            raise
        self._leave(place, inside, None)
        _echo(place, context)
        return result

    async def stream(self, value: Any, context: Context) -> AsyncGenerator[Any, None]:
        """Run one request that may have any number of answers; see `run`. Its turn ends with the last one.

        A reader that closes this before has given up the request, and so the sequence.
        """
        place = place_of(context.parameters, self._graph)
        inside = await self._enter(place, context)
        _echo(place, context)
        try:
            async with aclosing(self._stream(value, inside)) as answers:
                async for answer in answers:
                    yield answer
        except BaseException as error:
            self._leave(place, inside, error)
            raise
        self._leave(place, inside, None)

    async def end(self) -> None:
        """Let no sequence start any more, and return once none is under way."""
        self._none_left = asyncio.Event()
        self._settle(self._table.refuse_new())
        await self._none_left.wait()

    def close(self) -> None:
        """Refuse what waits and drop every state."""
        self._settle(self._table.close())
        if self._timer is not None:
            self._timer.cancel()

    async def _enter(self, place: Place, context: Context) -> Context:
        """Return the context to run with, once the request's turn has come."""
        now = self._loop.time()
        if self._timeout_s is not None and (context.deadline is None or now + self._timeout_s < context.deadline):
            context.deadline = now + self._timeout_s  # here already: the wait for the turn is part of the request's time
        for other, error in (verdicts := self._table.arrive(place, now)):
            if other is place and error is not None:
                self._settle(verdicts)
                raise error
        self._settle(verdicts)
        if place.turn is None:
            await self._turn_of(place, context.deadline)
        assert place.turn is not None
        return context.in_sequence(place.turn)

    async def _turn_of(self, place: Place, deadline: float | None) -> None:
        waiter = self._waiters[place] = self._loop.create_future()
        timer = None if deadline is None else self._loop.call_at(deadline, self._expire, place)
        try:
            await waiter
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled():
                waiter.exception()  # looked at: it came too late
            now = self._loop.time()
            self._settle(self._table.expire(place, now) if self._is_late(deadline) else self._table.cancel(place, now))
            self._settle(self._table.finish(place, now, failed=True))  # where its turn came meanwhile
            raise
        finally:
            del self._waiters[place]
            if timer is not None:
                timer.cancel()

    def _leave(self, place: Place, inside: Context, error: BaseException | None) -> None:
        if isinstance(error, asyncio.CancelledError | GeneratorExit) and not self._is_late(inside.deadline):
            self._settle(self._table.cancel(place, self._loop.time()))
        inside.when_idle(partial(self._finish, place, failed=error is not None))

    def _is_late(self, deadline: float | None) -> bool:
        """Tell whether a request that is cancelled is so because its time is up, and not because its caller gave it up."""
        return deadline is not None and self._loop.time() >= deadline - _NEARLY_S

    def _finish(self, place: Place, *, failed: bool) -> None:
        self._settle(self._table.finish(place, self._loop.time(), failed=failed))

    def _expire(self, place: Place) -> None:
        self._settle(self._table.expire(place, self._loop.time()))

    def _settle(self, verdicts: Sequence[Verdict]) -> None:
        """Tell those who wait what was decided, and plan what comes of itself."""
        for place, error in verdicts:
            waiter = self._waiters.get(place)
            if waiter is None or waiter.done():  # not yet waiting, or its caller has gone, which it will find out
                continue
            if error is None:
                waiter.set_result(None)
            else:
                waiter.set_exception(error)
        if self._timer is None and (moment := self._table.next_idle_end()) is not None:
            self._timer = self._loop.call_at(moment, self._free_idle, moment)
        if self._none_left is not None and not len(self._table):
            self._none_left.set()

    def _free_idle(self, moment: float) -> None:
        self._timer = None
        self._settle(self._table.free_idle(max(moment, self._loop.time())))  # some event loops wake up a little early


def place_of(parameters: Mapping[str, ParameterValue], graph: str) -> Place:
    """Return which sequence a request belongs to.

    Args:
        parameters: `sequence_id` is a number from 0 to 2^64-1 or a text of at most 128 bytes, 0 and
            the empty text standing for none; `sequence_start` and `sequence_end` are booleans.
        graph: the graph's name, for error texts.

    Raises:
        InvalidRequest: one of them is something else, or no sequence is named.

    Source: Triton, extension_sequence.
    """
    name = parameters.get("sequence_id", 0)
    if type(name) is int:
        if not 0 <= name < 2**64:
            raise InvalidRequest(f"parameter 'sequence_id' is a number from 0 to 2^64-1, got {name}")
    elif type(name) is not str:
        raise InvalidRequest(f"parameter 'sequence_id' is a whole number or text, got a {type(name).__name__}")
    elif len(name.encode("utf-8", "surrogatepass")) > _MAX_ID_BYTES:
        raise InvalidRequest(f"parameter 'sequence_id' is longer than {_MAX_ID_BYTES} bytes: '{name[:40]}...'")
    if not name:
        raise InvalidRequest(f"inference request to model '{graph}' must specify a non-zero or non-empty correlation ID")
    return Place(name, start=_flag(parameters, "sequence_start"), end=_flag(parameters, "sequence_end"))


def _flag(parameters: Mapping[str, ParameterValue], name: str) -> bool:
    value = parameters.get(name, False)
    if type(value) is not bool:
        raise InvalidRequest(f"parameter '{name}' is true or false, got {value!r}")
    return value


def _echo(place: Place, context: Context) -> None:
    answered = context.response_parameters
    answered["sequence_id"], answered["sequence_start"], answered["sequence_end"] = place.id, place.start, place.end
