"""Where tensors may stand in a request: raw or typed, which field, how many, how large."""

import time

import grpc
import numpy as np
import pytest
import tritonclient.grpc.service_pb2 as triton

from servinggraph import Graph

pytestmark = pytest.mark.anyio

BAD = grpc.StatusCode.INVALID_ARGUMENT


def echo(datatype="INT32", shape=(-1,)):
    return Graph("g", {"x": (datatype, list(shape))}).to(lambda value: {"y": value["x"]}, "step").respond()


def pair():
    return Graph("g", {"a": ("INT32", [-1]), "b": ("INT32", [-1])}).to(lambda a, b: {"y": a + b}, "step").respond()


def typed(datatype="INT32", shape=(2,), name="x", **contents):
    message = triton.ModelInferRequest(model_name="g")
    entry = message.inputs.add(name=name, datatype=datatype, shape=shape)
    for field, values in contents.items():
        getattr(entry.contents, field).extend(values)
    return message


def raw(*contents, datatype="INT32", shape=(2,), names=("x",)):
    message = triton.ModelInferRequest(model_name="g")
    for name in names:
        message.inputs.add(name=name, datatype=datatype, shape=shape)
    message.raw_input_contents.extend(contents)
    return message


async def refusal(server, message):
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await server.infer(message)
    assert 0 == server.in_flight
    return error.value.code(), error.value.details()


TWO = np.array([1, 2], np.int32).tobytes()


async def test_raw_and_typed_contents_do_not_mix(live):
    async with live(pair()) as server:
        message = raw(TWO, names=("a", "b"))
        message.inputs[1].contents.int_contents.extend([1, 2])
        expected = "contents field must not be specified when using raw_input_contents for 'b' for model 'g'"
        assert (BAD, expected) == await refusal(server, message)


async def test_an_empty_contents_message_beside_raw_contents_is_none(live):
    async with live(echo()) as server:
        message = raw(TWO)
        message.inputs[0].contents.SetInParent()
        assert [1, 2] == server.numbers(await server.infer(message), "<i4")


async def test_inputs_without_data_are_refused_by_name(live):
    async with live(pair()) as server:
        message = raw(TWO, names=("a", "b"))
        assert (BAD, "unable to find data for input tensor 'b' for model 'g' in request.") == await refusal(server, message)
        message = typed(name="a", int_contents=[1, 2])
        message.inputs.add(name="b", datatype="INT32", shape=[2])
        assert (BAD, "unable to find data for input tensor 'b' for model 'g' in request.") == await refusal(server, message)


async def test_raw_contents_that_belong_to_no_input_are_refused(live):
    async with live(echo()) as server:
        status, text = await refusal(server, raw(TWO, TWO))
        assert BAD is status
        assert "unexpected additional input data for model 'g': raw_input_contents has 2 entries for 1 inputs" == text


async def test_raw_contents_have_the_size_that_the_shape_says(live):
    async with live(echo()) as server:
        for data in (b"", TWO[:7], TWO + b"\0"):
            status, text = await refusal(server, raw(data))
            assert (BAD, f"input byte size mismatch for input 'x' for model 'g'. Expected 8, got {len(data)}") == (status, text)


@pytest.mark.parametrize(
    ("datatype", "contents", "of"),
    [
        ("FP32", {"int_contents": [1, 2]}, "INT32"), ("INT32", {"fp32_contents": [1, 2]}, "FP32"),
        ("INT32", {"int_contents": [1, 2], "bool_contents": [True]}, "BOOL"), ("INT64", {"int_contents": [1, 2]}, "INT32"),
        ("BYTES", {"uint_contents": [1, 2]}, "UINT32"), ("UINT8", {"bytes_contents": [b"a"]}, "BYTES"),
    ],
)  # fmt: skip
async def test_contents_in_the_field_of_another_datatype_are_refused(live, datatype, contents, of):
    async with live(echo(datatype)) as server:
        text = (
            f"unexpected explicit tensor data for input tensor 'x' for model 'g' of type '{of}', expected datatype '{datatype}'"
        )
        assert (BAD, text) == await refusal(server, typed(datatype, **contents))


@pytest.mark.parametrize("datatype", ["FP16", "BF16"])
async def test_half_precision_has_no_typed_contents(live, datatype):
    async with live(echo(datatype)) as server:
        status, text = await refusal(server, typed(datatype, fp32_contents=[1, 2]))
        assert (BAD, f"input 'x' is {datatype}, which has no typed contents; send it in 'raw_input_contents'") == (status, text)


@pytest.mark.parametrize(
    ("datatype", "field", "value"),
    [("INT8", "int_contents", 128), ("INT8", "int_contents", -129), ("INT16", "int_contents", 2**15),
     ("UINT8", "uint_contents", 256), ("UINT16", "uint_contents", 2**16)],
)  # fmt: skip
async def test_a_typed_value_out_of_range_is_refused_and_not_cut(live, datatype, field, value):
    async with live(echo(datatype)) as server:
        status, text = await refusal(server, typed(datatype, **{field: [1, value]}))
        assert (BAD, f"input 'x' element 1 is {value}, out of range for {datatype}") == (status, text)


