"""Exactly once: answers and offsets are written in transactions, a producer for each input partition.

Each input partition has a transactional id of its own, made of group, topic and partition: whoever
gets the partition begins by fencing off the member that had it before, whose open transaction the
broker undoes (Kafka's way before KIP-447, which aiokafka does not have). So what a member that lost
its partitions still writes is seen by nobody who reads committed records.

A partition's answers are written in the order of its records: were one written before an earlier
one is done, a crash between would have it written again.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Sequence
from typing import Any, Final

from aiokafka import AIOKafkaProducer
from aiokafka.errors import IllegalOperation, KafkaError, ProducerFenced

from servinggraph.protocols.kafka.clients import closed
from servinggraph.protocols.kafka.delivery import Delivery, NotWritten, cause_of
from servinggraph.protocols.kafka.records import Outgoing, Partition, Result, Work

__all__ = ["ExactlyOnce"]

logger = logging.getLogger("servinggraph.kafka")

_CLOSE_S: Final = 5.0


class ExactlyOnce(Delivery):
    """Every record that was read has its answer in the output once, whatever crashes; for readers of committed records."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._writers: dict[Partition, _Writer] = {}

    async def start(self) -> None:
        return

    async def assigned(self, partitions: Sequence[Partition]) -> None:
        await self._end_writers()
        self._writers = {partition: _Writer(self, partition) for partition in partitions}
        await asyncio.gather(*(writer.start() for writer in self._writers.values()))
        for partition in partitions:
            # Asked once the member before is fenced off: until then it could commit.
            committed = await self.consumer.committed(partition.place)
            if committed is not None:
                self.consumer.seek(partition.place, committed)

    async def deliver(self, work: Work, outgoing: Outgoing) -> None:
        writer = self._writers.get(work.partition)
        if writer is None:
            return  # let go meanwhile: it is read again by whoever has it now
        self._finish(writer, work, outgoing)

    def skip(self, work: Work) -> None:
        writer = self._writers.get(work.partition)
        if writer is not None:
            self._finish(writer, work, None)

    def _finish(self, writer: _Writer, work: Work, outgoing: Outgoing | None) -> None:
        partition = work.partition
        partition.results[work.record.offset] = work, outgoing
        passed = partition.offsets.finish(work.record.offset)
        if passed:
            writer.add([partition.results.pop(offset) for offset in passed])

    async def settle(self, partitions: Sequence[Partition], until: float, *, lost: bool) -> None:
        if not lost:
            await asyncio.gather(*(writer.empty(until) for writer in self._writers.values()))
        await self._end_writers()

    async def stop(self) -> None:
        await self._end_writers()

    async def _end_writers(self) -> None:
        writers, self._writers = list(self._writers.values()), {}
        await asyncio.gather(*(writer.stop() for writer in writers), return_exceptions=True)


