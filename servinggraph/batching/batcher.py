"""Runs an operation on batches of rows: waits for work or a deadline, and answers every member.

The decisions are `BatchQueue`'s. All of this runs on the event loop; only what the
operation itself does may be elsewhere.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Hashable, Mapping
from functools import partial
from math import inf
from time import perf_counter_ns
from typing import Any

from servinggraph.batching.members import Departures, SharedContext, Stamps, Waiter, awaited, count_answers, end_work
from servinggraph.batching.pieces import run_in_pieces
from servinggraph.batching.queue import BatchQueue
from servinggraph.batching.rows import group_key, join, pad, rows_of_result, why_bad_errors
from servinggraph.batching.shares import expired, own_error, shares
from servinggraph.context import Context, current_context
from servinggraph.errors import InvalidRequest, LimitExceeded, ServingGraphError, StepFailed, Unavailable
from servinggraph.interfaces import BatchPolicy, Operation, RowErrors
from servinggraph.statistics import NodeStatistics, code_of, is_late
from servinggraph.tensors import Array, row_count

__all__ = ["Batcher"]

_ASIDE_S = 1.0  # how long `close` waits for copies of requests, for which nobody else waits
_LONELY = 4
"""Batches of one request in a row after which the next request is not made to wait for company."""


class Batcher:
    """Batches calls of one operation.

    Args:
        operation: takes a mapping of tensor name to array and gives one whose arrays have
            as many rows, or `RowErrors`.
        policy: sizes, delays and limits.
        name: the node, for error texts.
        admit: checks one request's value and picks its tensors before it joins a batch.
        statistics: where requests and executions are counted.
    """

    def __init__(
        self,
        operation: Operation,
        policy: BatchPolicy,
        name: str,
        admit: Callable[[Any], Any] | None = None,
        statistics: NodeStatistics | None = None,
    ) -> None:
        self._suspends = operation.suspends
        self._call = operation.call
        self._policy = policy
        self._name = name
        self._admit = admit
        self._statistics = statistics or NodeStatistics()
        self._statistics.batched = True
        self._statistics.max_rows = policy.max_rows
        self._queue: BatchQueue[Waiter] = BatchQueue(policy, self._gone)
        self._loop = asyncio.get_running_loop()
        self._running = 0
        self._instances = policy.instances
        self._max_rows = policy.max_rows
        self._wait_when_idle = policy.wait_when_idle and policy.max_delay_ms > 0
        self._pad_to = sorted(policy.pad_to) if policy.pad_to else None
        self._pump_is_due = False
        # Whether requests have come one in a turn of the loop, of late: then there is nothing to
        # wait for, and an idle node is run at once, without another turn.
        self._lone_turns = _LONELY
        self._used_this_turn = False
        # Since when there is room for a batch, by `perf_counter_ns`: what waits from then on waits for company.
        self._free = 0
        self._timer: asyncio.Handle | None = None
        self._timer_at = inf
        self._runs: dict[asyncio.Future[Any], bool] = {}  # whether only copies of requests are in it
        self._joined: set[asyncio.Task[Any]] = set()
        self._closed = False
        self._abandoned = False
        # What a waiter has in place of its result that has failed.
        self._failed_already: asyncio.Future[Any] = self._loop.create_future()
        self._failed_already.set_result(None)

    def operation(self) -> Operation:
        """Return the batched operation; same contract as the one inside."""
        return Operation(self.submit, suspends=True)

    @property
    def policy(self) -> BatchPolicy:
        """Sizes, delays and limits."""
        return self._policy

    @property
    def queued(self) -> int:
        """Requests waiting for a batch."""
        return len(self._queue)

    @property
    def running(self) -> int:
        """Batches that run now."""
        return self._running

    def submit(self, value: Any, context: Context) -> asyncio.Future[Any]:
        """Queue one request; the future gives its own rows of the result, or the error.

        Cancelling the future takes the request out of the queue, or, when its batch runs,
        drops its part of the result. The future fails with:

            InvalidRequest: the value cannot be batched.
            LimitExceeded: the queue is full.
            DeadlineExceeded: its time was up before it ran.
            Unavailable: the batcher is closed, or the request waited over `queue_timeout_ms`.
            StepFailed: the operation failed for this request.
        """
        arrived = perf_counter_ns()
        result = self._loop.create_future()
        if self._closed:
            self._statistics.failed(0, Unavailable.code.value)
            result.set_exception(own_error(Unavailable("is shutting down"), self._name))
            return result
        try:
            if self._admit is not None:
                value = self._admit(value)
            rows = row_count(value)
            key = group_key(value)
        except ServingGraphError as error:
            self._statistics.failed(perf_counter_ns() - arrived, error.code.value)
            result.set_exception(error.at(self._name))
            return result
        except Exception as error:
            self._statistics.failed(perf_counter_ns() - arrived, InvalidRequest.code.value)
            invalid = InvalidRequest(f"cannot batch this value: {error}")
            invalid.__cause__ = error
            result.set_exception(invalid.at(self._name))
            return result
        if rows > self._max_rows:
            return self._in_pieces(value, rows, key, context, arrived)
        waiter = Waiter(value, rows, key, context, result, arrived)
        if (
            self._lone_turns >= _LONELY
            and not self._wait_when_idle
            and not self._running
            and not self._used_this_turn
            and not self._queue.waiting
            and (waiter.deadline is None or waiter.deadline > self._loop.time())
        ):
            self._used_this_turn = True
            self._loop.call_soon(self._end_turn)
            self._start([waiter], arrived)
        else:
            self._put(waiter)
        try:
            return result
        finally:
            del result  # one that a step has failed by now has the error, which holds this frame by its traceback

    async def close(self) -> None:
        """Refuse what is queued and new, and wait for the batches that run; they are abandoned when this is cancelled."""
        self._closed = True
        for member in self._queue.clear():
            self._fail([member], Unavailable("is shutting down"))
        try:
            while waited := {run for run, aside in self._runs.items() if not aside} | self._joined:
                await asyncio.wait(waited)
            if self._runs:  # of copies, which were cancelled: all but those in threads end at once
                await asyncio.wait(self._runs, timeout=_ASIDE_S)
        except asyncio.CancelledError:
            self._abandoned = True
            for run in self._runs:
                run.cancel()
            raise
        finally:
            self._set_timer(None)

    def _in_pieces(
        self, value: Mapping[str, Array], rows: int, key: Hashable, context: Context, arrived: int
    ) -> asyncio.Task[dict[str, Array]]:
        """Run a request that is too large for one batch."""

        def put(piece: Mapping[str, Array], first_row: int, context: Context) -> asyncio.Future[Any]:
            result = self._loop.create_future()
            size = min(self._max_rows, rows - first_row)
            self._put(Waiter(piece, size, key, context, result, perf_counter_ns(), first_row, whole=False))
            return result

        def ended(task: asyncio.Task[Any]) -> None:
            self._joined.discard(task)
            ns = perf_counter_ns() - arrived
            error = None if task.cancelled() else task.exception()
            if task.cancelled() or error is not None:
                self._statistics.failed(ns, code_of(error, late=is_late(context.deadline, self._loop.time())))
            else:
                self._statistics.answered_in_pieces(ns)

        task = self._loop.create_task(run_in_pieces(value, rows, context, put, self._policy, self._name))
        self._joined.add(task)
        task.add_done_callback(ended)
        return task

    def _put(self, waiter: Waiter) -> None:
        if self._closed:
            self._fail([waiter], Unavailable("is shutting down"))
            return
        if self._used_this_turn:
            self._lone_turns = 0
        queue = self._queue
        if waiter.counts and queue.full:
            if self._running < self._instances:
                self._pump()  # this turn's arrivals fill the queue of an idle node: they need not wait for the turn's end
            if queue.full:
                limit = f"{self._policy.max_queue} requests wait already (limit 'batch.max_queue')"
                self._fail([waiter], LimitExceeded(f"Exceeds maximum queue size: {limit}; try again later"))
                return
        expires = queue.put(waiter, self._loop.time(), idle=self._running == 0)
        # Not run here: everything else that arrives in this turn of the loop joins the batch.
        # While all instances are busy only a time limit needs a look before a batch ends.
        if self._running < self._instances or (expires is not None and expires < self._timer_at):
            self._pump_soon()

    def _end_turn(self) -> None:
        self._used_this_turn = False

    def _pump_soon(self) -> None:
        if not self._pump_is_due:
            self._pump_is_due = True
            self._loop.call_soon(self._pump)

    def _set_timer(self, moment: float | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None if moment is None else self._loop.call_at(moment, self._time_is_up, moment)
        self._timer_at = inf if moment is None else moment

    def _time_is_up(self, moment: float) -> None:
        self._set_timer(None)
        self._look(max(moment, self._loop.time()))  # some event loops wake up a little early

    def _pump(self) -> None:
        self._pump_is_due = False
        self._look(self._loop.time())

    def _look(self, now: float) -> None:
        """Start every batch that is due, and plan the next look."""
        queue = self._queue
        for member in queue.expire(now):
            self._fail([member], expired(member, now, self._policy))
        while self._running < self._instances:
            batch = queue.take(now)
            if not batch:
                break
            self._lone_turns = self._lone_turns + 1 if len(batch) == 1 else 0
            self._start(batch, perf_counter_ns())
            if not self._suspends and queue.waiting:
                # It held the loop: answers go out, arrivals come in and time limits count before the next one.
                self._pump_soon()
                return
        if queue.waiting:
            moment = queue.next_event(busy=self._running >= self._instances)
            # A timer that is too early stays: with time limits far away nearly every one would be set in vain.
            if moment is not None and moment < self._timer_at:
                self._set_timer(moment)

    def _start(self, batch: list[Waiter], began: int) -> None:
        single = len(batch) == 1
        value: Any = batch[0].value
        rows = batch[0].rows
        context = batch[0].context
        stamps = self._free, began, began
        try:
            if not single:
                value = join([waiter.value for waiter in batch])
                rows = sum(waiter.rows for waiter in batch)
                context = SharedContext(batch, isolate=self._policy.isolate)
            if self._pad_to is not None and 0 < rows < self._pad_to[-1]:
                size = next(size for size in self._pad_to if size >= rows)
                if size > rows:
                    value, rows = pad(value, rows, size), size
            if value is not batch[0].value:
                stamps = self._free, began, perf_counter_ns()
            current_context.set(context)
            result = self._call(value, context)
            if self._suspends:
                # An operation that cannot suspend has run by now, and one that can has begun.
                self._watch(result, batch, rows, context, stamps)
                return
        except KeyboardInterrupt as error:  # not the step's: somebody stops the process
            self._fail(batch, error)
            raise
        except BaseException as error:
            self._failed(batch, error)
            return
        self._finish(batch, rows, context, stamps, result)

    def _watch(self, awaitable: Awaitable[Any], batch: list[Waiter], rows: int, context: Context, stamps: Stamps) -> None:
        """Have `_done` called when a batch under way has ended."""
        left: Callable[[asyncio.Future[Any]], None] | None = None
        if isinstance(awaitable, asyncio.Future):
            running: asyncio.Future[Any] = awaitable
        else:
            running = self._loop.create_task(awaited(awaitable))
            left = Departures(running, len(batch))
            for waiter in batch:
                waiter.result.add_done_callback(left)
        self._running += 1
        for waiter in batch:
            waiter.context.begin_work()
        # Owned so that `close` waits for it; done callbacks run also when it is cancelled.
        self._runs[running] = all(waiter.context.shadow for waiter in batch)
        running.add_done_callback(partial(self._done, batch, rows, context, stamps, left))

    def _done(
        self,
        batch: list[Waiter],
        rows: int,
        context: Context,
        stamps: Stamps,
        left: Callable[[asyncio.Future[Any]], None] | None,
        done: asyncio.Future[Any],
    ) -> None:
        del self._runs[done]
        self._running -= 1
        if left is not None:
            for waiter in batch:
                waiter.result.remove_done_callback(left)
        if context is batch[0].context:
            context.end_work()
        else:  # a thread that the batch began may run on although the batch was cancelled
            context.when_idle(partial(end_work, batch))
        if done.cancelled():
            self._failed(batch, StepFailed("the batch was cancelled"))
        elif (error := done.exception()) is not None:
            self._failed(batch, error)
        else:
            self._finish(batch, rows, context, stamps, done.result())
        self._pump()

    def _finish(self, batch: list[Waiter], rows: int, context: Context, stamps: Stamps, result: Any) -> None:
        """Hand each member its rows of a batch's result."""
        ended = self._freed()
        errors: Mapping[int, str | BaseException] = {}
        try:
            reason = None
            if isinstance(result, RowErrors):
                errors, result = result.errors, result.outputs
                reason = why_bad_errors(errors, rows)
            reason = reason or rows_of_result(result, rows)
            if reason is None and len(batch) == 1 and batch[0].rows == rows and not errors:
                if not batch[0].result.done():
                    batch[0].result.set_result(result)
                    count_answers(self._statistics, batch, rows, stamps, (ended, ended), self._name)
                else:
                    self._gone(batch[0])
                return
            parts = shares(batch, result, errors, self._name) if reason is None else []
        except Exception as error:  # a result that only looks like a mapping of arrays
            self._failed(batch, error)
            return
        if reason is not None:
            self._failed(batch, StepFailed(reason))
            return
        added = context.response_parameters if len(batch) > 1 else None
        answered: list[Waiter] = []
        for waiter, part in zip(batch, parts, strict=True):
            if waiter.result.done() or isinstance(part, ServingGraphError):
                there = not waiter.result.done()  # else its caller has gone
                self._gone(waiter, part if there else None)
                if there:
                    waiter.result.set_exception(part)
                continue
            if added:
                waiter.context.response_parameters.update(added)
            waiter.result.set_result(part)
            answered.append(waiter)
        count_answers(self._statistics, answered, rows, stamps, (ended, perf_counter_ns()), self._name)

    def _freed(self) -> int:
        """Note that a batch has ended now; return the moment."""
        now = perf_counter_ns()
        if not self._suspends or self._running == self._instances - 1:
            self._free = now
        return now

    def _gone(self, waiter: Waiter, error: BaseException | None = None) -> None:
        """Count a request that gets an error, or whose caller has left; a piece is its request's business."""
        if waiter.whole:
            code = code_of(error, late=is_late(waiter.deadline, self._loop.time()))
            self._statistics.failed(perf_counter_ns() - waiter.arrived, code)

    def _failed(self, batch: list[Waiter], error: BaseException) -> None:
        """Answer a batch whose run failed: run members again alone, or fail them all."""
        self._freed()
        if self._abandoned:
            self._fail(batch, Unavailable("is shutting down"))
        elif len(batch) > 1 and self._policy.isolate and not getattr(error, "of_batch", False):
            for waiter in batch:
                if waiter.result.done():
                    self._gone(waiter)
            self._run_alone([waiter for waiter in batch if not waiter.result.done()])
        else:
            self._fail(batch, error)

    def _run_alone(self, waiters: list[Waiter]) -> None:
        # One after the other, behind whatever runs: a failing batch must not multiply the load.
        now = self._loop.time()
        for waiter in waiters:
            waiter.key = object()  # a key of its own: it never meets another member again
            waiter.counts = False
            self._queue.put_back(waiter, now)
        self._pump_soon()

    def _fail(self, batch: list[Waiter], error: BaseException) -> None:
        for waiter in batch:
            there = not waiter.result.done()
            failure = own_error(error, self._name)
            self._gone(waiter, failure if there else None)
            if there:
                waiter.result.set_exception(failure)
                # The frames that the error holds by its traceback have the waiter: the tensors there would stay until a garbage
                # collection.
                waiter.result = self._failed_already
