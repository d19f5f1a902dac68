"""Reading graph files: positions, environment values, overrides."""

from pathlib import Path

import pytest

from servinggraph.errors import GraphInvalid
from servinggraph.spec import read_text


def read(text, overrides=(), **environment):
    return read_text(text, "g.yaml", Path("/"), overrides, environment)


def test_every_key_has_its_line():
    source = read("graph: g\nnodes:\n  a:\n    batch: {max_rows: 3}\n")
    assert 4 == source.lines[("nodes", "a", "batch", "max_rows")]


def test_a_variable_becomes_its_value_and_takes_the_type_of_what_it_became():
    source = read("a: ${ROWS}\nb: ${GONE:-32}\nc: pre-${NAME}-post\nd: '${ROWS}'\n", ROWS="7", NAME="x")
    assert {"a": 7, "b": 32, "c": "pre-x-post", "d": 7} == source.document


def test_a_quoted_text_with_a_variable_in_it_stays_text():
    assert {"a": "1 7"} == read("a: '1 ${ROWS}'", ROWS="7").document


def test_an_empty_variable_takes_the_default_as_in_a_shell():
    assert {"a": "x"} == read("a: ${EMPTY:-x}", EMPTY="").document


def test_a_default_may_hold_colons():
    assert {"a": "127.0.0.1:9092"} == read("a: ${KAFKA:-127.0.0.1:9092}").document


def test_two_dollar_signs_are_one():
    assert {"a": "${NAME}"} == read("a: $${NAME}").document


def test_an_override_replaces_a_value_and_is_typed_as_yaml():
    source = read("nodes:\n  s: {batch: {max_rows: 1}}\n", ["nodes.s.batch.max_rows=64", "nodes.s.keep=[a, b]"])
    assert {"nodes": {"s": {"batch": {"max_rows": 64}, "keep": ["a", "b"]}}} == source.document


def test_an_override_makes_the_mappings_that_are_not_there_yet():
    source = read("nodes:\n  s: {step: onnx, batch: true}\n", ["nodes.s.batch.max_rows=64", "nodes.s.tensorrt.fp16=true"])
    assert {"max_rows": 64} == source.document["nodes"]["s"]["batch"]
    assert {"fp16": True} == source.document["nodes"]["s"]["tensorrt"]


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("nodes.scroe.x=1", "there is no 'nodes.scroe'; did you mean 'score'"),
        ("nodes.score", "expected key=value"),
        ("graph.x=1", "'graph' has no keys"),
        ("graph=[", "is not valid YAML"),
    ],
)
def test_an_override_of_nothing_is_refused(override, text):
    with pytest.raises(GraphInvalid, match="--set") as refused:
        read("graph: g\nnodes: {score: {step: onnx}}\n", [override])
    assert text in str(refused.value)


def test_a_problem_at_an_overridden_key_names_the_override():
    source = read("nodes: {s: {batch: {max_rows: 1}}}", ["nodes.s.batch.max_rows=none"])
    problem = source.problem("wrong", ("nodes", "s", "batch", "max_rows"))
    assert "g.yaml: wrong (set by --set nodes.s.batch.max_rows=none)" == str(problem)


def test_merge_keys_and_anchors_work():
    source = read("a: &base {x: 1}\nb:\n  <<: *base\n  y: 2\n")
    assert {"x": 1, "y": 2} == source.document["b"]


def test_an_alias_that_contains_itself_is_refused():
    with pytest.raises(GraphInvalid, match="an alias contains itself"):
        read("a: &x [*x]\n")
