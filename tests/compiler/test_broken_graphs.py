"""What is printed for graph files that cannot be served: file, line, node, what was expected, what to do."""

import onnx
import pytest
from onnx import TensorProto, helper

from servinggraph.errors import GraphInvalid
from servinggraph.server import read_graphs

STEPS = """
import numpy as np

class Scaler:
    def __init__(self, factor): self.factor = factor
    def __call__(self, value): return {"X": value["X"] * self.factor}

def clean(value): return value
def add(a, b): return {"c": a + b}
limit = 3
"""


def write_model(path, inputs, outputs, nodes):
    tensors = lambda pairs: [helper.make_tensor_value_info(n, t, s) for n, t, s in pairs]  # noqa: E731
    graph = helper.make_graph(nodes, "g", tensors(inputs), tensors(outputs))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 9
    onnx.save(model, path)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken_graph_steps.py").write_text(STEPS)
    (tmp_path / "broken_import.py").write_text("x = 1\nimport no_such_library\n")
    (tmp_path / "syntax_error.py").write_text("def f(:\n")
    identity = [helper.make_node("Identity", ["x"], ["y"])]
    float32 = TensorProto.FLOAT
    write_model("free.onnx", [("x", float32, ["N", 4])], [("y", float32, ["N", 4])], identity)
    write_model("fixed.onnx", [("x", float32, [1, 4])], [("y", float32, [1, 4])], identity)
    (tmp_path / "text.onnx").write_text("this is no model")
    yield tmp_path
    import sys

    for name in ("broken_graph_steps", "broken_import", "syntax_error"):
        sys.modules.pop(name, None)
    if str(tmp_path) in sys.path:
        sys.path.remove(str(tmp_path))


HEAD = "graph: g\ninputs:\n  x: {datatype: FP32, shape: [-1, 4]}\nnodes:\n"

