"""An unmodified tritonclient over gRPC, sync and async, against a server with a port."""

from __future__ import annotations

import asyncio
import queue
import threading
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from ml_dtypes import bfloat16
from tritonclient.utils import InferenceServerException, triton_to_np_dtype

from servinggraph import Context, Graph

ARRAYS: dict[str, np.ndarray[Any, Any]] = {
    "BOOL": np.array([[True, False, True]]),
    "UINT8": np.array([[0, 1, 255]], np.uint8),
    "UINT16": np.array([[0, 1, 65535]], np.uint16),
    "UINT32": np.array([[0, 1, 2**32 - 1]], np.uint32),
    "UINT64": np.array([[0, 1, 2**64 - 1]], np.uint64),
    "INT8": np.array([[-128, 0, 127]], np.int8),
    "INT16": np.array([[-(2**15), 0, 2**15 - 1]], np.int16),
    "INT32": np.array([[-(2**31), 0, 2**31 - 1]], np.int32),
    "INT64": np.array([[-(2**63), 0, 2**63 - 1]], np.int64),
    "FP16": np.array([[0.1, -65504, 6e-8]], np.float16),
    "FP32": np.array([[0.1, -3.4e38, 1e-45]], np.float32),
    "FP64": np.array([[0.1, -1.7e308, 5e-324]], np.float64),
    "BF16": np.array([[0.1, -3.3e38, 1e-38]], bfloat16),
    "BYTES": np.array([[b"", b"\x00\xff raw", "text é".encode()]], np.object_),
}
waiting: list[str] = []


def tell(value, context: Context):
    context.response_parameters["seen"] = str(sorted(context.parameters.items()))
    context.response_parameters["header"] = context.headers.get("x-tenant", "none")
    context.response_parameters["rows"] = 1
    return {"y": value["x"]}


def fail(value):
    raise RuntimeError("the model is broken")


async def wait(value):
    waiting.append("in")
    try:
        await asyncio.sleep(60)
    finally:
        waiting.append("out")


def count(value):
    for number in range(int(value["x"][0])):
        yield {"y": np.array([number], np.float32)}


@pytest.fixture(scope="module")
def server(shared_grpc_server):
    pair, one = {"a": ("INT32", [2]), "b": ("INT32", [2])}, {"x": ("FP32", [-1])}
    sums = {"sum": ("INT32", [2]), "difference": ("INT32", [2])}
    graphs = [
        *(Graph(f"echo_{name}", {"x": (name, [-1, -1])}).to(lambda value: {"y": value["x"]}).respond() for name in ARRAYS),
        Graph("add", pair, outputs=sums).to(lambda a, b: {"sum": a + b, "difference": a - b}).respond(),
        Graph("tell", one, version=7).to(tell).respond(),
        Graph("fail", one).to(fail).respond(),
        Graph("wait", one).to(wait).respond(),
        Graph("count", one).to(count).respond(),
    ]
    return shared_grpc_server(*graphs)


@pytest.fixture
def client(server):
    with triton.InferenceServerClient(server.url) as client:
        yield client


def an_input(name, array, datatype):
    tensor = triton.InferInput(name, list(array.shape), datatype)
    tensor.set_data_from_numpy(array)
    return tensor


def x_of(*numbers):
    return [an_input("x", np.array(numbers, np.float32), "FP32")]


@pytest.mark.parametrize("datatype", sorted(ARRAYS))
def test_every_datatype_comes_back_as_it_went(client, datatype):
    array = ARRAYS[datatype]
    reply = client.infer(f"echo_{datatype}", [an_input("x", array, datatype)]).as_numpy("y")

    # The client reads BF16 as FP32, having no dtype of its own for it.
    expected = array.astype(np.float32) if datatype == "BF16" else array
    assert triton_to_np_dtype(datatype) in (reply.dtype, np.float32)
    assert (expected.shape, expected.tolist()) == (reply.shape, reply.tolist())


def test_outputs_are_those_that_were_asked_for(client):
    inputs = [an_input(name, np.array([5, 2], np.int32), "INT32") for name in "ab"]
    outputs = [triton.InferRequestedOutput("difference")]
    reply = client.infer("add", inputs, outputs=outputs, request_id="r-1")

    assert [0, 0] == reply.as_numpy("difference").tolist()
    assert None is reply.as_numpy("sum")
    assert ("add", "1", "r-1") == (reply.get_response().model_name, reply.get_response().model_version, reply.get_response().id)


def test_parameters_and_metadata_reach_the_graph_and_parameters_come_back(client):
    reply = client.infer(
        "tell", x_of(1), model_version="7", parameters={"who": "me", "n": 3, "yes": True}, headers={"x-tenant": "a"},
        priority=1, timeout=5_000_000,
    ).get_response()  # fmt: skip

    expected = "[('n', 3), ('priority', 1), ('timeout', 5000000), ('who', 'me'), ('yes', True)]"
    assert (expected, "a", 1) == (
        reply.parameters["seen"].string_param, reply.parameters["header"].string_param, reply.parameters["rows"].int64_param
    )  # fmt: skip


@pytest.mark.parametrize("compression", ["gzip", "deflate"])
def test_compressed_requests_are_understood(client, compression):
    array = np.arange(100_000, dtype=np.float32).reshape(1, -1)
    reply = client.infer("echo_FP32", [an_input("x", array, "FP32")], compression_algorithm=compression)

    assert array.tolist() == reply.as_numpy("y").tolist()


