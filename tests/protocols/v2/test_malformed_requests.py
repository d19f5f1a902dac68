"""The validation ladder: what is wrong with a request is said with Triton's texts, and always by name."""

from __future__ import annotations

import json

import numpy as np
import pytest

from servinggraph.errors import ErrorCode, InvalidRequest, ServingGraphError
from servinggraph.protocols.v2 import RequestLimits, parse_request
from servinggraph.tensors import TensorSpec

DECLARED = {
    "a": TensorSpec("FP32", (-1, 2)),
    "n": TensorSpec("INT8", (-1,), optional=True),
    "u": TensorSpec("UINT8", (-1,), optional=True),
    "b": TensorSpec("BOOL", (-1,), optional=True),
    "s": TensorSpec("BYTES", (-1,), optional=True),
    "h": TensorSpec("BF16", (-1,), optional=True),
    "any": TensorSpec("FP64", None, optional=True),
}
LIMITS = RequestLimits()
OUTPUTS = {"y": TensorSpec("FP32", (-1,))}
GOOD = {"name": "a", "datatype": "FP32", "shape": [1, 2], "data": [1, 2]}


def parse(body, header_length=None, declared=DECLARED, limits=LIMITS):
    return parse_request(body, header_length, "m", declared, OUTPUTS, limits)


def refusal(body, header_length=None, **options):
    with pytest.raises(ServingGraphError) as info:
        parse(body if isinstance(body, bytes) else json.dumps(body).encode(), header_length, **options)
    return info.value


def of(**changes):
    """A request whose only input is GOOD with some keys changed, or left out where None is given."""
    entry = {key: value for key, value in {**GOOD, **changes}.items() if value is not ...}
    return {"inputs": [entry]}


def tensor(name, datatype, data, shape=None):
    return {"inputs": [GOOD, {"name": name, "datatype": datatype, "shape": shape or [len(data)], "data": data}]}


def nested(depth):
    return b'{"inputs":[{"name":"any","datatype":"FP64","shape":[1],"data":' + b"[" * depth + b"1" + b"]" * depth + b"}]}"