CASES = {
    "unknown kind": (
        HEAD + "  a: {step: pyton, call: broken_graph_steps:clean}\nanswer: a\n",
        ["g.yaml:5: node 'a': unknown step 'pyton'; did you mean 'python'?"],
    ),
    "unknown keys on every level": (
        HEAD.replace("graph: g", "grahp: g\ngraph: g")
        + "  a: {step: python, call: broken_graph_steps:clean, timeout: 3, batch: {max_row: 3}}\nanswer: a\n",
        [
            "g.yaml:1: unknown key 'grahp'; did you mean 'graph'?",
            "g.yaml:6: node 'a': unknown key 'batch.max_row'; did you mean 'max_rows'?",
            "g.yaml:6: node 'a': unknown key 'timeout'; did you mean 'timeout_ms'?",
        ],
    ),
    "missing callable": (
        HEAD + "  a: {step: python, call: broken_graph_steps:clear}\n  b: {step: python, call: nowhere:f}\nanswer: b\n",
        [
            "g.yaml:5: node 'a': module 'broken_graph_steps' has no 'clear'; did you mean 'clean'?",
            "g.yaml:6: node 'b': there is no module 'nowhere' in {folder} and the Python path",
        ],
    ),
    "the import's own error": (
        HEAD + "  a: {step: python, call: broken_import:f}\n  b: {step: python, call: syntax_error:f}\nanswer: b\n",
        [
            "g.yaml:5: node 'a': module 'broken_import' failed to import: ModuleNotFoundError: No module named 'no_such_library'",
            "g.yaml:6: node 'b': module 'syntax_error' failed to import: {folder}/syntax_error.py:1: SyntaxError: ",
        ],
    ),
    "cycle, as a path": (
        HEAD
        + "".join(f"  {n}: {{step: python, call: broken_graph_steps:clean, after: {a}}}\n" for n, a in ("ac", "ba", "cb"))
        + "answer: c\n",
        ["g.yaml:5: node 'a': the graph has a cycle: a -> b -> c -> a"],
    ),
    "dead ends": (
        HEAD
        + "  a: {step: python, call: broken_graph_steps:clean}\n"
        + "  b: {step: python, call: broken_graph_steps:clean}\n"
        + "  c: {step: python, call: broken_graph_steps:clean, after: inputs}\n"
        + "answer: c\n",
        [
            "g.yaml:5: node 'a': is unreachable from the answer 'c': only nodes that lead nowhere use its result",
            "g.yaml:6: node 'b': nobody uses its result: name it in another node's 'after', or answer with it instead of 'c'",
        ],
    ),
    "no answer, and a wrong one": (
        HEAD + "  a: {step: python, call: broken_graph_steps:clean}\n",
        ["g.yaml:1: missing key 'answer': which node's result is the answer: add 'answer: a'"],
    ),
    "answer that is no node": (
        HEAD + "  score: {step: python, call: broken_graph_steps:clean}\nanswer: scores\n",
        ["g.yaml:6: 'answer' names 'scores', which is no node; did you mean 'score'?"],
    ),
    "names": (
        (
            "graph: my graph\ninputs: {x: {datatype: FP32, shape: [-1, 4]}}\nnodes:\n"
            "  a/b: {step: python, call: broken_graph_steps:clean}\n  inputs: {step: python, call: broken_graph_steps:clean}\n"
            "  a/b: {step: python, call: broken_graph_steps:clean}\nanswer: inputs\n"
        ),
        [
            (
                "g.yaml:1: graph name 'my graph' is not URL-safe: use letters, digits, '_', '-' and '.', "
                "beginning with a letter, digit or '_'"
            ),
            "g.yaml:4: node 'a/b': node name 'a/b' is not URL-safe",
            "g.yaml:5: node 'inputs': a node cannot be called 'inputs': that name stands for the graph's inputs",
            "g.yaml:6: duplicate key 'a/b': first given in line 4",
        ],
    ),
    "model file": (
        HEAD + "  a: {step: onnx, path: gone.onnx}\n  b: {step: onnx, path: text.onnx}\nanswer: b\n",
        [
            "g.yaml:5: node 'a': model file 'gone.onnx' does not exist (looked at {folder}/gone.onnx)",
            "g.yaml:6: node 'b': ONNX Runtime cannot read 'text.onnx': ",
        ],
    ),
    "tensors that do not meet": (
        (
            "graph: g\ninputs:\n  x: {datatype: FP64, shape: [-1, 4]}\n  z: {datatype: FP32, shape: [-1, 5]}\nnodes:\n"
            "  a: {step: onnx, path: free.onnx}\n"
            "  b: {step: onnx, path: free.onnx, after: inputs, rename: {inputs: {z: x, q: r}}, keep: [k]}\n"
            "  c: {step: onnx, path: free.onnx, after: a}\n"
            "  d: {step: python, call: broken_graph_steps:clean, after: [a, c]}\nanswer: d\n"
        ),
        [
            "g.yaml:6: node 'a': input 'x' does not fit: its datatype is FP64, expected FP32",
            "g.yaml:7: node 'b': nobody uses its result",
            "g.yaml:7: node 'b': 'rename.inputs' names 'q', which does not reach this node",
            "g.yaml:7: node 'b': 'rename.inputs' makes two tensors 'x'",
            "g.yaml:7: node 'b': input 'x' does not fit: its shape is [-1, 5], expected [-1, 4]",
            "g.yaml:7: node 'b': 'keep' names 'k', which does not reach this node",
        ],
    ),
    "an input that nobody provides": (
        HEAD.replace("x:", "features:") + "  a: {step: onnx, path: free.onnx}\nanswer: a\n",
        [
            (
                "g.yaml:5: node 'a': input 'x' is provided by nobody: what reaches the node is features; "
                "'rename: {inputs: {features: x}}' would pass 'features'"
            ),
        ],
    ),
    "two nodes give one name": (
        HEAD
        + "  a: {step: onnx, path: free.onnx}\n  b: {step: onnx, path: free.onnx, after: inputs}\n"
        + "  c: {step: python, call: broken_graph_steps:clean, after: [a, b]}\nanswer: c\n",
        ["g.yaml:7: node 'c': 'a' and 'b' both give a tensor 'y': rename one with 'rename: {outputs: ...}'"],
    ),
    "batching what cannot be batched": (
        HEAD + "  a: {step: onnx, path: fixed.onnx, batch: {max_rows: 8, preferred_rows: [16]}}\n"
        "  b: {step: onnx, path: fixed.onnx, after: inputs, batch: true}\n"
        "  c: {step: python, call: broken_graph_steps:add, after: [a, b]}\nanswer: c\n",
        [
            "g.yaml:5: node 'a': 'batch': preferred_rows [16] go beyond max_rows 8",
            (
                "g.yaml:6: node 'b': cannot batch: the first axis of input 'x' is fixed, its shape is [1, 4]; "
                "remove 'batch', or export the model with a free first axis"
            ),
        ],
    ),
    "batching whole requests without a free axis": (
        (
            "graph: g\nbatch: {max_rows: 4}\ninputs: {x: {datatype: FP32, shape: [4]}}\nnodes:\n"
            "  a: {step: python, call: broken_graph_steps:clean}\nanswer: a\n"
        ),
        ["g.yaml:2: 'batch' joins requests by their first axis, and that of input 'x' is not free"],
    ),
    "a device that is not there": (
        HEAD + "  a: {step: onnx, path: free.onnx, device: 'cuda:7'}\n"
        "  b: {step: onnx, path: free.onnx, device: openvino, after: inputs}\n"
        "  c: {step: onnx, path: free.onnx, device: gpu, after: inputs}\nanswer: a\n",
        [
            "g.yaml:5: node 'a': device 'cuda:7' is not there: this machine has ",
            "g.yaml:6: node 'b': ONNX Runtime ",
            "g.yaml:7: node 'c': 'device': string should match pattern",
        ],
    ),
    "a router": (
        HEAD
        + "  a:\n    router: ensemble\n    combine: weighted_mean\n    quorum: 3\n    weights: {m: 1, q: 2}\n    branches:\n"
        "      m: {step: onnx, path: free.onnx}\n      n: {step: onnx, path: gone.onnx}\n"
        "  b: {router: ensemble, branches: {}}\n  c: {step: python, router: ensemble, call: x}\n  d: {call: x}\nanswer: a\n",
        [
            "g.yaml:12: node 'a.n': model file 'gone.onnx' does not exist",
            "g.yaml:13: node 'b': a router needs 'branches'",
            "g.yaml:14: node 'c': has both 'step' and 'router': a node is one or the other",
            "g.yaml:15: node 'd': has neither 'step' nor 'router': a node is one or the other",
        ],
    ),
    "an init that does not fit": (
        HEAD + "  a: {step: python, call: broken_graph_steps:Scaler, init: {faktor: 2}}\n"
        "  b: {step: python, call: broken_graph_steps:limit}\n"
        "  c: {step: python, call: broken_graph_steps:clean, init: {x: 1}}\nanswer: c\n",
        [
            "g.yaml:5: node 'a': 'init' does not fit 'broken_graph_steps:Scaler': missing a required argument: 'factor'",
            "g.yaml:6: node 'b': 'broken_graph_steps:limit' is not callable",
            "g.yaml:7: node 'c': 'init' is for classes, and 'broken_graph_steps:clean' is a function",
        ],
    ),
    "wrong types": (
        (
            "graph: g\nversion: 1.5\ntimeout_ms: soon\ninputs:\n  x: {datatype: FP31, shape: [-2]}\nnodes:\n"
            "  a: {step: python, call: broken_graph_steps:clean, batch: 5, after: 3}\nanswer: [a]\n"
        ),
        [
            "g.yaml:2: 'version': a version is a positive integer, got 1.5",
            "g.yaml:3: 'timeout_ms': expected a number, got 'soon'",
            "g.yaml:5: 'inputs.x.datatype': expected 'BOOL', 'UINT8'",
            "g.yaml:5: 'inputs.x.shape': each size is -1 (any) or 0 and more, got [-2]",
            "g.yaml:7: node 'a': 'after': expected text or a list, got 3",
            "g.yaml:7: node 'a': 'batch': expected a mapping or true or false, got 5",
            "g.yaml:8: 'answer': expected text, got ['a']",
        ],
    ),
    "not YAML": ("graph: g\n  inputs: [\n", ["g.yaml:2: not valid YAML: mapping values are not allowed here"]),
    "not a mapping": ("- a\n- b\n", ["g.yaml:1: expected a mapping with 'graph:', 'inputs:' and 'nodes:', got a list"]),
    "empty": ("", ["g.yaml:1: the file is empty"]),
    "a node after nothing that is there": (
        HEAD + "  a: {step: python, call: broken_graph_steps:clean, after: b}\nanswer: a\n",
        ["g.yaml:5: node 'a': 'after' names 'b', which is no node"],
    ),
    "a variable that is not set": (
        "graph: ${NO_SUCH_VARIABLE_HERE}\n",
        ["g.yaml:1: environment variable NO_SUCH_VARIABLE_HERE is not set; set it or write ${NO_SUCH_VARIABLE_HERE:-default}"],
    ),
}


