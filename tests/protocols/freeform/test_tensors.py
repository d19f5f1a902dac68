"""Tensors out of documents and tables, by the rules of JSON data."""

import json

import numpy as np
import pytest

from servinggraph.errors import DatatypeMismatch, InvalidRequest, ShapeMismatch, UnsupportedType
from servinggraph.protocols.freeform import decode_tensors
from servinggraph.protocols.freeform.body import media_of
from servinggraph.protocols.freeform.packing import encode_msgpack
from servinggraph.tensors import TensorSpec

TWO = {"x": TensorSpec("FP32", (-1, 2)), "n": TensorSpec("INT64", (-1,))}
ONE = {"x": TensorSpec("FP32", (-1, 2))}
COLUMNS = {
    "age": TensorSpec("INT32", (-1, 1)),
    "name": TensorSpec("BYTES", (-1,)),
    "vip": TensorSpec("BOOL", (-1,), optional=True),
    "sum": TensorSpec("FP64", (-1,)),
}


def tensors(body, declared, content_type="application/json"):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return decode_tensors(data, media_of(content_type), declared, "g")


@pytest.mark.parametrize(
    "body",
    [
        {"x": [[1, 2], [3, 4]], "n": [5, 6]},
        {"inputs": {"x": [[1, 2], [3, 4]], "n": [5, 6]}},
        {"instances": [{"x": [1, 2], "n": 5}, {"x": [3, 4], "n": 6}]},
        {"dataframe_records": [{"n": 5, "x": [1, 2]}, {"n": 6, "x": [3, 4]}]},
        {"dataframe_split": {"index": [0, 1], "columns": ["n", "x"], "data": [[5, [1, 2]], [6, [3, 4]]]}},
    ],
)
def test_an_object_names_the_tensors(body):
    got = tensors(body, TWO)

    assert [[1, 2], [3, 4]] == got["x"].tolist()
    assert [5, 6] == got["n"].tolist()
    assert [np.float32, np.int64] == [got["x"].dtype, got["n"].dtype]


@pytest.mark.parametrize(
    "body",
    [
        [[1, 2]],
        {"inputs": [[1, 2]]},
        {"instances": [[1, 2]]},
        {"dataframe_split": {"columns": ["a", "b"], "data": [[1, 2]]}},
        {"x": [[1, 2]]},
    ],
)
def test_the_only_tensor_of_a_graph_needs_no_name(body):
    assert [[1, 2]] == tensors(body, ONE)["x"].tolist()


def test_a_tensor_that_is_called_like_a_wrapper_is_that_tensor():
    assert [1, 2] == tensors({"inputs": [1, 2]}, {"inputs": TensorSpec("INT8", (-1,))})["inputs"].tolist()


def test_an_empty_list_has_the_declared_sizes():
    assert (0, 2) == tensors({"x": []}, ONE)["x"].shape


def test_a_scalar_is_a_plain_number():
    assert 3.0 == tensors({"t": 3}, {"t": TensorSpec("FP64", ())})["t"].tolist()


def test_msgpack_brings_arrays_and_lists():
    got = tensors(encode_msgpack({"x": np.ones((1, 2), "f4"), "n": [7]}), TWO, "application/msgpack")

    assert [[1, 1]] == got["x"].tolist()
    assert [7] == got["n"].tolist()


def test_a_table_has_a_column_for_each_tensor():
    got = tensors(b"name,age,sum\nann,7,1.5\nbob,-8,\n", COLUMNS, "text/csv")

    assert [[7], [-8]] == got["age"].tolist()
    assert [b"ann", b"bob"] == got["name"].tolist()
    assert np.isnan(got["sum"][1])
    assert "vip" not in got


def test_a_table_without_header_follows_the_declaration():
    got = tensors(b"7,ann,true,1\n", COLUMNS, "text/csv; header=absent")

    assert [True] == got["vip"].tolist()
    assert [1.0] == got["sum"].tolist()


