"""`publish` and `queue` on a real broker, through the mock server; the stage behind a queue through the Kafka front end."""

import asyncio
import contextlib
import gc
import json

import numpy as np
import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka.errors import KafkaConnectionError
from aiokafka.partitioner import DefaultPartitioner

from servinggraph import Graph
from servinggraph.errors import GraphInvalid, InvalidRequest, StepFailed, Unavailable
from servinggraph.interfaces import FrontEndOptions
from servinggraph.kafka import headers as names
from servinggraph.kafka.development import development_broker
from servinggraph.lifecycle import Serving
from servinggraph.protocols.kafka.server import KafkaFrontEnd
from servinggraph.steps import Publish, Queue
from servinggraph.steps.topics import writer as writers
from servinggraph.steps.topics.publish import PublishOptions

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend():
    return "asyncio"


async def read(kafka, topic, count):
    async with AIOKafkaConsumer(topic, bootstrap_servers=kafka.address, auto_offset_reset="earliest") as consumer:
        return [(await asyncio.wait_for(consumer.getone(), 60)) for _ in range(count)]


async def until_written(server, number):
    """Ask again and again, as the time for writing is less than a machine may stand still."""
    async with asyncio.timeout(60):
        while True:
            with contextlib.suppress(Unavailable):
                return await server.infer(x=[number])


def tensors(*nodes, **options):
    graph = Graph("g", inputs={"x": ("FP32", [-1])}, **options)
    last = graph
    for number, node in enumerate(nodes):
        last = last.to(node, f"then{number}" if callable(node) else None)
    last.respond()
    return graph


async def test_what_is_published_passes_on_as_it_is(kafka):
    topic = await kafka.topic("side")
    graph = tensors(Publish(topic, kafka.address, key="tensor:x", headers=["tenant"]), lambda value: {"y": value["x"] * 2})

    async with graph.mock() as server:
        answer = await server.infer({"x": np.array([3, 4], "f4")}, id="r-1", headers={"tenant": "a", "other": "b"})

    assert [6, 8] == answer.outputs["y"].tolist()
    (record,) = await read(kafka, topic, 1)
    assert (b"3.0", {"x": [3.0, 4.0]}) == (record.key, json.loads(record.value))
    expected = {"content-type": b"application/json", "x-request-id": b"r-1", "tenant": b"a"}
    assert expected == dict(record.headers)


async def test_the_compiler_knows_what_passes_through(kafka):
    graph = tensors(Publish("t", kafka.address), lambda x, z: {"y": z})

    with pytest.raises(GraphInvalid, match="input 'z' is provided by nobody: what reaches the node is x"):
        graph.compile()


async def test_a_body_is_published_too(kafka):
    topic = await kafka.topic("side")
    graph = Graph("g", inputs="body")
    graph.to(Publish(topic, kafka.address, key="field:user.id")).respond()

    async with graph.mock() as server:
        assert {"user": {"id": 7}} == await server.invoke({"user": {"id": 7}})

    (record,) = await read(kafka, topic, 1)
    assert (b"7", {"user": {"id": 7}}) == (record.key, json.loads(record.value))


@pytest.mark.parametrize(
    ("format", "media"),
    [
        ("json", "application/json"),
        ("msgpack", "application/msgpack"),
        ("v2-json", "application/json"),
        ("v2-binary", "application/octet-stream"),
        ("auto", "application/octet-stream"),
    ],
)
async def test_each_format_says_what_it_is(kafka, format, media):
    topic = await kafka.topic("side")

    async with tensors(Publish(topic, kafka.address, format=format)).mock() as server:
        await server.infer(x=[1.0])

    (record,) = await read(kafka, topic, 1)
    headers = dict(record.headers)
    assert media.encode() == headers["content-type"]
    assert (names.HEADER_LENGTH in headers) is (media == "application/octet-stream")


async def test_a_body_in_a_format_for_tensors_is_refused(kafka):
    graph = Graph("g", inputs="body")
    graph.to(Publish("t", kafka.address, format="v2-json")).respond()

    async with graph.mock() as server:
        with pytest.raises(InvalidRequest, match="is for tensors by name, got list; 'json' takes any value"):
            await server.invoke([1])


async def test_a_record_that_is_too_large_fails_and_says_the_limits(kafka):
    topic = await kafka.topic("side")

    async with tensors(Publish(topic, kafka.address, max_message_bytes=1024)).mock() as server:
        with pytest.raises(StepFailed, match="does not take a record of this size"):
            await server.infer({"x": np.arange(1000, dtype="f4")})