@pytest.mark.parametrize("text, expected", CASES.values(), ids=CASES)
def test_a_broken_file_is_refused_with_every_problem_at_its_line(folder, text, expected):
    (folder / "g.yaml").write_text(text)
    with pytest.raises(GraphInvalid) as refused:
        read_graphs(folder.joinpath("g.yaml").relative_to(folder))
    printed = str(refused.value).splitlines()
    wanted = [line.replace("{folder}", str(folder)) for line in expected]
    missing = [line for line in wanted if not any(got.startswith(line) for got in printed)]
    assert not missing, "\n".join(["not printed:", *missing, "", "printed:", *printed])
    assert len(printed) >= len(wanted)


def test_problems_come_in_the_order_of_the_file(folder):
    (folder / "g.yaml").write_text(CASES["wrong types"][0])
    with pytest.raises(GraphInvalid) as refused:
        read_graphs(folder / "g.yaml")
    lines = [problem.line for problem in refused.value.problems]
    assert lines == sorted(lines)


def test_an_extra_that_is_not_installed_is_named(folder, monkeypatch):
    import sys

    from servinggraph import registry

    registry.load_kind.cache_clear()
    for name in [name for name in sys.modules if name.startswith("servinggraph.steps.onnx")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    (folder / "g.yaml").write_text(HEAD + "  a: {step: onnx, path: free.onnx}\nanswer: a\n")
    with pytest.raises(GraphInvalid, match=r"pip install 'servinggraph\[onnx\]'"):
        read_graphs(folder / "g.yaml")
    registry.load_kind.cache_clear()


def test_fan_in_of_an_input_and_a_node_is_accepted(folder):
    (folder / "g.yaml").write_text(
        "graph: g\ninputs:\n  x: {datatype: FP32, shape: [-1, 4]}\nnodes:\n"
        "  a: {step: onnx, path: free.onnx}\n"
        "  b: {step: python, call: broken_graph_steps:clean, after: [inputs, a]}\nanswer: b\n"
    )
    (plan,) = read_graphs(folder / "g.yaml")
    assert ("inputs", "a") == plan.nodes[1].sources
