"""One life with the brokers: from a connection, through any number of rebalances, to its end by a stop or a failure."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from aiokafka import AIOKafkaConsumer, ConsumerRebalanceListener, TopicPartition
from aiokafka.errors import CommitFailedError, IllegalStateError

from servinggraph.kafka import headers as names
from servinggraph.protocols.kafka.budget import Budget
from servinggraph.protocols.kafka.clients import closed
from servinggraph.protocols.kafka.cloudevents import ID
from servinggraph.protocols.kafka.delivery import AtLeastOnce, AtMostOnce, Delivery, NotWritten
from servinggraph.protocols.kafka.pulse import Dropped, Fenced, Pulse
from servinggraph.protocols.kafka.records import Outgoing, Partition, Record, Work
from servinggraph.protocols.kafka.replies import ReplyTopics
from servinggraph.protocols.kafka.runner import Runner
from servinggraph.protocols.kafka.transactions import ExactlyOnce

if TYPE_CHECKING:
    from servinggraph.protocols.kafka.stream import Stream

__all__ = ["Session"]

_POLL_MS: Final = 500
_MAX_POLL_INTERVAL_MS: Final = 300_000
"""aiokafka's default."""
_CHUNK: Final = 500
"""Most records that are taken at once: others of the event loop's work goes between."""
_CLOSE_S: Final = 5.0
_LAST_S: Final = 1.0
"""Time to write and commit what ended at the last moment."""
_BEGIN_S: Final = 5.0
_SMOOTHING: Final = 16
_AHEAD: Final = 65_536
"""Most records of a partition that may be done behind one that is not, before its reading pauses."""


async def _ended(task: asyncio.Future[Any]) -> None:
    """End a task; what it raised was looked at, or does not matter any more."""
    task.cancel()
    await asyncio.wait({task})
    if not task.cancelled():
        task.exception()


