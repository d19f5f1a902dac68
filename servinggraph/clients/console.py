"""Records to and from topics for a person at a terminal: what `servinggraph kafka send` and `read` do."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

import orjson
from aiokafka import AIOKafkaProducer, TopicPartition
from aiokafka.errors import KafkaError

from servinggraph.clients.topics import failure_text, partitions_of, reader
from servinggraph.errors import Unavailable
from servinggraph.kafka import ConnectionOptions

__all__ = ["read_records", "send_records"]


async def send_records(
    connection: ConnectionOptions,
    topic: str,
    bodies: Sequence[bytes],
    key: bytes | None,
    headers: Mapping[str, bytes],
) -> None:
    """Write records, and return when the brokers have them.

    Raises:
        Unavailable: they could not be written.
    """
    producer = AIOKafkaProducer(**connection.client_settings(), acks="all", enable_idempotence=True)
    try:
        await producer.start()
        sent = [await producer.send(topic, body, key=key, headers=list(headers.items())) for body in bodies]
        await asyncio.gather(*sent)
    except KafkaError as error:
        raise Unavailable(f"topic '{topic}' at {connection.brokers}: {failure_text(error)}") from error
    finally:
        await producer.stop()


async def read_records(connection: ConnectionOptions, topic: str, *, from_start: bool) -> AsyncIterator[bytes]:
    """Give each record of a topic as one line of JSON, for as long as somebody asks; belongs to no consumer group.

    Raises:
        Unavailable: the topic cannot be read.
    """
    consumer = reader(connection)
    try:
        await consumer.start()
        places = [TopicPartition(topic, number) for number in await partitions_of(connection, topic)]
        consumer.assign(places)
        await (consumer.seek_to_beginning if from_start else consumer.seek_to_end)(*places)
        async for record in consumer:
            yield orjson.dumps(shown(record))
    except KafkaError as error:
        raise Unavailable(f"topic '{topic}' at {connection.brokers}: {failure_text(error)}") from error
    finally:
        await consumer.stop()


def shown(record: Any) -> dict[str, Any]:
    """Return a record as JSON has it: JSON values as they are, other text as text, bytes as base64."""
    headers = {name: _plain(value) for name, value in record.headers}
    try:
        value = orjson.loads(record.value or b"null")
    except orjson.JSONDecodeError:
        value = _plain(record.value)
    place = {"partition": record.partition, "offset": record.offset}
    return place | {"key": _plain(record.key), "headers": headers, "value": value}


def _plain(data: bytes | None) -> str | dict[str, str] | None:
    if data is None:
        return None
    try:
        return data.decode()
    except UnicodeDecodeError:
        return {"base64": base64.b64encode(data).decode()}