def test_the_columns_of_a_table_are_the_only_two_dimensional_tensor():
    assert [[1, 2], [3, 4.5]] == tensors(b"a,b\n1,2\n3,4.5\n", ONE, "text/csv")["x"].tolist()
    assert [[1, 2]] == tensors(b"1,2", ONE, "text/csv; header=absent")["x"].tolist()


@pytest.mark.parametrize(
    ("body", "error", "text"),
    [
        ({"x": [[1, 2]]}, InvalidRequest, "missing required input.*'n'"),
        ({"x": [[1, 2]], "n": [1], "m": 1}, InvalidRequest, "unexpected inference input 'm'"),
        ({"x": [[1, 2], [3]], "n": [1]}, InvalidRequest, "ragged"),
        ({"x": [[1, 2, 3]], "n": [1]}, ShapeMismatch, r"Expected \[-1,2\], got \[1,3\]"),
        ({"x": [[1, "2"]], "n": [1]}, InvalidRequest, "element 1 is '2', expected a number"),
        ({"x": [[1, 2]], "n": [1.0]}, InvalidRequest, "expected an integer"),
        ({"x": [[1, 2]], "n": [2**63]}, InvalidRequest, "out of range for INT64"),
        ({"x": {"a": 1}, "n": [1]}, ShapeMismatch, "x"),
        ([1], InvalidRequest, "object of tensor name"),
        ("text", InvalidRequest, "object of tensor name"),
        ({"instances": {"x": 1}}, InvalidRequest, "a list with an entry for each row"),
        ({"instances": [{"x": [1, 2], "n": 1}, {"x": [1, 2]}]}, InvalidRequest, "entry 1 of 'instances'"),
        ({"dataframe_split": [1]}, InvalidRequest, "'columns'"),
        ({"dataframe_split": {"columns": ["n", "x"], "data": [[1]]}}, InvalidRequest, "row 0"),
        ({"dataframe_split": {"columns": ["n", "n"], "data": []}}, InvalidRequest, "same name"),
    ],
)
def test_what_is_not_the_declared_tensors_is_refused_with_the_place(body, error, text):
    with pytest.raises(error, match=text):
        tensors(body, TWO)


def test_arrays_of_another_datatype_are_not_cast():
    with pytest.raises(DatatypeMismatch, match="'FP64'.*'FP32'"):
        tensors(encode_msgpack({"x": np.ones((1, 2)), "n": [7]}), TWO, "application/msgpack")


def test_deep_nesting_is_refused():
    with pytest.raises(InvalidRequest, match="nesting"):
        tensors(b'{"x":' + b"[" * 100 + b"1" + b"]" * 100 + b',"n":[1]}', TWO)
    with pytest.raises(ShapeMismatch):
        tensors(b'{"x":' + b"[" * 99 + b"1" + b"]" * 99 + b',"n":[1]}', TWO)


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (b"name,age,sum\nann,7.5,1\n", "input 'age' element 0 is '7.5', expected an integer"),
        (b"name,age,sum\nann,3000000000,1\n", "out of range for INT32"),
        (b"name,age,sum\nann,7,1_0\n", "'1_0', expected a number"),
        (b"name,age,sum,vip\nann,7,1,yes\n", "'yes', expected true or false"),
        (b"name,age\nann,7\n", "missing required input.*'sum'"),
        (b"name,age,sum,x\nann,7,1,1\n", "unexpected inference input 'x'"),
        (b"name,age,sum\nann,,1\n", "'', expected an integer"),
    ],
)
def test_cells_that_do_not_fit_are_refused(body, text):
    with pytest.raises(InvalidRequest, match=text):
        tensors(body, COLUMNS, "text/csv")


def test_a_table_without_header_has_as_many_columns_as_there_are_tensors():
    with pytest.raises(InvalidRequest, match="3 columns, but graph 'g' takes 4 tensors"):
        tensors(b"1,2,3\n", COLUMNS, "text/csv; header=absent")


def test_types_without_tensors_are_refused():
    for content_type in ("text/plain", "image/png", None):
        with pytest.raises(UnsupportedType, match="application/json, application/msgpack or text/csv"):
            tensors(b"x", ONE, content_type)
