"""Every tensor survives both encodings, in both directions; no element is taken for another kind."""

from __future__ import annotations

import json

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.extra import numpy as st_np

from servinggraph.errors import InvalidRequest
from servinggraph.messages import InferenceRequest, InferenceResponse, RequestedOutput
from servinggraph.protocols.v2 import RequestLimits, encode_response, parse_request
from servinggraph.protocols.v2.client import decode_response, encode_request
from servinggraph.protocols.v2.json_data import decode_data
from servinggraph.tensors import DATATYPES, TensorSpec, datatype_of

SHAPES = st_np.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)
NUMBERS = sorted(set(DATATYPES) - {"BYTES"})
INTEGERS = {name: np.iinfo(dtype) for name, dtype in DATATYPES.items() if dtype.kind in "iu"}
quick = settings(max_examples=60, deadline=None, derandomize=True)


@st.composite
def arrays(draw, datatype, *, text=False):
    shape = draw(SHAPES)
    if datatype == "BYTES":
        element = st.text(max_size=8).map(str.encode) if text else st.binary(max_size=8)
        items = draw(st.lists(element, min_size=int(np.prod(shape)), max_size=int(np.prod(shape))))
        array = np.empty(len(items), np.object_)
        array[:] = items
        return array.reshape(shape)
    if datatype == "BF16":
        bits = draw(st_np.arrays(np.uint16, shape))
        return np.asarray(bits).view(ml_dtypes.bfloat16).reshape(shape)
    return np.asarray(draw(st_np.arrays(DATATYPES[datatype], shape)))


def parsed(body, length, array):
    declared = {"x": TensorSpec(datatype_of(array), None)}
    return parse_request(body, length, "m", declared, None, RequestLimits())


def assert_same(expected, got, *, exactly=True):
    assert (datatype_of(expected), expected.shape) == (datatype_of(got), got.shape)
    if datatype_of(expected) == "BYTES":
        assert expected.tolist() == got.tolist()
    elif exactly:
        assert expected.tobytes() == got.tobytes()
    else:  # JSON has one not-a-number
        numbers = expected == expected  # noqa: PLR0124
        assert (numbers == (got == got)).all()  # noqa: PLR0124
        assert expected[numbers].tobytes() == got[numbers].tobytes()


@pytest.mark.parametrize("datatype", DATATYPES)
@given(data=st.data())
@quick
def test_a_binary_request_is_read_as_it_was_written(datatype, data):
    array = data.draw(arrays(datatype))
    body, length = encode_request({"x": array}, "id", {"p": 1}, ["y"])
    request = parsed(body, length, array)

    assert_same(array, request.inputs["x"])
    assert ("id", 1, ["y"], True) == (request.id, request.parameters["p"], [o.name for o in request.outputs], request.binary)


@pytest.mark.parametrize("datatype", DATATYPES)
@given(data=st.data())
@quick
def test_a_json_request_is_read_as_it_was_written_flat_or_nested(datatype, data):
    array = data.draw(arrays(datatype, text=True))
    items = array.astype(np.float64) if datatype in ("BF16", "FP16", "FP32") else array
    flat = [item.decode() if isinstance(item, bytes) else item for item in items.ravel().tolist()]
    nested = np.array(flat, np.object_).reshape(array.shape).tolist() if array.ndim else flat
    for form in (flat, nested):
        entry = {"name": "x", "datatype": datatype, "shape": array.shape, "data": form}
        request = parsed(json.dumps({"inputs": [entry]}).encode(), None, array)
        assert_same(array, request.inputs["x"], exactly=False)


@pytest.mark.parametrize("datatype", DATATYPES)
@given(data=st.data(), binary=st.booleans())
@quick
def test_an_answer_is_read_as_it_was_written(datatype, data, binary):
    array = data.draw(arrays(datatype, text=True))
    wanted = (RequestedOutput("y", binary, {}),) if data.draw(st.booleans()) else ()
    request = InferenceRequest({}, outputs=wanted, binary=binary)
    encoded = encode_response(InferenceResponse("m", "1", {"y": array}, "id", {"p": 0.5}), request)
    response = decode_response(encoded.body, encoded.header_length)

    assert_same(array, response.outputs["y"], exactly=binary)
    assert ("m", "1", "id", {"p": 0.5}) == (response.model, response.version, response.id, response.parameters)
    assert (encoded.header_length is not None) == (binary and array.size > 0)


