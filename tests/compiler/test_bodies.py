"""Graphs that take a body: what is checked at the start, and what of a body before a node runs."""

import numpy as np
import pytest

from servinggraph import Graph, InvalidRequest, routers, steps
from servinggraph.compiler import compile_source, json_schema
from servinggraph.errors import GraphInvalid
from servinggraph.plotting import mermaid
from servinggraph.spec import read_text

DIGITS = "examples/digits/models/mlp.onnx"


def whole(value):
    return value


def by_name(a, b, c=3):
    return {"sum": a + b + c}


def test_a_graph_file_says_body(tmp_path):
    text = "graph: g\ninputs: body\nnodes: {n: {step: python, call: 'builtins:len'}}\nanswer: n\n"
    plan = compile_source(read_text(text, None, tmp_path))

    assert plan.body
    assert {} == plan.inputs
    assert None is plan.body_keys


def test_builder_and_file_are_one(tmp_path):
    graph = Graph("g", "body", version=2)
    graph.to(len).respond()
    graph.save(tmp_path / "graph.yaml")

    assert graph == Graph.load(tmp_path / "graph.yaml")
    assert "body" == graph.to_dict()["inputs"]


def test_another_word_is_refused():
    graph = Graph("g", "bodies")
    graph.to(whole).respond()
    with pytest.raises(GraphInvalid, match="'inputs': expected a mapping or 'body', got 'bodies'"):
        graph.compile()


def test_a_mistake_in_a_tensor_is_still_placed():
    with pytest.raises(GraphInvalid, match="inputs.x.shape"):
        Graph("g", {"x": {"datatype": "FP32", "shape": "many"}}).compile()


def test_whole_bodies_cannot_be_batched():
    graph = Graph("g", "body", batch={"max_rows": 4})
    graph.to(whole).respond()
    with pytest.raises(GraphInvalid, match="a body has none"):
        graph.compile()


def test_the_schema_knows_bodies():
    import jsonschema

    document = {"graph": "g", "inputs": "body", "nodes": {"n": {"step": "python", "call": "a:b"}}, "answer": "n"}
    jsonschema.validate(document, json_schema())
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**document, "inputs": "bodies"}, json_schema())


def test_the_picture_begins_with_the_body():
    graph = Graph("g", "body")
    graph.to(whole).respond()
    assert 'inputs(["body"])' in mermaid(graph.compile())


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({"a": 1}, "graph 'g' takes 'b' from the body, which has 'a'"),
        ({}, "graph 'g' takes 'a' from the body, which has nothing"),
        ([1], "takes a body that is an object with 'a', 'b', 'c', got an array"),
        ("text", "got text"),
    ],
)
def test_what_the_first_node_takes_by_name_has_to_be_there(body, text):
    graph = Graph("g", "body")
    graph.to(by_name).respond()
    with graph.mock() as server:
        assert {"sum": 6} == server.invoke({"a": 1, "b": 2})
        assert {"sum": 13} == server.invoke({"a": 1, "b": 2, "c": 10})
        with pytest.raises(InvalidRequest, match=text):
            server.invoke(body)


def test_names_are_those_outside_the_node():
    graph = Graph("g", "body")
    graph.to(by_name, rename={"inputs": {"first": "a"}}, keep=["id"]).respond()

    assert {"first", "b", "c", "id"} == set(graph.compile().body_keys)
    with graph.mock() as server:
        assert {"sum": 6, "id": "x"} == server.invoke({"first": 1, "b": 2, "id": "x"})


def test_every_branch_and_every_first_node_counts():
    graph = Graph("g", "body")
    one = graph.add(lambda a, b: {"x": a}, "one", after="inputs")
    two = graph.add(whole, "two", after="inputs")
    graph.add(lambda value: value, "join", after=[one, two])
    graph.answer("join")

    assert {"a", "b"} == set(graph.compile().body_keys)


def test_what_the_branches_of_a_router_take_counts():
    def shifted(a, shift):
        return {"y": a + shift}

    def plain(value):
        return {"y": value["a"]}

    graph = Graph("g", "body")
    ensemble = routers.Ensemble({"shifted": shifted, "plain": plain}, combine="mean")
    graph.to(ensemble, rename={"inputs": {"by": "shift"}}).respond()

    assert {"a", "by"} == set(graph.compile().body_keys)
    with graph.mock() as server, pytest.raises(InvalidRequest, match="takes 'by' from the body"):
        server.invoke({"a": np.ones(1)})


def test_a_node_that_joins_the_body_needs_an_object():
    graph = Graph("g", "body")
    size = graph.to(lambda value: {"size": len(value)}, "size")
    graph.add(whole, "join", after=["inputs", size])
    graph.answer("join")
    with graph.mock() as server:
        assert {"a": 1, "size": 1} == server.invoke({"a": 1})
        with pytest.raises(InvalidRequest, match="takes a body that is an object, got an array"):
            server.invoke([1])


def test_a_model_right_behind_the_body_takes_arrays():
    graph = Graph("g", "body")
    graph.to(steps.Onnx(DIGITS)).respond()
    with graph.mock() as server:
        assert (2, 10) == np.shape(server.invoke({"pixels": np.zeros((2, 64), "f4")})["probabilities"])
        for pixels, text in (
            ([[0.0] * 64], "'pixels' of the body is an array, but graph 'g' needs a tensor of datatype FP32"),
            (np.zeros((2, 64)), "has datatype FP64"),
            (np.zeros((2, 63), "f4"), "has shape"),
        ):
            with pytest.raises(InvalidRequest, match=text):
                server.invoke({"pixels": pixels, "more": np.zeros(1)} if isinstance(pixels, list) else {"pixels": pixels})


def test_tensors_are_refused_with_the_way_to_go():
    graph = Graph("g", "body")
    graph.to(whole).respond()
    with graph.mock() as server, pytest.raises(InvalidRequest, match="/v2/models/g/invocations"):
        server.infer(x=[1])


def test_declared_outputs_of_a_body_graph_are_checked():
    graph = Graph("g", "body", outputs={"n": ("INT64", [])})
    graph.to(lambda value: {"n": np.int64(len(value))}, "size").respond()
    with graph.mock() as server:
        assert {"n": 2} == server.invoke([1, 2])
