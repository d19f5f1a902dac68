"""Datatypes and shapes: what has which V2 name, and what fits what."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from servinggraph.tensors import DATATYPES, TensorSpec, datatype_of, fits_shape, row_count


@pytest.mark.parametrize("name", DATATYPES)
def test_a_datatype_and_its_dtype_name_each_other(name):
    assert name == datatype_of(np.zeros(1, DATATYPES[name]))


@pytest.mark.parametrize("dtype", ["U3", "S3", "U0", object])
def test_text_of_any_width_is_bytes(dtype):
    assert "BYTES" == datatype_of(np.zeros(1, dtype))


@pytest.mark.parametrize("dtype", [">f4", ">i8", ">u2", "c8", "M8[s]", "m8[s]", "V4", "f16", ml_dtypes.float8_e4m3fn])
def test_a_dtype_that_v2_does_not_know_has_no_name(dtype):
    assert datatype_of(np.zeros(1, dtype)) is None


@pytest.mark.parametrize(
    ("shape", "declared", "fits"),
    [
        ((2, 3), (2, 3), True), ((2, 3), (-1, 3), True), ((2, 3), (-1, -1), True), ((2, 3), (2, -1), True), ((0, 3), (-1, 3), True),
        ((), (), True), ((), (-1,), False), ((1,), (), False), ((2, 3), (-1, 4), False), ((2, 3), (3, 3), False), ((2,), (-1, 3), False),
        ((2, 3, 4), (-1, 3, -1), True), ((2, 3, 4), (-1, 4, -1), False), ((5,), (-1,), True),
    ],
)  # fmt: skip
def test_a_shape_fits_where_sizes_are_equal_or_free(shape, declared, fits):
    assert fits == fits_shape(shape, declared)


@pytest.mark.parametrize(
    ("one", "other", "reason"),
    [
        (TensorSpec("FP32", (-1, 2)), TensorSpec("FP32", (5, 2)), None),
        (TensorSpec(), TensorSpec("FP32", (5, 2)), None),
        (TensorSpec("FP32"), TensorSpec(None, (5,)), None),
        (TensorSpec("FP32"), TensorSpec("FP64"), "datatype is FP32, expected FP64"),
        (TensorSpec("FP32", (1, 2)), TensorSpec("FP32", (-1, 3)), "shape is [1, 2], expected [-1, 3]"),
        (TensorSpec(None, (1,)), TensorSpec(None, (1, 1)), "shape is [1], expected [1, 1]"),
    ],
)
def test_specs_conflict_only_in_what_both_know(one, other, reason):
    assert reason == one.conflict_with(other)


def test_rows_are_the_common_first_axis():
    assert 3 == row_count({"a": np.zeros((3, 2)), "b": np.zeros(3)})


@pytest.mark.parametrize(
    ("tensors", "text"),
    [
        ({}, "there is no tensor"),
        ({"a": np.zeros(())}, "tensor 'a' is a scalar"),
        ({"a": np.zeros(3), "b": np.zeros(2)}, "tensor 'b' has 2 rows but 'a' has 3"),
    ],
)
def test_tensors_without_common_rows_are_named(tensors, text):
    with pytest.raises(ValueError, match=text):
        row_count(tensors)