class Session(ConsumerRebalanceListener):  # type: ignore[misc]  # aiokafka has no types
    """Reads, runs, writes and commits.

    Args:
        stream: what it is a session of.
    """

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._options = stream.options
        self._counts = stream.counts
        self._loop = asyncio.get_running_loop()
        self._failed: asyncio.Future[None] = self._loop.create_future()
        self._room = asyncio.Event()
        self._settled = asyncio.Event()
        self._giving_up = asyncio.Lock()
        self._taking = asyncio.Lock()
        self._giving = False
        self._pulse = Pulse(self._options.input.session_timeout_ms / 1e3)
        self._usual_size = 1000.0
        longest_ms = float(self._options.input.settings.get("max_poll_interval_ms", _MAX_POLL_INTERVAL_MS))
        self._patience_s = longest_ms / 3e3
        self.connected = self.joined = self._ended = False
        self.partitions: dict[TopicPartition, Partition] = {}
        self.budget = Budget(self._options.max_waiting, self._options.max_waiting_bytes)
        self.consumer: AIOKafkaConsumer = stream.clients.consumer()
        self.delivery = self._make_delivery()
        self._reply_topics = ReplyTopics(self.consumer)
        answering = stream.exchange, stream.addressing, self._reply_topics
        self.runner = Runner(*answering, self._options, self._counts, self._deliver, self._fail)

    def _make_delivery(self) -> Delivery:
        kinds: Mapping[str, Any] = {"at_least_once": AtLeastOnce, "at_most_once": AtMostOnce, "exactly_once": ExactlyOnce}
        kind = kinds[self._options.delivery]
        counted = self._options, self.budget, self._counts, self._stream.recent
        made: Delivery = kind(self._stream.clients, self.consumer, *counted, self._room.set, self._fail)
        return made

    async def run(self, stop: asyncio.Event) -> None:
        """Serve until told to stop.

        Raises:
            Exception: what ended the session; all that was not committed is read again.
        """
        told = asyncio.ensure_future(stop.wait())
        reading = self._loop.create_task(self._read(), name="kafka-read")
        beating = self._loop.create_task(self._pulse.run(), name="kafka-pulse")
        try:
            ends: set[asyncio.Future[Any]] = {reading, beating, told, self._failed}
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            for ended in (self._failed, beating, reading):
                if ended.done():
                    ended.result()
            # In order: read no more, let what runs end, write, commit, leave the group.
            grace_s = self._stream.stop_by - self._loop.time()
            await self._taken(grace_s)
            await _ended(reading)
            await self._give_up(self._stream.stop_by - self._loop.time())
        finally:
            self.joined = False
            for task in (told, reading, beating):
                await _ended(task)
            await self._close()

    async def _read(self) -> None:
        await self._open()
        await self._poll()

    async def _open(self) -> None:
        await self.consumer.start()
        self.connected = True
        await self.delivery.start()
        await self._stream.check_topics(self.consumer)
        self.consumer.subscribe(self._options.input.topics, listener=self)

    async def _close(self) -> None:
        for partition in self.partitions.values():
            partition.owned = False
        self._ended = True
        self._stream.recent.forget_running()
        await self.runner.abandon()
        if self._failed.done() and isinstance(self._failed.exception(), NotWritten):
            # One record was refused: that is no reason to answer others again.
            self._stream.answered |= await self.delivery.keep(list(self.partitions.values()))
        await self.delivery.stop()
        await closed(self.consumer, _CLOSE_S)
        await self.delivery.stop()  # a rebalance that was under way may have begun anew
        if not self._failed.done():
            self._failed.cancel()
        elif not self._failed.cancelled():
            self._failed.exception()

    def end(self, error: BaseException) -> None:
        """End it because of a failure; the first one counts."""
        self._fail(error)

    def _fail(self, error: BaseException) -> None:
        if not self._failed.done():
            self._failed.set_exception(error)

    async def _poll(self) -> None:
        """Read while there is room; with none, keep the membership alive."""
        consumer = self.consumer
        while True:
            if self.budget.full:
                await self._wait_for_room()
            read = await consumer.getmany(timeout_ms=_POLL_MS, max_records=self._most())
            partitions = self.partitions  # as they were given out: what is read here is of no later ones
            for place, records in read.items():
                partition = partitions.get(place)
                if partition is None:  # a rebalance is under way: they are read again once it is known where from
                    with contextlib.suppress(IllegalStateError):  # or they are another member's by now
                        consumer.seek(place, records[0].offset)
                    continue
                async with self._taking:
                    if self._giving or not await self.delivery.taken(partition, records[-1].offset) or not partition.owned:
                        continue
                    for record in records:
                        self._take(partition, record)
                if len(partition.offsets) > _AHEAD:
                    consumer.pause(place)
            self.runner.go()
            self._resume_partitions()
            if not self._settled.is_set():
                # Not for as long as it takes: aiokafka says in a poll what goes wrong meanwhile, and does nothing before.
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._settled.wait(), _POLL_MS / 1e3)

    def _most(self) -> int:
        """Return how many records may be read: as fit by their number, and by their usual size."""
        room = self.budget.max_bytes - self.budget.size
        return max(1, min(_CHUNK, self.budget.room, int(room / self._usual_size)))

    def _take(self, partition: Partition, record: Record) -> None:
        partition.offsets.begin(record.offset)
        work = Work(partition, record)
        self.budget.take(work.size)
        self._usual_size += (work.size - self._usual_size) / _SMOOTHING
        self._counts.consumed += 1
        stream = self._stream
        if stream.answered and work.place in stream.answered:
            stream.answered.discard(work.place)
            self.delivery.skip(work)
            return
        if stream.verdicts:
            work.verdict = stream.verdicts.get(work.place)
        if self._options.duplicates:
            work.id = work.headers.get(names.REQUEST_ID) or work.headers.get(ID) or b""
            if work.id and not stream.recent.begin(work.id):
                self._counts.duplicates += 1
                self.delivery.skip(work)
                return
        self.runner.take(work)

    async def _wait_for_room(self) -> None:
        """Return once there is room to read on.

        The group drops a member that does not poll. So when this takes long, partitions are paused
        and polled in vain; as seldom as can be, because aiokafka then drops what it has fetched of
        them, and in cycles, so that it takes memory until the garbage collector comes by.
        """
        began = self._loop.time()
        self._counts.pauses += 1
        while self.budget.full:
            self._room.clear()
            try:
                await asyncio.wait_for(self._room.wait(), self._patience_s)
            except TimeoutError:
                self.consumer.pause(*self.consumer.assignment())
                await self.consumer.getmany(timeout_ms=0)
        self._counts.paused_s += self._loop.time() - began
        self._resume_partitions()

    def _resume_partitions(self) -> None:
        paused = self.consumer.paused()
        if paused and not self.budget.full:
            self.consumer.resume(*(place for place in paused if self._near(place)))

    def _near(self, place: TopicPartition) -> bool:
        partition = self.partitions.get(place)
        return partition is None or len(partition.offsets) <= _AHEAD // 2

    async def _deliver(self, work: Work, outgoing: Outgoing) -> None:
        self._pulse.check()
        await self.delivery.deliver(work, outgoing)

    async def on_partitions_revoked(self, revoked: set[TopicPartition]) -> None:
        """Finish or abandon what runs, commit, and let go; called by the consumer before a rebalance.

        Raises:
            asyncio.CancelledError: this member may not join again before the next session.
        """
        # A member that the group dropped already may not write; its generation is gone.
        lost = self.joined and self.consumer._coordinator.generation < 0  # noqa: SLF001  (no public way to ask)
        self.joined = False
        self._settled.clear()
        try:
            if self.partitions:
                await self._give_up(0 if lost else self._options.input.revoke_ms / 1e3)
        except Exception as error:  # aiokafka would only log it
            self._fail(error)
        if lost and (member := self._options.input.member):
            # Two of one name take it from each other, at each heartbeat, and each answers again what the other did not commit.
            self._fail(Dropped(member))
            raise asyncio.CancelledError  # ends aiokafka's coordination, which would join at once

    async def _give_up(self, grace_s: float) -> None:
        """Let go of all partitions within a time; with none, whatever runs is abandoned."""
        async with self._giving_up:
            await self._let_go(grace_s)

    async def _taken(self, grace_s: float) -> None:
        """Take no more records, and wait for those that are being taken, which may be committed already."""
        self._giving = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, grace_s)), self._taking:
                pass

    async def _let_go(self, grace_s: float) -> None:
        until = self._loop.time() + max(0.0, grace_s)
        await self._taken(grace_s)
        partitions = list(self.partitions.values())
        keep = self.delivery.runs_waiting and grace_s > 0
        if not keep:
            for partition in partitions:
                partition.lanes.clear()
        finished = grace_s > 0 and await self.runner.drain(until, waiting=keep)
        for partition in partitions:
            partition.owned = False
        if not finished:
            self._counts.abandoned += self.runner.running
            await self.runner.abandon()
        await self.delivery.settle(partitions, until + _LAST_S, lost=grace_s <= 0)
        self._stream.recent.forget_running()
        self._stream.answered.clear()
        self._stream.verdicts.clear()
        self.partitions = {}
        self.budget.reset()
        self._room.set()
        if self.delivery.unwritten:
            self._fail(Fenced("the broker did not take all answers before the partitions went to another member"))

    async def _begin_here(self, partitions: Sequence[Partition]) -> None:
        """Commit where partitions begin of which nothing is committed.

        Else what comes before the first commit would be skipped by whoever reads next, this member after a rebalance say.
        """
        for partition in partitions:
            if await self.consumer.committed(partition.place) is None:
                position = await self.consumer.position(partition.place)
                with contextlib.suppress(CommitFailedError, IllegalStateError):  # they are being given out anew
                    await self.consumer.commit({partition.place: position})

    async def on_partitions_assigned(self, assigned: set[TopicPartition]) -> None:
        """Begin with partitions; called by the consumer after a rebalance."""
        if self._ended:
            return
        partitions = [Partition(place) for place in sorted(assigned)]
        try:
            await self.delivery.assigned(partitions)
            if self._options.input.start == "latest":
                async with asyncio.timeout(_BEGIN_S):
                    await self._begin_here(partitions)
        except Exception as error:
            self._fail(error)
            return
        self.partitions = {partition.place: partition for partition in partitions}
        self._giving = False
        self._counts.rebalances += 1
        self.joined = True
        self._settled.set()
        self._stream.began()
