"""The Python builder, and that it and YAML are one model."""

import numpy as np
import onnx
import pytest
import yaml
from hypothesis import given, settings, strategies as st
from onnx import TensorProto, helper

from servinggraph import Graph, routers, signature, steps
from servinggraph.errors import GraphInvalid


def clean(value):
    return {"x": value["x"] * np.float32(2)}


@signature(inputs={"x": ("FP32", [-1, 4])}, outputs={"label": ("INT64", [-1])})
def decide(value):
    return {"label": value["y"].argmax(1)}


class Scale:
    def __init__(self, factor):
        self.factor = factor

    def __call__(self, value):
        return {"y": value["x"] * np.float32(self.factor)}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "double.onnx"
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "x"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 4])],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    made.ir_version = 9
    onnx.save(made, path)
    return path


def example(model):
    graph = Graph("fraud", inputs={"x": ("FP32", [-1, 4])}, version=3, timeout_ms=500)
    (
        graph.to(clean, timeout_ms=50)
        .to(
            routers.Ensemble(
                {"a": steps.Onnx(model, batch={"max_rows": 8}), "b": steps.Python(Scale, init={"factor": 2})},
                combine="weighted_mean",
                weights={"a": 2, "b": 1},
            ),
            name="score",
            batch=True,
        )
        .to(lambda value: value, name="pass", keep="all")
    )
    return graph


def test_a_built_graph_answers(model):
    graph = Graph("fraud", inputs={"x": ("FP32", [-1, 4])})
    graph.to(clean).to(routers.Ensemble({"a": steps.Onnx(model), "b": steps.Python(Scale, init={"factor": 2})})).respond()
    with graph.mock() as server:
        reply = server.infer(x=np.array([[1, 2, 3, 4]], "f4"))
    assert [[4, 8, 12, 16]] == reply.outputs["y"].tolist()
    assert "a,b" == reply.parameters["ensemble.members"]


def round_trip(graph, path):
    graph.save(path)
    return Graph.load(path)


def test_a_saved_graph_loads_as_an_equal_graph(model, tmp_path):
    graph = Graph("fraud", inputs={"x": ("FP32", [-1, 4])}, version=3, timeout_ms=500)
    score = graph.to(clean, timeout_ms=50).to(
        routers.Ensemble({"a": steps.Onnx(model), "b": Scale}, weights={"a": 2, "b": 1}, combine="weighted_mean"),
        name="score",
    )
    graph.add(decide, after=[score, "inputs"], name="end", rename={"inputs": {"x": "raw"}})
    graph.answer("end")
    loaded = round_trip(graph, tmp_path / "g.yaml")
    assert graph == loaded
    assert graph.to_dict() == loaded.to_dict()
    assert loaded == round_trip(loaded, tmp_path / "again.yaml")


NAMES = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,8}", fullmatch=True).filter(lambda name: name != "inputs")
OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "timeout_ms": st.floats(0.1, 1e6, allow_nan=False),
        "keep": st.one_of(st.just("all"), st.lists(st.sampled_from(["x", "y z", "1", "null", "on"]), max_size=2)),
        "batch": st.one_of(st.booleans(), st.fixed_dictionaries({"max_rows": st.integers(1, 64)})),
        "rename": st.just({"inputs": {"x": "yes"}}),
        "after": st.just("inputs"),
    },
)


@settings(max_examples=60, deadline=None)
@given(nodes=st.dictionaries(NAMES, OPTIONS, min_size=1, max_size=6), name=NAMES, version=st.integers(1, 10**6))
def test_any_graph_survives_the_round_trip(tmp_path_factory, nodes, name, version):
    graph = Graph(name, inputs={"x": ("FP32", (-1, 4)), "no": ("BYTES", [1])}, version=version)
    for node, options in nodes.items():
        graph.add(clean, node, **options)
    graph.answer(node)
    path = tmp_path_factory.mktemp("round") / "g.yaml"
    assert graph == round_trip(graph, path)
    assert yaml.safe_load(path.read_text()) == graph.to_dict()


def test_model_paths_are_rewritten_when_the_file_goes_elsewhere(model, tmp_path, monkeypatch):
    monkeypatch.chdir(model.parent)
    graph = Graph("g", inputs={"x": ("FP32", [-1, 4])})
    graph.to(steps.Onnx("double.onnx")).respond()
    (tmp_path / "deep").mkdir()
    loaded = round_trip(graph, tmp_path / "deep" / "g.yaml")
    assert loaded == graph
    assert loaded.compile().outputs.keys() == {"y"}


def test_a_lambda_works_in_a_mock_and_is_refused_in_a_file(model, tmp_path):
    graph = example(model)
    graph.answer("pass")
    with graph.mock() as server:
        assert [[4, 4, 4, 4]] == server.infer(x=np.ones((1, 4), "f4")).outputs["y"].tolist()
    with pytest.raises(ValueError, match="define it at the top of a module"):
        graph.save(tmp_path / "g.yaml")


def test_a_name_that_is_taken_is_refused():
    graph = Graph("g", inputs={"x": ("FP32", [-1])})
    graph.to(clean)
    with pytest.raises(ValueError, match="has a node 'clean' already"):
        graph.add(clean)


def test_a_built_graph_is_checked_like_a_file(model):
    graph = Graph("g", inputs={"x": ("FP64", [-1, 4])})
    graph.to(steps.Onnx(model, bach=True)).to(clean, keep=["z"])
    with pytest.raises(GraphInvalid) as refused:
        graph.compile()
    printed = str(refused.value)
    assert "node 'double': unknown key 'bach'; did you mean 'batch'?" in printed
    assert "node 'double': input 'x' does not fit: its datatype is FP64, expected FP32" in printed
    assert "missing key 'answer'" in printed


def test_a_replaced_node_needs_no_model_file():
    graph = Graph("g", inputs={"x": ("FP32", [-1, 4])})
    graph.to(routers.Ensemble({"a": steps.Onnx("gone.onnx"), "b": steps.Onnx("gone2.onnx")}), name="score").respond()
    stand_ins = {"score.a": {"y": np.float32([[1.0]])}, "score.b": lambda value: {"y": np.float32([[3.0]])}}
    with graph.mock(replace=stand_ins) as server:
        assert [[2.0]] == server.infer(x=np.zeros((1, 4), "f4")).outputs["y"].tolist()
    with pytest.raises(GraphInvalid, match=r"there is no node 'scor' to replace; did you mean 'score'\?"):
        graph.mock(replace={"scor": clean})


def test_a_bad_signature_declaration_is_a_problem_of_its_node():
    @signature(outputs={"y": "FP32"})
    def wrong(value):
        return value

    graph = Graph("g", inputs={"x": ("FP32", [-1])})
    graph.to(wrong).respond()
    with pytest.raises(GraphInvalid, match=r"node 'wrong': its declared outputs must map a tensor name to"):
        graph.compile()


def test_an_absolute_and_a_relative_path_to_one_model_are_equal(model, tmp_path, monkeypatch):
    monkeypatch.chdir(model.parent)
    graphs = []
    for path in (model, "double.onnx"):
        graph = Graph("g", inputs={"x": ("FP32", [-1, 4])})
        graph.to(steps.Onnx(path), name="m").respond()
        graphs.append(graph)
    assert graphs[0] == graphs[1]
    graphs[0].save("g.yaml")
    assert "double.onnx" == Graph.load("g.yaml").to_dict()["nodes"]["m"]["path"]
