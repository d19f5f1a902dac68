"""Makes and ends aiokafka's clients: the only module that constructs them.

What aiokafka 0.14 offers and what not: eager rebalancing alone (no cooperative protocol), so every
rebalance takes all partitions from all members for a moment; `send_offsets_to_transaction` without the
group's generation (no KIP-447), so a zombie is fenced by a transactional id for each input partition.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from typing import Any, Final, TypeVar

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka.errors import ProducerClosed, UnknownTopicOrPartitionError

from servinggraph.kafka import KafkaOptions, development

__all__ = ["Clients", "answers", "client_of", "closed", "has_topic", "lasting", "partitions_of"]

logger = logging.getLogger("servinggraph.kafka.client")

ClientT = TypeVar("ClientT", AIOKafkaConsumer, AIOKafkaProducer)

_BATCH_BYTES: Final = 256 * 1024
_SMALLEST_BATCH: Final = 1024
_OVERHEAD: Final = 64 * 1024
"""Dead letters have headers beside what was as large as allowed already."""
_REQUEST_MS: Final = 15_000
_PAUSE_S: Final = 0.1
_FETCH_BYTES: Final = 2**20


class Clients:
    """Makes the clients of one `kafka:` block.

    Args:
        options: the block.
        brokers: addresses instead of the block's; empty for the block's.
        graph: the graph's name, which the brokers' logs then show.
    """

    def __init__(self, options: KafkaOptions, graph: str, brokers: str = "") -> None:
        self._options = options
        self._name = f"servinggraph-{graph}"
        if brokers:
            options = options.model_copy(update={"brokers": brokers})
        self.brokers = options.brokers
        self._connection = options
        self._batch_bytes = _BATCH_BYTES

    def _common(self) -> dict[str, Any]:
        # Read anew each time: certificates are replaced while a server runs.
        settings = self._connection.client_settings()
        return {**settings, "client_id": self._name, "request_timeout_ms": _REQUEST_MS, "retry_backoff_ms": 100}

    def smaller_batches(self, size: int) -> bool:
        """Have less written at once by the next producers, after a topic did not take a record of a size among others.

        Returns:
            False when it was not for the others: the record is too large by itself.
        """
        if self._batch_bytes <= max(size, _SMALLEST_BATCH):
            return False
        self._batch_bytes = max(size, _SMALLEST_BATCH, self._batch_bytes // 8)
        return True

    def consumer(self) -> AIOKafkaConsumer:
        """Return a consumer that is not started, and subscribed to nothing.

        Raises:
            OSError: a certificate cannot be read.
        """
        given = self._options.input
        settings: dict[str, Any] = {
            **self._common(),
            "group_id": given.group,
            "group_instance_id": given.member,
            "auto_offset_reset": given.start,
            "enable_auto_commit": False,
            "isolation_level": "read_committed",
            "session_timeout_ms": given.session_timeout_ms,
            "heartbeat_interval_ms": max(100, given.session_timeout_ms // 4),
            # The broker waits for this long for members to come back; they need `revoke_ms` before they can.
            "rebalance_timeout_ms": given.revoke_ms + max(given.session_timeout_ms, 10_000),
            # What aiokafka holds ready comes on top of what waits: at most a quarter of it for each broker.
            "max_partition_fetch_bytes": min(_FETCH_BYTES, self._options.max_waiting_bytes),
            "fetch_max_bytes": max(self._options.max_waiting_bytes // 4, min(_FETCH_BYTES, self._options.max_waiting_bytes)),
            "fetch_max_wait_ms": 250,
            "check_crcs": not development.address(),  # its transactions' markers have none
            **given.settings,
        }
        return lasting(AIOKafkaConsumer(**settings))

    def producer(self, transactional_id: str | None = None) -> AIOKafkaProducer:
        """Return a producer that is not started: idempotent, and waiting for all replicas.

        Args:
            transactional_id: for one that writes in transactions.
        """
        given = self._options.output
        settings: dict[str, Any] = {
            **self._common(),
            "enable_idempotence": True,
            "acks": "all",
            "compression_type": None if given.compression == "none" else given.compression,
            "linger_ms": given.linger_ms,
            "max_batch_size": self._batch_bytes,
            "max_request_size": self._options.max_message_bytes + _OVERHEAD,
            **given.settings,
        }
        if transactional_id is not None:
            settings |= {
                "transactional_id": transactional_id,
                "transaction_timeout_ms": self._options.transaction.timeout_ms,
            }
        return lasting(AIOKafkaProducer(**settings))


def lasting(client: ClientT) -> ClientT:
    """Return a client, not started yet, that goes on to follow the cluster whatever happens to it meanwhile.

    aiokafka asks for metadata in a task of its own. A connection that breaks at the wrong moment ends that task, silently,
    and from then on whoever waits for news of the cluster, a producer that has to try again say, waits for ever
    (tests/protocols/kafka/kills.md, killed brokers).
    """
    connections = client_of(client)
    once = connections._md_synchronizer  # noqa: SLF001  (no public way)

    async def again_and_again() -> None:
        while True:
            try:
                await once()
            except Exception:
                logger.warning("aiokafka stopped to follow the cluster; it begins again", exc_info=True)
                await asyncio.sleep(_PAUSE_S)
                if not connections._md_update_waiter.done():  # noqa: SLF001  (at once: somebody may wait already)
                    connections._md_update_waiter.set_result(None)  # noqa: SLF001

    connections._md_synchronizer = again_and_again  # noqa: SLF001
    return client


async def closed(client: AIOKafkaConsumer | AIOKafkaProducer, timeout_s: float) -> bool:
    """Stop a client; False when that takes longer than it may, because the broker does not answer.

    What a producer holds is dropped: whoever wants it written waits for that before. What is left is of a session that
    failed, whose records are read again.
    """
    sending = getattr(getattr(client, "_sender", None), "sender_task", None)
    if sending is not None:
        sending.cancel()
    stopping = asyncio.ensure_future(client.stop())
    done, _ = await asyncio.wait({stopping}, timeout=timeout_s)
    if not stopping.done():
        stopping.cancel()
        await asyncio.wait({stopping}, timeout=1)
        await asyncio.wait({asyncio.ensure_future(client_of(client).close())}, timeout=1)
    if not stopping.cancelled():
        stopping.exception()  # whatever it is: the client is gone
    if isinstance(client, AIOKafkaProducer):
        _drop(client._message_accumulator)  # noqa: SLF001  (no public way)
    if sending is not None and sending.done() and not sending.cancelled():
        sending.exception()  # whoever wrote has been told
    return bool(done)


def _drop(accumulator: Any) -> None:
    """Tell whoever still waits for a record of a producer that has ended; aiokafka lets them wait for ever."""
    left = [*itertools.chain.from_iterable(accumulator._batches.values()), *accumulator._pending_batches]  # noqa: SLF001
    accumulator.fail_all(ProducerClosed())
    for batch in left:
        for future in (batch.future, batch._drain_waiter):  # noqa: SLF001
            if future.done() and not future.cancelled():
                future.exception()  # nobody has to look at it


def client_of(client: AIOKafkaConsumer | AIOKafkaProducer) -> Any:
    """Return the connections of a client."""
    return client._client if isinstance(client, AIOKafkaConsumer) else client.client  # noqa: SLF001


def partitions_of(client: AIOKafkaConsumer | AIOKafkaProducer, topic: str) -> set[int] | None:
    """Return the partitions of a topic; None where nothing is known of it yet."""
    found: set[int] | None = client_of(client).cluster.partitions_for_topic(topic)
    return found


async def has_topic(consumer: AIOKafkaConsumer, topic: str, timeout_s: float) -> bool | None:
    """Tell whether the brokers have a topic, None where they do not say; to ask makes it where they create topics themselves.

    Raises:
        TopicAuthorizationFailedError: nothing of it may be known.
    """
    client = client_of(consumer)
    there: bool | None = None
    try:
        await asyncio.wait_for(client._wait_on_metadata(topic), timeout_s)  # noqa: SLF001  (no public way)
        there = True
    except (TimeoutError, UnknownTopicOrPartitionError):  # it is not there, or nobody has said yet that it is
        if await answers(consumer, timeout_s):
            there = partitions_of(consumer, topic) is not None
    finally:
        if not there:
            client._topics.discard(topic)  # noqa: SLF001  (or it would be asked for again and again, for ever)
    return there


async def answers(client: AIOKafkaConsumer | AIOKafkaProducer, timeout_s: float) -> bool:
    """Tell whether a broker answers at all."""
    try:
        return bool(await asyncio.wait_for(client_of(client).force_metadata_update(), timeout_s))
    except TimeoutError:
        return False
