"""Decoupled graphs through Triton's own Python client, unmodified: stream, callback, empty final answer."""

import asyncio
import queue
import threading

import numpy as np
import pytest
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

from servinggraph import Graph
from servinggraph.interfaces import FrontEndOptions
from servinggraph.lifecycle import Serving
from servinggraph.protocols.grpc.server import GrpcFrontEnd

PATIENCE_S = 60


class Many:
    """A generator that gives 0, 1, 2, ... and can be held between two items; a negative number makes it fail behind them."""

    def __init__(self):
        self.free = threading.Event()
        self.free.set()
        self.ended = 0

    async def items(self, value):
        wanted = int(value["x"][0])
        try:
            for number in range(abs(wanted)):
                yield {"y": np.array([number], np.int32)}
                while not self.free.is_set():
                    await asyncio.sleep(0.002)
            if wanted < 0:
                raise ValueError("broken")
        finally:
            self.ended += 1


@pytest.fixture
def many():
    return Many()


@pytest.fixture
def server(many):
    """Return a client of a server with the graph `many`, on an event loop of its own in a thread."""
    ready, stop = threading.Event(), []

    async def serve():
        serving = Serving(FrontEndOptions())
        front_end = GrpcFrontEnd(serving, "127.0.0.1", 0)
        front_end.bind()
        graph = Graph("many", {"x": ("INT32", [-1])}, outputs={"y": ("INT32", [-1])}).to(many.items, "count").respond()
        await serving.catalog.load([graph.compile()])
        await front_end.start()
        end = asyncio.Event()
        stop.extend([asyncio.get_running_loop(), end, front_end.port, serving.admission])
        ready.set()
        await end.wait()
        await front_end.stop(1)
        await serving.catalog.stop()

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    assert ready.wait(PATIENCE_S)
    loop, end, port, admission = stop
    client = triton.InferenceServerClient(f"127.0.0.1:{port}")
    client.admission = admission
    yield client
    client.close()
    loop.call_soon_threadsafe(end.set)
    thread.join(PATIENCE_S)
    assert not thread.is_alive()


def numbers(*values):
    tensor = triton.InferInput("x", [len(values)], "INT32")
    tensor.set_data_from_numpy(np.array(values, np.int32))
    return [tensor]


class Stream:
    """An open stream of the client, and what its callback got."""

    def __init__(self, client):
        self.client = client
        self.got = queue.Queue()

    def __enter__(self):
        self.client.start_stream(lambda result, error: self.got.put((result, error)))
        return self

    def __exit__(self, *_):
        self.client.stop_stream()

    def ask(self, number, id="", **options):
        self.client.async_stream_infer("many", numbers(number), request_id=id, **options)

    def next(self):
        result, error = self.got.get(timeout=PATIENCE_S)
        if error is not None:
            raise error
        response = result.get_response()
        array = result.as_numpy("y")
        final = response.parameters["triton_final_response"].bool_param
        return response.id, None if array is None else int(array[0]), final


def test_several_answers_come_to_one_request(server):
    with Stream(server) as stream:
        stream.ask(3, "r", enable_empty_final_response=True)

        assert [("r", 0, False), ("r", 1, False), ("r", 2, False), ("r", None, True)] == [stream.next() for _ in range(4)]


def test_without_asking_for_it_no_empty_answer_comes(server):
    with Stream(server) as stream:
        stream.ask(2, "first")
        stream.ask(0, "none")
        stream.ask(1, "last")
        got = sorted(stream.next() for _ in range(3))

    assert [("first", 0, False), ("first", 1, False), ("last", 0, False)] == got
    assert stream.got.empty()


def test_no_answer_at_all_is_an_empty_final_one(server):
    with Stream(server) as stream:
        stream.ask(0, "r", enable_empty_final_response=True)

        assert ("r", None, True) == stream.next()


def test_answers_of_several_requests_interleave(server, many):
    many.free.clear()
    with Stream(server) as stream:
        stream.ask(2, "a")
        stream.ask(2, "b")
        first = {stream.next(), stream.next()}  # both have begun, and neither has ended
        many.free.set()
        second = {stream.next(), stream.next()}

    assert ({("a", 0, False), ("b", 0, False)}, {("a", 1, False), ("b", 1, False)}) == (first, second)


def test_an_error_in_the_middle_comes_behind_the_answers_and_leaves_the_stream_open(server):
    with Stream(server) as stream:
        stream.ask(-2, "r")
        assert [0, 1] == [stream.next()[1] for _ in range(2)]
        with pytest.raises(InferenceServerException, match="node 'count': ValueError: broken"):
            stream.next()
        stream.ask(1, "next")
        assert ("next", 0, False) == stream.next()


def test_a_stream_that_is_cancelled_ends_its_generators(server, many, until):
    many.free.clear()
    stream = Stream(server)
    with stream:
        stream.ask(5)
        stream.next()
        server.stop_stream(cancel_requests=True)

    until(lambda: many.ended == 1 and server.admission.in_flight == 0)


def test_a_call_for_one_answer_says_why_there_is_none(server):
    with pytest.raises(InferenceServerException) as refusal:
        server.infer("many", numbers(3))

    assert "StatusCode.UNIMPLEMENTED" == refusal.value.status()
    assert "ModelInfer RPC doesn't support models with decoupled transaction policy" in refusal.value.message()
