"""The client for request and reply against the front end: what a call over Kafka is to whoever makes it."""

import asyncio
import contextlib

import numpy as np
import pytest

from servinggraph import Graph, InvalidRequest
from servinggraph.clients.kafka import Client
from servinggraph.errors import DeadlineExceeded, StepFailed
from servinggraph.interfaces import FrontEndOptions
from servinggraph.lifecycle import Serving
from servinggraph.protocols.kafka.server import KafkaFrontEnd

pytestmark = pytest.mark.anyio

ROWS = np.arange(3, dtype="f4")


@pytest.fixture
def anyio_backend():
    return "asyncio"


@contextlib.asynccontextmanager
async def served(kafka, work, inputs=None, **options):
    """Serve a step from a topic; gives a client of it."""
    topic, replies = await kafka.topic("asked"), await kafka.topic("replies", partitions=2)
    block = {
        "brokers": kafka.address,
        "input": {"topics": [topic], "group": topic},
        "output": {"reply_topics": ["replies-*"]},
        "errors": {"topic": await kafka.topic("dead")},
        **options,
    }
    graph = Graph("g", inputs or {"x": ("FP32", [-1])}, kafka=block).to(work, "step").respond()
    serving = Serving(FrontEndOptions())
    await serving.catalog.load([graph.compile()])
    front_end = KafkaFrontEnd(serving)
    await front_end.start()
    try:
        async with Client(kafka.address, topic, replies) as client:
            yield client
    finally:
        await front_end.stop(5)
        await serving.catalog.stop()
        await serving.close()


@pytest.mark.parametrize("delivery", ["at_least_once", "exactly_once"])
async def test_tensors_come_back_with_id_and_parameters(kafka, delivery):
    def work(value, context):
        context.response_parameters["seen"] = context.headers["tenant"]
        return {"y": value["x"] * 2}

    async with served(kafka, work, delivery=delivery) as client:
        answers = await asyncio.gather(
            *(client.infer({"x": ROWS + number}, id=f"r-{number}", headers={"tenant": "a"}) for number in range(100))
        )

    for number, answer in enumerate(answers):
        assert ((ROWS + number) * 2).tolist() == answer.outputs["y"].tolist()
        assert (f"r-{number}", {"seen": "a"}) == (answer.id, dict(answer.parameters))


async def test_errors_are_those_of_the_graph(kafka):
    def work(value):
        if value["x"][0] < 0:
            raise InvalidRequest("x must not be negative")
        raise ZeroDivisionError("no luck")

    async with served(kafka, work) as client:
        with pytest.raises(InvalidRequest, match="x must not be negative") as refused:
            await client.infer({"x": -ROWS - 1})
        with pytest.raises(StepFailed, match="no luck") as failed:
            await client.infer({"x": ROWS})
        with pytest.raises(InvalidRequest, match="unexpected inference input 'z'|'z'"):
            await client.infer({"z": ROWS})

    assert ["step", "step"] == [caught.value.node for caught in (refused, failed)]


async def test_the_deadline_goes_along(kafka):
    begun, cancelled = asyncio.Event(), asyncio.Event()

    async def work(value):
        begun.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.set()
            raise

    async with served(kafka, work) as client:
        timeout_s = 1.0
        while not begun.is_set():  # one that comes too late, or before the group is there, never runs
            with pytest.raises(DeadlineExceeded):
                await client.infer({"x": ROWS}, timeout_s=timeout_s)
            timeout_s *= 2
        async with asyncio.timeout(60):
            await cancelled.wait()


async def test_documents_come_back_as_documents(kafka):
    async with served(kafka, lambda value: {"count": len(value["words"])}, "body", format="json") as client:
        assert {"count": 2} == await client.invoke({"words": ["a", "b"]})