SOURCES = "Input must set only one of the following fields"
LADDER = [
    (b"", "failed to parse the request JSON buffer"),
    (b"{", "failed to parse the request JSON buffer"),
    (b"{}}", "failed to parse the request JSON buffer"),
    (b'{"inputs": [NaN}', "failed to parse the request JSON buffer"),
    (b"\xff\xfe{}", "failed to parse the request JSON buffer"),
    ('{"inputs": [NaN]}'.encode("utf-16"), "failed to parse the request JSON buffer"),
    (b'{"id": "\xed\xa0\x80", "inputs": [], "x": NaN}', "failed to parse the request JSON buffer"),
    (b'{"id": "\\ud800", "inputs": []}', "failed to parse the request JSON buffer"),
    (b'{"id": "\\ud800", "inputs": [], "x": NaN}', "failed to parse the request JSON buffer"),
    (b'{"inputs": [], "x": [NaN, 1e999]}', "failed to parse the request JSON buffer"),
    (b'{"inputs": [], "x": NaN, "y": ' + b"9" * 5000 + b"}", "failed to parse the request JSON buffer"),
    (b"[" * 100_000, "failed to parse the request JSON buffer"),
    (b'[NaN, "' + b"[" * 100_000, "failed to parse the request JSON buffer"),
    ([], "expected an object at the top"),
    (b'"text"', "expected an object at the top"),
    ({}, "Unable to parse 'inputs': attempt to access JSON non-array as array"),
    ({"inputs": None}, "attempt to access JSON non-array as array"),
    ({"inputs": {}}, "attempt to access JSON non-array as array"),
    ({"inputs": [5]}, "attempt to access JSON non-object as object"),
    ({"inputs": [None]}, "attempt to access JSON non-object as object"),
    ({"inputs": [[]]}, "attempt to access JSON non-object as object"),
    (of(name=...), "an input has no 'name'"),
    (of(name=5), "an input has no 'name', or it is no text"),
    (of(datatype=...), "Unable to parse 'datatype': input 'a' has none"),
    (of(datatype="FLOAT"), "unknown datatype 'FLOAT'; expected one of BOOL, UINT8"),
    (of(datatype="fp32"), "unknown datatype 'fp32'"),
    (of(datatype=5), "unknown datatype 5"),
    (of(datatype={"deep": []}), "unknown datatype an object"),
    (of(shape=...), "Unable to parse 'shape': input 'a' has none"),
    (of(shape="2"), "Unable to parse 'shape' of input 'a': expected an array, got '2'"),
    (of(shape=None), "Unable to parse 'shape' of input 'a': expected an array, got None"),
    (of(shape=[1, -2]), "Unable to parse 'shape' of input 'a': sizes are whole numbers from 0 on, got -2"),
    (of(shape=[1, 2.0]), "sizes are whole numbers from 0 on, got 2.0"),
    (of(shape=[True, 2]), "sizes are whole numbers from 0 on, got True"),
    (of(shape=["1", 2]), "sizes are whole numbers from 0 on, got '1'"),
    (of(shape=[1] * 65), "it has 65 axes, at most 64 are possible"),
    (of(shape=[2**33, 2**33]), "causes total element count to exceed maximum size of"),
    (of(shape=[2**40, 2]), "Shape does not match true shape of 'data' field"),
    ({"inputs": [{"name": "any", "datatype": "FP64", "shape": [2**63, 0], "data": []}, GOOD]}, "input 'any' has an impossible shape"),
    (of(data=...), f"{SOURCES}: 'data', 'binary_data_size', 'shared_memory_region'; 'a' sets none"),
    (of(data=None), f"{SOURCES}: 'data', 'binary_data_size', 'shared_memory_region'; 'a' sets none"),
    (of(parameters={"binary_data_size": 8}), f"{SOURCES}: 'data', 'binary_data_size', 'shared_memory_region'; 'a' sets 'data' and"),
    (of(parameters={"binary_data_size": -1}), "'binary_data_size' of input 'a' is a whole number from 0 on, got -1"),
    (of(parameters={"binary_data_size": True}), "'binary_data_size' of input 'a' is a whole number"),
    (of(parameters={"binary_data_size": "8"}), "'binary_data_size' of input 'a' is a whole number"),
    (of(parameters=[]), "Unable to parse 'parameters' of input 'a': expected an object"),
    (of(parameters={"triton_x": 1}), "parameter keys starting with 'triton_' are reserved, got 'triton_x' on input 'a'"),
    (of(data=..., parameters={"binary_data_size": 8}), "unexpected size for input 'a', expecting 8 additional bytes for model 'm'"),
    (of(data=5), "Unable to parse 'data': input 'a' has a number, expected an array"),
    (of(data={}), "Unable to parse 'data': input 'a' has an object, expected an array"),
    (of(data="12"), "Unable to parse 'data': input 'a' has text, expected an array"),
    (of(data=[1]), "Unable to parse 'data': Shape does not match true shape of 'data' field: input 'a' has shape [1, 2], that is 2 elements, but 'data' has 1"),
    (of(data=[1, 2, 3]), "Shape does not match true shape of 'data' field"),
    (of(data=[[1, 2], [3]]), "input 'a' is ragged: row 1 at depth 1 has 1 elements, row 0 has 2"),
    (of(data=[[[1], [2, 3]]]), "input 'a' is ragged: row 1 at depth 2 has 2 elements, row 0 has 1"),
    (of(data=[[1], 2]), "input 'a' is ragged: element 1 at depth 1 is no array, others are"),
    (of(data=[1, [2]]), "input 'a' element 1 is an array, expected a number for FP32"),
    (of(data=[1, "2"]), "input 'a' element 1 is '2', expected a number for FP32"),
    (of(data=[1, None]), "input 'a' element 1 is None, expected a number for FP32"),
    (of(data=[True, 2]), "input 'a' element 0 is True, expected a number for FP32"),
    (of(data=[1, 1e39]), "input 'a' element 1 is 1e+39, out of range for FP32"),
    (tensor("h", "BF16", [1, 3.4e38]), "input 'h' element 1 is 3.4e+38, out of range for BF16"),
    (tensor("n", "INT8", [127, 128]), "input 'n' element 1 is 128, out of range for INT8"),
    (tensor("n", "INT8", [-129]), "input 'n' element 0 is -129, out of range for INT8"),
    (tensor("n", "INT8", [1.0]), "input 'n' element 0 is 1.0, expected an integer for INT8"),
    (tensor("n", "INT8", [False]), "input 'n' element 0 is False, expected an integer for INT8"),
    (tensor("n", "INT8", [5] * 500 + [True]), "input 'n' element 500 is True, expected an integer for INT8"),
    (tensor("u", "UINT8", [300]), "input 'u' element 0 is 300, out of range for UINT8"),
    (tensor("u", "UINT8", [-1]), "input 'u' element 0 is -1, out of range for UINT8"),
    (tensor("b", "BOOL", [1]), "input 'b' element 0 is 1, expected true or false"),
    (tensor("b", "BOOL", [True, "true"]), "input 'b' element 1 is 'true', expected true or false"),
    (tensor("s", "BYTES", ["a", 5]), "input 's' element 1 is 5, expected text"),
    (tensor("s", "BYTES", [None]), "input 's' element 0 is None, expected text"),
    (nested(101), "JSON nesting depth exceeds maximum allowed limit (100)"),
    (nested(1000), "JSON nesting depth exceeds maximum allowed limit (100)"),
    ({"inputs": [GOOD, {**GOOD, "name": "x"}]}, "unexpected inference input 'x' for model 'm', expected a, n"),
    ({"inputs": [GOOD, GOOD]}, "input 'a' already exists in request"),
    ({"inputs": []}, "expected between 1 and 7 inputs but got 0 inputs for model 'm'. Got input(s) [], but missing required input(s) ['a']"),
    (of(datatype="FP64"), "inference input 'a' data-type is 'FP64', but model 'm' expects 'FP32'"),
    (of(shape=[2]), "unexpected shape for input 'a' for model 'm'. Expected [-1,2], got [2]"),
    (of(shape=[2, 1]), "unexpected shape for input 'a' for model 'm'. Expected [-1,2], got [2,1]"),
    ({"inputs": [GOOD], "id": 5}, "Unable to parse 'id': expected text, got 5"),
    ({"inputs": [GOOD], "id": False}, "Unable to parse 'id': expected text, got False"),
    ({"inputs": [GOOD], "id": [[]]}, "Unable to parse 'id': expected text, got an array"),
    ({"inputs": [GOOD], "parameters": []}, "Unable to parse 'parameters': attempt to access JSON non-object as object"),
    ({"inputs": [GOOD], "parameters": {"triton_a": 1}}, "parameter keys starting with 'triton_' are reserved"),
    ({"inputs": [GOOD], "parameters": {"p": None}}, "parameter 'p' has invalid type. It should be either 'int', 'bool', 'double' or 'string'"),
    ({"inputs": [GOOD], "parameters": {"p": [1]}}, "parameter 'p' has invalid type"),
    ({"inputs": [GOOD], "parameters": {"binary_data_output": 1}}, "parameter 'binary_data_output' is true or false, got 1"),
    ({"inputs": [GOOD], "outputs": {}}, "Unable to parse 'outputs': attempt to access JSON non-array as array"),
    ({"inputs": [GOOD], "outputs": 0}, "Unable to parse 'outputs': attempt to access JSON non-array as array"),
    ({"inputs": [GOOD], "outputs": ["y"]}, "Unable to parse 'outputs': an output has no 'name'"),
    ({"inputs": [GOOD], "outputs": [{"name": 5}]}, "an output has no 'name', or it is no text"),
    ({"inputs": [GOOD], "outputs": [{"name": "z"}]}, "unexpected inference output 'z' for model 'm', it has y"),
    ({"inputs": [GOOD], "outputs": [{"name": "y", "parameters": 5}]}, "Unable to parse 'parameters' of output 'y': expected an object"),
    ({"inputs": [GOOD], "outputs": [{"name": "y", "parameters": {"binary_data": 1}}]}, "parameter 'binary_data' is true or false, got 1"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "text"), LADDER)
