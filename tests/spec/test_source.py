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


def test_a_definition_keeps_its_references():
    source = read("a: ${ROWS}\nb: [x, 'pre-${GONE:-32}']\n", ROWS="7")
    assert {"a": 7, "b": ["x", "pre-32"]} == source.expanded()
    assert {"a": "${ROWS}", "b": ["x", "pre-${GONE:-32}"]} == source.document


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("${ROWS}", 7),
        ("'${ROWS}'", 7),
        ("${GONE:-32}", 32),
        ("${GONE:-}", None),
        ("${EMPTY:-x}", "x"),  # as in a shell
        ("${KAFKA:-127.0.0.1:9092}", "127.0.0.1:9092"),
        ("${GONE:-2026-13-45}", "2026-13-45"),
        ("pre-${NAME}-post", "pre-x-post"),
        ("1${ROWS}", "17"),
        ("$${NAME}", "${NAME}"),
        ("costs 5$", "costs 5$"),
        ("$$$${ROWS}", "$${ROWS}"),
    ],
)
def test_a_reference_becomes_its_value_and_alone_takes_the_type_of_that(text, value):
    assert {"a": value} == read(f"a: {text}", ROWS="7", NAME="x", EMPTY="").expanded()


def test_every_variable_that_is_not_there_is_named_with_its_place():
    source = read("graph: ${A}\nnodes:\n  s:\n    url: 'http://${B}:${EMPTY}'\n    key: ${a-b}\n", EMPTY="")
    with pytest.raises(GraphInvalid) as refused:
        source.expanded()
    assert [
        "g.yaml:1: environment variable A is not set; set it or write ${A:-default}",
        "g.yaml:4: node 's': environment variable B is not set; set it or write ${B:-default}",
        "g.yaml:4: node 's': environment variable EMPTY is empty; set it or write ${EMPTY:-default}",
        "g.yaml:5: node 's': '${a-b}' is no reference: write ${NAME} or ${NAME:-default}, and $$ for a dollar sign",
    ] == str(refused.value).splitlines()


def test_a_problem_names_the_reference_and_not_the_value():
    source = read("a: ${KEY}\nb: {c: 'x-${PIN}'}\n", KEY="hunter22", PIN="12")
    source.expanded()
    assert "g.yaml:1: no door for ${KEY}, 12 tries" == str(source.problem("no door for hunter22, 12 tries", ("z",)))
    assert "g.yaml:2: got x-${PIN}, not 123" == str(source.problem("got x-12, not 123", ("b", "c")))


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