@given(data=st.data(), order=st.permutations(sorted(DATATYPES)), flags=st.lists(st.booleans(), min_size=14, max_size=14))
@settings(quick, max_examples=25)
def test_json_and_binary_tensors_mix_in_any_order(data, order, flags):
    outputs = {name: data.draw(arrays(name, text=True)) for name in order}
    wanted = tuple(RequestedOutput(name, flag, {}) for name, flag in zip(order, flags, strict=True))
    encoded = encode_response(InferenceResponse("m", "1", outputs), InferenceRequest({}, outputs=wanted))
    response = decode_response(encoded.body, encoded.header_length)

    assert list(order) == list(response.outputs)
    for name, flag in zip(order, flags, strict=True):
        assert_same(outputs[name], response.outputs[name], exactly=flag)


@pytest.mark.parametrize("datatype", INTEGERS)
@given(number=st.integers(-(2**65), 2**65))
@quick
def test_an_integer_is_itself_or_refused_never_cut_to_width(datatype, number):
    info = INTEGERS[datatype]
    if info.min <= number <= info.max:
        assert [number] == decode_data("x", datatype, [1], [number]).tolist()
    else:
        with pytest.raises(InvalidRequest, match="element 0 is .*, out of range for"):
            decode_data("x", datatype, [1], [number])


@pytest.mark.parametrize("datatype", sorted(set(NUMBERS) - {"BOOL"}))
@given(data=st.data(), size=st.integers(1, 200))
@quick
def test_a_boolean_is_never_taken_for_a_number(datatype, data, size):
    items = data.draw(st.lists(st.integers(0, 3), min_size=size, max_size=size))
    at = data.draw(st.integers(0, size - 1))
    items[at] = data.draw(st.booleans())
    with pytest.raises(InvalidRequest, match=f"element {at} is (True|False), expected"):
        decode_data("x", datatype, [size], items)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-300, 300) | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    max_leaves=12,
)


@pytest.mark.parametrize("datatype", DATATYPES)
@given(value=JSON_VALUES, shape=st.lists(st.integers(0, 3), max_size=3))
@quick
def test_data_of_any_kind_is_an_array_of_the_shape_or_refused(datatype, value, shape):
    try:
        array = decode_data("x", datatype, shape, value)
    except InvalidRequest:
        return

    assert (datatype, tuple(shape)) == (datatype_of(array), array.shape)
    flat = []
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, list):
            waiting.extend(reversed(item))
        else:
            flat.append(item)
    kinds = {"BOOL": (bool,), "BYTES": (str,)}.get(datatype, (int,) if datatype in INTEGERS else (int, float))
    assert all(type(item) in kinds for item in flat)


@pytest.mark.parametrize("datatype", ["FP16", "BF16", "FP32", "FP64"])
@given(number=st.floats(allow_nan=False))
@quick
def test_a_float_is_rounded_as_numpy_does_or_refused(datatype, number):
    with np.errstate(over="ignore"):
        expected = np.array([number]).astype(DATATYPES[datatype])
    if np.isinf(expected[0]) and not np.isinf(number):
        with pytest.raises(InvalidRequest, match="out of range"):
            decode_data("x", datatype, [1], [number])
    else:
        assert expected.tobytes() == decode_data("x", datatype, [1], [number]).tobytes()


@given(body=st.binary(max_size=200), length=st.none() | st.integers(-2, 220))
@quick
def test_bytes_of_any_kind_are_a_request_or_refused(body, length):
    declared = {"x": TensorSpec("FP32", (-1,))}
    try:
        parse_request(body, length, "m", declared, None, RequestLimits())
    except InvalidRequest:
        pass
