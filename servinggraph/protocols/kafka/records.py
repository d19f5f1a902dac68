"""A record on its way through: what was read, and what is written because of it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from enum import IntEnum
from typing import Any, NamedTuple, Protocol

from servinggraph.errors import ServingGraphError
from servinggraph.kafka.headers import headers_of
from servinggraph.lifecycle import ServedGraph
from servinggraph.protocols.kafka.lanes import Lanes
from servinggraph.protocols.kafka.offsets import Offsets

__all__ = ["LeftOut", "Outgoing", "Partition", "Place", "Record", "Result", "Verdict", "Work"]


class Place(NamedTuple):
    """Where a record is."""

    topic: str
    partition: int
    offset: int

    def __str__(self) -> str:
        return f"{self.topic}/{self.partition}/{self.offset}"


class Record(Protocol):
    """A record as aiokafka gives it."""

    @property
    def topic(self) -> str: ...
    @property
    def partition(self) -> int: ...
    @property
    def offset(self) -> int: ...
    @property
    def timestamp(self) -> int: ...
    @property
    def key(self) -> bytes | None: ...
    @property
    def value(self) -> bytes | None: ...
    @property
    def headers(self) -> Sequence[tuple[str, bytes | None]]: ...


class Outgoing(NamedTuple):
    """A record to be written."""

    topic: str
    key: bytes | None
    value: bytes | None
    headers: list[tuple[str, bytes | None]]
    partition: int | None = None
    """None for the key's."""
    error: str = ""
    """Error code; empty for an answer."""
    dead: bool = False
    """True for a dead letter."""


class Partition:
    """An input partition that this member owns.

    Attributes:
        place: what aiokafka calls it, a `TopicPartition`.
        offsets: what of it is done.
        lanes: what of it waits for another record.
        owned: False from when it goes to another member: what still runs is not written any more.
        results: with `exactly_once`, what came of records that ended before others before them.
    """

    __slots__ = ("lanes", "offsets", "owned", "place", "results")

    def __init__(self, place: Any) -> None:
        self.place = place
        self.offsets = Offsets()
        self.lanes: Lanes[Work] = Lanes()
        self.owned = True
        self.results: dict[int, Result] = {}


class LeftOut(IntEnum):
    """What of a record is left out of what is written because it was given up, since the topic takes none of its size."""

    NOTHING = 0
    VALUE = 1
    ALL = 2
    """Its headers and its key as well, as far as they are large."""


class Verdict(NamedTuple):
    """What an earlier session found out of a record: it is given up when it is read again."""

    error: ServingGraphError
    """What was wrong."""
    left_out: LeftOut = LeftOut.NOTHING
    """What is too large for the topic that its error or dead letter goes to."""
    no_reply: bool = False
    """True when whoever asked cannot be told."""


class Work:
    """A record that was read, until what came of it is written.

    Attributes:
        partition: where it came from.
        id: the request's id as headers say it, where duplicates are looked for; else empty.
        record: the record.
        headers: its headers, the last of several equal ones; of an event in structured mode, what it would have in binary mode.
        value: its value; of an event in structured mode, the data.
        lane: lane that it keeps to; None for none.
        size: its bytes, as they count in the budget.
        attempts: how often it was tried, the attempt under way included.
        cancel: undoes what is waited for: an attempt under way, or the pause before one; None when nothing is.
        graph: the graph that it is for; None until that is found.
        trace: headers that make whoever reads the answer a part of the request's trace; none where it has none of its own.
        verdict: what is known to be wrong before it is tried; None for most.
        no_reply: True when whoever asked cannot be told: the reply topic does not work.
    """

    __slots__ = (
        "attempts",
        "cancel",
        "graph",
        "headers",
        "id",
        "lane",
        "no_reply",
        "partition",
        "record",
        "size",
        "trace",
        "value",
        "verdict",
    )

    def __init__(self, partition: Partition, record: Record) -> None:
        self.partition = partition
        self.record = record
        self.headers: Mapping[str, bytes] = headers_of(record.headers)
        self.lane: Hashable = None
        self.size = len(record.value or b"") + len(record.key or b"") + 200
        if record.headers:
            self.size += sum(len(name) + len(content or b"") for name, content in record.headers)
        self.value = record.value
        self.id = b""
        self.attempts = 0
        self.cancel: Callable[[], Any] | None = None
        self.graph: ServedGraph | None = None
        self.verdict: Verdict | None = None
        self.no_reply = False
        self.trace: Mapping[str, str] = {}

    @property
    def place(self) -> Place:
        """Where the record is."""
        return Place(self.record.topic, self.record.partition, self.record.offset)


Result = tuple[Work, Outgoing | None]
"""A record, and what is to be written because of it; None for nothing."""
