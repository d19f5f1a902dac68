"""Stacking: a branch that is no member gets what all members gave."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from servinggraph import Graph, routers, steps
from servinggraph.errors import GraphInvalid, StepFailed

X = np.array([[1.0], [2.0]], np.float32)


def double(value: Any) -> Any:
    return {"p": value["x"] * 2}


def halve(value: Any) -> Any:
    return {"p": value["x"] / 2, "label": np.array([1, 2])}


def final(value: Any) -> Any:
    return {"y": value["gbm.p"] + 10 * value["mlp.p"], "seen": np.array(sorted(value), object)}


def declared(work: Any, **outputs: Any) -> Any:
    return steps.Python(work, outputs=outputs)


def stacked(branches: dict[str, Any], **options: Any) -> Graph:
    router = routers.Ensemble(branches, "stacking", **{"stacker": "final", **options})
    return Graph("g", {"x": ("FP32", [-1, 1])}).to(router, "n").respond()


def test_the_stacker_gets_the_tensors_of_all_members_by_member_and_name() -> None:
    with stacked({"gbm": double, "mlp": halve, "final": final}).mock() as server:
        reply = server.infer(x=X)
    assert [[7.0], [14.0]] == reply.outputs["y"].tolist()
    assert [b"gbm.p", b"mlp.label", b"mlp.p"] == reply.outputs["seen"].tolist()
    assert {"n.members": "gbm,mlp"} == reply.parameters


def test_the_stacker_may_be_a_chain_of_nodes_that_rename_what_they_get() -> None:
    join = steps.Python(lambda a, b: {"both": np.concatenate([a, b], axis=1)}, rename={"inputs": {"gbm.p": "a", "mlp.p": "b"}})
    chain = routers.Chain({"join": join, "sum": lambda value: {"y": value["both"].sum(axis=1)}})
    with stacked({"gbm": double, "mlp": double, "final": chain}).mock() as server:
        assert [4.0, 8.0] == server.infer(x=X).outputs["y"].tolist()


def test_a_stacked_ensemble_is_batched_and_told_apart_in_pieces() -> None:
    with stacked({"gbm": double, "mlp": lambda value: {"p": value["x"]}, "final": lambda value: {"y": value["gbm.p"] + value["mlp.p"]}},
                 batch={"max_rows": 2}).mock() as server:  # fmt: skip
        assert [[3.0], [6.0], [9.0]] == server.infer(x=np.array([[1], [2], [3]], np.float32)).outputs["y"].tolist()


def test_a_failing_member_or_stacker_is_named() -> None:
    def fails(value: Any) -> Any:
        raise ValueError("no")

    with (
        stacked({"gbm": double, "mlp": fails, "final": final}).mock() as server,
        pytest.raises(StepFailed, match=r"'n\.mlp': ValueError: no"),
    ):
        server.infer(x=X)
    with (
        stacked({"gbm": double, "mlp": halve, "final": fails}).mock() as server,
        pytest.raises(StepFailed, match=r"'n\.final': ValueError: no"),
    ):
        server.infer(x=X)
    with (
        stacked({"gbm": double, "mlp": lambda value: 3, "final": final}).mock() as server,
        pytest.raises(StepFailed, match="member 'mlp' gave a int"),
    ):
        server.infer(x=X)


def test_the_members_tensors_are_held_against_what_the_stacker_takes() -> None:
    def takes(a, b):
        return {"y": a + b}

    def graph(renames: dict[str, str], datatype: str = "FP32") -> Graph:
        node = steps.Python(takes, rename={"inputs": renames}, outputs={"y": ("FP32", [-1, 1])})
        member = declared(double, p=("FP32", [-1, 1]))
        return stacked({"gbm": member, "mlp": declared(double, p=(datatype, [-1, 1])), "final": node})

    plan = graph({"gbm.p": "a", "mlp.p": "b"}).compile()
    assert ["y"] == list(plan.outputs or {})
    with pytest.raises(
        GraphInvalid, match="'rename.inputs' names 'mlp.q', which does not reach this node; did you mean 'mlp.p'"
    ):
        graph({"gbm.p": "a", "mlp.q": "b"}).compile()
    with pytest.raises(GraphInvalid, match=r"input 'b' is provided by nobody: what reaches the node is a, mlp\.p"):
        graph({"gbm.p": "a"}).compile()


def test_a_stacker_model_is_checked_in_datatype_and_shape(tmp_path: Any) -> None:
    from onnx import TensorProto, helper, save

    node = helper.make_node("Add", ["a", "b"], ["y"])
    tensors = {name: helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, 1]) for name in "aby"}
    model = helper.make_model(
        helper.make_graph([node], "g", [tensors["a"], tensors["b"]], [tensors["y"]]),
        opset_imports=[helper.make_opsetid("", 17)], ir_version=8,
    )  # fmt: skip
    path = str(tmp_path / "stack.onnx")
    save(model, path)

    def graph(datatype: str, shape: list[int]) -> Graph:
        onnx = steps.Onnx(path, rename={"inputs": {"gbm.p": "a", "mlp.p": "b"}})
        return stacked(
            {"gbm": declared(double, p=("FP32", [-1, 1])), "mlp": declared(double, p=(datatype, shape)), "final": onnx}
        )

    with graph("FP32", [-1, 1]).mock() as server:
        assert [[4.0], [8.0]] == server.infer(x=X).outputs["y"].tolist()
    with pytest.raises(GraphInvalid, match="input 'b' does not fit: its datatype is FP64, expected FP32"):
        graph("FP64", [-1, 1]).compile()
    with pytest.raises(GraphInvalid, match=r"input 'b' does not fit: its shape is \[-1, 3\], expected \[-1, 1\]"):
        graph("FP32", [-1, 3]).compile()


@pytest.mark.parametrize(
    ("branches", "options", "text"),
    [
        ({"gbm": double, "final": final, "mlp": halve}, {}, "not the last branch: put it there"),
        ({"gbm": double, "final": final}, {"stacker": "finale"}, "not the last branch; did you mean 'final'"),
        ({"gbm": double, "final": final}, {"stacker": None}, "'combine: stacking' needs 'stacker'"),
        ({"final": final}, {}, "needs a branch beside the stacker"),
        ({"gbm": double, "final": final}, {"on_failure": "reweight"}, "a stacker needs what every member gives"),
        (
            {"gbm": double, "mlp": halve, "final": final},
            {"quorum": 1, "wait": "quorum"},
            "a stacker needs what every member gives",
        ),
        ({"gbm": double, "final": final}, {"tensors": ["p"]}, "'tensors' is for"),
    ],
)
def test_stacks_that_cannot_work_are_refused(branches: Any, options: Any, text: str) -> None:
    with pytest.raises(GraphInvalid, match=text):
        stacked(branches, **options).compile()


def test_a_stacked_ensemble_round_trips(tmp_path: Any) -> None:
    graph = stacked(
        {  # import strings survive a file
            name: steps.Python(f"operator:{work}", outputs={"p": ("FP32", [-1, 1])})
            for name, work in (("gbm", "neg"), ("mlp", "neg"), ("final", "pos"))
        },
        on_failure="default", defaults={"mlp": {"p": [0.5]}},
    )  # fmt: skip
    graph.save(tmp_path / "graph.yaml")
    assert graph == Graph.load(tmp_path / "graph.yaml")
