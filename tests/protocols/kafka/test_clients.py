"""aiokafka's clients as they are made here: what ends them in aiokafka's hands does not."""

import asyncio

import pytest
from aiokafka import AIOKafkaProducer

from servinggraph.protocols.kafka.clients import closed, lasting

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
