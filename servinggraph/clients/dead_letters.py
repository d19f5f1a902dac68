"""Sends dead letters back to the topics that they came from, each once.

A letter and the note that it was sent stand in one transaction, so that neither a crash nor a second run at the same time
sends it twice. The notes are the offsets that a consumer group has committed on the topic of dead letters: the offset says
up to where all are sent, and its metadata which ones beyond.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Final, Self

from aiokafka import AIOKafkaProducer, TopicPartition
from aiokafka.errors import KafkaError

from servinggraph.clients.marks import Marks, read_marks
from servinggraph.clients.topics import failure_text, partitions_of, reader
from servinggraph.errors import Unavailable
from servinggraph.kafka import ConnectionOptions, headers as names

__all__ = ["Letter", "Selection", "Summary", "replay"]

_BATCH: Final = 500
_LARGEST: Final = 2**30


@dataclass(frozen=True, slots=True)
class Letter:
    """One dead letter.

    Attributes:
        partition: where it lies, on the topic of dead letters.
        offset: where it lies there.
        topic: topic that it came from; empty where it does not say.
        source: partition that it came from; None where it does not say.
        error: code of what was wrong.
        node: node that failed; empty for none.
        died_at: when it was given up, milliseconds since 1970; the record's own time where it does not say.
        replays: how often it was sent back already, and died again.
        whole: False when its value was left out for its size.
    """

    partition: int
    offset: int
    topic: str
    source: int | None
    error: str
    node: str
    died_at: int
    replays: int
    whole: bool

    @classmethod
    def of(cls, record: Any) -> Self:
        """Return what a record of the topic of dead letters says of itself."""
        found = names.headers_of(record.headers)

        def text(name: str) -> str:
            return found.get(name, b"").decode(errors="replace")

        source = text(names.DEAD_PARTITION)
        return cls(
            record.partition,
            record.offset,
            text(names.DEAD_TOPIC),
            int(source) if source.isdigit() else None,
            text(names.DEAD_ERROR),
            text(names.DEAD_NODE),
            _number(text(names.DEAD_AT), record.timestamp),
            _number(text(names.REPLAYED), 0),
            names.DEAD_LEFT_OUT not in found,
        )


@dataclass(frozen=True, slots=True)
class Selection:
    """Which letters are sent.

    Attributes:
        errors: error codes; empty for all.
        nodes: patterns of nodes, `score.*`; empty for all.
        topics: topics that they came from; empty for all.
        since_ms: given up at this time or later, milliseconds since 1970.
        until_ms: given up before this time.
        most_replays: none that was sent back this often; None for no limit.
        limit: at most so many; None for all.
    """

    errors: frozenset[str] = frozenset()
    nodes: tuple[str, ...] = ()
    topics: frozenset[str] = frozenset()
    since_ms: int | None = None
    until_ms: int | None = None
    most_replays: int | None = None
    limit: int | None = None

    def takes(self, letter: Letter) -> bool:
        """Tell whether a letter is meant, the limit aside."""
        return (
            (not self.errors or letter.error in self.errors)
            and (not self.nodes or any(fnmatchcase(letter.node, pattern) for pattern in self.nodes))
            and (not self.topics or letter.topic in self.topics)
            and (self.since_ms is None or letter.died_at >= self.since_ms)
            and (self.until_ms is None or letter.died_at < self.until_ms)
            and (self.most_replays is None or letter.replays < self.most_replays)
        )


@dataclass(slots=True)
class Summary:
    """What became of the letters.

    Attributes:
        read: letters that were looked at.
        sent: how many were sent (with a dry run: would be), by error code, node and topic.
        before: sent by an earlier run.
        left: not meant by the selection, or beyond its limit.
        impossible: cannot be sent, by reason.
    """

    read: int = 0
    sent: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    before: int = 0
    left: int = 0
    impossible: Counter[str] = field(default_factory=Counter)


async def replay(
    connection: ConnectionOptions,
    dead_topic: str,
    selection: Selection,
    *,
    to: str | None = None,
    group: str | None = None,
    again: bool = False,
    dry_run: bool = False,
) -> Summary:
    """Send dead letters back: those that lie on the topic now; what comes meanwhile is for the next run.

    Each goes to the topic and partition that it came from, with its key, value and headers, without the headers of the dead
    letter and without a deadline, which has passed; `x-replayed` counts how often.

    Args:
        connection: the brokers.
        dead_topic: topic of dead letters.
        selection: which ones.
        to: another topic to send them to, by key.
        group: consumer group that notes what was sent; by default one for the topic.
        again: send also what was sent before.
        dry_run: send nothing, note nothing.

    Raises:
        Unavailable: the brokers cannot be reached, a topic is not there or does not take a letter, or another run has begun.
        LimitExceeded: the letters left out are too scattered to be noted.
    """
    group = group or f"servinggraph-replay-{dead_topic}"
    summary = Summary()
    try:
        async with _producing(None if dry_run else group, connection) as producer:
            partitions = await partitions_of(connection, dead_topic)
            # After the producer has started: from then on no earlier run notes anything more.
            marks = await read_marks(connection, group, [TopicPartition(dead_topic, number) for number in partitions])
            if again:
                marks = {place: Marks() for place in marks}
            targets = _Targets(connection, to)
            async for records in _batches(connection, marks):
                chosen = await _choose(records, marks, selection, targets, summary)
                notes = {place: marks[place].note() for place in {_place(record) for record in records}}
                if producer is not None and chosen:
                    await _send(producer, group, chosen, targets, notes)
    except KafkaError as error:
        raise Unavailable(f"replay of '{dead_topic}' at {connection.brokers}: {failure_text(error)}") from error
    return summary


@asynccontextmanager
async def _producing(group: str | None, connection: ConnectionOptions) -> AsyncIterator[Any]:
    """Give a producer whose transactions end those of an earlier run; None for a dry run."""
    if group is None:
        yield None
        return
    producer = AIOKafkaProducer(**connection.client_settings(), transactional_id=group, max_request_size=_LARGEST)
    try:
        await producer.start()
        yield producer
    finally:
        await producer.stop()


async def _batches(connection: ConnectionOptions, marks: Mapping[TopicPartition, Marks]) -> AsyncIterator[list[Any]]:
    """Give the letters from the marks to the present end, some at a time, each partition's in their order."""
    consumer = reader(connection)
    try:
        await consumer.start()
        consumer.assign(list(marks))
        firsts, ends = await consumer.beginning_offsets(list(marks)), await consumer.end_offsets(list(marks))
        left = set()
        for place, mark in marks.items():
            mark.start(firsts[place])
            if mark.low < ends[place]:
                consumer.seek(place, mark.low)
                left.add(place)
            else:
                consumer.pause(place)
        while left:
            found = await consumer.getmany(*left, timeout_ms=500, max_records=_BATCH)
            records = [record for place, read in found.items() for record in read if record.offset < ends[place]]
            if records:
                yield records
            for place in tuple(left):
                if await consumer.position(place) >= ends[place]:
                    left.discard(place)
                    consumer.pause(place)
    finally:
        await consumer.stop()


