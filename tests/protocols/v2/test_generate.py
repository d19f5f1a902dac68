"""The mapping of the generate extension: JSON keys to tensors and parameters, and back."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, strategies as st
from ml_dtypes import bfloat16

from servinggraph.errors import InvalidRequest, StepFailed
from servinggraph.messages import InferenceResponse
from servinggraph.protocols.v2.generate import encode_generated, event, parse_generate
from servinggraph.tensors import TensorSpec


def inputs(**declared):
    return {name: TensorSpec(datatype, tuple(shape)) for name, (datatype, shape) in declared.items()}


def parse(document, **declared):
    body = document if isinstance(document, bytes) else json.dumps(document).encode()
    return parse_generate(body, "m", inputs(**declared))


@pytest.mark.parametrize(
    ("shape", "value", "expected"),
    [
        ([], 1, ()),
        ([1], 1, (1,)),
        ([-1], 1, (1,)),
        ([-1], [1], (1,)),
        ([-1], [1, 2, 3], (3,)),
        ([-1], [], (0,)),
        ([2], [1, 2], (2,)),
        ([-1, 3], [1, 2, 3], (1, 3)),
        ([-1, 3], [1, 2, 3, 4, 5, 6], (2, 3)),
        ([-1, -1], [1, 2, 3], (1, 3)),
        ([2, -1, 2], [1, 2, 3, 4, 5, 6, 7, 8], (2, 2, 2)),
        ([-1, 2, -1], [1, 2, 3, 4], (1, 2, 2)),
        ([-1, -1], [[1, 2], [3, 4]], (2, 2)),
        ([-1, 2], [[1, 2]], (1, 2)),
        ([-1, 0], [], (1, 0)),
    ],
)
def test_a_shape_is_that_of_nested_arrays_or_follows_from_the_declared_one(shape, value, expected):
    assert expected == parse({"x": value}, x=("INT32", shape)).inputs["x"].shape


@pytest.mark.parametrize(
    ("shape", "value"), [([2], [1]), ([2], 1), ([], [1, 2]), ([-1, 3], [1, 2]), ([2, -1], [1, 2, 3]), ([0], [1]), ([-1, 0], 1)]
)
def test_elements_that_do_not_fill_the_declared_shape_are_refused(shape, value):
    with pytest.raises(InvalidRequest, match="The schema can not convert input 'x' to tensor with proper shape"):
        parse({"x": value}, x=("INT32", shape))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ([[1, 2], [3, 4]], "unexpected shape for input 'x'"),
        ({"a": 1}, "Unable to parse 'x': it is an input"),
        (["a", "b"], "expected an integer"),
        (True, "expected an integer"),
        (2**40, "out of range"),
        (None, "missing required input"),
    ],
)
def test_what_an_input_cannot_be_is_refused_by_name(value, text):
    with pytest.raises(InvalidRequest, match=text) as refusal:
        parse({"x": value}, x=("INT32", [-1]))

    assert "'x'" in str(refusal.value)


@pytest.mark.parametrize("value", [[[1], [2, 3]], [[1, 2], 3], [[1, 2], [[3], [4]]]])
def test_ragged_arrays_are_refused(value):
    with pytest.raises(InvalidRequest, match="input 'x' is ragged"):
        parse({"x": value}, x=("INT32", [-1, -1]))


def test_nested_arrays_as_deep_as_a_client_likes_are_refused():
    with pytest.raises(InvalidRequest):
        parse(b'{"x": ' + b"[" * 200 + b"]" * 200 + b"}", x=("INT32", [-1]))


@pytest.mark.parametrize(
    ("datatype", "value", "expected"),
    [
        ("BYTES", "é\n", ["é\n".encode()]),
        ("BYTES", ["a", ""], [b"a", b""]),
        ("BOOL", [True, False], [True, False]),
        ("FP32", 0.5, [0.5]),
        ("FP16", [1, 2.5], [1, 2.5]),
        ("UINT64", 2**64 - 1, [2**64 - 1]),
    ],
)
def test_every_datatype_may_come_as_json(datatype, value, expected):
    assert expected == parse({"x": value}, x=(datatype, [-1])).inputs["x"].tolist()


def test_not_a_number_and_infinity_are_bare_tokens():
    assert "[nan, inf]" == str(parse(b'{"x": [NaN, Infinity]}', x=("FP32", [-1])).inputs["x"].tolist())


def test_parameters_are_an_object_and_all_that_is_no_input():
    request = parse({"x": 1, "id": "r", "parameters": {"a": 1, "b": None}, "c": "t", "d": 0.5, "e": None}, x=("INT32", [1]))

    assert ("r", {"a": 1, "c": "t", "d": 0.5}) == (request.id, request.parameters)


def test_an_input_goes_before_the_meaning_that_its_name_has_otherwise():
    request = parse({"id": "text", "parameters": "more"}, id=("BYTES", [1]), parameters=("BYTES", [1]))

    assert ([b"text"], [b"more"], "") == (request.inputs["id"].tolist(), request.inputs["parameters"].tolist(), request.id)


@pytest.mark.parametrize(
    ("document", "text"),
    [
        (b"[]", "expected an object at the top"),
        (b"{", "failed to parse the request JSON buffer"),
        (b"", "failed to parse the request JSON buffer"),
        ({"x": 1, "id": 7}, "Unable to parse 'id'"),
        ({"x": 1, "parameters": 7}, "Unable to parse 'parameters'"),
        ({"x": 1, "other": [1]}, "parameter 'other' has invalid type"),
        ({"x": 1, "parameters": {"a": {}}}, "parameter 'a' has invalid type"),
        ({"x": 1, "parameters": {"triton_a": 1}}, "'triton_' are reserved"),
        ({"x": 1, "triton_a": 1}, "'triton_' are reserved"),
        ({"x": 1, "a": 1, "parameters": {"a": 1}}, "parameter 'a' is there twice"),
        ({}, "missing required input"),
    ],
)
def test_what_no_request_can_be_is_refused(document, text):
    with pytest.raises(InvalidRequest, match=text):
        parse(document, x=("INT32", [1]))


@pytest.mark.parametrize(
    "text",
    [
        b'{"x": 1, "x": 2}',
        b'{"x": 1, "x": 1}',
        b'{"x": 1, "\\u0078": 1}',
        b'{"x": 1, "a": "\\n", "a": 1}',
        b'{"x": 1, "parameters": {"a": 1, "a": 2}}',
        b'{"x": 1, "x": NaN}',
    ],
)
def test_a_key_that_is_there_twice_is_refused(text):
    with pytest.raises(InvalidRequest, match="is there twice"):
        parse(text, x=("INT32", [1]))


@pytest.mark.parametrize("text", [b'{"x": 1, "a": "x"}', b'{"x": 1, "a": "\\"x\\": 1"}', b'{"x": 1, "parameters": {"id": 2}}'])
def test_what_only_looks_like_a_second_key_is_none(text):
    assert [1] == parse(text, x=("INT32", [1])).inputs["x"].tolist()


TEXTS = st.text(st.characters(codec="utf-8"), max_size=3)


@given(st.dictionaries(TEXTS, TEXTS | st.integers(-9, 9), max_size=4), st.booleans())
def test_keys_that_differ_are_never_taken_for_the_same(parameters, ascii_only):
    parameters = {name: value for name, value in parameters.items() if name not in ("x", "id", "parameters")}
    body = json.dumps({"x": 1, **parameters}, ensure_ascii=ascii_only).encode()

    assert parameters == parse(body, x=("INT32", [1])).parameters


def test_an_id_stands_in_the_refusal():
    with pytest.raises(InvalidRequest, match=r"^\[request id: r\] parameter 'a' has invalid type"):
        parse({"x": 1, "id": "r", "a": []}, x=("INT32", [1]))


def answer(outputs, id="", **parameters):
    response = InferenceResponse("m", "3", outputs, id, parameters)
    return json.loads(encode_generated(response))


def test_an_answer_is_flat_with_one_element_as_a_scalar():
    outputs = {"one": np.array([[2]], np.int8), "many": np.array([[1.5, 2], [3, 4]], "f4"), "none": np.zeros((0, 2), "f4")}

    assert {
        "model_name": "m", "model_version": "3", "id": "r", "one": 2, "many": [1.5, 2, 3, 4], "none": [], "p": True,
    } == answer(outputs, "r", p=True)  # fmt: skip


def test_an_answer_without_an_id_has_no_such_key():
    assert {"model_name", "model_version", "y"} == set(answer({"y": np.array(["t"])}))


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (np.array([b"a", "\u00e9"], object), ["a", "\u00e9"]),
        (np.array([0.1], "f4"), 0.1),
        (np.array([0.5, 1], np.float16), [0.5, 1]),
        (np.array([0.5], bfloat16), 0.5),
        (np.array([True]), True),
        (np.array(2**63, "u8"), 2**63),
    ],
)
def test_every_datatype_goes_as_json(array, expected):
    assert expected == answer({"y": array})["y"]


def test_numbers_that_json_has_no_word_for_are_bare_tokens():
    response = InferenceResponse("m", "1", {"y": np.array([np.nan, np.inf], "f4"), "z": np.array([-np.inf], "f4")})

    assert b'"y":[NaN,Infinity],"z":-Infinity}' in encode_generated(response)


@pytest.mark.parametrize("name", ["model_name", "model_version", "id"])
def test_an_output_with_a_name_that_stands_for_something_else_is_a_failure(name):
    with pytest.raises(StepFailed, match=f"the answer has '{name}' twice"):
        answer({name: np.array([1])}, "r")


def test_a_response_parameter_with_an_outputs_name_is_a_failure():
    with pytest.raises(StepFailed, match="the answer has 'y' twice"):
        answer({"y": np.array([1])}, y=2)


def test_bytes_that_are_no_text_are_refused_with_a_way_out():
    with pytest.raises(InvalidRequest, match="infer can give it as binary data"):
        answer({"y": np.array([b"\xff"], object)})


def test_an_event_is_one_line_and_an_empty_one():
    body = encode_generated(InferenceResponse("m", "1", {"y": np.array(["a\n\nb\r"])}))

    assert b'data: {"model_name":"m","model_version":"1","y":"a\\n\\nb\\r"}\n\n' == event(body)
