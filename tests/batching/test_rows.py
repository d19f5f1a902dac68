"""Joining and splitting rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from servinggraph.batching.rows import (
    Unjoinable,
    group_key,
    join,
    join_results,
    pad,
    rows_of_result,
    slice_rows,
    why_bad_errors,
)


@pytest.mark.parametrize("dtype", ["f4", ">f4", "f2", "i8", "?", "u1", "O", "<U3", "S2"])
def test_joined_rows_come_apart_as_they_were(dtype: str) -> None:
    parts = [{"x": np.array([["1"], ["0"]]).astype(dtype)}, {"x": np.array([["1"]]).astype(dtype)}]
    joined = join(parts)
    assert np.dtype(dtype) == joined["x"].dtype
    for part, (start, stop) in zip(parts, [(0, 2), (2, 3)], strict=True):
        np.testing.assert_array_equal(part["x"], slice_rows(joined, start, stop)["x"])


def test_slices_are_views() -> None:
    tensors = {"x": np.zeros((4, 2))}
    assert np.shares_memory(tensors["x"], slice_rows(tensors, 1, 3)["x"])


@pytest.mark.parametrize(
    "other",
    [
        {"x": np.zeros((5, 2), "f8")},
        {"x": np.zeros((5, 3), "f4")},
        {"x": np.zeros((5, 2, 1), "f4")},
        {"x": np.zeros(5, "f4")},
        {"z": np.zeros((5, 2), "f4")},
        {"x": np.zeros((5, 2), "f4"), "z": np.zeros(5)},
        {"x": np.zeros((5, 2), ">f4")},
    ],
)
def test_any_difference_but_the_number_of_rows_keeps_requests_apart(other: dict[str, Any]) -> None:
    key = group_key({"x": np.zeros((1, 2), "f4")})
    assert key == group_key({"x": np.ones((7, 2), "f4")})
    assert key != group_key(other)


def test_the_order_of_tensors_is_no_difference() -> None:
    a, b = np.zeros((1, 2)), np.zeros((1, 3), "i4")
    assert group_key({"a": a, "b": b}) == group_key({"b": b, "a": a})


def test_padding_repeats_the_last_row() -> None:
    padded = pad({"x": np.array([[1.0], [2.0]]), "s": np.array([b"a", b"b"], object)}, 2, 4)
    assert [[1.0], [2.0], [2.0], [2.0]] == padded["x"].tolist()
    assert [b"a", b"b", b"b", b"b"] == padded["s"].tolist()


@pytest.mark.parametrize(
    ("results", "text"),
    [
        ([{"y": np.zeros((1, 1))}, {"z": np.zeros((1, 1))}], "one gave outputs"),
        ([{"y": np.zeros((1, 1), "f4")}, {"y": np.zeros((1, 1), "f8")}], "is float32 in one and float64 in another"),
        ([{"y": np.zeros((1, 1))}, {"y": np.zeros((1, 2))}], "has shape"),
    ],
)
def test_pieces_that_differ_are_not_joined(results: list[dict[str, Any]], text: str) -> None:
    with pytest.raises(Unjoinable, match=text):
        join_results(results)


def test_pieces_that_fit_are_joined_in_order() -> None:
    assert [1, 2, 3] == join_results([{"y": np.array([1, 2])}, {"y": np.array([3])}])["y"].tolist()


def test_a_result_is_split_only_if_every_output_has_a_row_for_each() -> None:
    assert rows_of_result({"y": np.zeros((2, 1)), "z": np.zeros(2)}, 2) is None
    assert rows_of_result({}, 2) is None
    assert "has shape [1], but the batch has 2 rows" in str(rows_of_result({"y": np.zeros(1)}, 2))
    assert "has shape []" in str(rows_of_result({"y": np.array(1)}, 2))


def test_row_errors_name_rows_that_are_there() -> None:
    assert why_bad_errors({0: "a", np.int64(1): "b"}, 2) is None
    assert "row 2" in str(why_bad_errors({2: "c"}, 2))
    assert "got a list" in str(why_bad_errors(["c"], 2))
