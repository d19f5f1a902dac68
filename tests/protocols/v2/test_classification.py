"""Outputs as classes."""

import math

import numpy as np
import pytest
from hypothesis import given, strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from servinggraph.errors import InvalidRequest
from servinggraph.protocols.v2.classification import MOST_ELEMENTS, classes, classifier
from servinggraph.tensors import DATATYPES, Labels, TensorSpec


def texts(array):
    return [[item.decode() for item in row] for row in array] if array.ndim == 2 else [item.decode() for item in array]


def test_the_largest_come_first_with_six_decimals_and_labels():
    got = classes("y", np.array([[0.1, 0.7, 0.2], [3, 2, 1]], np.float32), 2, ["cat", "dog"], batched=True)
    assert [["0.700000:1:dog", "0.200000:2"], ["3.000000:0:cat", "2.000000:1:dog"]] == texts(got)
    assert (2, 2) == got.shape


def test_without_a_batch_all_axes_count_as_classes():
    assert ["4:3", "3:2"] == texts(classes("y", np.array([[1, 2], [3, 4]]), 2, [], batched=False))


def test_behind_the_batch_all_axes_count_as_classes():
    assert [["4:3"]] == texts(classes("y", np.array([[[1, 2], [3, 4]]]), 1, [], batched=True))


def test_equals_come_in_order_and_not_a_number_last():
    row = np.array([math.nan, 1, 1, -math.inf, math.inf])
    assert ["inf:4", "1.000000:1", "1.000000:2", "-inf:3", "nan:0"] == texts(classes("y", row, 9, [], batched=False))


def test_an_empty_label_is_none():
    assert ["1:0"] == texts(classes("y", np.array([1]), 1, [""], batched=False))


@pytest.mark.parametrize("shape, expected", [((0, 3), (0, 0)), ((2, 0), (2, 0))])
def test_a_batch_without_elements_has_no_classes(shape, expected):
    assert expected == classes("y", np.zeros(shape), 2, [], batched=True).shape


@pytest.mark.parametrize("datatype", ["BYTES", "BOOL", "FP16", "BF16"])
def test_types_without_classes_are_refused_before_and_after_the_graph_ran(datatype):
    text = f"class result not available for output due to unsupported type '{datatype}'"
    array = np.zeros(1, DATATYPES[datatype]) if datatype != "BYTES" else np.array([b"x"], object)
    with pytest.raises(InvalidRequest, match=text):
        classes("y", array, 1, [], batched=False)
    with pytest.raises(InvalidRequest, match=text):
        classifier("y", {"classification": 1}, {"y": TensorSpec(datatype, (-1,))})


def test_too_many_elements_are_refused():
    with pytest.raises(InvalidRequest, match="classification output tensor too large"):
        classes("y", np.zeros(MOST_ELEMENTS + 1, np.int8), 1, [], batched=False)


@pytest.mark.parametrize("count", [-1, True, 1.0, "2"])
def test_a_count_that_is_no_whole_number_from_0_on_is_refused(count):
    with pytest.raises(InvalidRequest, match="'classification' of output 'y' is a whole number from 0 on"):
        classifier("y", {"classification": count}, None)


def test_none_and_0_are_off_and_shared_memory_does_not_go_with_it():
    assert classifier("y", {}, None) is None
    assert classifier("y", {"classification": None}, None) is None
    assert classifier("y", {"classification": 0}, None) is None
    with pytest.raises(InvalidRequest, match="can't use shared memory if classification is requested"):
        classifier("y", {"classification": 1, "shared_memory_region": "r"}, None)


def test_labels_are_those_of_the_output():
    classify = classifier("y", {"classification": 1}, {"y": TensorSpec("INT8", (-1,), labels=Labels("l", ("a", "b")))})
    assert ["5:1:b"] == texts(classify(np.array([1, 5], np.int8), False))


@given(
    arrays(
        np.float32,
        array_shapes(min_dims=2, max_dims=3, max_side=6),
        elements=st.sampled_from([0.0, -0.0, 1.5, -2.0, math.nan, math.inf]),
    ),
    st.integers(1, 8),
)
def test_classes_are_those_of_a_plain_sort(array, count):
    for row, got in zip(array.reshape(len(array), -1), classes("y", array, count, [], batched=True), strict=True):
        order = sorted(range(len(row)), key=lambda at: (math.isnan(row[at]), -row[at] if not math.isnan(row[at]) else 0, at))
        assert order[:count] == [int(text.split(b":")[1]) for text in got]
