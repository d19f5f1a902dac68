"""The broker that the tests of Kafka run against is a real one: it keeps what it acknowledged, and comes back."""

import asyncio

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.errors import KafkaError

pytestmark = pytest.mark.anyio


async def read(address, topic, count, **options):
    async with AIOKafkaConsumer(topic, bootstrap_servers=address, auto_offset_reset="earliest", **options) as consumer:
        return [(await asyncio.wait_for(consumer.getone(), 60)).value for _ in range(count)]


@pytest.mark.slow
async def test_what_was_acknowledged_outlives_a_kill(kafka, anyio_backend):
    topic = await kafka.topic("kept", partitions=2)
    async with AIOKafkaProducer(bootstrap_servers=kafka.address, acks="all") as producer:
        for number in range(10):
            await producer.send_and_wait(topic, str(number).encode(), partition=number % 2)

    kafka.kill()
    kafka.restart()

    assert sorted(str(number).encode() for number in range(10)) == sorted(await read(kafka.address, topic, 10))


async def test_offsets_and_output_of_a_transaction_stand_or_fall_together(kafka, anyio_backend):
    source, target = await kafka.topic("in"), await kafka.topic("out")
    place = TopicPartition(source, 0)
    async with AIOKafkaProducer(bootstrap_servers=kafka.address) as producer:
        await producer.send_and_wait(source, b"1")
    async with AIOKafkaProducer(bootstrap_servers=kafka.address, transactional_id=target) as producer:
        with pytest.raises(ZeroDivisionError):
            async with producer.transaction():
                await producer.send_and_wait(target, b"lost")
                await producer.send_offsets_to_transaction({place: 1}, target)
                raise ZeroDivisionError
        async with producer.transaction():
            await producer.send_and_wait(target, b"kept")
            await producer.send_offsets_to_transaction({place: 1}, target)

    assert [b"kept"] == await read(kafka.address, target, 1, isolation_level="read_committed")
    async with (
        AIOKafkaConsumer(bootstrap_servers=kafka.address, group_id=target, enable_auto_commit=False) as consumer,
        asyncio.timeout(60),
    ):
        while (offset := await consumer.committed(place)) is None:  # seen a little after what was written
            await asyncio.sleep(0.02)
    assert 1 == offset


async def test_a_paused_broker_answers_once_it_goes_on(kafka, anyio_backend):
    topic = await kafka.topic("paused")
    async with AIOKafkaProducer(bootstrap_servers=kafka.address) as producer:
        await producer.send_and_wait(topic, b"0")
        kafka.pause()
        sent = await producer.send(topic, b"1")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.shield(sent), 0.2)

        kafka.resume()

        assert 1 == (await sent).offset


def test_a_broker_stands_still_from_when_it_is_paused(kafka):
    for _ in range(20):
        kafka.pause()
        states = kafka.brokers[0].thread_states()
        kafka.resume()
        assert {"T"} == states


@pytest.mark.slow
async def test_a_topic_outlives_its_leader(kafka_cluster, anyio_backend):
    topic = await kafka_cluster.topic("led", partitions=3)
    async with AIOKafkaProducer(bootstrap_servers=kafka_cluster.address, acks="all", retry_backoff_ms=50) as producer:
        for number in range(3):
            await producer.send_and_wait(topic, str(number).encode(), partition=number)

        kafka_cluster.brokers[0].kill()

        for number in range(3):
            for _ in range(5):  # a leader that is gone may cost the first attempts
                try:
                    await producer.send_and_wait(topic, str(number).encode(), partition=number)
                    break
                except KafkaError:
                    continue
    assert 6 == len(await read(kafka_cluster.address, topic, 6))