async def test_brokers_that_are_not_there_fail_the_request_or_drop_the_copy(kafka, caplog):
    copy = Publish("t", "127.0.0.1:1", write_timeout_ms=500)
    aside = Publish("t", "127.0.0.1:1", write_timeout_ms=500, on_failure="drop")

    async with tensors(copy).mock() as server:
        with pytest.raises(Unavailable, match="not written to topic 't' at 127.0.0.1:1"):
            await server.infer(x=[1.0])
    async with tensors(aside).mock() as server:
        assert [1.0] == (await server.infer(x=[1.0])).outputs["x"].tolist()

    (line,) = [record for record in caplog.records if record.name == "servinggraph.steps"]
    assert "1 dropped" in line.getMessage() or "1 not delivered" in line.getMessage()


async def test_copies_that_are_not_waited_for_are_written_before_the_end(kafka):
    topic = await kafka.topic("side")

    async with tensors(Publish(topic, kafka.address, on_failure="drop")).mock() as server:
        for number in range(100):
            await server.infer(x=[float(number)], id=str(number))

    assert [str(number).encode() for number in range(100)] == [record.key for record in await read(kafka, topic, 100)]


async def test_more_copies_than_may_wait_are_dropped_and_told_of_once(kafka, caplog):
    async with tensors(Publish("t", "127.0.0.1:1", write_timeout_ms=60_000, on_failure="drop", max_waiting=3)).mock() as server:
        for _ in range(10):
            await server.infer(x=[1.0])
        told = [record.getMessage() for record in caplog.records if record.name == "servinggraph.steps"]
        assert ["node 'publish': 1 dropped, the last one because: 3 wait already (limit 'max_waiting')"] == told


async def test_requests_that_are_joined_cannot_be_told_apart(kafka):
    with pytest.raises(GraphInvalid, match="step 'publish' writes each request by itself"):
        tensors(Publish("t", kafka.address), batch={"max_rows": 8}).compile()
    with pytest.raises(GraphInvalid, match="step 'queue' writes each request by itself"):
        tensors(Queue("t", kafka.address, batch=True)).compile()


async def test_a_key_from_nowhere_is_refused_at_the_start():
    with pytest.raises(GraphInvalid, match="is no place of a key"):
        tensors(Publish("t", "127.0.0.1:1", key="cookie:x")).compile()


async def test_a_queue_answers_where_the_request_lies(kafka):
    topic = await kafka.topic("later")

    async with tensors(Queue(topic, kafka.address, graph="second")).mock() as server:
        first = await server.infer(x=[1.0], id="r-1")
        second = await server.infer(x=[1.0])

    one, two = await read(kafka, topic, 2)
    assert [b"r-1"] == first.outputs["id"].tolist()
    assert [[topic.encode()], [0], [0]] == [first.outputs[name].tolist() for name in ("topic", "partition", "offset")]
    assert (b"r-1", b"r-1", b"second") == (one.key, dict(one.headers)[names.REQUEST_ID], dict(one.headers)[names.GRAPH])
    assert second.outputs["id"].tolist() == [two.key] != [b""]


@pytest.mark.slow
@pytest.mark.parametrize("of", ["tensors", "body"])
async def test_the_stage_behind_a_queue_answers_under_the_same_id(kafka, of):
    later, done = await kafka.topic("later"), await kafka.topic("done")
    inputs = {"x": ("FP32", [-1])} if of == "tensors" else "body"
    stage = {"input": {"topics": [later], "group": later}, "output": {"topic": done}, "brokers": kafka.address}
    first, second = Graph("first", inputs=inputs), Graph("second", inputs=inputs, kafka=stage)
    first.to(Queue(later, kafka.address)).respond()
    second.to((lambda value: {"y": value["x"] * 2}) if of == "tensors" else (lambda value: value["x"])).respond()
    serving = Serving(FrontEndOptions())
    await serving.catalog.load([second.compile()])
    front_end = KafkaFrontEnd(serving)
    await front_end.start()
    try:
        async with first.mock() as server:
            if of == "tensors":
                assert [b"r-1"] == (await server.infer(x=[2.0], id="r-1")).outputs["id"].tolist()
            else:
                assert 0 == (await server.invoke({"x": 4.0}))["offset"][0]
        (record,) = await read(kafka, done, 1)
    finally:
        await front_end.stop(5)
        await serving.catalog.stop()
        await serving.close()

    headers = dict(record.headers)
    assert b"ok" == headers[names.STATUS], record.value
    if of == "tensors":
        assert b"r-1" == headers[names.REQUEST_ID]
    else:
        assert 4.0 == json.loads(record.value)