def test_what_is_wrong_is_said(body, text):
    error = refusal(body)

    assert isinstance(error, InvalidRequest)
    assert text in error.message
    assert len(error.message) < 1000


def entry(name, datatype, shape, size):
    return {"name": name, "datatype": datatype, "shape": shape, "parameters": {"binary_data_size": size}}


def binary(entries, data, length=None):
    text = json.dumps({"inputs": entries}).encode()
    return text + data, len(text) if length is None else length


A = entry("a", "FP32", [1, 2], 8)
EIGHT = bytes(8)
BINARY_LADDER = [
    ([A], b"1234567", "unexpected size for input 'a', expecting 1 additional bytes for model 'm'"),
    ([A], b"", "unexpected size for input 'a', expecting 8 additional bytes for model 'm'"),
    ([A], bytes(9), "unexpected additional input data for model 'm': 1 bytes are left over"),
    ([GOOD], b"1", "unexpected additional input data for model 'm': 1 bytes are left over"),
    ([entry("a", "FP32", [1, 2], 7)], bytes(7), "input byte size mismatch for input 'a' for model 'm'. Expected 8, got 7"),
    ([entry("a", "FP32", [1, 2], 2**63)], EIGHT, "unexpected size for input 'a'"),
    ([entry("a", "FP32", [2**61, 2], 8)], EIGHT, "input byte size mismatch for input 'a' for model 'm'. Expected 18446744073709551616, got 8"),
    ([A, entry("s", "BYTES", [1], 3)], EIGHT + b"\1\0\0", "incomplete string length indicator for inference input 's'"),
    ([A, entry("s", "BYTES", [1], 6)], EIGHT + b"\5\0\0\0ab", "incomplete string data for inference input 's' for model 'm': expecting 5 bytes, got 2"),
    ([A, entry("s", "BYTES", [1], 8)], EIGHT + b"\xff\xff\xff\xffabcd", "incomplete string data"),
    ([A, entry("s", "BYTES", [16], 8)], EIGHT + bytes(8), "expected 16 string elements for inference input 's' for model 'm', got 2"),
    ([A, entry("s", "BYTES", [1], 8)], EIGHT + bytes(8), "unexpected number of string elements 2 for inference input 's' for model 'm', expecting 1"),
    ([A, entry("s", "BYTES", [0], 4)], EIGHT + bytes(4), "unexpected number of string elements 1"),
    ([A, entry("s", "BYTES", [2**60], 4)], EIGHT + bytes(4), "expected 1152921504606846976 string elements"),
    ([A, entry("b", "BOOL", [3], 3)], EIGHT + b"\0\1\2", "input 'b' is BOOL, and a byte of it is neither 0 nor 1"),
]  # fmt: skip


