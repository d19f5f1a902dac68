"""The client for request and reply, against a stand-in that answers as the front end does."""

import asyncio
import contextlib
import json

import numpy as np
import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer

from servinggraph.clients.errors import error_from
from servinggraph.clients.kafka import Client
from servinggraph.errors import (
    DeadlineExceeded,
    ErrorCode,
    InvalidRequest,
    LimitExceeded,
    RequestTooLarge,
    StepFailed,
    Unavailable,
)
from servinggraph.kafka import headers as names
from servinggraph.messages import InferenceRequest, InferenceResponse
from servinggraph.protocols.kafka.clients import lasting
from servinggraph.protocols.v2.request import RequestLimits, parse_request
from servinggraph.protocols.v2.response import encode_response
from servinggraph.tensors import TensorSpec

pytestmark = pytest.mark.anyio

ROWS = np.arange(6, dtype="f4").reshape(2, 3)


@pytest.fixture
def anyio_backend():
    return "asyncio"


@contextlib.asynccontextmanager
async def serving(kafka, answer):
    """Answer the records of a topic: `answer(record headers, body)` gives headers and body, or None for silence."""
    topic, replies = await kafka.topic("requests"), await kafka.topic("replies", partitions=3)

    async def serve():
        async for record in consumer:
            found = names.headers_of(record.headers)
            given = await answer(found, record.value)
            if given is None:
                continue
            own, body = given
            sent = [*own.items(), (names.CORRELATION_ID, found[names.CORRELATION_ID])]
            partition = int(found[names.REPLY_PARTITION])
            await producer.send(found[names.REPLY_TOPIC].decode(), body, headers=sent, partition=partition)

    async with (
        lasting(AIOKafkaConsumer(topic, bootstrap_servers=kafka.address, auto_offset_reset="earliest")) as consumer,
        lasting(AIOKafkaProducer(bootstrap_servers=kafka.address)) as producer,
    ):
        task = asyncio.create_task(serve())
        try:
            yield topic, replies
        finally:
            task.cancel()
            await asyncio.wait([task])


async def double(found, body):
    request = parse_request(
        body, int(found[names.HEADER_LENGTH]), "g", {"x": TensorSpec("FP32", (-1, 3))}, None, RequestLimits()
    )
    answer = InferenceResponse("g", "1", {"y": request.inputs["x"] * 2}, found.get(names.REQUEST_ID, b"").decode())
    wanted = InferenceRequest({}, binary=request.binary)
    encoded = encode_response(answer, wanted)
    return {names.STATUS: b"ok", names.HEADER_LENGTH: str(encoded.header_length).encode()}, encoded.body


def failing(code, message, node=None):
    async def answer(found, body):
        own = {names.STATUS: code.encode()}
        if node:
            own[names.ERROR_NODE] = node.encode()
        return own, json.dumps({"error": message}).encode()

    return answer


async def silence(found, body):
    return None


async def test_an_answer_comes_to_the_call_that_asked(kafka):
    async with serving(kafka, double) as (topic, replies), Client(kafka.address, topic, replies) as client:
        answers = await asyncio.gather(*(client.infer({"x": ROWS + number}, id=str(number)) for number in range(50)))

    for number, answer in enumerate(answers):
        assert str(number) == answer.id
        assert ((ROWS + number) * 2).tolist() == answer.outputs["y"].tolist()


async def test_clients_share_a_reply_topic(kafka):
    async with serving(kafka, double) as (topic, replies), contextlib.AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(Client(kafka.address, topic, replies, reply_partition=0)) for _ in range(3)]
        answers = await asyncio.gather(
            *(client.infer({"x": ROWS + number}) for number, client in enumerate(clients) for _ in range(5))
        )

    expected = [float((ROWS + number)[0, 0] * 2) for number in range(3) for _ in range(5)]
    assert expected == [float(answer.outputs["y"][0, 0]) for answer in answers]


async def test_what_a_request_says_stands_in_headers(kafka):
    seen = []

    async def look(found, body):
        seen.append(found)
        return await double(found, body)

    async with serving(kafka, look) as (topic, replies), Client(kafka.address, topic, replies, graph="g") as client:
        await client.infer({"x": ROWS}, id="r-1", headers={"tenant": "a", "x-deadline": "not mine"})

    (found,) = seen
    assert (b"r-1", b"a", b"g") == (found[names.REQUEST_ID], found["tenant"], found[names.GRAPH])
    assert found[names.DEADLINE].isdigit()


