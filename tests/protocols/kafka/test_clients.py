"""aiokafka's clients as they are made here: what ends them in aiokafka's hands does not."""

import asyncio

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka.errors import ProducerClosed, RequestTimedOutError, UnknownTopicOrPartitionError

from servinggraph.protocols.kafka import clients, delivery as deliveries
from servinggraph.protocols.kafka.clients import answers, closed, has_topic, lasting
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
        async with asyncio.timeout(60):
            assert await producer.client.force_metadata_update()
            await producer.send_and_wait(await kafka.topic("after"), b"1")
    finally:
        assert await closed(producer, 60)


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

    async with asyncio.timeout(60):
        outcomes = await asyncio.gather(*sent, return_exceptions=True)
    assert [ProducerClosed] * 3 == [type(outcome) for outcome in outcomes]


async def test_a_topic_is_missing_only_if_the_brokers_say_so(kafka, monkeypatch):
    monkeypatch.setattr(deliveries, "_ANSWER_S", 60.0)
    producer = lasting(AIOKafkaProducer(bootstrap_servers=kafka.address))
    await producer.start()
    missing, topic = UnknownTopicOrPartitionError(), await kafka.topic("there")
    try:
        assert missing is await cause_of(missing, producer, "nowhere")
        await producer.send_and_wait(topic, b"1")
        assert isinstance(await cause_of(missing, producer, topic), RequestTimedOutError)

        async def silence(*arguments):
            return False

        producer.client._metadata_update = silence
        assert isinstance(await cause_of(missing, producer, "nowhere"), RequestTimedOutError)
    finally:
        assert await closed(producer, 60)


async def test_a_topic_that_the_brokers_are_slow_to_tell_of_is_not_taken_for_missing(kafka, monkeypatch):
    consumer, gate = lasting(AIOKafkaConsumer(bootstrap_servers=kafka.address)), asyncio.Event()
    await consumer.start()
    update = consumer._client._metadata_update

    async def slow(*arguments):
        await gate.wait()
        return await update(*arguments)

    async def silence(client, timeout_s):
        return False

    async def late(client, timeout_s):
        gate.set()
        return await answers(client, 60)

    consumer._client._metadata_update = slow
    topic = await kafka.topic("slow")
    try:
        monkeypatch.setattr(clients, "answers", silence)
        assert await has_topic(consumer, topic, 0.01) is None
        monkeypatch.setattr(clients, "answers", late)
        assert await has_topic(consumer, topic, 0.01) is True
        assert await has_topic(consumer, "nowhere", 0.01) is False
        assert {topic} == consumer._client._topics
    finally:
        assert await closed(consumer, 60)
