"""When two answers agree: held against numpy and against the definition, element by element."""

from __future__ import annotations

from math import inf, isclose, isnan, nan

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.extra import numpy as arrays

from servinggraph.errors import GraphInvalid, StepFailed
from servinggraph.messages import Body
from servinggraph.routers.shadow import Comparison, ComparisonOptions, TensorRule
from servinggraph.tensors import Signature, TensorSpec

IN_ROWS = {"a": Signature(None, {"y": TensorSpec("FP32", (-1, -1))})}


def comparison(branches=None, base=None, **options):
    return Comparison(ComparisonOptions(**options), base, branches or {})


def agree(one, other, **options):
    return comparison(**options)({"y": one}, {"y": other}).agrees


floats = st.one_of(st.floats(width=32), st.sampled_from([0.0, -0.0, 1.0, 1.0005, inf, -inf, nan]))
pairs = arrays.array_shapes(max_dims=3, max_side=4).flatmap(
    lambda shape: st.tuples(*[arrays.arrays(np.float32, shape, elements=floats)] * 2)
)


@settings(max_examples=300, deadline=None)
@given(pairs, st.sampled_from([0.0, 1e-3, 0.5]), st.sampled_from([0.0, 1e-6, 1.0]))
def test_values_agree_where_numpy_and_the_definition_say_so(pair, rtol, atol):
    champion, challenger = pair
    verdict = comparison(rtol=rtol, atol=atol)({"y": champion}, {"y": challenger})

    a, b = champion.astype(float), challenger.astype(float)
    with np.errstate(invalid="ignore", over="ignore"):
        assert np.allclose(b, a, rtol=rtol, atol=atol, equal_nan=True) == verdict.agrees

        def close(x, y):
            if isnan(x) or isnan(y):
                return isnan(x) and isnan(y)
            return x == y or (np.isfinite(x) and abs(y - x) <= atol + rtol * abs(x))

        assert all(map(close, a.flat, b.flat)) == verdict.agrees
        away = [0.0 if x == y or (isnan(x) and isnan(y)) else abs(y - x) for x, y in zip(a.flat, b.flat, strict=True)]
    largest = max((inf if isnan(d) else d for d in away), default=0.0)
    assert isclose(largest, verdict.differences["y"])


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 5), st.integers(2, 4), st.data())
def test_labels_and_rows_are_those_of_numpy(rows, classes, data):
    elements = st.integers(0, 3).map(float)
    one, other = (data.draw(arrays.arrays(np.float32, (rows, classes), elements=elements)) for _ in range(2))
    verdict = comparison(IN_ROWS, by="label")({"y": one}, {"y": other})

    same = one.argmax(-1) == other.argmax(-1)
    assert (bool(same.all()), rows, int(same.sum())) == (verdict.agrees, verdict.rows, verdict.agreeing_rows)


@settings(max_examples=200, deadline=None)
@given(arrays.array_shapes(max_dims=2, max_side=4), st.sampled_from(["i8", "u1", "?", "u8"]), st.data())
def test_integers_have_to_be_equal(shape, dtype, data):
    one, other = (data.draw(arrays.arrays(dtype, shape)) for _ in range(2))
    assert agree(one, one.copy(), by="label")
    assert np.array_equal(one, other) == agree(one, other)


def test_large_tensors_are_compared_in_pieces_with_the_same_result():
    one = np.zeros(200_001, np.float32)
    other = one.copy()
    assert agree(one, other)
    other[-1] = 1
    verdict = comparison()({"y": one}, {"y": other})
    assert (False, 1.0) == (verdict.agrees, verdict.differences["y"])


def test_text_agrees_as_bytes_and_as_str_of_any_width():
    texts = [np.array([b"a", "\u00e4".encode()], object), np.array(["a", "\u00e4"], object), np.array(["a", "\u00e4"])]
    for one in texts:
        for other in texts:
            assert agree(one, other)
            assert not agree(one, other[::-1].copy())
    assert agree(np.array([b"a"], "S3"), np.array([b"a"], object))


def test_datatypes_may_differ_where_the_values_do_not():
    x = np.array([0.5, 2.0])
    for dtype in (np.float32, np.float16, ml_dtypes.bfloat16):
        assert agree(x, x.astype(dtype))
    assert agree(np.array([2, 3], np.int32), np.array([2, 3], np.int64))
    assert agree(np.array([2, 3]), np.array([2.0, 3.0]))
    assert not agree(np.array([2.0]), np.array(["2.0"]))
    assert agree(np.array([[0.1, 0.9]]).astype(ml_dtypes.bfloat16), np.array([[0.4, 0.6]]), by="label")


def test_what_differs_is_said():
    said = lambda one, other, **options: comparison(**options)(one, other).reason  # noqa: E731
    y = np.ones((2, 2))
    assert "" == said({"y": y}, {"y": y})
    assert "values of 'y'" == said({"y": y}, {"y": y + 1})
    assert "label of 'y'" == said({"y": np.array([[1.0, 0]])}, {"y": np.array([[0, 1.0]])}, by="label")
    assert "shape of 'y'" == said({"y": y}, {"y": y[:1]})
    assert "'z' is missing" == said({"y": y, "z": y}, {"y": y})
    assert "values" == said(1, 2)