class _Targets:
    """Where letters go: the partition that they came from, as long as it is there."""

    def __init__(self, connection: ConnectionOptions, to: str | None) -> None:
        self._connection = connection
        self._to = to
        self._partitions: dict[str, list[int]] = {}

    async def look(self, letter: Letter) -> None:
        """Find out about the topic of a letter.

        Raises:
            Unavailable: it is not there.
        """
        topic = self.topic(letter)
        if topic not in self._partitions:
            self._partitions[topic] = await partitions_of(self._connection, topic)

    def topic(self, letter: Letter) -> str:
        return self._to or letter.topic

    def partition(self, letter: Letter) -> int | None:
        return None if self._to or letter.source not in self._partitions[letter.topic] else letter.source


async def _choose(
    records: Iterable[Any], marks: Mapping[TopicPartition, Marks], selection: Selection, targets: _Targets, summary: Summary
) -> list[tuple[Any, Letter]]:
    """Return what is to be sent, and mark it."""
    chosen: list[tuple[Any, Letter]] = []
    for record in records:
        letter, mark = Letter.of(record), marks[_place(record)]
        summary.read += 1
        if mark.has(letter.offset):
            summary.before += 1
            mark.pass_by(letter.offset, done=True)
            continue
        full = selection.limit is not None and summary.sent.total() >= selection.limit
        reason = _hindrance(letter, targets)
        if full or reason or not selection.takes(letter):
            mark.pass_by(letter.offset, done=False)
            if reason:
                summary.impossible[reason] += 1
            else:
                summary.left += 1
            continue
        await targets.look(letter)
        mark.pass_by(letter.offset, done=True)
        summary.sent[letter.error, letter.node, targets.topic(letter)] += 1
        chosen.append((record, letter))
    return chosen


def _hindrance(letter: Letter, targets: _Targets) -> str | None:
    if not letter.whole:
        return "its value was left out, since the topic of dead letters did not take a record of that size"
    return None if targets.topic(letter) else "it does not say which topic it came from; 'to' would"


async def _send(
    producer: Any,
    group: str,
    chosen: Sequence[tuple[Any, Letter]],
    targets: _Targets,
    notes: Mapping[TopicPartition, tuple[int, str]],
) -> None:
    async with producer.transaction():
        written = []
        for record, letter in chosen:
            sent = _headers(record.headers, letter.replays + 1)
            written.append(
                await producer.send(
                    targets.topic(letter), record.value, key=record.key, partition=targets.partition(letter), headers=sent
                )
            )
        # aiokafka would commit a transaction of which a record was refused, and with it the note that it was sent.
        for (_, letter), outcome in zip(chosen, await asyncio.gather(*written, return_exceptions=True), strict=True):
            if isinstance(outcome, BaseException):
                raise Unavailable(
                    f"topic '{targets.topic(letter)}' does not take the letter at {letter.partition}/{letter.offset}: "
                    f"{failure_text(outcome)}"
                ) from outcome
        await producer.send_offsets_to_transaction(dict(notes), group)


def _headers(raw: names.RawHeaders, replays: int) -> list[tuple[str, bytes | None]]:
    kept = [
        (name, value)
        for name, value in raw
        if not name.startswith(names.DEAD_PREFIX) and name not in (names.REPLAYED, names.DEADLINE)
    ]
    return [*kept, (names.REPLAYED, str(replays).encode())]


def _place(record: Any) -> TopicPartition:
    return TopicPartition(record.topic, record.partition)


def _number(text: str, default: int) -> int:
    return int(text) if text.isdigit() else default
