"""A client for graphs that are reached over Kafka: request and reply, as one awaited call.

    async with Client("127.0.0.1:9092", "tx-in", "tx-replies") as client:
        answer = await client.infer({"transaction": rows}, key="card-7", timeout_s=2)

Each request names the topic and the partition that this client reads (the server's `output.reply_topics` has to allow the
topic) and carries a correlation id of its own, so that any number of clients can share a reply topic.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import random
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Final, NamedTuple, Self

import orjson
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import KafkaError

from servinggraph.clients.errors import error_from
from servinggraph.clients.topics import failure_text, partitions_of
from servinggraph.context import ParameterValue
from servinggraph.errors import DeadlineExceeded, LimitExceeded, RequestTooLarge, StepFailed, Unavailable
from servinggraph.kafka import ConnectionOptions, SecurityOptions, headers as names
from servinggraph.messages import InferenceResponse
from servinggraph.protocols.freeform import decode_body
from servinggraph.protocols.freeform.body import media_of
from servinggraph.protocols.freeform.client import encode_body
from servinggraph.protocols.kafka.clients import lasting
from servinggraph.protocols.v2.client import decode_response, encode_request
from servinggraph.steps.topics.writer import Record, TopicOptions, TopicWriter
from servinggraph.tensors import Array

__all__ = ["Client"]

logger = logging.getLogger("servinggraph.clients.kafka")

_BINARY: Final = b"application/octet-stream"
_START_S: Final = 30.0
_WRITE_MS: Final = 3_600_000
"""No limit of its own for writing: each call has one."""


class _Reply(NamedTuple):
    headers: Mapping[str, bytes]
    body: bytes


class _Call(NamedTuple):
    answer: asyncio.Future[_Reply]
    limit: asyncio.Timeout


class Client:
    """Sends requests to a topic and takes their answers from another.

    Args:
        brokers: `host:port`, with commas between several.
        topic: where the graph reads requests.
        reply_topic: where its answers are to go; it has to exist.
        graph: name of the graph, where the topic is read for several.
        security: encryption and authentication.
        max_in_flight: most requests that wait for an answer; one more is refused.
        max_message_bytes: largest request.
        linger_ms: how long a request may wait for others, to be written with them.
        reply_partition: partition of the reply topic to read; by default a random one.
    """

    def __init__(
        self,
        brokers: str,
        topic: str,
        reply_topic: str,
        *,
        graph: str = "",
        security: SecurityOptions | None = None,
        max_in_flight: int = 1024,
        max_message_bytes: int = 2**20,
        linger_ms: int = 0,
        reply_partition: int | None = None,
    ) -> None:
        self._topic, self._reply_topic, self._graph = topic, reply_topic, graph
        self._connection = ConnectionOptions(brokers=brokers, security=security or SecurityOptions())
        self._writing = TopicOptions(
            brokers=brokers,
            security=self._connection.security,
            topic=topic,
            linger_ms=linger_ms,
            max_message_bytes=max_message_bytes,
            write_timeout_ms=_WRITE_MS,
        )
        self._max_in_flight = max_in_flight
        self._partition = reply_partition
        self._waiting: dict[bytes, _Call] = {}
        self._own = os.urandom(9).hex()
        self._numbers = itertools.count()
        self._writer: TopicWriter | None = None
        self._consumer: Any = None
        self._reader: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        """Connect; what is answered from now on is seen.

        Raises:
            Unavailable: no broker can be reached, or the reply topic is not there.
        """
        settings = self._connection.client_settings()
        consumer = AIOKafkaConsumer(
            **settings, auto_offset_reset="latest", enable_auto_commit=False, isolation_level="read_committed", check_crcs=False
        )
        self._consumer = lasting(consumer)
        self._writer = TopicWriter(self._writing)
        try:
            async with asyncio.timeout(_START_S):
                await self._consumer.start()
                await self._assign()
        except (KafkaError, TimeoutError) as error:
            await self._disconnect()
            raise Unavailable(f"cannot reach Kafka at {self._connection.brokers}: {failure_text(error)}") from error
        except BaseException:
            await self._disconnect()
            raise
        self._reader = asyncio.create_task(self._read())
        return self

    async def _assign(self) -> None:
        """Take one partition of the reply topic, from its end."""
        partitions = await partitions_of(self._connection, self._reply_topic)
        if self._partition is None:
            self._partition = random.choice(partitions)  # noqa: S311  (which one is no secret)
        elif self._partition not in partitions:
            raise Unavailable(f"reply topic '{self._reply_topic}' has partitions 0 to {partitions[-1]}, no {self._partition}")
        place = TopicPartition(self._reply_topic, self._partition)
        self._consumer.assign([place])
        await self._consumer.seek_to_end(place)
        await self._consumer.position(place)  # the end as it is before the first request

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Disconnect; calls that still wait raise `Unavailable`."""
        if self._reader is not None:
            self._reader.cancel()
            await asyncio.wait([self._reader])
        self._give_up(Unavailable("the client was closed before the answer came"))
        await self._disconnect()

    async def _disconnect(self) -> None:
        if self._writer is not None:
            await self._writer.close()
        if self._consumer is not None:
            await self._consumer.stop()

    async def infer(
        self,
        inputs: Mapping[str, Array],
        *,
        id: str = "",
        key: str | bytes | None = None,
        parameters: Mapping[str, ParameterValue] | None = None,
        outputs: Sequence[str] = (),
        headers: Mapping[str, str | bytes] | None = None,
        timeout_s: float = 30.0,
    ) -> InferenceResponse:
        """Send one request and return its answer.

        Args:
            inputs: tensors by name.
            id: request id; the server makes one where there is none.
            key: key of the record: requests of a key are answered in their order.
            parameters: V2 request parameters.
            outputs: outputs to ask for; all by default.
            headers: further record headers; they come back with the answer.
            timeout_s: how long the answer is waited for. It goes along as a deadline, so that the server does
                not work on it any longer either; both clocks have to agree.

        Raises:
            ServingGraphError: what the server answered, as the class of its error code, with the node at fault.
            DeadlineExceeded: no answer in time; whether the request was served is not known.
            LimitExceeded: `max_in_flight` requests wait already.
            RequestTooLarge: the request is larger than `max_message_bytes`, or than the topic takes.
            Unavailable: the request could not be written.
        """
        body, length = encode_request(inputs, id, parameters, outputs)
        own = {names.CONTENT_TYPE: _BINARY, names.HEADER_LENGTH: str(length).encode()}
        reply = await self._ask(body, own, id, key, headers, timeout_s)
        given = reply.headers.get(names.HEADER_LENGTH)
        return decode_response(reply.body, int(given) if given else None)

    async def invoke(
        self,
        body: Any,
        content_type: str | None = None,
        *,
        accept: str = "",
        id: str = "",
        key: str | bytes | None = None,
        headers: Mapping[str, str | bytes] | None = None,
        timeout_s: float = 30.0,
    ) -> Any:
        """Send a free-form request, for a graph with `inputs: body`, and return its answer, decoded by its content type.

        Args:
            body: bytes and text go as they are; anything else as JSON, or as msgpack where `content_type` says so.
            content_type: media type of the body.
            accept: media types that the answer may have.
            id: see `infer`.
            key: see `infer`.
            headers: see `infer`.
            timeout_s: see `infer`.

        Raises:
            ServingGraphError: see `infer`.
        """
        data, media = encode_body(body, content_type)
        own = {names.CONTENT_TYPE: media.encode()}
        if accept:
            own[names.ACCEPT] = accept.encode()
        reply = await self._ask(data, own, id, key, headers, timeout_s)
        return decode_body(reply.body, media_of(reply.headers.get(names.CONTENT_TYPE, b"").decode()))

    async def _ask(
        self,
        body: bytes,
        own: dict[str, bytes],
        id: str,
        key: str | bytes | None,
        further: Mapping[str, str | bytes] | None,
        timeout_s: float,
    ) -> _Reply:
        if self._reader is None or self._reader.done():
            raise Unavailable("the client is not connected: use it inside 'async with'")
        if len(self._waiting) >= self._max_in_flight:
            raise LimitExceeded(f"{self._max_in_flight} requests wait for an answer already: max_in_flight")
        ticket = f"{self._own}-{next(self._numbers)}".encode()
        sent = {name: _encoded(value) for name, value in (further or {}).items()} | own
        sent[names.CORRELATION_ID] = ticket
        sent[names.REPLY_TOPIC] = self._reply_topic.encode()
        sent[names.REPLY_PARTITION] = str(self._partition).encode()
        sent[names.DEADLINE] = str(int((time.time() + timeout_s) * 1e3)).encode()
        if id:
            sent[names.REQUEST_ID] = id.encode()
        if self._graph:
            sent[names.GRAPH] = self._graph.encode()
        call = _Call(asyncio.get_running_loop().create_future(), asyncio.timeout(timeout_s))
        self._waiting[ticket] = call
        try:
            async with call.limit:
                await self._send(body, _encoded(key), sent)
                reply = await call.answer
        except TimeoutError:
            if call.answer.done() and not call.answer.cancelled():  # given up while it was still being written
                call.answer.result()
            raise DeadlineExceeded(f"no answer to a request on topic '{self._topic}' within {timeout_s:g} s") from None
        finally:
            del self._waiting[ticket]
        status = reply.headers.get(names.STATUS, b"").decode()
        if status != names.OK:
            raise error_from(status, _message(reply), reply.headers.get(names.ERROR_NODE, b"").decode() or None)
        return reply

    async def _send(self, body: bytes, key: bytes | None, sent: Mapping[str, bytes]) -> None:
        assert self._writer is not None  # the reader lives
        try:
            await self._writer.write(Record(body, key, sent))
        except StepFailed as error:
            raise RequestTooLarge(error.message) from error

    async def _read(self) -> None:
        """Hand answers to those who wait for them; others' answers on the same partition pass by."""
        try:
            while True:
                for records in (await self._consumer.getmany(timeout_ms=1000)).values():
                    for record in records:
                        found = names.headers_of(record.headers)
                        call = self._waiting.get(found.get(names.CORRELATION_ID, b""))
                        if call is not None and not call.answer.done():
                            call.answer.set_result(_Reply(found, record.value or b""))
        except Exception as error:
            logger.error("answers on topic '%s' are not read any more: %s", self._reply_topic, failure_text(error))
            self._give_up(Unavailable(f"answers on topic '{self._reply_topic}' cannot be read: {failure_text(error)}"))

    def _give_up(self, why: Unavailable) -> None:
        now = asyncio.get_running_loop().time()
        for call in self._waiting.values():
            if not call.answer.done():
                call.answer.set_exception(why.copy())
                if call.limit.when() is not None:
                    call.limit.reschedule(now)  # a stopped producer does not end what waits for it


def _encoded(value: Any) -> Any:
    return value.encode() if isinstance(value, str) else value


def _message(reply: _Reply) -> str:
    """Return what an error answer says: its body's `error`, else its header."""
    try:
        return str(orjson.loads(reply.body)["error"])
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return reply.headers.get(names.ERROR, b"").decode(errors="replace") or "the answer says no more"