async def test_an_error_is_an_exception_of_its_kind_with_the_node(kafka):
    answer = failing("invalid_request", "x is not right", "score.gbm")
    async with serving(kafka, answer) as (topic, replies), Client(kafka.address, topic, replies) as client:
        with pytest.raises(InvalidRequest, match="x is not right") as caught:
            await client.infer({"x": ROWS})

    assert "score.gbm" == caught.value.node


@pytest.mark.parametrize("code", ErrorCode)
def test_every_code_has_its_class(code):
    assert code is error_from(code.value, "text").code


def test_a_code_that_is_not_known_is_the_servers_fault():
    error = error_from("teapot", "short and stout")

    assert isinstance(error, StepFailed)
    assert "teapot" in str(error)


async def test_no_answer_in_time_is_said_and_forgotten(kafka):
    async with serving(kafka, silence) as (topic, replies), Client(kafka.address, topic, replies, max_in_flight=1) as client:
        for _ in range(2):  # the first one's place is free again
            with pytest.raises(DeadlineExceeded, match=r"within 0\.2 s"):
                await client.infer({"x": ROWS}, timeout_s=0.2)


async def test_a_call_that_is_cancelled_leaves_its_place(kafka):
    async with serving(kafka, silence) as (topic, replies), Client(kafka.address, topic, replies, max_in_flight=1) as client:
        first = asyncio.create_task(client.infer({"x": ROWS}))
        await asyncio.sleep(0)
        with pytest.raises(LimitExceeded, match="max_in_flight"):
            await client.infer({"x": ROWS})
        first.cancel()
        await asyncio.wait([first])
        with pytest.raises(DeadlineExceeded):
            await client.infer({"x": ROWS}, timeout_s=0.1)


async def test_who_waits_when_the_client_is_closed_is_told(kafka):
    async with serving(kafka, silence) as (topic, replies):
        async with Client(kafka.address, topic, replies) as client:
            waiting = asyncio.create_task(client.infer({"x": ROWS}))
            await asyncio.sleep(0)
        with pytest.raises(Unavailable, match="closed"):
            await waiting
        with pytest.raises(Unavailable, match="not connected"):
            await client.infer({"x": ROWS})


async def test_a_request_that_is_too_large_is_refused_here(kafka):
    async with (
        serving(kafka, double) as (topic, replies),
        Client(kafka.address, topic, replies, max_message_bytes=2000) as client,
    ):
        with pytest.raises(RequestTooLarge, match="max_message_bytes is 2000"):
            await client.infer({"x": np.zeros((1000, 3), "f4")})
        assert (2, 3) == (await client.infer({"x": ROWS})).outputs["y"].shape


async def test_a_free_form_answer_is_decoded_by_its_type(kafka):
    async def answer(found, body):
        assert b"application/json" == found[names.CONTENT_TYPE]
        return {names.STATUS: b"ok", names.CONTENT_TYPE: b"application/json"}, body

    async with serving(kafka, answer) as (topic, replies), Client(kafka.address, topic, replies) as client:
        assert {"a": [1]} == await client.invoke({"a": [1]})


async def test_a_reply_topic_that_is_not_there_is_said(kafka):
    with pytest.raises(Unavailable, match="topic 'nowhere' does not exist"):
        async with Client(kafka.address, "any", "nowhere"):
            pass


async def test_brokers_that_are_not_there_are_said():
    with pytest.raises(Unavailable, match="cannot reach Kafka at 127.0.0.1:1"):
        async with Client("127.0.0.1:1", "any", "nowhere"):
            pass


@pytest.mark.slow
async def test_a_broker_that_comes_back_answers_again(kafka):
    async with serving(kafka, double) as (topic, replies), Client(kafka.address, topic, replies) as client:
        await client.infer({"x": ROWS})
        kafka.kill()
        kafka.restart()

        answer = await client.infer({"x": ROWS}, timeout_s=40)

    assert (2, 3) == answer.outputs["y"].shape
