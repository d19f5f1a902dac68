"""A Kafka broker inside this process, to try things out without one: librdkafka's mock cluster. For development only.

It keeps everything in memory, at most some megabytes of each partition, makes topics of four partitions when they are asked
for, and knows neither users nor encryption. Offsets that are committed in a transaction it takes and forgets; all else that
the front end needs, transactions included, it does.

Source: librdkafka, src/rdkafka_mock.h.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from servinggraph.errors import Unavailable

__all__ = ["address", "development_broker"]

_PATIENCE_S = 30.0

_running: list[str] = []
"""Addresses of brokers of this process, the latest last: whatever speaks Kafka here then speaks to that one."""


def address() -> str | None:
    """Return the address of the broker that runs in this process, None without one."""
    return _running[-1] if _running else None


@contextmanager
def development_broker() -> Iterator[str]:
    """Run a broker, and have every connection of this process go there; give its address.

    Raises:
        ImportError: the extra `kafka-dev` is not installed.
        Unavailable: it did not start.
    """
    from confluent_kafka import KafkaException, Producer

    # The cluster belongs to a client, which says where it listens. Of the log only what is wrong.
    settings: dict[str, Any] = {"bootstrap.servers": "127.0.0.1:1", "test.mock.num.brokers": 1, "log_level": 4}
    owner = Producer(settings)
    try:
        brokers = owner.list_topics(timeout=_PATIENCE_S).brokers.values()
    except KafkaException as error:
        raise Unavailable(f"the development broker did not start: {error}") from error
    where = ",".join(f"{broker.host}:{broker.port}" for broker in brokers)
    _running.append(where)
    try:
        yield where
    finally:
        _running.remove(where)
        del owner  # and with it the cluster
