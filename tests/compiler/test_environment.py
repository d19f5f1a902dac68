"""Values from the environment: kept as references in definitions, followed by the compiler, never printed."""

import pytest

from servinggraph import Graph, routers, steps
from servinggraph.errors import GraphInvalid, InvalidRequest, StepFailed
from servinggraph.server import read_graphs


class Door:
    def __init__(self, key, tries=1):
        if tries > 9:
            raise ValueError("too often")
        self.key, self.tries = key, tries

    def __call__(self, value):
        return {"known": self.key == "sesame!" and self.tries == 2, **value}


def graph_of(**options):
    graph = Graph("g", inputs="body")
    graph.to(Door, name="door", **options).respond()
    return graph


def test_a_graph_that_is_loaded_and_saved_keeps_the_reference(tmp_path, monkeypatch):
    graph = graph_of(init={"key": "${DOOR_KEY}", "tries": "${TRIES:-2}"}, timeout_ms="${MS:-50}")
    graph.save(tmp_path / "a.yaml")  # it needs no variable
    Graph.load(tmp_path / "a.yaml").save(tmp_path / "b.yaml")
    assert "${DOOR_KEY}" in (tmp_path / "b.yaml").read_text()
    assert graph == Graph.load(tmp_path / "b.yaml")
    monkeypatch.setenv("DOOR_KEY", "sesame!")
    (plan,) = read_graphs(tmp_path / "b.yaml")
    assert 0.05 == plan.nodes[0].timeout_s
    with Graph.load(tmp_path / "b.yaml").mock() as server:
        assert {"known": True, "a": 1} == server.invoke({"a": 1})


def test_a_path_that_begins_with_a_variable_is_written_as_it_is(tmp_path):
    graph = Graph("g", inputs={"x": ("FP32", [-1])})
    graph.to(steps.Onnx("${MODELS}/a.onnx"), name="a").respond()
    graph.save(tmp_path / "g.yaml")
    assert "path: ${MODELS}/a.onnx" in (tmp_path / "g.yaml").read_text()


def test_a_variable_that_is_missing_is_named_with_file_line_and_node(tmp_path):
    (tmp_path / "g.yaml").write_text(
        "graph: g\ninputs: body\nnodes:\n  door:\n    step: python\n    call: x:y\n    init:\n      key: ${NO_SUCH_KEY}\nanswer: door\n"
    )
    with pytest.raises(GraphInvalid, match=r"g.yaml:8: node 'door': environment variable NO_SUCH_KEY is not set"):
        read_graphs(tmp_path / "g.yaml")
    with pytest.raises(GraphInvalid, match=r"node 'door': environment variable NO_SUCH_KEY is not set"):
        Graph.load(tmp_path / "g.yaml").compile()


def test_text_may_look_like_a_number(monkeypatch):
    monkeypatch.setenv("DESCRIPTION", "007")
    graph = Graph("g", inputs={"x": ("FP32", [-1])}, description="${DESCRIPTION}", answer="door")
    graph.to(Door, name="door", init={"key": "k"}, rename={"inputs": {"x": "${DESCRIPTION}"}})
    assert ({"x": "007"}) == graph.compile().nodes[0].renamed_inputs


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"timeout_ms": "${SECRET}"}, "'timeout_ms': expected a number, got ${SECRET}"),
        ({"batch": {"max_rows": "${NUMBER}"}}, "'batch.max_rows': expected greater than or equal to 1, got ${NUMBER}"),
        ({"call": "${SECRET}:call"}, "there is no module '${SECRET}'"),
        ({"run": "${SECRET}"}, "'run': expected 'inline' or 'thread', got ${SECRET}"),
        ({"keep": {"a": "${SECRET}"}}, "'keep': expected a list or 'all', got {'a': '${SECRET}'}"),
        ({"batch": {"max_rows": 4, "preferred_rows": ["${NUMBER}"]}}, "at least one size, each 1 or more, got [${NUMBER}]"),
    ],
)
def test_what_came_from_the_environment_is_not_printed(options, told, monkeypatch):
    monkeypatch.setenv("SECRET", "hunter22")
    monkeypatch.setenv("NUMBER", "-7")
    with pytest.raises(GraphInvalid) as refused:
        graph_of(**{"init": {"key": "k"}, **options}).compile()
    printed = str(refused.value)
    assert told in printed
    assert "hunter22" not in printed
    assert "-7" not in printed


@pytest.mark.parametrize(
    ("condition", "headers", "message"),
    [
        ("headers['x-key'] == '${DOOR_KEY}'", {}, "expression 'headers['x-key'] == '${DOOR_KEY}'' asks for 'x-key'"),
        ("int('${DOOR_KEY}') > 1", {}, "invalid literal for int() with base 10: '${DOOR_KEY}'"),
        ("headers['x-key'] == '${DOOR_KEY}'", {"x-key": "guess"}, "go away"),
        ("inputs['x'] > 0 or id == '${DOOR_KEY}'", {}, "'inputs['x'] > 0 or id == '${DOOR_KEY}'' asks several truth values"),
    ],
)
def test_a_condition_tells_no_caller_what_it_compares_with(monkeypatch, condition, headers, message):
    monkeypatch.setenv("DOOR_KEY", "sesame!")
    door = routers.Filter(lambda value: value, condition, {"message": "go away"})
    with Graph("g", {"x": ("FP32", [-1])}).to(door, "door").respond().mock() as server:
        with pytest.raises((InvalidRequest, StepFailed)) as caught:
            server.infer(x=[1.0, 2.0], headers=headers)
        assert message in caught.value.message
        about = server.request("GET", "/admin/graphs/g").body.decode()
    assert "${DOOR_KEY}" in about
    assert "sesame" not in about + caught.value.message


def test_a_cycle_tells_no_caller_what_it_compares_with(monkeypatch):
    monkeypatch.setenv("DOOR_KEY", "sesame!")
    cycle = routers.Cycle(lambda value: value, "id != '${DOOR_KEY}'", 2)
    graph = Graph("g", {"x": ("FP32", [-1])}).to(cycle, "turn").respond()
    text = "repeat_while: id != '.{DOOR_KEY}'' still holds after 2 turns"
    with graph.mock() as server, pytest.raises(StepFailed, match=text):
        server.infer(x=[1.0])


def test_where_state_is_kept_is_told_by_reference(monkeypatch):
    monkeypatch.setenv("DOOR_KEY", "sesame!")
    router = routers.Ab({"a": lambda value: value}, {"a": 1}, state="unix:///nowhere/${DOOR_KEY}")
    with pytest.raises(StepFailed, match="cannot read state") as caught:
        Graph("g", {"x": ("FP32", [-1])}).to(router, "ab").respond().mock().__enter__()
    assert "sesame" not in caught.value.message