def test_a_tensor_may_have_a_rule_of_its_own():
    rules = {"loose": TensorRule(atol=1.0), "noise": TensorRule(by="ignore"), "score": TensorRule(by="label")}
    compare = comparison(tensors=rules)
    one = {"loose": np.array([1.0]), "noise": np.array([1.0]), "score": np.array([[1.0, 0]]), "y": np.array([1.0])}
    other = {"loose": np.array([1.9]), "noise": np.array([7.0]), "score": np.array([[9.0, 0]]), "y": np.array([1.0])}
    assert compare(one, other).agrees
    assert "values of 'y'" == compare(one, {**other, "y": np.array([2.0])}).reason
    assert compare(one, {name: array for name, array in other.items() if name != "noise"}).agrees


def test_rows_are_counted_only_where_the_first_axis_is_known_to_be_the_batch():
    y = np.array([[1.0, 2.0], [3.0, 4.0]])
    other = np.array([[1.0, 2.0], [3.0, 5.0]])
    verdict = comparison(IN_ROWS)({"y": y}, {"y": other})
    assert (2, 1) == (verdict.rows, verdict.agreeing_rows)
    assert 0 == comparison()({"y": y}, {"y": other}).rows
    fixed = {"a": Signature(None, {"y": TensorSpec("FP32", (2, 2))})}
    assert 0 == comparison(fixed)({"y": y}, {"y": other}).rows


def test_rows_of_an_answer_that_cannot_be_held_against_the_champions_do_not_agree():
    champion = {"y": np.ones((3, 2)), "z": np.ones((3, 1))}
    branches = {"a": Signature(None, {"y": TensorSpec("FP64", (-1, 2)), "z": TensorSpec("FP64", (-1, 1))})}
    for challenger in (
        {"y": np.ones((3, 2))},
        {"y": np.ones((2, 2)), "z": np.ones((3, 1))},
        {"y": np.ones((3, 4)), "z": np.ones((3, 1))},
    ):
        verdict = comparison(branches)(champion, challenger)
        assert (False, 3, 0) == (verdict.agrees, verdict.rows, verdict.agreeing_rows)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_what_is_no_number_has_no_label(dtype):
    champion = np.array([[0.9, 0.1], [0.2, 0.8]]).astype(dtype)
    spoilt = np.full((2, 2), nan).astype(dtype)
    half = np.array([[0.9, 0.1], [0.2, nan]]).astype(dtype)
    compare = comparison(IN_ROWS, by="label")
    verdict = compare({"y": champion}, {"y": spoilt})
    assert (False, 0) == (verdict.agrees, verdict.agreeing_rows)
    verdict = compare({"y": champion}, {"y": half})
    assert (False, 1) == (verdict.agrees, verdict.agreeing_rows)
    assert compare({"y": spoilt}, {"y": spoilt}).agrees


def test_documents_are_compared_with_the_tolerance_inside():
    compare = comparison(rtol=0.01)
    one = {"labels": ["cat", "dog"], "scores": [0.9, {"top": 0.5}], "n": 3, "x": np.array([1.0])}
    assert compare([one], [{**one, "scores": [0.905, {"top": 0.501}]}]).agrees
    assert compare(Body([one]), Body([one])).agrees
    for other in ({**one, "labels": ["cat"]}, {**one, "n": 4}, {**one, "scores": [0.9, {"top": 0.6}]}, {**one, "n": "3"}, {}):
        assert not compare([one], [other]).agrees


def test_a_function_of_the_users_compares():
    def by_mean(champion, challenger):
        difference = float(champion["y"].mean() - challenger["y"].mean())
        return abs(difference) < 0.1, {"mean": difference}

    compare = comparison(call=by_mean)
    assert compare.custom
    verdict = compare({"y": np.array([1.0])}, {"y": np.array([1.5])})
    assert (False, {"mean": 0.5}, "the function says so") == (verdict.agrees, verdict.differences, verdict.reason)
    assert comparison(call=lambda a, b: np.bool_(True))({}, {}).agrees
    with pytest.raises(StepFailed, match="returned a str, expected True or False"):
        comparison(call=lambda a, b: "yes")({}, {})


@pytest.mark.parametrize(
    ("options", "shape", "text"),
    [
        ({"by": "label"}, (-1,), "'y' has shape \\[-1\\]"),
        ({"by": "label"}, (-1, 1), "'y' has shape \\[-1, 1\\]"),
        ({"tensors": {"z": TensorRule()}}, (-1, 2), "names 'z', but the branches give y"),
    ],
)
def test_what_cannot_be_compared_is_found_before_it_is_served(options, shape, text):
    branches = {"a": Signature(None, {"y": TensorSpec("FP32", shape)})}
    found = comparison(branches, **options).problems
    with pytest.raises(GraphInvalid, match=text):
        raise GraphInvalid(found)
