"""What the clients of this package ask about topics before they use them."""

from __future__ import annotations

from typing import Any

from aiokafka import AIOKafkaConsumer
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaError

from servinggraph.errors import Unavailable
from servinggraph.kafka import ConnectionOptions

__all__ = ["failure_text", "partitions_of", "reader"]


async def partitions_of(connection: ConnectionOptions, topic: str) -> list[int]:
    """Return the numbers of a topic's partitions, in order.

    Raises:
        Unavailable: no broker can be reached, or there is no such topic.
    """
    admin = AIOKafkaAdminClient(**connection.client_settings())
    try:
        await admin.start()
        (found,) = await admin.describe_topics([topic])
    except KafkaError as error:
        raise Unavailable(f"cannot reach Kafka at {connection.brokers}: {failure_text(error)}") from error
    finally:
        await admin.close()
    partitions: list[dict[str, Any]] = found["partitions"]
    if not partitions:
        raise Unavailable(f"topic '{topic}' does not exist at {connection.brokers}")
    return sorted(partition["partition"] for partition in partitions)


def failure_text(error: BaseException) -> str:
    """Return a Kafka error's name and text; many have no text of their own."""
    return f"{type(error).__name__}: {error}".removesuffix(": ")


def reader(connection: ConnectionOptions) -> AIOKafkaConsumer:
    """Return a consumer without a group, not started: it reads what is committed, and changes nothing."""
    return AIOKafkaConsumer(
        **connection.client_settings(),
        enable_auto_commit=False,
        isolation_level="read_committed",
        auto_offset_reset="earliest",
        check_crcs=False,  # the development broker's markers of transactions have none
    )
