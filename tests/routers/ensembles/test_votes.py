"""Votes: hard, soft, weighted, and who wins a tie."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from servinggraph import Graph, routers, steps
from servinggraph.errors import GraphInvalid, StepFailed

X = {"x": np.zeros((2, 1), "f4")}


def gives(array: Any, dtype: Any, name: str = "y") -> Any:
    return lambda value: {name: np.array(array, dtype)}


def ensemble(members: Mapping[str, Any], combine: str, **options: Any) -> Graph:
    return Graph("g", {"x": ("FP32", [-1, 1])}).to(routers.Ensemble(members, combine, **options), "n").respond()


@pytest.mark.parametrize(("ties", "expected"), [("smallest", [1, 2, 1]), ("first", [3, 2, 1])])
@pytest.mark.parametrize("dtype", ["i4", "u1", object])
def test_a_tie_goes_to_the_smallest_label_or_to_the_first_member(ties: str, expected: list[int], dtype: Any) -> None:
    def labels(*numbers: int) -> Any:
        return gives([str(n).encode() for n in numbers] if dtype is object else numbers, dtype)

    members = {"a": labels(3, 2, 1), "b": labels(1, 2, 2), "c": labels(2, 1, 1)}
    with ensemble(members, "vote", ties=ties).mock() as server:
        y = server.infer(X).outputs["y"]
    assert expected == [int(label) for label in y]


def test_weights_decide_a_vote_and_the_response_tells_them() -> None:
    members = {"a": gives([1, 1], "i8"), "b": gives([2, 2], "i8"), "c": gives([2, 1], "i8")}
    with ensemble(members, "vote", weights={"a": 5, "b": 3, "c": 1}).mock() as server:
        reply = server.infer(X)
    assert [1, 1] == reply.outputs["y"].tolist()
    assert {"n.members": "a,b,c", "n.weights": "a=0.5556,b=0.3333,c=0.1111"} == reply.parameters


def test_a_soft_vote_elects_the_class_of_the_highest_mean_probability() -> None:
    # The first row: two members prefer class 0, but less than the third prefers class 1.
    a, b, c = ([[0.6, 0.4], [0.1, 0.9]], [[0.6, 0.4], [0.2, 0.8]], [[0.1, 0.9], [0.3, 0.7]])
    members = {name: gives(array, "f4", "p") for name, array in (("a", a), ("b", b), ("c", c))}
    with ensemble(members, "soft_vote", label="winner").mock() as server:
        reply = server.infer(X)
    assert (np.dtype("i8"), [1, 1]) == (reply.outputs["winner"].dtype, reply.outputs["winner"].tolist())
    np.testing.assert_allclose(reply.outputs["p"], np.mean([a, b, c], axis=0), rtol=1e-6)


def test_weights_decide_a_soft_vote() -> None:
    members = {"a": gives([[0.6, 0.4]], "f4", "p"), "b": gives([[0.1, 0.9]], "f4", "p")}
    with ensemble(members, "soft_vote", weights={"a": 9, "b": 1}).mock() as server:
        assert [0] == server.infer(X).outputs["label"].tolist()


def test_equal_probabilities_elect_the_lowest_class_whatever_the_order_of_the_members() -> None:
    rows = [[0.1, 0.3, 0.6], [0.3, 0.6, 0.1], [0.6, 0.1, 0.3]]
    for order in ((0, 1, 2), (2, 1, 0), (1, 0, 2), (2, 0, 1)):
        members = {f"m{at}": gives([rows[at]], "f8", "p") for at in order}
        with ensemble(members, "soft_vote").mock() as server:
            assert [0] == server.infer(X).outputs["label"].tolist()


@pytest.mark.parametrize(
    ("array", "text"), [([[0.5, float("nan")]], "elects no class"), (0.5, "its last axis"), (np.zeros((1, 0)), "its last axis")]
)
def test_what_elects_nothing_is_an_error(array: Any, text: str) -> None:
    with (
        ensemble({"a": gives(array, "f4"), "b": gives(array, "f4")}, "soft_vote").mock() as server,
        pytest.raises(StepFailed, match=text),
    ):
        server.infer(X)


def test_probabilities_have_to_be_named_where_members_give_more() -> None:
    def both(value: Any) -> Any:
        return {"p": np.array([[0.2, 0.8]], "f4"), "q": np.zeros((1, 2), "f4")}

    with (
        ensemble({"a": both, "b": both}, "soft_vote").mock() as server,
        pytest.raises(StepFailed, match="name the probabilities in 'tensors'"),
    ):
        server.infer(X)
    with ensemble({"a": both, "b": both}, "soft_vote", tensors=["p"]).mock() as server:
        assert ["p", "label"] == list(server.infer(X).outputs)


def test_the_elected_class_is_in_the_metadata() -> None:
    members = {n: steps.Python(gives([[0.2, 0.8]], "f4", "p"), outputs={"p": ("FP32", [-1, 2])}) for n in "ab"}
    plan = ensemble(members, "soft_vote").compile()
    assert {"p": ("FP32", (-1, 2)), "label": ("INT64", (-1,))} == {
        name: (spec.datatype, spec.shape) for name, spec in (plan.outputs or {}).items()
    }


@pytest.mark.parametrize(
    ("combine", "outputs", "options", "text"),
    [
        ("vote", {"p": ("FP32", [-1, 2])}, {}, "'combine: soft_vote' by probabilities"),
        ("soft_vote", {"p": ("INT64", [-1, 2])}, {}, "a mean of labels is no label"),
        ("soft_vote", {"p": ("FP32", [-1, 2]), "q": ("FP32", [-1, 2])}, {}, "elects by one tensor, and members give p, q"),
        ("soft_vote", {"label": ("FP32", [-1, 2])}, {}, "elects by one tensor"),
        ("mean", {"p": ("FP32", [-1, 2])}, {"label": "x"}, "'label' is for soft_vote"),
        ("soft_vote", {"p": ("FP32", [-1, 2])}, {"ties": "first"}, "'ties' is for vote"),
    ],
)
def test_votes_that_cannot_be_held_are_refused(combine: str, outputs: Any, options: Any, text: str) -> None:
    members = {name: steps.Python(lambda value: value, outputs=outputs) for name in "ab"}
    with pytest.raises(GraphInvalid, match=text):
        ensemble(members, combine, **options).compile()