@pytest.mark.slow
async def test_a_broker_that_comes_back_takes_what_follows(kafka):
    topic = await kafka.topic("later")

    async with tensors(Queue(topic, kafka.address, write_timeout_ms=30_000)).mock() as server:
        await server.infer(x=[1.0])
        kafka.kill()
        kafka.restart()
        again = await server.infer(x=[2.0])

    assert [1] == again.outputs["offset"].tolist()


async def test_a_connection_that_takes_longer_than_a_request_may_wait_is_there_for_those_that_follow(kafka, monkeypatch):
    topic, go_on, begun = await kafka.topic("later"), asyncio.Event(), []
    start = AIOKafkaProducer.start

    async def slowly(producer):
        begun.append(producer)
        await go_on.wait()
        await start(producer)

    monkeypatch.setattr(AIOKafkaProducer, "start", slowly)
    async with tensors(Queue(topic, kafka.address, write_timeout_ms=200)).mock() as server:
        for _ in range(3):
            with pytest.raises(Unavailable, match="not written to topic"):
                await server.infer(x=[1.0])
        go_on.set()
        await until_written(server, 2.0)

    assert 1 == len(begun)


async def test_a_connection_that_fails_once_nobody_waits_for_it_is_begun_anew(kafka, monkeypatch, caplog):
    topic, fail, failed = await kafka.topic("later"), asyncio.Event(), asyncio.Event()
    start = AIOKafkaProducer.start

    async def at_first_not(producer):
        if not failed.is_set():
            await fail.wait()
            failed.set()
            raise KafkaConnectionError("not today")
        await start(producer)

    monkeypatch.setattr(AIOKafkaProducer, "start", at_first_not)
    async with tensors(Queue(topic, kafka.address, write_timeout_ms=200)).mock() as server:
        with pytest.raises(Unavailable, match="not written to topic"):
            await server.infer(x=[1.0])
        fail.set()
        await failed.wait()
        await until_written(server, 2.0)
    gc.collect()

    assert [] == [record.getMessage() for record in caplog.records if "never retrieved" in record.getMessage()]


async def test_who_waits_for_a_connection_that_does_not_come_is_told_when_the_writer_ends(monkeypatch):
    begun = asyncio.Event()

    async def never(producer):
        begun.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(AIOKafkaProducer, "start", never)
    monkeypatch.setattr(writers, "_CLOSE_S", 0.01)
    writer = writers.TopicWriter(PublishOptions(topic="t", brokers="127.0.0.1:1"))
    asked = asyncio.ensure_future(writer.write(writers.Record(b"1", None, {})))
    await begun.wait()
    await writer.close()

    with pytest.raises(Unavailable, match="not written to topic 't'"):
        await asked


async def test_the_development_broker_takes_the_records_of_a_process_that_has_one():
    with development_broker():
        async with tensors(Queue("later", "kafka.invalid:9092")).mock() as server:
            assert [0] == (await server.infer(x=[1.0])).outputs["offset"].tolist()


@pytest.mark.slow
async def test_a_broker_that_stood_still_fails_what_waited_and_takes_what_follows(kafka):
    topic = await kafka.topic("later")

    async with tensors(Queue(topic, kafka.address, write_timeout_ms=1500)).mock() as server:
        await until_written(server, 1.0)
        kafka.pause()
        with pytest.raises(Unavailable, match="not written to topic"):
            await server.infer(x=[2.0])
        kafka.resume()
        answer = await until_written(server, 3.0)  # the connections that stood still have to be given up first

    assert answer.outputs["offset"].tolist()[0] >= 1


async def test_a_record_that_the_topic_refuses_does_not_fail_those_beside_it_and_after_it(kafka):
    """A producer fails for good in the partition of a record that was refused: what comes next needs another one."""
    topic = await kafka.topic("small", partitions=4, settings={"max.message.bytes": "20000"})

    def partition(number):
        return DefaultPartitioner()(str(number).encode(), [0, 1, 2, 3], [0, 1, 2, 3])

    refused = np.arange(10_000, dtype="f4")  # its key is its first element
    beside = [number for number in map(float, range(1, 100)) if partition(number) != partition(0.0)]
    async with tensors(Queue(topic, kafka.address, key="tensor:x", write_timeout_ms=60_000)).mock() as server:
        for _ in range(3):
            asked = [server.infer({"x": refused}), *(server.infer(x=[number]) for number in beside)]
            failure, *answers = await asyncio.gather(*asked, return_exceptions=True)
            assert isinstance(failure, StepFailed), failure
            assert "does not take a record of this size" in str(failure)
            assert [] == [answer for answer in answers if isinstance(answer, BaseException)]
            await server.infer(x=[0.0])
