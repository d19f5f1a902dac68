"""Writes records to a topic: connects when the first one is to be written, and says of each whether the brokers have it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, TypeVar

from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError, MessageSizeTooLargeError, ProducerClosed, RecordTooLargeError
from pydantic import Field, field_validator

from servinggraph.context import Context
from servinggraph.errors import ServingGraphError, StepFailed, Unavailable
from servinggraph.importing import ImportProblem
from servinggraph.interfaces import BatchPolicy, Step
from servinggraph.kafka import ConnectionOptions, headers as names
from servinggraph.protocols.kafka.clients import closed, lasting
from servinggraph.routers.selection.keys import key_reader
from servinggraph.tracing import trace_headers

__all__ = ["Record", "TopicOptions", "TopicStep", "TopicWriter", "record_headers"]


class Record(NamedTuple):
    """What is written."""

    value: bytes
    key: bytes | None
    headers: Mapping[str, bytes]


class TopicOptions(ConnectionOptions):
    """A topic that is written to."""

    topic: str = Field(description="Topic; it has to exist.")
    key: str = Field(
        "id",
        description="Key of a record: `id` for the request's, `none`, or `header:NAME`, `parameter:NAME`, `tensor:NAME` (its "
        "first element), `field:PATH.TO.KEY` of a JSON body. Records of a key keep their order.",
    )
    headers: list[str] = Field(
        default_factory=lambda: [names.TRACEPARENT, names.TRACESTATE],
        description="Headers of the request that the record gets, too.",
    )
    compression: Literal["none", "gzip", "snappy", "lz4", "zstd"] = Field("none", description="Compression of what is written.")
    linger_ms: int = Field(0, ge=0, description="How long a record may wait for others, to be written with them.")
    max_message_bytes: int = Field(2**20, ge=1024, description="Largest record.")
    write_timeout_ms: int = Field(
        10_000,
        ge=1,
        description="Longest time that a request waits for its record; then it fails, and the record may be written all the "
        "same once the brokers answer again.",
    )
    settings: dict[str, Any] = Field(default_factory=dict, description="Other arguments of aiokafka's AIOKafkaProducer.")

    @field_validator("key")
    @classmethod
    def _place(cls, key: str) -> str:
        if key != "none":
            key_reader(key)
        return key


_CLOSE_S: Final = 5.0
_FLUSH_S: Final = 10.0

TopicOptionsT = TypeVar("TopicOptionsT", bound=TopicOptions)


class TopicWriter:
    """Writes to one topic, idempotently and to all replicas. To be made on the event loop.

    Args:
        options: which topic, and how.
        conceal: puts references in place of what came from the environment, in a text for people.
    """

    def __init__(self, options: TopicOptions, conceal: Callable[[str], str] = str) -> None:
        self._options = options
        self._conceal = conceal
        self._key = None if options.key == "none" else key_reader(options.key)
        self._producer: Any = None
        self._connecting: asyncio.Task[None] | None = None
        self._ending: set[asyncio.Task[None]] = set()

    def key(self, value: Any, context: Context) -> bytes | None:
        """Return the key of a request's record."""
        found = None if self._key is None else self._key(value, context)
        return None if found is None else found.encode("utf-8", "surrogateescape")

    async def write(self, record: Record) -> Any:
        """Write a record; return where it lies once all replicas have it: its `partition` and `offset`.

        Raises:
            StepFailed: the record is too large.
            Unavailable: it was not written, as far as is known.
        """
        try:
            async with asyncio.timeout(self._options.write_timeout_ms / 1e3):
                return await self.outcome(await self.begin(record))
        except TimeoutError as error:
            raise self._failure(error, len(record.value)) from error

    async def begin(self, record: Record) -> asyncio.Future[Any]:
        """Hand over a record, in the order of the calls; `outcome` says what became of it.

        Raises:
            StepFailed: the record is too large.
            Unavailable: the brokers cannot be reached.
        """
        options = self._options
        try:
            async with asyncio.timeout(options.write_timeout_ms / 1e3):
                producer = self._producer or await self._connected()
                sent: asyncio.Future[Any] = await producer.send(
                    options.topic, record.value, key=record.key, headers=list(record.headers.items())
                )
                sent.add_done_callback(_seen)
                return sent
        except (KafkaError, TimeoutError) as error:
            raise self._failure(error, len(record.value)) from error

    async def outcome(self, sent: asyncio.Future[Any]) -> Any:
        """Wait for what `begin` has handed over; see `write`."""
        producer = self._producer
        try:
            return await asyncio.shield(sent)  # who leaves does not take back what is on its way
        except KafkaError as error:
            self._renew(producer)
            raise self._failure(error, 0) from error

    def _renew(self, producer: Any) -> None:
        """Have the next record written over a new connection: a producer of which a record was refused fails for good."""
        if producer is not None and producer is self._producer:
            self._producer = None
            ending = asyncio.get_running_loop().create_task(self._retire(producer))
            self._ending.add(ending)
            ending.add_done_callback(self._ending.discard)

    async def _retire(self, producer: Any) -> None:
        """End a producer once what others wait for is written, as far as that goes."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(producer.flush(), min(_FLUSH_S, self._options.write_timeout_ms / 1e3))
        await closed(producer, _CLOSE_S)

    def _failure(self, error: BaseException, size: int) -> ServingGraphError:
        topic = self._conceal(self._options.topic)
        if isinstance(error, MessageSizeTooLargeError | RecordTooLargeError):
            return StepFailed(
                f"topic '{topic}' does not take a record of this size{f' ({size} bytes)' if size else ''}: "
                f"max_message_bytes is {self._options.max_message_bytes}, and the topic has a limit of its own"
            )
        text = f"{type(error).__name__}: {error}".removesuffix(": ")
        if isinstance(error, TimeoutError):
            text = (
                f"no word within {self._options.write_timeout_ms} ms (is there such a topic, and do its brokers live?); "
                "it may be written all the same"
            )
        return Unavailable(f"not written to topic '{topic}' at {self._conceal(self._options.brokers)}: {text}")

    async def _connected(self) -> Any:
        while self._producer is None:
            if self._connecting is None:
                self._connecting = asyncio.get_running_loop().create_task(self._connect(), name="kafka-connect")
                self._connecting.add_done_callback(_seen)
            connecting = self._connecting
            try:
                # A request whose time is up, or that is cancelled, leaves the connection to those that come after it.
                await asyncio.shield(connecting)
            except asyncio.CancelledError:
                if connecting.cancelled():
                    raise ProducerClosed from None
                raise
        return self._producer

    async def _connect(self) -> None:
        try:
            if self._ending:  # what was handed over before is written before
                await asyncio.wait(self._ending)
            options = self._options
            compression = None if options.compression == "none" else options.compression
            made = AIOKafkaProducer(
                **options.client_settings(),
                **{
                    "acks": "all",
                    "enable_idempotence": True,
                    "linger_ms": options.linger_ms,
                    "max_request_size": options.max_message_bytes,
                    "compression_type": compression,
                    **options.settings,
                },
            )
            producer = lasting(made)
            try:
                await producer.start()
            except BaseException:
                await producer.stop()
                raise
            self._producer = producer
        finally:
            self._connecting = None

    async def close(self) -> None:
        """Disconnect; whoever wants a record written has waited for it."""
        connecting = self._connecting
        if connecting is not None:  # not at once: aiokafka leaves a connection behind that is cut off while it is made
            await asyncio.wait({connecting}, timeout=_CLOSE_S)
            connecting.cancel()
            await asyncio.wait({connecting})
        if self._producer is not None:
            await closed(self._producer, _CLOSE_S)
        await asyncio.gather(*self._ending)


def _seen(outcome: asyncio.Future[Any]) -> None:
    """Look at an outcome: whoever asked for it may have left meanwhile."""
    if not outcome.cancelled():
        outcome.exception()


def record_headers(context: Context, id: str, wanted: list[str], own: Mapping[str, bytes], node: str) -> dict[str, bytes]:
    """Return the headers of a request's record: those of the request that are wanted, its id, and those of the format."""
    passed = {name: _bytes(context.headers[name]) for name in wanted if name in context.headers}
    passed |= {name: value.encode() for name, value in trace_headers(context, node).items() if name in wanted}
    return {**passed, **({names.REQUEST_ID: id.encode()} if id else {}), **own}


def _bytes(text: str) -> bytes:
    """Return a header as it came: of its bytes each is a character."""
    try:
        return text.encode("latin-1")
    except UnicodeEncodeError:
        return text.encode()


class TopicStep(Step[TopicOptionsT]):
    """What the steps that write to a topic have in common: each request is a record of its own."""

    sees_requests = True

    def load(self, batch: BatchPolicy | bool | None) -> BatchPolicy | None:
        try:
            self.options.below(self.base).client_settings()  # reads certificates, and finds what the options name
        except (OSError, ImportProblem) as error:
            raise StepFailed(f"'security' of topic '{self.conceal(self.options.topic)}': {error}") from error
        return None

    def files(self) -> Iterable[Path]:
        # Whom to trust is no secret; who this is, the certificate and its key, is the machine's.
        ca = self.options.security.ca
        return [] if ca is None or Path(ca).is_absolute() else [self.base / ca]

    def writer(self) -> TopicWriter:
        """Return what writes to the topic; called on the event loop."""
        return TopicWriter(self.options.below(self.base), self.conceal)

    def impurity(self) -> str | None:
        return "writes to a topic"

    def describe(self) -> str:
        return f"{type(self).__name__.lower()} to topic {self.conceal(self.options.topic)}"
