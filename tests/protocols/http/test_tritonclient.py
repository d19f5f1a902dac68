"""An unmodified tritonclient, sync and async, against a server with a port."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest
import tritonclient.http as triton
import tritonclient.http.aio as triton_aio
from ml_dtypes import bfloat16
from tritonclient.utils import InferenceServerException, triton_to_np_dtype

from servinggraph import Context, Graph, routers

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
AS_JSON = sorted(set(ARRAYS) - {"FP16", "BF16", "BYTES"})  # the client refuses FP16 and BF16 as JSON; BYTES has to be text


def echo(value):
    return {"y": value["x"]}


def add(a, b):
    return {"sum": a + b, "difference": a - b}


def tell(value, context: Context):
    context.response_parameters["seen"] = str(sorted(context.parameters.items()))
    context.response_parameters["rows"] = 1
    return {"y": value["x"]}


def fail(value):
    raise RuntimeError("the model is broken")


@pytest.fixture(scope="module")
def server(shared_server):
    graphs = [
        Graph(f"echo_{name}", {"x": (name, [-1, -1])}).to(echo).respond()
        for name in ARRAYS
    ]  # fmt: skip
    graphs.append(Graph("add", {"a": ("INT32", [2]), "b": ("INT32", [2])}, outputs={"sum": ("INT32", [2]), "difference": ("INT32", [2])}).to(add).respond())  # fmt: skip
    graphs.append(Graph("tell", {"x": ("FP32", [-1])}, version=7).to(tell).respond())
    graphs.append(Graph("fail", {"x": ("FP32", [-1])}).to(fail).respond())
    for by, names in (("path", ("same", "twice")), ("version", ("v1", "v2"))):
        branches = dict(zip(names, (echo, lambda value: {"y": value["x"] * 2}), strict=True))
        graphs.append(Graph(f"by_{by}", {"x": ("FP32", [-1])}).to(routers.Model(branches, by)).respond())
    return shared_server(*graphs)


@pytest.fixture
def client(server):
    with triton.InferenceServerClient(server.url) as client:
        yield client


def an_input(name: str, array: np.ndarray[Any, Any], datatype: str, *, binary: bool = True, kind: Any = triton) -> Any:
    tensor = kind.InferInput(name, list(array.shape), datatype)
    tensor.set_data_from_numpy(array, binary_data=binary)
    return tensor


def assert_same(expected: np.ndarray[Any, Any], got: np.ndarray[Any, Any]) -> None:
    assert (expected.dtype, expected.shape, expected.tolist()) == (got.dtype, got.shape, got.tolist())


def test_health_and_metadata_are_understood(client):
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("add")
    assert client.is_model_ready("tell", "7")
    assert not client.is_model_ready("tell", "1")
    assert not client.is_model_ready("nope")
    assert "servinggraph" == client.get_server_metadata()["name"]
    assert "binary_tensor_data" in client.get_server_metadata()["extensions"]
    metadata = client.get_model_metadata("add")
    assert ["1"] == metadata["versions"]
    assert {"name": "a", "datatype": "INT32", "shape": [2]} == metadata["inputs"][0]
    assert ["sum", "difference"] == [output["name"] for output in metadata["outputs"]]
    assert ["7"] == client.get_model_metadata("tell", "7")["versions"]


def test_metadata_of_an_unknown_model_is_an_error_that_names_it(client):
    with pytest.raises(InferenceServerException, match="Request for unknown model: 'nope' is not found") as info:
        client.get_model_metadata("nope")

    assert "404" == info.value.status()


@pytest.mark.parametrize("datatype", sorted(ARRAYS))
def test_binary_tensors_come_back_as_they_went(client, datatype):
    array = ARRAYS[datatype]
    reply = client.infer(f"echo_{datatype}", [an_input("x", array, datatype)], outputs=[triton.InferRequestedOutput("y")])

    assert_same(array, reply.as_numpy("y"))


@pytest.mark.parametrize("datatype", AS_JSON)
def test_json_tensors_come_back_as_they_went(client, datatype):
    array = ARRAYS[datatype]
    outputs = [triton.InferRequestedOutput("y", binary_data=False)]
    reply = client.infer(f"echo_{datatype}", [an_input("x", array, datatype, binary=False)], outputs=outputs)

    assert "data" in reply.get_output("y")
    assert_same(array, reply.as_numpy("y"))


def test_text_goes_and_comes_as_json(client):
    array = np.array([["a", "null", "é ☃ 😀"]], np.object_)
    outputs = [triton.InferRequestedOutput("y", binary_data=False)]
    reply = client.infer("echo_BYTES", [an_input("x", array, "BYTES", binary=False)], outputs=outputs)

    assert array.tolist() == reply.as_numpy("y").tolist()


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0)])
@pytest.mark.parametrize("datatype", ["FP32", "BYTES", "BOOL"])
def test_tensors_without_elements_keep_their_shape(client, datatype, shape):
    array = np.zeros(shape, ARRAYS[datatype].dtype)
    reply = client.infer(f"echo_{datatype}", [an_input("x", array, datatype)])

    assert list(shape) == reply.get_output("y")["shape"]


@pytest.mark.parametrize("going", [None, "gzip", "deflate"])
@pytest.mark.parametrize("coming", [None, "gzip", "deflate"])
@pytest.mark.parametrize("rows", [3, 40_000])
def test_compression_works_both_ways_in_any_mix(client, going, coming, rows):
    array = np.arange(rows * 2, dtype=np.float32).reshape(rows, 2)
    reply = client.infer(
        "echo_FP32", [an_input("x", array, "FP32")], request_compression_algorithm=going, response_compression_algorithm=coming
    )

    assert (array == reply.as_numpy("y")).all()


def test_only_the_outputs_that_were_asked_for_come_and_in_that_order(client):
    inputs = [an_input("a", np.array([5, 6], np.int32), "INT32"), an_input("b", np.array([1, 2], np.int32), "INT32")]
    everything = client.infer("add", inputs)
    one = client.infer("add", inputs, outputs=[triton.InferRequestedOutput("difference")])

    assert ["sum", "difference"] == [output["name"] for output in everything.get_response()["outputs"]]
    assert ["difference"] == [output["name"] for output in one.get_response()["outputs"]]
    assert [4, 4] == one.as_numpy("difference").tolist()


def test_binary_and_json_tensors_mix_in_one_request(client):
    inputs = [
        an_input("a", np.array([5, 6], np.int32), "INT32", binary=False),
        an_input("b", np.array([1, 2], np.int32), "INT32"),
    ]
    outputs = [triton.InferRequestedOutput("sum"), triton.InferRequestedOutput("difference", binary_data=False)]
    reply = client.infer("add", inputs, outputs=outputs)

    assert [6, 8] == reply.as_numpy("sum").tolist()
    assert [4, 4] == reply.as_numpy("difference").tolist()


def test_id_version_parameters_priority_and_timeout_arrive(client):
    reply = client.infer(
        "tell",
        [an_input("x", np.ones(2, np.float32), "FP32")],
        model_version="7",
        request_id="r-1",
        priority=3,
        timeout=5_000_000,
        parameters={"text": "a", "number": 3, "flag": True, "real": 0.5},
    ).get_response()

    assert ("r-1", "tell", "7") == (reply["id"], reply["model_name"], reply["model_version"])
    assert (
        "('flag', True), ('number', 3), ('priority', 3), ('real', 0.5), ('text', 'a'), ('timeout', 5000000)"
        in reply["parameters"]["seen"]
    )
    assert 1 == reply["parameters"]["rows"]


def test_an_answer_has_no_id_when_the_request_had_none(client):
    reply = client.infer("echo_FP32", [an_input("x", ARRAYS["FP32"], "FP32")]).get_response()

    assert "id" not in reply


@pytest.mark.parametrize(
    ("model", "tensors", "status", "text"),
    [
        ("nope", {"x": ("FP32", (1,))}, "404", "Request for unknown model: 'nope' is not found"),
        ("tell", {"x": ("FP64", (1,))}, "400", "inference input 'x' data-type is 'FP64', but model 'tell' expects 'FP32'"),
        ("tell", {"x": ("FP32", (1, 1))}, "400", "unexpected shape for input 'x' for model 'tell'. Expected [-1], got [1,1]"),
        ("tell", {"z": ("FP32", (1,))}, "400", "unexpected inference input 'z' for model 'tell'"),
        ("add", {"a": ("INT32", (2,))}, "400", "expected 2 inputs but got 1 inputs for model 'add'. Got input(s) ['a'], but missing required input(s) ['b']"),
        ("fail", {"x": ("FP32", (1,))}, "500", "node 'fail': RuntimeError: the model is broken"),
    ],
)  # fmt: skip
def test_errors_reach_the_caller_with_triton_s_texts(client, model, tensors, status, text):
    inputs = [
        an_input(name, np.zeros(shape, triton_to_np_dtype(datatype)), datatype) for name, (datatype, shape) in tensors.items()
    ]
    with pytest.raises(InferenceServerException) as info:
        client.infer(model, inputs)

    assert status == info.value.status()
    assert text in info.value.message()


def test_an_unknown_output_is_refused_by_name(client):
    inputs = [an_input("a", np.zeros(2, np.int32), "INT32"), an_input("b", np.zeros(2, np.int32), "INT32")]
    with pytest.raises(InferenceServerException, match="unexpected inference output 'product' for model 'add'"):
        client.infer("add", inputs, outputs=[triton.InferRequestedOutput("product")])


def test_query_parameters_are_ignored(client):
    reply = client.infer("echo_FP32", [an_input("x", ARRAYS["FP32"], "FP32")], query_params={"tag": "a"})

    assert ARRAYS["FP32"].tolist() == reply.as_numpy("y").tolist()


def test_requests_side_by_side_each_get_their_own_answer(server):
    with triton.InferenceServerClient(server.url, concurrency=8) as client:
        arrays = [np.full((1, 3), number, np.float32) for number in range(40)]
        pending = [client.async_infer("echo_FP32", [an_input("x", array, "FP32")]) for array in arrays]

        assert [array.tolist() for array in arrays] == [reply.get_result().as_numpy("y").tolist() for reply in pending]


def test_the_asyncio_client_does_the_same(server):
    async def check() -> None:
        async with triton_aio.InferenceServerClient(server.url) as client:
            assert await client.is_server_live()
            assert await client.is_server_ready()
            assert await client.is_model_ready("add")
            assert not await client.is_model_ready("nope")
            assert "tell" == (await client.get_model_metadata("tell", "7"))["name"]
            for datatype, array in ARRAYS.items():
                tensor = an_input("x", array, datatype, kind=triton_aio)
                reply = await client.infer(f"echo_{datatype}", [tensor])
                assert_same(array, reply.as_numpy("y"))
            for datatype in AS_JSON:
                tensor = an_input("x", ARRAYS[datatype], datatype, binary=False, kind=triton_aio)
                outputs = [triton_aio.InferRequestedOutput("y", binary_data=False)]
                reply = await client.infer(f"echo_{datatype}", [tensor], outputs=outputs)
                assert_same(ARRAYS[datatype], reply.as_numpy("y"))
            for coding in ("gzip", "deflate"):
                tensor = an_input("x", ARRAYS["FP32"], "FP32", kind=triton_aio)
                reply = await client.infer(
                    "echo_FP32", [tensor], request_compression_algorithm=coding, response_compression_algorithm=coding
                )
                assert ARRAYS["FP32"].tolist() == reply.as_numpy("y").tolist()
            with pytest.raises(InferenceServerException, match="the model is broken"):
                await client.infer("fail", [an_input("x", np.ones(1, np.float32), "FP32", kind=triton_aio)])

    asyncio.run(check())


def test_bfloat16_of_the_client_is_bfloat16_here(shared_server):
    def times_two(value):
        assert value["x"].dtype == bfloat16
        return {"y": value["x"] * bfloat16(2)}

    server = shared_server(Graph("twice", {"x": ("BF16", [-1])}).to(times_two).respond())
    with triton.InferenceServerClient(server.url) as client:
        reply = client.infer("twice", [an_input("x", np.array([1.5, -3.0], bfloat16), "BF16")])

    assert [3.0, -6.0] == reply.as_numpy("y").tolist()


def test_a_route_and_a_version_of_a_graph_are_asked_for_by_name_and_version(client):
    tensor = an_input("x", np.ones(2, np.float32), "FP32")
    for model, version, factor in (
        ("by_path/routes/same", "", 1),
        ("by_path/routes/twice", "", 2),
        ("by_version", "1", 1),
        ("by_version", "2", 2),
    ):
        answer = client.infer(model, [tensor], model_version=version)
        assert [factor] * 2 == answer.as_numpy("y").tolist()
    assert ["1", "2"] == client.get_model_metadata("by_version")["versions"]
    assert client.is_model_ready("by_version", "2")
    with pytest.raises(InferenceServerException, match="did you mean 'twice'"):
        client.infer("by_path/routes/twise", [tensor])
    with pytest.raises(InferenceServerException, match="version 3 is not found; there are 1, 2"):
        client.infer("by_version", [tensor], model_version="3")