@pytest.mark.parametrize(
    ("model", "version", "inputs", "status", "text"),
    [
        ("nope", "", x_of(1), "NOT_FOUND", "Request for unknown model: 'nope' is not found"),
        ("tell", "8", x_of(1), "NOT_FOUND", "Request for unknown model: 'tell' version 8 is not found"),
        ("tell", "x", x_of(1), "INVALID_ARGUMENT", "failed to get model version"),
        ("tell", "", [], "INVALID_ARGUMENT", "expected 1 inputs but got 0 inputs for model 'tell'"),
        ("add", "", x_of(1), "INVALID_ARGUMENT", "unexpected inference input 'x' for model 'add'"),
        ("fail", "", x_of(1), "INTERNAL", "node 'fail': RuntimeError: the model is broken"),
        ("count", "", x_of(1), "UNIMPLEMENTED", "ModelInfer RPC doesn't support models with decoupled transaction policy"),
    ],
)
def test_errors_have_tritons_status_and_text(client, model, version, inputs, status, text):
    with pytest.raises(InferenceServerException, match=text) as error:
        client.infer(model, inputs, model_version=version)

    assert f"StatusCode.{status}" == error.value.status()


def test_requests_may_be_sent_without_waiting(client):
    answers: queue.Queue[Any] = queue.Queue()
    for n in range(20):
        client.async_infer("tell", x_of(n), lambda result, error: answers.put(error or result), request_id=str(n))

    got = [answers.get(timeout=30) for _ in range(20)]
    assert {str(n): [float(n)] for n in range(20)} == {g.get_response().id: g.as_numpy("y").tolist() for g in got}


def test_a_request_that_is_cancelled_leaves_its_slot(client, server, until):
    waiting.clear()
    ended = threading.Event()
    seen = []
    call = client.async_infer("wait", x_of(1), lambda result, error: (seen.append(error), ended.set()))
    until(lambda: waiting == ["in"])
    call.cancel()

    assert ended.wait(30)
    assert "Locally cancelled by application!" in str(seen[0])
    until(lambda: waiting == ["in", "out"])
    until(lambda: server.in_flight == 0)


def test_a_deadline_ends_the_run(client, server, until):
    waiting.clear()
    for seconds in (0.5, 5, 30):  # one that takes longer to the step than it has time may never get there
        with pytest.raises(InferenceServerException, match="Deadline Exceeded|Request timeout expired"):
            client.infer("wait", x_of(1), client_timeout=seconds)
        until(lambda: server.in_flight == 0)
        if waiting:
            break

    until(lambda: waiting == ["in", "out"])


def test_a_stream_takes_any_number_of_requests_for_any_models(client):
    answers: queue.Queue[Any] = queue.Queue()
    client.start_stream(lambda result, error: answers.put(error or result))
    client.async_stream_infer("count", x_of(3), request_id="c", enable_empty_final_response=True)
    client.async_stream_infer("tell", x_of(1), request_id="t")
    client.async_stream_infer("fail", x_of(1), request_id="f")
    got = [answers.get(timeout=30) for _ in range(6)]
    client.stop_stream()

    errors = [str(item) for item in got if isinstance(item, InferenceServerException)]
    assert ["node 'fail': RuntimeError: the model is broken"] == errors
    replies = [item.get_response() for item in got if not isinstance(item, InferenceServerException)]
    finals = [(reply.id, reply.parameters["triton_final_response"].bool_param) for reply in replies]
    assert [("c", False)] * 3 + [("c", True)] == [final for final in finals if final[0] == "c"]
    assert [("t", True)] == [final for final in finals if final[0] == "t"]


def test_a_stream_may_be_cancelled(client, server, until):
    waiting.clear()
    answers: queue.Queue[Any] = queue.Queue()
    client.start_stream(lambda result, error: answers.put(error or result))
    client.async_stream_infer("wait", x_of(1))
    until(lambda: waiting == ["in"])
    client.stop_stream(cancel_requests=True)

    assert "Locally cancelled by application!" in str(answers.get(timeout=30))
    until(lambda: waiting == ["in", "out"])
    until(lambda: server.in_flight == 0)


def test_a_message_far_above_grpc_s_default_comes_and_goes(client):
    array = np.random.default_rng(1).random((1, 8_000_000), np.float32)  # 32 MB
    reply = client.infer("echo_FP32", [an_input("x", array, "FP32")]).as_numpy("y")

    assert np.array_equal(array, reply)


def test_the_async_client_does_the_same(server):
    async def main():
        async with triton_aio.InferenceServerClient(server.url) as client:
            assert await client.is_server_live()
            assert await client.is_model_ready("add")
            replies = await asyncio.gather(*(client.infer("tell", x_of(n), request_id=str(n)) for n in range(20)))
            assert [(str(n), [float(n)]) for n in range(20)] == [
                (r.get_response().id, r.as_numpy("y").tolist()) for r in replies
            ]
            with pytest.raises(InferenceServerException, match="is not found"):
                await client.infer("nope", x_of(1))

            async def requests():
                for model, n in (("count", 2), ("tell", 5), ("nope", 1)):
                    yield {"model_name": model, "inputs": x_of(n), "request_id": model}

            stream = client.stream_infer(requests())
            got = [(r and r.get_response().id, r and r.as_numpy("y").tolist(), str(e or "")) async for r, e in stream]
            assert [("count", [0.0], ""), ("count", [1.0], "")] == [item for item in got if item[0] == "count"]
            assert ("tell", [5.0], "") in got
            assert (None, None, "Request for unknown model: 'nope' is not found") in got

            waiting.clear()
            task = asyncio.ensure_future(client.infer("wait", x_of(1)))
            async with asyncio.timeout(30):
                while waiting != ["in"]:
                    await asyncio.sleep(0.001)
                task.cancel()
                while waiting != ["in", "out"]:
                    await asyncio.sleep(0.001)

    asyncio.run(main())