@pytest.mark.parametrize(("entries", "data", "text"), BINARY_LADDER)
def test_what_is_wrong_with_binary_data_is_said(entries, data, text):
    assert text in refusal(*binary(entries, data)).message


@pytest.mark.parametrize(
    ("length", "text"),
    [
        (1000, "inference header size should be in range (0, 12), got: 1000"),
        (-5, "inference header size should be in range (0, 12), got: -5"),
    ],
)
def test_a_header_length_beyond_the_body_is_refused(length, text):
    assert text in refusal(b'{"inputs":1}', length).message


def test_texts_name_the_request_by_its_id():
    assert "[request id: r-1] input 'a' already exists in request" == refusal({"id": "r-1", "inputs": [GOOD, GOOD]}).message


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (of(data=..., parameters={"shared_memory_region": "r"}), "input 'a' is in shared memory"),
        ({"inputs": [GOOD], "outputs": [{"name": "y", "parameters": {"shared_memory_region": "r"}}]}, "'shared_memory_region'"),
    ],
)  # fmt: skip
def test_what_triton_has_and_we_do_not_is_called_unsupported(change, text):
    error = refusal(change)

    assert ErrorCode.UNSUPPORTED == error.code
    assert text in error.message


def test_more_inputs_or_outputs_than_allowed_are_refused():
    two = {"inputs": [GOOD, GOOD]}
    outputs = {"inputs": [GOOD], "outputs": [{"name": "y"}] * 2}

    assert "2 inputs (limit 'max_tensors' = 1)" in refusal(two, limits=RequestLimits(1)).message
    assert "2 outputs (limit 'max_tensors' = 1)" in refusal(outputs, limits=RequestLimits(1)).message


