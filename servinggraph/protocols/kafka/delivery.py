"""What came of records is written, and their offsets are committed: at least once, or at most once.

`transactions` has exactly once. All three have the same doors (`Delivery`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka.errors import (
    CommitFailedError,
    IllegalStateError,
    KafkaError,
    RequestTimedOutError,
    UnknownTopicOrPartitionError,
)

from servinggraph.kafka import KafkaOptions
from servinggraph.protocols.kafka.budget import Budget
from servinggraph.protocols.kafka.clients import Clients, answers, closed, partitions_of
from servinggraph.protocols.kafka.recent import Recent
from servinggraph.protocols.kafka.records import Outgoing, Partition, Place, Work
from servinggraph.protocols.kafka.report import Counts

__all__ = ["AtLeastOnce", "AtMostOnce", "Delivery", "NotWritten", "cause_of"]

logger = logging.getLogger("servinggraph.kafka")

_CLOSE_S: Final = 5.0
_KEEP_S: Final = 2.0
_ANSWER_S: Final = 2.0


class NotWritten(Exception):
    """The broker did not take a record; the cause says why.

    Attributes:
        work: the record that it was written for.
        outgoing: what was to be written.
    """

    def __init__(self, work: Work, outgoing: Outgoing, cause: BaseException) -> None:
        kind = "dead letter" if outgoing.dead else "error" if outgoing.error else "answer"
        text = str(cause) or type(cause).__name__
        super().__init__(f"the {kind} to {work.place} was not written to topic '{outgoing.topic}': {text}")
        self.work, self.outgoing = work, outgoing
        self.__cause__ = cause


async def cause_of(error: BaseException, producer: AIOKafkaProducer, topic: str) -> BaseException:
    """Return why a topic did not take a record: for want of an answer aiokafka says that there is no such topic."""
    if isinstance(error, UnknownTopicOrPartitionError):
        told = await answers(producer, _ANSWER_S)
        if not told or partitions_of(producer, topic) is not None:
            silence: BaseException = RequestTimedOutError("the brokers did not answer")
            return silence
    return error


class Delivery(ABC):
    """Writes and commits during one session.

    Args:
        clients: makes producers.
        consumer: commits offsets.
        options: the `kafka:` block.
        budget: is told what is done.
        counts: what is counted.
        recent: is told which requests have their answers.
        room: called when reading may go on.
        fail: called with a failure that ends the session.
    """

    runs_waiting = False
    """True when records that were read must be run although their partition goes to another member."""

    def __init__(
        self,
        clients: Clients,
        consumer: AIOKafkaConsumer,
        options: KafkaOptions,
        budget: Budget,
        counts: Counts,
        recent: Recent,
        room: Callable[[], None],
        fail: Callable[[BaseException], None],
    ) -> None:
        self.clients, self.consumer, self.options = clients, consumer, options
        self.budget, self.counts, self.recent = budget, counts, recent
        self.room, self.fail = room, fail
        self.loop = asyncio.get_running_loop()
        self.committed_at = self.loop.time()

    @abstractmethod
    async def start(self) -> None:
        """Connect.

        Raises:
            KafkaError: the brokers cannot be reached, or refuse.
        """

    @abstractmethod
    async def assigned(self, partitions: Sequence[Partition]) -> None:
        """Make ready for partitions that this member owns from now on."""

    async def taken(self, partition: Partition, offset: int) -> bool:
        """Note that a partition's records were read up to an offset, and are about to be run; False when they may not be."""
        return True

    @abstractmethod
    async def deliver(self, work: Work, outgoing: Outgoing) -> None:
        """Take what is to be written because of a record; it may be written later, but in this order."""

    @abstractmethod
    def skip(self, work: Work) -> None:
        """Take note of a record that is done without anything to write."""

    @abstractmethod
    async def settle(self, partitions: Sequence[Partition], until: float, *, lost: bool) -> None:
        """Let go of partitions: write and commit all that is done, until a moment on the loop's clock.

        Args:
            partitions: all that this member owned.
            until: the moment.
            lost: they belong to another member already: nothing more may be written or committed.
        """

    async def keep(self, partitions: Sequence[Partition]) -> set[Place]:
        """After a failure, commit what is done, if that goes; return the records that are done behind one that is not."""
        return set()

    @abstractmethod
    async def stop(self) -> None:
        """End the producers; what they hold and cannot write in a few seconds is dropped: it is not committed."""

    @property
    def unwritten(self) -> int:
        """How many records wait for the broker to have them."""
        return 0

    def forget(self, work: Work) -> None:
        """Note that a record takes no memory any more."""
        if work.partition.owned and self.budget.give(work.size):
            self.room()

    def done(self, work: Work, outgoing: Outgoing) -> None:
        """Note that the broker has what was written because of a record."""
        counts = self.counts
        if work.id:
            (self.recent.forget if outgoing.error else self.recent.add)(work.id)
        if outgoing.error:
            counts.failed(outgoing.error, dead=outgoing.dead)
        else:
            counts.produced += 1
        counts.seconds += max(0.0, time.time() - work.record.timestamp / 1e3)
        self.forget(work)


