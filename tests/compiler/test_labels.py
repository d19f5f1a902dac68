"""Files with the names of an output's classes."""

import pytest

from servinggraph.compiler import compile_source
from servinggraph.errors import GraphInvalid
from servinggraph.spec import read_text

GRAPH = """
graph: g
inputs: {x: {datatype: FP32, shape: [-1]%s}}
outputs: {y: {datatype: FP32, shape: [-1]%s}}
nodes:
  n: {step: python, call: "math:sqrt"%s}
answer: n
"""


def compiled(folder, inputs="", outputs="", node=""):
    return compile_source(read_text(GRAPH % (inputs, outputs, node), "graph.yaml", folder))


def test_labels_of_an_output_are_read_beside_the_graph(tmp_path):
    (tmp_path / "labels.txt").write_text("cat\ndög\n", encoding="utf-8")
    labels = compiled(tmp_path, outputs=", labels: labels.txt").outputs["y"].labels
    assert ("labels.txt", ("cat", "dög")) == (labels.file, labels.names)


def test_labels_of_a_node_are_those_of_the_answer_where_the_graph_declares_none(tmp_path):
    (tmp_path / "labels.txt").write_text("cat")
    text = (GRAPH % ("", "", ", outputs: {y: {datatype: FP32, shape: [-1], labels: labels.txt}}")).split("\n")
    plan = compile_source(read_text("\n".join(line for line in text if not line.startswith("outputs")), "g.yaml", tmp_path))
    assert ("cat",) == plan.outputs["y"].labels.names


@pytest.mark.parametrize(
    "content, text",
    [(None, "does not exist"), (b"\xff", "is not UTF-8"), (b"", "is empty")],
    ids=["missing", "binary", "empty"],
)
def test_a_file_without_labels_is_refused_with_its_line(tmp_path, content, text):
    if content is not None:
        (tmp_path / "l.txt").write_bytes(content)
    with pytest.raises(GraphInvalid) as info:
        compiled(tmp_path, outputs=", labels: l.txt")
    (problem,) = info.value.problems
    assert f"labels file 'l.txt' {text}" in problem.message
    assert 4 == problem.line


def test_inputs_have_no_labels(tmp_path):
    with pytest.raises(GraphInvalid, match="'labels' names classes of an output, and 'x' is an input"):
        compiled(tmp_path, inputs=", labels: l.txt")