class _Writer:
    """Writes one partition's answers, one transaction after the other."""

    def __init__(self, delivery: ExactlyOnce, partition: Partition) -> None:
        self._delivery = delivery
        self._partition = partition
        self._options = delivery.options.transaction
        self._group = delivery.options.input.group
        self._loop = delivery.loop
        topic, number = partition.place
        self._producer: AIOKafkaProducer = delivery.clients.producer(f"servinggraph-{self._group}-{topic}-{number}")
        self._queue: deque[Result] = deque()
        self._filled = asyncio.Event()
        self._drained = asyncio.Event()
        self._drained.set()
        self._hurry = False
        self._in_transaction = False
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Fence off whoever had the partition, and begin.

        Raises:
            KafkaError: the brokers refuse.
        """
        await self._producer.start()
        self._task = self._loop.create_task(self._run(), name="kafka-transactions")

    def add(self, results: Sequence[Result]) -> None:
        """Take the next answers, in the order of their records."""
        self._queue.extend(results)
        self._drained.clear()
        self._filled.set()

    async def empty(self, until: float) -> None:
        """Write what there is, at once; give up at a moment on the loop's clock."""
        self._hurry = True
        self._filled.set()
        try:
            await asyncio.wait_for(self._drained.wait(), until - self._loop.time())
        except TimeoutError:
            pass

    async def stop(self) -> None:
        """End; a transaction that is open is undone."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})
        if self._in_transaction:
            self._producer._txn_manager.wait_for_transaction_end().add_done_callback(_seen)  # noqa: SLF001  (as below)
            try:
                await asyncio.wait_for(self._producer.abort_transaction(), _CLOSE_S)
            except Exception as error:
                # One that is being committed cannot be aborted. Whatever it is, the next owner's producer ends it,
                # or the broker when its time is up.
                logger.debug("a transaction was left as it was: %r", error)
        await closed(self._producer, _CLOSE_S)

    async def _run(self) -> None:
        try:
            while True:
                await self._filled.wait()
                if self._queue:
                    await self._transaction()
                if not self._queue:
                    self._filled.clear()
                    self._drained.set()
        except Exception as error:
            self._delivery.fail(error)

    async def _transaction(self) -> None:
        """Write answers and their offset, as one.

        Raises:
            NotWritten: the broker did not take a record.
            KafkaError: fenced off, or the brokers refuse.
        """
        producer = self._producer
        await producer.begin_transaction()
        # How a transaction fails is told by its records as well; of this future nobody hears then.
        producer._txn_manager.wait_for_transaction_end().add_done_callback(_seen)  # noqa: SLF001  (no public way)
        self._in_transaction = True
        passed = 0
        written: list[tuple[Work, Outgoing]] = []
        acknowledged: list[asyncio.Future[Any]] = []
        end = self._loop.time() + self._options.interval_ms / 1e3
        while True:
            while self._queue and passed < self._options.records:
                work, outgoing = self._queue.popleft()
                passed += 1
                if outgoing is None:
                    self._delivery.forget(work)
                    continue
                written.append((work, outgoing))
                try:
                    acknowledged.append(await self._write(work, outgoing))
                except IllegalOperation:  # the transaction is over, because an earlier record was refused
                    await _all_taken(written[:-1], acknowledged)
                    raise
            left = end - self._loop.time()
            if passed >= self._options.records or self._hurry or left <= 0:
                break
            self._filled.clear()
            try:
                await asyncio.wait_for(self._filled.wait(), left)
            except TimeoutError:
                break
        # aiokafka would commit a transaction of which a record was refused.
        await _all_taken(written, acknowledged)
        place, position = self._partition.place, work.record.offset + 1
        await producer.send_offsets_to_transaction({place: position}, self._group)
        await producer.commit_transaction()
        self._in_transaction = False
        self._partition.offsets.committed = position
        delivery = self._delivery
        delivery.counts.commits += 1
        delivery.committed_at = self._loop.time()
        for sent, record in written:
            delivery.done(sent, record)
        self._filled.set()

    async def _write(self, work: Work, outgoing: Outgoing) -> asyncio.Future[Any]:
        try:
            future: asyncio.Future[Any] = await self._producer.send(
                outgoing.topic, outgoing.value, outgoing.key, outgoing.partition, headers=outgoing.headers
            )
        except ProducerFenced:
            raise
        except (KafkaError, AssertionError) as error:  # an assertion: no such partition
            cause = await cause_of(error, self._producer, outgoing.topic)
            raise NotWritten(work, outgoing, cause) from cause
        future.add_done_callback(_seen)
        return future


async def _all_taken(written: Sequence[tuple[Work, Outgoing]], acknowledged: Sequence[asyncio.Future[Any]]) -> None:
    """Wait until the broker has taken records.

    Raises:
        NotWritten: it did not take one.
        ProducerFenced: their partition is another member's.
    """
    for (work, outgoing), future in zip(written, acknowledged, strict=True):
        try:
            await future
        except ProducerFenced:
            raise
        except KafkaError as error:
            raise NotWritten(work, outgoing, error) from error


def _seen(future: asyncio.Future[Any]) -> None:
    """Look at an outcome: of many that are refused together only the first is told of."""
    if not future.cancelled():
        future.exception()
