"""The mock server: the production path without ports, sync and async."""

from __future__ import annotations

import asyncio
import json
import threading

import numpy as np
import pytest

from servinggraph import Graph, InvalidRequest, routers
from servinggraph.errors import DeadlineExceeded, GraphInvalid, LimitExceeded, NotAcceptable, StepFailed
from servinggraph.testing import FakeModel, FakeStream

X = np.ones((2, 1), np.float32)


def double(value):
    return {"y": value["x"] * 2}


def a_graph(work=double, datatype="FP32", shape=(-1, 1)):
    return Graph("g", {"x": (datatype, list(shape))}).to(work, "model").respond()


def test_a_test_without_asyncio_gets_arrays():
    with a_graph().mock() as server:
        reply = server.infer(x=X, id="r", parameters={"p": 1})

        assert [[2], [2]] == reply.outputs["y"].tolist()
        assert ("g", "1", "r") == (reply.model, reply.version, reply.id)
        assert 0 == server.in_flight


def test_an_asyncio_test_gets_the_same():
    async def check():
        async with a_graph().mock() as server:
            assert [[2], [2]] == (await server.infer({"x": X})).outputs["y"].tolist()

    asyncio.run(check())


def test_threads_may_share_a_server():
    with a_graph().mock() as server:
        sums = []
        threads = [threading.Thread(target=lambda n=n: sums.append(server.infer(x=X * n).outputs["y"].sum())) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    assert [4.0 * n for n in range(8)] == sorted(sums)


def test_a_node_is_replaced_by_a_function_by_tensors_or_by_a_fake():
    graph = a_graph()
    with graph.mock(replace={"model": lambda value: {"y": value["x"] + 10}}) as server:
        assert [[11], [11]] == server.infer(x=X).outputs["y"].tolist()
    with graph.mock(replace={"model": {"y": [1, 2, 3]}}) as server:
        assert [1, 2, 3] == server.infer(x=X).outputs["y"].tolist()
    fake = FakeModel({"y": np.array([7])})
    with graph.mock(replace={"model": fake}) as server:
        assert [7, 7] == server.infer(x=X).outputs["y"].tolist()
        assert [[1], [1]] == fake.calls[0]["x"].tolist()


def test_a_branch_of_a_router_is_replaced_by_its_full_name():
    graph = Graph("g", {"x": ("FP32", [-1, 1])})
    graph.to(routers.Ensemble({"a": double, "b": double}, combine="mean"), "score").respond()
    with graph.mock(replace={"score.b": {"y": np.float32([[4], [4]])}}) as server:
        assert [[3], [3]] == server.infer(x=X).outputs["y"].tolist()


def test_a_node_that_is_not_there_cannot_be_replaced():
    with pytest.raises(GraphInvalid, match="no node 'modle' to replace; did you mean 'model'"):
        a_graph().mock(replace={"modle": {}})


def test_limits_are_the_servers_own():
    async def check():
        async with a_graph(FakeModel({"y": [0]}, delay_s=60)).mock(max_in_flight=1) as server:
            first = asyncio.ensure_future(server.infer(x=X))
            while server.in_flight == 0:
                await asyncio.sleep(0)
            with pytest.raises(LimitExceeded, match="'max_in_flight' = 1"):
                await server.infer(x=X)
            first.cancel()
            with pytest.raises(asyncio.CancelledError):
                await first
            assert 0 == server.in_flight

    asyncio.run(check())


def test_the_cause_of_a_failure_is_the_step_s_own_error():
    error = KeyError("amount")
    graph = a_graph(FakeModel(error=error))
    with graph.mock() as server, pytest.raises(StepFailed, match="node 'model': KeyError") as info:
        server.infer(x=X)

    assert error is info.value.__cause__


def test_a_request_as_bytes_goes_the_way_that_serve_goes():
    body = json.dumps({"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 1], "data": [2]}]}).encode()
    with a_graph().mock() as server:
        reply = server.request("POST", "/v2/models/g/infer?a=b", body)

        assert (200, "application/json", [4.0]) == (
            reply.status,
            reply.headers["content-type"],
            reply.json()["outputs"][0]["data"],
        )
        assert {"ready": True} == server.request("GET", "/v2/health/ready").json()
        assert 404 == server.request("POST", "/v2/models/other/infer", body).status
        assert 0 == server.in_flight


def test_a_request_that_is_cancelled_has_ended_when_the_test_goes_on():
    ended = []

    async def wait(value):
        try:
            await asyncio.sleep(60)
        finally:
            ended.append(True)

    async def check():
        body = json.dumps({"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 1], "data": [2]}]}).encode()
        async with a_graph(wait).mock() as server:
            request = asyncio.ensure_future(server.request("POST", "/v2/models/g/infer", body))
            while server.in_flight == 0:
                await asyncio.sleep(0)
            request.cancel()
            with pytest.raises(asyncio.CancelledError):
                await request
            assert [True] == ended
            assert 0 == server.in_flight

    asyncio.run(check())


@pytest.mark.parametrize(
    ("datatype", "shape", "given", "expected"),
    [
        ("FP32", [-1, 2], [[1, 2.5]], [[1, 2.5]]),
        ("FP32", [-1], (1, 2), [1, 2]),
        ("FP64", [], 1.5, 1.5),
        ("INT8", [-1], [np.int8(1), np.int8(2)], [1, 2]),
        ("FP32", [-1, 2], [np.float32([1, 2]), np.float32([3, 4])], [[1, 2], [3, 4]]),
        ("BOOL", [-1], [True, False], [True, False]),
        ("BYTES", [-1], ["é", b"\xff", b""], ["é".encode(), b"\xff", b""]),
        ("BF16", [-1], [1.5], [1.5]),
        ("FP32", [-1, 2], np.zeros((0, 2), "f4"), []),
        ("FP32", [-1], [], []),
    ],
)
def test_lists_are_made_arrays_of_the_declared_datatype(datatype, shape, given, expected):
    with a_graph(lambda value: {"y": value["x"]}, datatype, shape).mock() as server:
        assert expected == server.infer(x=given).outputs["y"].tolist()


@pytest.mark.parametrize(
    ("datatype", "given", "text"),
    [
        ("INT32", [1.7], "element 0 is 1.7, expected an integer for INT32"),
        ("UINT8", [300], "element 0 is 300, out of range for UINT8"),
        ("FP32", ["1"], "element 0 is '1', expected a number for FP32"),
        ("FP32", [True], "element 0 is True, expected a number for FP32"),
        ("BOOL", [1], "element 0 is 1, expected true or false"),
        ("BYTES", [b"a", 5], "element 1 is 5, expected text"),
        ("FP32", [[1], [2, 3]], "input 'x' is ragged"),
    ],
)
def test_lists_are_never_bent_to_the_declared_datatype(datatype, given, text):
    with a_graph(datatype=datatype, shape=(-1,)).mock() as server, pytest.raises(InvalidRequest, match=text):
        server.infer(x=given)


def test_arrays_are_sent_as_they_are():
    with a_graph().mock() as server:
        with pytest.raises(InvalidRequest, match="data-type is 'FP64', but model 'g' expects 'FP32'"):
            server.infer(x=X.astype(np.float64))
        with pytest.raises(InvalidRequest, match="dtype complex128, which no V2 datatype stands for"):
            server.infer(x=X.astype(complex))
        with pytest.raises(InvalidRequest, match="unexpected inference input 'z'"):
            server.infer(x=X, z=X)


def test_a_graph_that_does_not_load_fails_the_test_and_leaves_nothing_running():
    class Broken:
        def load(self):
            raise OSError("no such model")

        def __call__(self, value):
            return value

    with pytest.raises(StepFailed, match="node 'model': failed to load: OSError: no such model"), a_graph(Broken).mock():
        pass
    assert not [thread for thread in threading.enumerate() if "portal" in thread.name.lower()]


def test_a_body_of_any_kind_is_sent_as_what_it_is():
    graph = (
        Graph("g", "body").to(lambda value, context: [type(value).__name__, context.headers["content-type"]], "look").respond()
    )
    with graph.mock() as server:
        assert ["dict", "application/json"] == server.invoke({"a": 1})
        assert ["list", "application/msgpack"] == server.invoke([X])
        assert ["str", "text/plain; charset=utf-8"] == server.invoke("é")
        assert ["bytes", "application/octet-stream"] == server.invoke(b"a")
        assert ["str", "application/json"] == server.invoke("é", "application/json")
        assert ["bytes", "image/png"] == server.invoke(b"a", content_type="image/png")
        assert ["dict", "application/x-msgpack"] == server.invoke({"a": 1}, "application/x-msgpack")


def test_an_answer_comes_back_as_what_it_is():
    graph = Graph("g", "body").to(lambda value: value, "echo").respond()
    with graph.mock() as server:
        assert "é" == server.invoke("é")
        assert X.tolist() == server.invoke({"x": X})["x"]
        assert X.dtype == server.invoke({"x": X}, accept="application/msgpack")["x"].dtype
        with pytest.raises(NotAcceptable, match="image/png"):
            server.invoke({"a": 1}, accept="image/png")
        assert 0 == server.in_flight


def test_a_free_form_request_has_a_deadline_and_a_cause():
    async def check():
        async def forever(value):
            await asyncio.Event().wait()

        async with Graph("g", "body").to(forever, "model").respond().mock() as server:
            with pytest.raises(DeadlineExceeded):
                await server.invoke("a", timeout_s=0.01)
            assert 0 == server.in_flight

    asyncio.run(check())
    with Graph("g", "body").to(lambda value: 1 / 0, "model").respond().mock() as server:
        with pytest.raises(StepFailed, match="node 'model': ZeroDivisionError") as caught:
            server.invoke("a")
        assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_a_graph_with_tensors_takes_documents_as_well():
    with a_graph().mock() as server:
        assert {"y": [[2], [4]]} == server.invoke({"x": [[1], [2]]})


NUMBERS = [{"y": [1.0]}, {"y": [2.0]}, {"y": [3.0]}]


def test_a_test_without_asyncio_gets_answers_one_by_one():
    model = FakeStream(NUMBERS)
    with a_graph(model).mock() as server:
        answers = server.stream(x=X, id="r")
        assert 0 == model.given
        first = next(answers)

        assert (1, 1, [1], "r") == (model.given, server.in_flight, first.outputs["y"].tolist(), first.id)
        assert [[2], [3]] == [answer.outputs["y"].tolist() for answer in answers]
        assert (0, 0) == (server.in_flight, model.closed)


def test_a_test_without_asyncio_may_leave_a_stream():
    model = FakeStream(NUMBERS)
    with a_graph(model).mock() as server:
        answers = server.stream(x=X)
        next(answers)
        answers.close()

        assert (1, 1, 0) == (model.given, model.closed, server.in_flight)


def test_an_asyncio_test_gets_answers_one_by_one_and_may_leave():
    model = FakeStream(NUMBERS)

    async def check():
        async with a_graph(model).mock() as server:
            assert 3 == len([answer async for answer in server.stream(x=X)])
            answers = server.stream({"x": X})
            await anext(answers)
            await answers.aclose()
            assert (4, 1, 0) == (model.given, model.closed, server.in_flight)

    asyncio.run(check())


def test_a_stream_that_fails_raises_behind_its_answers():
    got = []
    with a_graph(FakeStream(NUMBERS, error=ValueError("broken"))).mock() as server:
        with pytest.raises(StepFailed, match="node 'model': ValueError: broken") as failure:
            got.extend(server.stream(x=X))
        with pytest.raises(InvalidRequest, match="unexpected inference input 'z'"):
            next(server.stream(x=X, z=np.zeros(1)))

        assert 0 == server.in_flight
    assert isinstance(failure.value.__cause__, ValueError)


def test_a_stream_keeps_its_deadline(manual_clock):
    model = FakeStream(NUMBERS, delay_s=0.4)

    async def check():
        async with a_graph(model).mock() as server:

            async def read():
                return [answer async for answer in server.stream(x=X, timeout_s=1)]

            reading = asyncio.ensure_future(read())
            await manual_clock.advance(2)
            assert isinstance(reading.exception(), DeadlineExceeded)
            assert (2, 1) == (model.given, model.closed)

    manual_clock.run(check())


def test_binary_answers_stream_bit_by_bit():
    items = [{"y": np.array([0.1], np.float16)}, {"y": np.array([b"\xff"], object)}, {"y": np.array([np.nan], "f4")}]
    with a_graph(FakeStream(items)).mock() as server:
        half, raw, nan = [answer.outputs["y"] for answer in server.stream(x=X)]

    assert (np.float16(0.1), b"\xff", True) == (half[0], raw[0], bool(np.isnan(nan[0])))