class AtLeastOnce(Delivery):
    """Offsets are committed once the broker has everything up to them: after a crash, some is done again."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._producer: AIOKafkaProducer | None = None
        self._partitions: set[Partition] = set()
        self._since_commit = 0
        self._due = asyncio.Event()
        self._unwritten = 0
        self._written = asyncio.Event()
        self._committing: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._producer = self.clients.producer()
        await self._producer.start()
        self._committing = self.loop.create_task(self._keep_committing(), name="kafka-commit")

    async def assigned(self, partitions: Sequence[Partition]) -> None:
        self._partitions = set(partitions)

    async def deliver(self, work: Work, outgoing: Outgoing) -> None:
        assert self._producer is not None
        try:
            written = await self._producer.send(
                outgoing.topic, outgoing.value, outgoing.key, outgoing.partition, headers=outgoing.headers
            )
        except (KafkaError, AssertionError) as error:  # an assertion: no such partition
            cause = await cause_of(error, self._producer, outgoing.topic)
            raise NotWritten(work, outgoing, cause) from cause
        self._unwritten += 1
        written.add_done_callback(partial(self._acknowledged, work, outgoing))

    def _acknowledged(self, work: Work, outgoing: Outgoing, written: asyncio.Future[Any]) -> None:
        self._unwritten -= 1
        if not self._unwritten:
            self._written.set()
        if written.cancelled():
            return
        error = written.exception()
        if error is not None:
            self.fail(NotWritten(work, outgoing, error))
            return
        self.finish(work)
        self.done(work, outgoing)

    def skip(self, work: Work) -> None:
        self.finish(work)
        self.forget(work)

    def finish(self, work: Work) -> None:
        """Note that a record is done, and may be committed once all before it are."""
        if work.partition.offsets.finish(work.record.offset):
            self._since_commit += 1
            if self._since_commit >= self.options.commit.records:
                self._due.set()

    async def _keep_committing(self) -> None:
        interval = self.options.commit.interval_ms / 1e3
        while True:
            try:
                await asyncio.wait_for(self._due.wait(), interval)
            except TimeoutError:
                pass
            self._due.clear()
            try:
                await self.commit(self._partitions)
            except (CommitFailedError, IllegalStateError):
                pass  # the partitions are being given out anew: `settle` is next
            except Exception as error:
                self.fail(error)
                return

    async def commit(self, partitions: Sequence[Partition] | set[Partition]) -> None:
        """Commit what is done of partitions.

        Raises:
            CommitFailedError: they belong to another member by now.
            KafkaError: the broker refuses.
        """
        positions = {partition: position for partition in partitions if (position := partition.offsets.to_commit) is not None}
        self._since_commit = 0
        if positions:
            await self.consumer.commit({partition.place: position for partition, position in positions.items()})
            for partition, position in positions.items():
                partition.offsets.committed = position
            self.counts.commits += 1
        self.committed_at = self.loop.time()

    async def settle(self, partitions: Sequence[Partition], until: float, *, lost: bool) -> None:
        self._partitions = set()
        if not lost:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(until):
                    await self._all_written()
            try:
                await asyncio.wait_for(self.commit(partitions), max(1.0, until - self.loop.time()))
            except (TimeoutError, KafkaError) as error:
                reason = str(error) or type(error).__name__
                logger.warning("offsets were not committed before partitions went to another member: %s", reason)

    async def _all_written(self) -> None:
        while self._unwritten:
            self._written.clear()
            await self._written.wait()

    async def keep(self, partitions: Sequence[Partition]) -> set[Place]:
        with contextlib.suppress(TimeoutError, KafkaError, IllegalStateError):
            async with asyncio.timeout(_KEEP_S):
                await self._all_written()
                await self.commit(partitions)
        return {
            Place(partition.place.topic, partition.place.partition, offset)
            for partition in partitions
            for offset in partition.offsets.beyond
        }

    async def stop(self) -> None:
        if self._committing is not None:
            self._committing.cancel()
            await asyncio.wait({self._committing})
        if self._producer is not None:
            await closed(self._producer, _CLOSE_S)

    @property
    def unwritten(self) -> int:
        return self._unwritten


class AtMostOnce(AtLeastOnce):
    """Offsets are committed before their records are run: after a crash, some are lost and none is done again."""

    runs_waiting = True

    async def taken(self, partition: Partition, offset: int) -> bool:
        try:
            await self.consumer.commit({partition.place: offset + 1})
        except (CommitFailedError, IllegalStateError):
            return False  # the partition goes to another member, which reads them
        self.counts.commits += 1
        self.committed_at = self.loop.time()
        return True

    def finish(self, work: Work) -> None:
        work.partition.offsets.finish(work.record.offset)

    async def commit(self, partitions: Sequence[Partition] | set[Partition]) -> None:
        return
