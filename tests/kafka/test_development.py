"""The development broker: what the front end needs of a broker works there, and every connection of the process goes to it."""

import asyncio
import sys

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer

from servinggraph import Graph
from servinggraph.kafka import ConnectionOptions
from servinggraph.kafka.development import address, development_broker
from servinggraph.server import CannotServe, Server, ServerOptions

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend():
    return "asyncio"


@pytest.mark.slow
async def test_records_transactions_and_groups_work_there():
    elsewhere = ConnectionOptions(brokers="kafka.invalid:9092")
    with development_broker() as where:
        assert where == address()
        settings = elsewhere.client_settings()
        async with AIOKafkaProducer(**settings, transactional_id="one") as producer, producer.transaction():
            for number in range(20):
                await producer.send("in", str(number).encode(), key=str(number).encode())
        async with AIOKafkaConsumer(
            "in",
            **settings,
            group_id="g",
            auto_offset_reset="earliest",
            enable_auto_commit=False,
            isolation_level="read_committed",
        ) as consumer:
            read = [(await asyncio.wait_for(consumer.getone(), 60)).value for _ in range(20)]
            await consumer.commit()
            kept = [await consumer.committed(place) for place in consumer.assignment()]

    assert {str(number).encode() for number in range(20)} == set(read)
    assert 20 == sum(offset for offset in kept if offset is not None)
    assert address() is None
    assert ["kafka.invalid:9092"] == elsewhere.client_settings()["bootstrap_servers"]


async def test_a_server_runs_it_for_as_long_as_it_lives(graph):
    announced = []

    def announce(server):
        announced.append((server.development_broker, address()))
        server.stop()

    await Server([graph.compile()], ServerOptions(http_port=0, grpc_port="off", kafka_dev=True), announce).run()

    assert [(announced[0][0], announced[0][0])] == announced
    assert announced[0][0].startswith("127.0.0.1:")
    assert address() is None


async def test_a_server_says_what_is_not_installed(graph, monkeypatch):
    monkeypatch.setitem(sys.modules, "confluent_kafka", None)
    server = Server([graph.compile()], ServerOptions(http_port=0, grpc_port="off", kafka_dev=True), lambda server: None)

    with pytest.raises(CannotServe, match=r"pip install 'servinggraph\[kafka-dev\]'"):
        await server.run()


@pytest.fixture
def graph():

    graph = Graph("same", inputs={"x": ("FP32", [-1])})
    graph.to(lambda x: {"y": x}).respond()
    return graph


@pytest.mark.slow
async def test_a_stream_that_began_there_is_served_exactly_once():
    from servinggraph.interfaces import FrontEndOptions
    from servinggraph.lifecycle import Serving
    from servinggraph.protocols.kafka.server import KafkaFrontEnd

    kafka = {
        "brokers": "kafka.invalid:9092",
        "input": {"topics": ["in"], "group": "g"},
        "output": {"topic": "out"},
        "delivery": "exactly_once",
    }
    graph = Graph("same", inputs="body", kafka=kafka)
    graph.to(lambda value: value).respond()
    with development_broker() as where:
        serving = Serving(FrontEndOptions())
        await serving.catalog.load([graph.compile()])
        front_end = KafkaFrontEnd(serving)
        await front_end.start()
        try:
            async with AIOKafkaProducer(bootstrap_servers=where, transactional_id="p") as producer:
                for number in range(3):  # the second one lies behind the markers of the first
                    async with producer.transaction():
                        await producer.send("in", str(number).encode(), headers=[("content-type", b"application/json")])
            found = []
            async with AIOKafkaConsumer(
                "out", bootstrap_servers=where, auto_offset_reset="earliest", isolation_level="read_committed", check_crcs=False
            ) as consumer:
                found = [(await asyncio.wait_for(consumer.getone(), 60)).value for _ in range(3)]
        finally:
            await front_end.stop(5)
            await serving.catalog.stop()
            await serving.close()

    assert [b"0", b"1", b"2"] == sorted(found)
