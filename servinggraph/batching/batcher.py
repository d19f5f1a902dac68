"""Runs an operation on batches of rows: waits for work or a deadline, and answers every member.

The decisions are `BatchQueue`'s. All of this runs on the event loop; only what the
operation itself does may be elsewhere.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable, Mapping
from typing import Any

from servinggraph.batching.queue import BatchQueue, QueueFull
from servinggraph.batching.rows import group_key, join, pad, rows_of_result, slice_rows
from servinggraph.context import Context
from servinggraph.errors import (
    DeadlineExceeded,
    InvalidRequest,
    LimitExceeded,
    ServingGraphError,
    StepFailed,
    Unavailable,
)
from servinggraph.interfaces import BatchPolicy, Operation, RowErrors
from servinggraph.tensors import Array, row_count

__all__ = ["Batcher"]

_LONELY = 4
"""Batches of one request in a row after which the next request is not made to wait for company."""


class _Waiter:
    """One request, or one piece of a large one, on its way through a batch."""

    __slots__ = ("context", "counts", "deadline", "key", "priority", "result", "rows", "value")

    def __init__(
        self,
        value: Mapping[str, Array],
        rows: int,
        key: Hashable,
        context: Context,
        result: asyncio.Future[Any],
        *,
        counts: bool = True,
    ) -> None:
        self.value = value
        self.rows = rows
        self.key = key
        self.context = context
        self.priority = context.priority
        self.deadline = context.deadline
        self.result = result
        self.counts = counts

    @property
    def gone(self) -> bool:
        return self.result.done()


class Batcher:
    """Batches calls of one operation.

    Args:
        operation: takes a mapping of tensor name to array and gives one whose arrays have
            as many rows, or `RowErrors`.
        policy: sizes, delays and limits.
        name: the node, for error texts.
        admit: checks one request's value and picks its tensors before it joins a batch.
    """

    def __init__(
        self,
        operation: Operation,
        policy: BatchPolicy,
        name: str,
        admit: Callable[[Any], Any] | None = None,
    ) -> None:
        self._operation = operation
        self._call = operation.call
        self._policy = policy
        self._name = name
        self._admit = admit
        self._queue = BatchQueue(policy)
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
        self._timer: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._closed = False

    def operation(self) -> Operation:
        """Return the batched operation; same contract as the one inside."""
        return Operation(self.submit, suspends=True)

    @property
    def queued(self) -> int:
        """Requests waiting for a batch."""
        return len(self._queue)

    @property
    def running(self) -> int:
        """Batches that run now."""
        return self._running

    def submit(self, value: Any, context: Context) -> asyncio.Future[Any]:
        """Queue one request; the future gives its own rows of the result.

        Cancelling the future takes the request out of the queue, or, when its batch runs,
        drops its part of the result.

        Raises:
            InvalidRequest: the value cannot be batched.
            LimitExceeded: the queue is full.
            Unavailable: the batcher is closed.
        """
        if self._closed:
            raise Unavailable("is shutting down").at(self._name)
        try:
            if self._admit is not None:
                value = self._admit(value)
            rows = row_count(value)
            key = group_key(value)
        except ServingGraphError as error:
            error.at(self._name)
            raise
        except Exception as error:
            raise InvalidRequest(f"cannot batch this value: {error}").at(self._name) from error
        if rows > self._max_rows:
            return self._submit_pieces(value, rows, key, context)
        result = self._loop.create_future()
        waiter = _Waiter(value, rows, key, context, result)
        if (
            self._lone_turns >= _LONELY
            and not self._wait_when_idle
            and not self._running
            and not self._used_this_turn
            and not self._queue.waiting
        ):
            self._used_this_turn = True
            self._loop.call_soon(self._end_turn)
            self._start([waiter])
            return result
        self._put(waiter)
        return result

    async def close(self) -> None:
        """Refuse what is queued and new, and wait for the batches that run."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for member in self._queue.clear():
            assert isinstance(member, _Waiter)
            self._fail([member], Unavailable("is shutting down"))
        while self._tasks:
            await asyncio.wait(self._tasks)

    def _submit_pieces(self, value: Mapping[str, Array], rows: int, key: Hashable, context: Context) -> asyncio.Future[Any]:
        pieces: list[asyncio.Future[Any]] = []
        try:
            for start in range(0, rows, self._max_rows):
                stop = min(start + self._max_rows, rows)
                piece: asyncio.Future[Any] = self._loop.create_future()
                part = slice_rows(value, start, stop)
                self._put(_Waiter(part, stop - start, key, context, piece, counts=start == 0))
                pieces.append(piece)
        except BaseException:
            for piece in pieces:
                piece.cancel()
            raise
        task = self._loop.create_task(_joined(pieces))
        self._own(task)
        return task

    def _put(self, waiter: _Waiter) -> None:
        if self._used_this_turn:
            self._lone_turns = 0
        try:
            self._queue.put(waiter, self._loop.time(), idle=self._running == 0)
        except QueueFull:
            raise LimitExceeded(
                f"Exceeds maximum queue size: {self._policy.max_queue} requests wait already "
                "(limit 'batch.max_queue'); try again later"
            ).at(self._name) from None
        # Not run here: everything else that arrives in this turn of the loop joins the batch.
        # While all instances are busy only a time limit needs a look before a batch ends.
        if not self._pump_is_due and (
            self._running < self._instances or waiter.deadline is not None or self._policy.queue_timeout_ms is not None
        ):
            self._pump_is_due = True
            self._loop.call_soon(self._pump)

    def _end_turn(self) -> None:
        self._used_this_turn = False

    def _pump(self) -> None:
        """Start every batch that is due, and plan the next look."""
        self._pump_is_due = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        queue = self._queue
        now = self._loop.time()
        for member in queue.expire(now):
            self._refuse(member, now)
        while self._running < self._instances:
            batch = queue.take(now)
            if not batch:
                break
            self._lone_turns = self._lone_turns + 1 if len(batch) == 1 else 0
            self._start(batch)  # type: ignore[arg-type]  # only _Waiters are put
        if queue.waiting:
            moment = queue.next_event(busy=self._running >= self._instances)
            if moment is not None:
                self._timer = self._loop.call_at(moment, self._pump)

    def _refuse(self, member: Any, now: float) -> None:
        if member.deadline is not None and member.deadline <= now:
            error: ServingGraphError = DeadlineExceeded("Request timeout expired while it waited for a batch")
        else:
            limit = f"limit 'batch.queue_timeout_ms' = {self._policy.queue_timeout_ms:g}"
            error = Unavailable(f"Request timeout expired: it waited for a batch too long ({limit})")
        self._fail([member], error)

    def _start(self, batch: list[_Waiter]) -> None:
        single = len(batch) == 1
        try:
            value = batch[0].value if single else join([waiter.value for waiter in batch])
            rows = batch[0].rows if single else sum(waiter.rows for waiter in batch)
            if self._pad_to is not None and 0 < rows < self._pad_to[-1]:
                size = next(size for size in self._pad_to if size >= rows)
                if size > rows:
                    value, rows = pad(value, rows, size), size
        except Exception as error:  # out of memory, say
            self._fail(batch, error)
            return
        context = batch[0].context if single else Context(graph=batch[0].context.graph)
        if not self._operation.suspends:
            try:
                result = self._call(value, context)
            except Exception as error:
                self._failed(batch, error)
            else:
                self._finish(batch, rows, context, result)
            return
        self._running += 1
        for waiter in batch:
            waiter.context.begin_work()
        try:
            running = asyncio.ensure_future(self._call(value, context), loop=self._loop)
        except Exception as error:
            self._ended(batch)
            self._failed(batch, error)
            return
        # Owned so that `close` waits for it; done callbacks run also when it is cancelled.
        self._own(running)
        running.add_done_callback(lambda done: self._done(done, batch, rows, context))

    def _own(self, running: asyncio.Future[Any]) -> None:
        self._tasks.add(running)  # type: ignore[arg-type]  # futures and tasks are both awaited by close
        running.add_done_callback(self._tasks.discard)

    def _done(self, done: asyncio.Future[Any], batch: list[_Waiter], rows: int, context: Context) -> None:
        self._ended(batch)
        if done.cancelled():
            self._failed(batch, StepFailed("the batch was cancelled"))
        elif (error := done.exception()) is not None:
            self._failed(batch, error)
        else:
            self._finish(batch, rows, context, done.result())
        self._pump()

    def _ended(self, batch: list[_Waiter]) -> None:
        self._running -= 1
        for waiter in batch:
            waiter.context.end_work()

    def _finish(self, batch: list[_Waiter], rows: int, context: Context, result: Any) -> None:
        errors: Mapping[int, str | BaseException] = {}
        if isinstance(result, RowErrors):
            errors, result = result.errors, result.outputs
        reason = rows_of_result(result, rows)
        if reason is not None:
            self._fail(batch, StepFailed(reason))
            return
        if len(batch) == 1 and batch[0].rows == rows and not errors:
            if not batch[0].result.done():
                batch[0].result.set_result(result)
            return
        start = 0
        added = context.response_parameters if len(batch) > 1 else None
        for waiter in batch:
            stop = start + waiter.rows
            if not waiter.result.done():  # its caller may have gone
                bad = next((row for row in range(start, stop) if row in errors), None) if errors else None
                if bad is None:
                    waiter.result.set_result(slice_rows(result, start, stop))
                    if added:
                        waiter.context.response_parameters.update(added)
                else:
                    waiter.result.set_exception(self._row_error(bad - start, errors[bad]))
            start = stop

    def _row_error(self, row: int, reason: str | BaseException) -> ServingGraphError:
        if isinstance(reason, BaseException):
            return self._error(reason, f"row {row}: ")
        return StepFailed(f"row {row}: {reason}").at(self._name)

    def _error(self, error: BaseException, place: str = "") -> ServingGraphError:
        """Return a failure as an error that one caller alone may raise.

        One object raised in several tasks would collect all their tracebacks.
        """
        if isinstance(error, ServingGraphError):
            return error.copy().at(self._name)
        own = StepFailed(f"{place}{type(error).__name__}: {error}").at(self._name)
        own.__cause__ = error
        return own

    def _failed(self, batch: list[_Waiter], error: BaseException) -> None:
        """Answer a batch whose run raised: run members again alone, or fail them all."""
        if len(batch) > 1 and self._policy.isolate and not self._closed:
            for waiter in batch:
                if not waiter.result.done():
                    self._start_alone(waiter)
        else:
            self._fail(batch, error)

    def _start_alone(self, waiter: _Waiter) -> None:
        # One after the other, behind whatever runs: a failing batch must not multiply the load.
        if not self._operation.suspends:
            self._start([waiter])
            return
        waiter.key = (waiter.key, object())  # a key of its own: it never meets another member again
        waiter.counts = False
        self._queue.put(waiter, self._loop.time(), idle=True)

    def _fail(self, batch: list[_Waiter], error: BaseException) -> None:
        for waiter in batch:
            if not waiter.result.done():
                waiter.result.set_exception(self._error(error))


async def _joined(pieces: list[asyncio.Future[Any]]) -> dict[str, Array]:
    """Wait for the pieces of one request and join them; the first failure cancels the others."""
    try:
        results = [await piece for piece in pieces]
    except BaseException:
        for piece in pieces:
            piece.cancel()
            if piece.done() and not piece.cancelled():
                piece.exception()  # looked at: its failure is reported by the first one's
        raise
    return join(results)