ONE = {"x": TensorSpec("FP32", (-1, 2))}


@pytest.mark.parametrize(
    ("declared", "body", "text"),
    [
        (DECLARED, b"12345678", "Raw request must only have 1 input (found 7) to be deduced"),
        (ONE, b"", "the raw request for model 'm' has an empty body"),
        (ONE, b"1234567", "input byte size mismatch for input 'x' for model 'm'"),
        (ONE, bytes(16), "input byte size mismatch for input 'x' for model 'm'. Expected 8, got 16"),
        ({"x": TensorSpec("FP32", (-1, -1, -1))}, bytes(8), "can not be deduced because there are more than one variable-sized dimension"),
        ({"x": TensorSpec("FP32", (-1,))}, bytes(7), "Expected a multiple of 4, got 7"),
        ({"x": TensorSpec("FP32", (0, -1))}, bytes(8), "input byte size mismatch"),
        ({"x": TensorSpec("BYTES", (2,))}, b"ab", "For BYTES datatype raw input, the model must have input shape [1]"),
    ],
)  # fmt: skip
def test_a_raw_request_that_cannot_be_deduced_is_refused(declared, body, text):
    assert text in refusal(body, 0, declared=declared).message


@pytest.mark.parametrize(
    ("spec", "body", "expected"),
    [
        (TensorSpec("FP32", (-1, 2)), np.float32([1, 2]).tobytes(), [[1, 2]]),
        (TensorSpec("INT16", (-1,)), np.int16([1, 2, 3]).tobytes(), [1, 2, 3]),
        (TensorSpec("INT16", (-1, -1)), np.int16([1, 2, 3]).tobytes(), [[1, 2, 3]]),
        (TensorSpec("BYTES", (1,)), b"any \xff bytes", [b"any \xff bytes"]),
        (TensorSpec("BYTES", (-1, 1)), b"text", [[b"text"]]),
    ],
)
def test_the_shape_of_a_raw_request_is_deduced(spec, body, expected):
    request = parse(body, 0, declared={"x": spec})

    assert expected == request.inputs["x"].tolist()
    assert request.binary


def test_null_stands_for_absent_as_mlserver_s_types_write_it():
    body = {"id": None, "parameters": None, "outputs": None, "inputs": [{**GOOD, "parameters": None}], "raw": None}
    request = parse(json.dumps(body).encode())

    assert ("", {}, (), [[1, 2]]) == (request.id, request.parameters, request.outputs, request.inputs["a"].tolist())
    outputs = {"inputs": [GOOD], "outputs": [{"name": "y", "parameters": None}]}
    assert ["y"] == [output.name for output in parse(json.dumps(outputs).encode()).outputs]


def test_what_nobody_knows_is_ignored_at_the_top_and_in_input_parameters():
    body = {"inputs": [{**GOOD, "parameters": {"content_type": "np", "deep": [1]}, "extra": 1}], "extra": {"deep": []}}

    assert [[1, 2]] == parse(json.dumps(body).encode()).inputs["a"].tolist()


def test_nesting_of_50_works_and_data_may_be_nested_in_any_way_that_is_not_ragged():
    assert [1.0] == parse(nested(50).replace(b"}]}", b"}," + json.dumps(GOOD).encode() + b"]}")).inputs["any"].tolist()
    for data in ([[1, 2, 3, 4]], [1, 2, 3, 4], [[1, 2], [3, 4]], [[[1], [2]], [[3], [4]]]):
        assert [[1, 2], [3, 4]] == parse(json.dumps(of(shape=[2, 2], data=data)).encode()).inputs["a"].tolist()


def test_inputs_are_read_only_views_of_the_body():
    body, length = binary([A], np.float32([1, 2]).tobytes())
    array = parse(body, length).inputs["a"]

    assert not array.flags.writeable
    assert not array.flags.owndata
