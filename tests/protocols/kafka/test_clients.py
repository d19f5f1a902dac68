"""aiokafka's clients as they are made here: what ends them in aiokafka's hands does not."""

import asyncio

import pytest
from aiokafka import AIOKafkaProducer
from aiokafka.errors import ProducerClosed, RequestTimedOutError, UnknownTopicOrPartitionError

from servinggraph.protocols.kafka.clients import closed, lasting
from servinggraph.protocols.kafka.delivery import cause_of

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("times", [1, 3])
async def test_news_of_the_cluster_come_again_after_a_failure_that_aiokafka_did_not_expect(kafka, times):
    producer = lasting(AIOKafkaProducer(bootstrap_servers=kafka.address, metadata_max_age_ms=60_000))
    await producer.start()
    update, failures = producer.client._metadata_update, [RuntimeError("the handler is closed")] * times

    async def broken(*arguments):
        if failures:
            raise failures.pop()
        return await update(*arguments)

    producer.client._metadata_update = broken
    try:
        async with asyncio.timeout(10):
            assert await producer.client.force_metadata_update()
            await producer.send_and_wait(await kafka.topic("after"), b"1")
    finally:
        assert await closed(producer, 5)


async def test_whoever_waits_for_a_record_of_a_producer_that_ends_is_told(kafka):
    topic = await kafka.topic("ends")
    producer = lasting(AIOKafkaProducer(bootstrap_servers=kafka.address, enable_idempotence=True))
    await producer.start()
    await producer.send_and_wait(topic, b"1")
    begun = asyncio.Event()

    async def never(*arguments, **options):
        begun.set()
        await asyncio.Event().wait()

    producer._sender._send_produce_req = never
    sent = [await producer.send(topic, b"2")]
    await begun.wait()
    sent += [await producer.send(topic, b"3"), await producer.send(topic, b"4")]  # behind the one under way
    await closed(producer, 0.5)

    async with asyncio.timeout(10):
        outcomes = await asyncio.gather(*sent, return_exceptions=True)
    assert [ProducerClosed] * 3 == [type(outcome) for outcome in outcomes]


async def test_a_topic_is_missing_only_if_the_brokers_say_so(kafka):
    producer = lasting(AIOKafkaProducer(bootstrap_servers=kafka.address))
    await producer.start()
    missing = UnknownTopicOrPartitionError()
    try:
        assert missing is await cause_of(missing, producer)

        async def silence(*arguments):
            return False

        producer.client._metadata_update = silence
        assert isinstance(await cause_of(missing, producer), RequestTimedOutError)
    finally:
        assert await closed(producer, 5)
