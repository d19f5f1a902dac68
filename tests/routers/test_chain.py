"""Nodes one after the other, as one."""

import numpy as np
import pytest

from servinggraph import Graph, routers, signature
from servinggraph.errors import GraphInvalid, StepFailed

X = np.array([1.0, 2.0], np.float32)


@signature(inputs={"x": ("FP32", [-1])}, outputs={"y": ("FP32", [-1])})
def double(value):
    return {"y": value["x"] * 2}


@signature(inputs={"y": ("FP32", [-1])}, outputs={"z": ("FP32", [-1])})
def increase(value):
    return {"z": value["y"] + 1}


async def slowly(value):
    return {"z": value["y"] - 1}


def a_graph(**branches):
    return Graph("g", {"x": ("FP32", [-1])}).to(routers.Chain(branches), "both").respond()


def test_each_node_of_a_chain_gets_what_the_one_before_it_gave():
    for last, expected in ((increase, [3, 5]), (slowly, [1, 3])):
        with a_graph(first=double, last=last).mock() as server:
            assert expected == server.infer(x=X).outputs["z"].tolist()


def test_nodes_of_a_chain_that_do_not_fit_are_refused_at_compile_time():
    with pytest.raises(GraphInvalid, match=r"node 'both.first': input 'y' is provided by nobody"):
        a_graph(first=increase, last=increase).compile()
    with pytest.raises(GraphInvalid, match=r"node 'both.b': input 'x' is provided by nobody: what reaches the node is y"):
        a_graph(a=double, b=double).compile()


def test_a_failure_names_the_node_inside_the_chain():
    def fail(value):
        raise ValueError("no")

    with a_graph(first=double, last=fail).mock() as server, pytest.raises(StepFailed, match="node 'both.last': ValueError: no"):
        server.infer(x=X)


def test_a_chain_may_be_the_member_of_an_ensemble():
    member = routers.Chain({"first": double, "last": increase})

    def other(value):
        return {"z": value["x"]}

    graph = Graph("g", {"x": ("FP32", [-1])}).to(routers.Ensemble({"chain": member, "plain": other}), "score").respond()
    with graph.mock() as server:
        assert [2, 3.5] == server.infer(x=X).outputs["z"].tolist()
