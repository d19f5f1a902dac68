"""Runs copies of requests on one challenger, beside the requests: bounded in number, bytes and time, and dropped when full.

Nothing here may cost a request anything: a copy begins when its request was answered, one in a
turn of the event loop; what it raises, however badly, ends here; and a challenger that holds the
event loop gets next to none of it.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
from time import perf_counter_ns
from typing import Any, Final

import numpy as np
from pydantic import Field

from servinggraph.concurrency import WorkerThreads, run_until
from servinggraph.context import Context, current_context
from servinggraph.errors import Cancelled, DeadlineExceeded, ErrorCode, ServingGraphError, StepFailed
from servinggraph.interfaces import Handler, Options
from servinggraph.routers.shadow.comparison import Comparison, Verdict
from servinggraph.routers.shadow.holding import held_bytes
from servinggraph.routers.shadow.record import Record
from servinggraph.routers.shadow.turns import turns_of

__all__ = ["Copy", "Lane", "ShadowOptions"]

logger = logging.getLogger("servinggraph.routers")

STOP_S: Final = 1.0
"""How long a copy that was cancelled may take to end before nobody waits for it any more."""

_FIRST_SHARE: Final = 0.1
"""Share of the loop for a challenger that has held it once: the machine may have been busy with something else."""

_SMALL_BYTES: Final = 65_536
"""Larger answers are compared in a thread."""

_TEXT_COST: Final = 8
"""How much longer texts and documents take to compare than numbers of as many bytes."""


class ShadowOptions(Options):
    """What challengers may take; each of them has all of it to itself."""

    timeout_ms: float = Field(
        1000, gt=0, description="Longest time that a challenger may take for a copy, and a copy may wait for it."
    )
    concurrency: int = Field(8, ge=1, description="Most copies that a challenger runs at the same time.")
    max_pending: int = Field(64, ge=0, description="Most copies that wait for it; one more is dropped.")
    max_bytes: int = Field(
        64 * 2**20,
        ge=1,
        description="Most bytes that its copies keep in memory, waiting or running: inputs and the champion's answers. More "
        "are dropped.",
    )
    max_loop_share: float = Field(
        0.002,
        gt=0,
        le=1,
        description="A challenger that holds the event loop for over 2 ms with each copy pauses so long that it has at most "
        "this share of it; copies are dropped meanwhile. What runs in a thread does not hold it. 1 lets it.",
    )


class Copy:
    """A request that was answered, for a challenger to run.

    Of its context it has what says whose request it is, not its deadline, cancellation, sequence or
    response parameters.

    Args:
        value: what reached the router, by reference.
        context: the request's.
        answer: what the champion gave, by reference.
        champion_ns: how long that took.
        handler: the challenger.
        record: where it is counted.

    Attributes:
        held: True once it has held the event loop for long; set by the lane.
        offered: when, by the event loop's clock; set by the lane.
        size: bytes that it keeps in memory; set by the lane.
    """

    __slots__ = (
        "answer", "champion_ns", "graph", "handler", "headers", "held", "id", "offered", "parameters", "priority", "record",
        "route", "size", "value", "version",
    )  # fmt: skip

    def __init__(self, value: Any, context: Context, answer: Any, champion_ns: int, handler: Handler, record: Record) -> None:
        self.value = value
        self.id, self.headers, self.parameters = context.id, context.headers, context.parameters
        self.priority, self.graph = context.priority, context.graph
        self.route, self.version = context.route, context.version
        self.answer = answer
        self.champion_ns = champion_ns
        self.handler = handler
        self.record = record
        self.held = False
        self.offered = 0.0
        self.size = 0


class ShadowContext(Context):
    """The context of a copy."""

    __slots__ = ()

    def __init__(self, of: Copy, deadline: float) -> None:
        super().__init__(
            of.id, deadline=deadline, headers=of.headers, parameters=of.parameters, priority=of.priority, graph=of.graph
        )
        self.route, self.version = of.route, of.version

    @property
    def shadow(self) -> bool:
        return True


class Lane:
    """The way of copies to one challenger.

    Args:
        name: the challenger's node, for the log.
        options: its limits.
        comparison: holds its answers against the champion's.
        threads: where answers are compared that are large, or by a function of the user's.
        counted: called whenever a copy has ended.

    Attributes:
        running: copies that run; one whose time was up as well, until what it left in a thread has ended.
        bytes: bytes that all copies keep in memory.
    """

    def __init__(
        self,
        name: str,
        options: ShadowOptions,
        comparison: Comparison,
        threads: WorkerThreads,
        counted: Callable[[], None],
    ) -> None:
        self._name = name
        self._counted = counted
        self._options = options
        self._compare = comparison
        self._threads = threads
        self._loop = asyncio.get_running_loop()
        self._timeout_s = options.timeout_ms / 1e3
        self._late = f"took longer than 'shadow.timeout_ms' = {options.timeout_ms:g}"
        self._waiting: deque[Copy] = deque()
        self._tasks: set[asyncio.Task[None]] = set()
        self.running = 0
        self.bytes = 0
        self._start_is_due = False
        self._rests_until = 0.0
        self._holding = 0  # copies in a row that held the loop
        self._reported = False
        self._closed = False

    @property
    def waiting(self) -> int:
        """Copies that wait."""
        return len(self._waiting)

    def offer(self, copy: Copy) -> None:
        """Take a copy, or drop it and count why."""
        copy.record.sampled += 1
        now = copy.offered = self._loop.time()
        self._drop_late(now)
        if self._closed:
            copy.record.drop("stopped")
        elif now < self._rests_until:
            copy.record.drop("max_loop_share")
        elif self.running + len(self._waiting) >= self._options.concurrency + self._options.max_pending:
            copy.record.drop("max_pending")
        elif self.bytes + (size := held_bytes(copy.value, copy.answer)) > self._options.max_bytes:
            copy.record.drop("max_bytes")
        else:
            copy.size = size
            self.bytes += size
            self._waiting.append(copy)
            self._start_soon()

    def let_go(self) -> None:
        """Drop what waits, cancel what runs, take nothing more."""
        self._closed = True
        while self._waiting:
            self._drop(self._waiting.popleft(), "stopped")
        for task in self._tasks:
            task.cancel()

    async def ended(self) -> None:
        """Return once what ran has ended, or will not."""
        if not self._tasks:
            return
        _, left = await asyncio.wait(self._tasks, timeout=STOP_S)
        if left:
            text = "challenger '%s': %d copies of requests go on although they were cancelled; nobody waits for them"
            logger.warning(text, self._name, len(left))

    def _start_soon(self) -> None:
        if not self._start_is_due and self.running < self._options.concurrency:
            self._start_is_due = True
            self._loop.call_soon(self._start)

    def _start(self) -> None:
        """Start one copy: one in a turn of the loop, so that the first to hold it is found out before the next."""
        self._start_is_due = False
        now = self._loop.time()
        self._drop_late(now)
        if now < self._rests_until:
            while self._waiting:
                self._drop(self._waiting.popleft(), "max_loop_share")
        if not self._waiting:
            return
        self.running += 1
        task = self._loop.create_task(self._run(self._waiting.popleft()))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        if self._waiting:
            self._start_soon()

    async def _run(self, copy: Copy) -> None:
        context = ShadowContext(copy, self._loop.time() + self._timeout_s)
        current_context.set(context)  # this task was begun by whatever copy or request made room for it
        try:
            await self._answered(copy, context)
        except asyncio.CancelledError as error:
            if self._closed:
                copy.record.drop("stopped")
            else:
                self._failed(copy, Cancelled(f"was cancelled from inside: {error}"))
        except KeyboardInterrupt:  # not the challenger's: somebody stops the process
            raise
        except BaseException as error:  # whatever a challenger raises ends here, SystemExit as well
            self._failed(copy, error)
        finally:
            if not copy.held:
                self._holding = 0
            context.abandon()
            context.answered()
            # A thread cannot be interrupted: its place is free, and its memory, when it has really ended.
            context.when_idle(partial(self._leave, copy.size))

    async def _answered(self, copy: Copy, context: ShadowContext) -> None:
        began = perf_counter_ns()
        call = partial(turns_of, copy.handler, partial(self._held, copy))
        assert context.deadline is not None
        answer = await run_until(context.deadline, self._loop, call, copy.value, context, self._late)
        took = perf_counter_ns() - began
        if self._closed:  # it caught its cancellation and went on
            raise asyncio.CancelledError
        if self._loop.time() > context.deadline:  # it held the event loop, so that nothing could interrupt it
            raise DeadlineExceeded(self._late)
        copy.record.answers(copy.champion_ns / 1e6, took / 1e6)
        try:
            verdict = await self._verdict(copy, answer, context)
        except asyncio.CancelledError:
            copy.record.cannot_compare("the server stopped" if self._closed else "the comparison was cancelled from inside")
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # the copy is counted as answered: it must not be counted as failed as well
            copy.record.cannot_compare(f"{type(error).__name__}: {error}")
        else:
            copy.record.compares(verdict, copy.id, copy.value, copy.answer, answer)

    async def _verdict(self, copy: Copy, answer: Any, context: ShadowContext) -> Verdict:
        if not self._compare.custom and _is_small(copy.answer) and _is_small(answer):
            return self._compare(copy.answer, answer)

        def compare(value: Any, _: Context) -> Verdict:
            return self._compare(*value)

        deadline = self._loop.time() + self._timeout_s
        pair = (copy.answer, answer)
        verdict: Verdict = await run_until(
            deadline, self._loop, partial(self._threads.call, compare), pair, context, self._late
        )
        return verdict

    def _failed(self, copy: Copy, error: BaseException) -> None:
        # `because_of` also gets on with an error whose own text cannot be read.
        failure = error if isinstance(error, ServingGraphError) else StepFailed.because_of(error)
        if failure.code is ErrorCode.LIMIT_EXCEEDED:
            copy.record.drop("challenger_full")
        else:
            copy.record.failed(failure.code.value, f"{failure.node}: {failure.message}" if failure.node else failure.message)

    def _held(self, copy: Copy, ns: int) -> None:
        """Let a challenger rest that has held the event loop."""
        most = self._options.max_loop_share
        if most == 1:
            return
        if not copy.held:
            copy.held = True
            self._holding += 1
        again = self._holding > 1
        share = most if again else max(most, _FIRST_SHARE)
        self._rests_until = max(self._rests_until, self._loop.time() + ns / 1e9 / share)
        if again and not self._reported:
            self._reported = True
            logger.warning(
                "challenger '%s' held the event loop for %.1f ms, and not for the first time: it gets few copies, so that it "
                "has at most %.1f %% of the loop; give it 'run: thread' or make it async (reported once)",
                self._name,
                ns / 1e6,
                most * 100,
            )

    def _drop_late(self, now: float) -> None:
        while self._waiting and now - self._waiting[0].offered >= self._timeout_s:
            self._drop(self._waiting.popleft(), "late")

    def _drop(self, copy: Copy, reason: str) -> None:
        self.bytes -= copy.size
        copy.record.drop(reason)

    def _leave(self, size: int) -> None:
        self.running -= 1
        self.bytes -= size
        self._counted()
        if self._waiting:
            self._start_soon()


def _is_small(answer: Any) -> bool:
    """Tell whether an answer is compared faster than a thread is told to."""
    total = 0
    for item in answer.values() if isinstance(answer, Mapping) else (answer,):
        is_plain = isinstance(item, np.ndarray) and item.dtype.kind not in "OUST"
        total += item.nbytes if is_plain else _TEXT_COST * held_bytes(item)
    return total <= _SMALL_BYTES
