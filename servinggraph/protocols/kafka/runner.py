"""Runs records through the graph: many at once, in the order of their lanes, with retries that hold up nobody else."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Final

from servinggraph.errors import DeadlineExceeded, ServingGraphError
from servinggraph.guards import backoff_s
from servinggraph.kafka import KafkaOptions, headers as names
from servinggraph.protocols.kafka.addressing import Addressing
from servinggraph.protocols.kafka.exchange import Exchange
from servinggraph.protocols.kafka.records import Outgoing, Record, Work
from servinggraph.protocols.kafka.replies import ReplyTopics
from servinggraph.protocols.kafka.report import Counts
from servinggraph.protocols.kafka.status import Outcome, outcome_of

__all__ = ["Runner"]

Deliver = Callable[[Work, Outgoing], Awaitable[None]]

_WHOLE: Final = ""
"""The only lane of a partition whose order is kept as a whole."""


class Runner:
    """Runs at most `max_in_flight` records at a time.

    A record that is tried again keeps its lane, so that its key's order holds, and leaves its place:
    others run meanwhile.

    Args:
        exchange: answers a record.
        addressing: says what is written because of it.
        reply_topics: knows those that are there.
        options: the `kafka:` block.
        counts: what is counted.
        deliver: takes what is to be written; a record's lane is free once this has returned.
        fail: called with a failure that ends the session.
    """

    def __init__(
        self,
        exchange: Exchange,
        addressing: Addressing,
        reply_topics: ReplyTopics,
        options: KafkaOptions,
        counts: Counts,
        deliver: Deliver,
        fail: Callable[[BaseException], None],
    ) -> None:
        self._exchange = exchange
        self._addressing = addressing
        self._reply_topics = reply_topics
        self._options = options
        self._counts = counts
        self._deliver = deliver
        self._fail = fail
        self._loop = asyncio.get_running_loop()
        self._ready: deque[Work] = deque()
        self._running: set[asyncio.Task[None]] = set()
        self._pausing: set[Work] = set()
        self._leaving = False
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def running(self) -> int:
        """How many records run now."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """How many records are ready to run, or pause between two attempts."""
        return len(self._ready) + len(self._pausing)

    def take(self, work: Work) -> None:
        """Take a record that was read."""
        work.lane = self._lane_of(work.record)
        if work.lane is None or work.partition.lanes.enter(work.lane, work):
            self._ready.append(work)

    def _lane_of(self, record: Record) -> bytes | str | None:
        order = self._options.order
        if order == "key":
            return record.key
        return _WHOLE if order == "partition" else None

    def go(self) -> None:
        """Begin as many records as may run."""
        ready, running = self._ready, self._running
        most = self._options.max_in_flight
        while ready and len(running) < most:
            work = ready.popleft()
            if not work.partition.owned:
                continue
            task = self._loop.create_task(self._run(work))
            work.cancel = task.cancel
            running.add(task)
            task.add_done_callback(self._ended)
        self._note_idle()

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._fail(error)
        self.go()

    def _note_idle(self) -> None:
        if self._running or self._ready or self._pausing:
            self._idle.clear()
        else:
            self._idle.set()

    async def _run(self, work: Work) -> None:
        work.attempts += 1
        try:
            if work.verdict is not None:
                work.no_reply = work.verdict.no_reply
                raise work.verdict.error
            await self._check_reply(work)
            answer = await self._exchange.answer(work)
            outgoing = self._addressing.answer(work, answer)
        except ServingGraphError as error:
            if self._again(work, error):
                return
            self._exchange.given_up(work, error)
            outgoing = self._addressing.failure(work, error)
        work.cancel = None
        if not work.partition.owned:
            return
        await self._deliver(work, outgoing)
        self._leave_lane(work)

    async def _check_reply(self, work: Work) -> None:
        """Find out before a record is run whether its answer has somewhere to go.

        Raises:
            InvalidRequest: it has not.
            Unavailable: the brokers do not say.
        """
        work.no_reply = False
        topic = self._addressing.checked(work)
        if names.REPLY_TOPIC in work.headers:
            try:
                await self._reply_topics.check(topic, work)
            except ServingGraphError:
                work.no_reply = True
                raise

    def _leave_lane(self, work: Work) -> None:
        if work.lane is None or not work.partition.owned:
            return
        following = work.partition.lanes.leave(work.lane)
        if following is not None:
            self._ready.append(following)

    def _again(self, work: Work, error: ServingGraphError) -> bool:
        """Have a record tried again after a pause, if that may help."""
        if outcome_of(error) is Outcome.GIVE_UP or work.attempts >= self._options.retry.attempts:
            return False
        if isinstance(error, DeadlineExceeded) and self._exchange.expired(work):
            return False
        if self._leaving:
            return True  # not tried again here: it is read again by whoever gets its partition
        retry = self._options.retry
        pause = backoff_s(work.attempts, retry.first_ms / 1e3, retry.most_ms / 1e3, jitter=True)
        handle = self._loop.call_later(pause, self._resume, work)
        work.cancel = handle.cancel
        self._pausing.add(work)
        self._counts.retries += 1
        return True

    def _resume(self, work: Work) -> None:
        self._pausing.discard(work)
        # In front: the records of its key behind it wait for it already.
        self._ready.appendleft(work)
        self.go()

    async def drain(self, until: float, *, waiting: bool) -> bool:
        """Let what runs end until a moment on the loop's clock; True when all of it did.

        Args:
            until: the moment.
            waiting: True to run what has not begun, too; False to forget it: it is read again by whoever
                gets its partition.
        """
        if not waiting:
            self._forget_waiting()
        self._leaving = not waiting
        self._note_idle()
        try:
            async with asyncio.timeout_at(until):
                await self._idle.wait()
        except TimeoutError:
            return False
        finally:
            self._leaving = False
        return True

    async def abandon(self) -> None:
        """Stop everything at once; what is not done is read again by whoever gets its partition."""
        self._forget_waiting()
        running = list(self._running)
        for task in running:
            task.cancel()
        if running:
            await asyncio.wait(running)
        self._note_idle()

    def _forget_waiting(self) -> None:
        self._ready.clear()
        for work in self._pausing:
            if work.cancel is not None:
                work.cancel()
        self._pausing.clear()