@pytest.mark.parametrize("count", [0, 1, 3])
async def test_typed_contents_have_as_many_elements_as_the_shape(live, count):
    async with live(echo()) as server:
        status, text = await refusal(server, typed(int_contents=[7] * count) if count else _empty())
        assert BAD is status
        assert text.startswith(f"input byte size mismatch for input 'x' for model 'g'. Expected 8, got {4 * count}")
    async with live(echo("BYTES")) as server:
        message = typed("BYTES", bytes_contents=[b"a"] * count)
        message.inputs[0].contents.SetInParent()
        expected = f"expected 2 string elements for inference input 'x' for model 'g', got {count}"
        assert (BAD, expected) == await refusal(server, message)


def _empty():
    message = typed()
    message.inputs[0].contents.SetInParent()
    return message


async def test_a_tensor_of_no_elements_may_be_typed(live):
    async with live(echo()) as server:
        message = typed(shape=(0,))
        message.inputs[0].contents.SetInParent()
        assert [0] == list((await server.infer(message)).outputs[0].shape)


@pytest.mark.parametrize(
    ("shape", "text"),
    [((2**40, 2**40), "causes total element count to exceed maximum size"), ((-1,), "sizes are whole numbers from 0 on"),
     ((2**62,), "input byte size mismatch"), ((1,) * 65, "at most 64 are possible"), ((0, 2**62), None)],
)  # fmt: skip
async def test_impossible_shapes_are_the_caller_s_mistake(live, shape, text):
    async with live(
        Graph("g", {"x": {"datatype": "INT32", "shape": [-1] * len(shape)}}).to(lambda value: value, "n").respond()
    ) as server:
        for message in (raw(TWO, shape=shape), typed(shape=shape, int_contents=[1, 2])):
            status, got = await refusal(server, message)
            assert BAD is status
            assert (text or "input byte size mismatch") in got


async def test_bytes_elements_are_taken_apart_with_triton_s_texts(live):
    async with live(echo("BYTES")) as server:
        one = b"\x01\0\0\0a"
        for data, text in (
            (one, "expected 2 string elements for inference input 'x' for model 'g', got 1"),
            (one * 3, "unexpected number of string elements 3 for inference input 'x'"),
            (one + b"\0\0", "incomplete string length indicator"),
            (one + b"\5\0\0\0a", "incomplete string data"),
        ):
            status, got = await refusal(server, raw(data, datatype="BYTES"))
            assert BAD is status
            assert text in got


async def test_inputs_may_be_of_any_size_as_views_or_copies(live):
    async with live(pair()) as server:
        for count in (1, 8_190, 8_192, 100_000):  # around the size from which raw contents are views of the message
            a = np.arange(count, dtype=np.int32)
            message = raw(a.tobytes(), a.tobytes(), shape=(count,), names=("a", "b"))
            assert (2 * a).tolist() == server.numbers(await server.infer(message), "<i4")


async def test_raw_contents_may_come_before_the_rest_of_a_message(live):
    async with live(echo()) as server:
        a = np.arange(20_000, dtype=np.int32)
        late = raw(shape=(20_000,))
        late.parameters["n"].int64_param = 1
        data = triton.ModelInferRequest(raw_input_contents=[a.tobytes()]).SerializeToString() + late.SerializeToString()
        call = server.channel.unary_unary(
            "/inference.GRPCInferenceService/ModelInfer", None, triton.ModelInferResponse.FromString
        )
        assert a.tolist() == server.numbers(await call(data), "<i4")


async def test_a_large_message_that_is_cut_off_is_the_caller_s_mistake(live):
    async with live(echo()) as server:
        data = raw(bytes(100_000), shape=(25_000,)).SerializeToString()
        call = server.channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        for end in (50_000, len(data) - 1, 2):
            with pytest.raises(grpc.aio.AioRpcError, match="failed to parse the request") as error:
                await call(data[:end])
            assert BAD is error.value.code()


async def test_ten_million_elements_of_text_take_time_in_proportion(live):
    graph = Graph("g", {"x": ("BYTES", [-1])}).to(lambda value: {"n": np.array([len(value["x"])])}, "count").respond()
    async with live(graph) as server:
        took = []
        for count in (100_000, 2_000_000):
            message = typed("BYTES", (count,), bytes_contents=[b"x"] * count)
            began = time.process_time()  # which stands still while others have the processor
            assert [count] == server.numbers(await server.infer(message), "<i8")
            took.append(time.process_time() - began)

    assert took[1] < 20 * 10 * took[0]  # quadratic would be 400 times
