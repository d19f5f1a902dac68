"""A graph as a node of another: one plan, with the names, checks and limits of both."""

import asyncio
import sys

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from servinggraph import Graph, InvalidRequest, steps
from servinggraph.errors import DeadlineExceeded, GraphInvalid, StepFailed
from servinggraph.plotting import draw, mermaid
from servinggraph.server import read_graphs

STEPS = """
import numpy as np
from servinggraph import InvalidRequest, signature

@signature(inputs={"x": ("FP32", [-1])}, outputs={"y": ("FP32", [-1])})
def double(value):
    return {"y": value["x"] * 2, "extra": value["x"]}

def plus(value):
    return {"y": value["x"] + 1}

def minus(value):
    if (value["y"] > 100).any():
        raise RuntimeError("too much")
    return {"y": value["y"] - 1}

@signature(inputs={"x": ("FP32", [-1])}, outputs={"y": ("FP32", [-1])})
def just_double(value):
    return {"y": value["x"] * 2}

def seen(value):
    return {"names": np.array([",".join(sorted(value)).encode()], dtype=object)}

def wrong(value):
    return {"x": value["x"].astype("f8")}

def runs(value, counter=[0]):
    counter[0] += 1
    return {"y": value["x"] * 0 + counter[0]}

def pair(x, z):
    return {"y": x + z}

def number(value): return 3.0
def text(value): return "a"
def both(value): return {"keys": np.array([",".join(sorted(value)).encode()], dtype=object)}

def halves(value):
    yield value
    yield value

def total(value, state):
    state["sum"] = state.get("sum", 0) + value["x"]
    return {"y": state["sum"]}

async def slow(value):
    import asyncio
    await asyncio.sleep(60)

class Linear:
    def __init__(self, output, factor, addend):
        self.output, self.factor, self.addend = output, factor, addend

    def __call__(self, value):
        return {self.output: sum(value.values()) * self.factor + self.addend}

class SlowLinear(Linear):
    async def __call__(self, value):
        import asyncio
        await asyncio.sleep(0)
        return super().__call__(value)
"""
X = "inputs: {x: {datatype: FP32, shape: [-1]}}\n"
INNER = f"graph: inner\n{X}nodes:\n  twice: {{step: python, call: 'nested_steps:double'}}\nanswer: twice\n"
OUTER = f"graph: outer\n{X}nodes:\n  part: {{step: graph, path: inner.yaml}}\n  last: {{step: python, call: 'nested_steps:minus'}}\nanswer: last\n"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nested_steps.py").write_text(STEPS)
    yield tmp_path
    sys.modules.pop("nested_steps", None)
    sys.path[:] = [place for place in sys.path if place != str(tmp_path)]


def write(folder, **files):
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)
    return Graph.load(folder / "outer.yaml")


def node(call, **keys):
    return "{" + ", ".join(["step: python", f"call: 'nested_steps:{call}'", *(f"{k}: {v}" for k, v in keys.items())]) + "}"


def graph_text(name, nodes, answer, inputs=X, **keys):
    lines = "".join(f"  {key}: {value}\n" for key, value in nodes.items())
    return f"graph: {name}\n{inputs}nodes:\n{lines}answer: {answer}\n" + "".join(f"{k}: {v}\n" for k, v in keys.items())


def test_a_graph_from_a_file_runs_as_a_node(folder):
    graph = write(folder, inner=INNER, outer=OUTER)
    plan = graph.compile()
    assert ["part", "part.twice", "last"] == [inner.name for inner in plan.every_node()]
    with graph.mock() as server:
        assert [1, 5] == server.infer(x=[1, 3]).outputs["y"].tolist()
        names = [entry["name"] for entry in server.request("GET", "/v2/models/outer/stats").json()["model_stats"]]
    assert ["outer", "outer.part", "outer.part.twice", "outer.last"] == names


def test_errors_name_the_node_inside(folder):
    inner = graph_text("inner", {"twice": node("double"), "less": node("minus")}, "less")
    graph = write(folder, inner=inner, outer=OUTER)
    with graph.mock() as server, pytest.raises(StepFailed, match="^node 'part.less': RuntimeError: too much"):
        server.infer(x=[99])


def test_graphs_in_graphs_in_branches_of_routers(folder):
    middle = graph_text("middle", {"deep": "{step: graph, path: inner.yaml}"}, "deep")
    branches = f"{{plain: {node('just_double')}, nested: {{step: graph, path: middle.yaml}}}}"
    outer = graph_text("outer", {"pick": f"{{router: ensemble, combine: mean, branches: {branches}}}"}, "pick")
    graph = write(folder, inner=INNER, middle=middle, outer=outer)
    assert "pick.nested.deep.twice" in [inner.name for inner in graph.compile().every_node()]
    with graph.mock() as server:
        assert [2, 6] == server.infer(x=[1, 3]).outputs["y"].tolist()


@st.composite
def dags(draw):
    """A random graph: (name, sources, factor, addend, class, batch) of each node; the last one joins all that dangle."""
    nodes, dangling = [], []
    size = draw(st.integers(1, 6))
    for index in range(size):
        known = ["inputs", *(node[0] for node in nodes)]
        last = index == size - 1
        sources = (
            (dangling or ["inputs"]) if last else draw(st.lists(st.sampled_from(known), min_size=1, max_size=3, unique=True))
        )
        kind = draw(st.sampled_from(["Linear", "SlowLinear"]))
        nodes.append((f"n{index}", sources, draw(st.integers(-2, 2)), draw(st.integers(-3, 3)), kind, draw(st.booleans())))
        dangling = [name for name in dangling if name not in sources] + [f"n{index}"]
    return nodes


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    dag=dags(),
    depth=st.integers(1, 3),
    rows=st.lists(st.lists(st.integers(-5, 5), min_size=1, max_size=3), min_size=1, max_size=4),
)
def test_any_graph_gives_as_a_node_what_it_gives_alone(folder, dag, depth, rows):
    nodes = {}
    for name, sources, factor, addend, kind, batch in dag:
        output = "y" if name == dag[-1][0] else name
        init = f"{{output: {output}, factor: {factor}, addend: {addend}}}"
        nodes[name] = node(kind, init=init, after=f"[{', '.join(sources)}]", batch="{max_rows: 4}" if batch else "false")
    inner = graph_text("inner", nodes, dag[-1][0])
    files = {f"level{level}": graph_text(f"l{level}", {"in": f"{{step: graph, path: {below}.yaml}}"}, "in")
             for level, below in enumerate(["inner", *(f"level{number}" for number in range(depth - 1))])}  # fmt: skip
    part = f"{{step: graph, path: level{depth - 1}.yaml}}"
    branches = f"{{left: {part}, right: {part}}}"
    outer = graph_text("outer", {"both": f"{{router: ensemble, combine: mean, branches: {branches}}}"}, "both")
    graph = write(folder, inner=inner, **files, outer=outer)

    async def main():
        async with graph.mock() as server:
            return await asyncio.gather(*(server.infer(x=x) for x in rows))

    for x, reply in zip(rows, asyncio.run(main()), strict=True):
        columns = {"inputs": np.array(x, "f4")}
        for name, sources, factor, addend, _, _ in dag:
            columns[name] = sum(columns[source] for source in sources) * factor + addend
        assert columns[dag[-1][0]].tolist() == reply.outputs["y"].tolist()


def test_a_dag_inside_joins_as_it_does_alone(folder):
    nodes = {"a": node("number"), "b": node("text", after="inputs"), "both": node("both", after="[a, b, inputs]")}
    inner = graph_text("inner", nodes, "both")
    outer = graph_text("outer", {"part": "{step: graph, path: inner.yaml}"}, "part")
    graph = write(folder, inner=inner, outer=outer)
    answers = []
    for whole in (Graph.load(folder / "inner.yaml"), graph):
        with whole.mock() as server:
            answers.append(server.infer(x=[1]).outputs["keys"].tolist())
    assert [[b"a,b,x"]] * 2 == answers


def test_only_declared_inputs_go_in_and_only_declared_outputs_come_out(folder):
    inner = graph_text("inner", {"seen": node("seen", keep="all")}, "seen", outputs="{names: {datatype: BYTES, shape: [-1]}}")
    outer = graph_text(
        "outer", {"part": "{step: graph, path: inner.yaml}"}, "part",
        inputs="inputs: {x: {datatype: FP32, shape: [-1]}, z: {datatype: FP32, shape: [-1]}}\n",
    )  # fmt: skip
    graph = write(folder, inner=inner, outer=outer)
    with graph.mock() as server:
        outputs = server.infer(x=[1], z=[2]).outputs
    assert {"names": [b"x"]} == {name: tensor.tolist() for name, tensor in outputs.items()}


def test_what_does_not_fit_is_refused_when_it_is_compiled(folder):
    wide = INNER.replace("FP32, shape: [-1]}}\nnodes", "FP64, shape: [-1]}, q: {datatype: INT8, shape: [1]}}\nnodes")
    with pytest.raises(GraphInvalid) as refused:
        write(folder, inner=wide, outer=OUTER).compile()
    printed = str(refused.value)
    assert (
        f"{folder}/outer.yaml:4: node 'part': input 'q' is provided by nobody" not in printed
    )  # the inner one is broken already
    assert f"{folder}/inner.yaml:4: node 'part.twice': input 'x' does not fit: its datatype is FP64, expected FP32" in printed
    with pytest.raises(GraphInvalid) as refused:
        write(folder, inner=INNER.replace("[-1]", "[-1, 4]", 1).replace("double", "seen"), outer=OUTER).compile()
    assert "outer.yaml:4: node 'part': input 'x' does not fit: its shape is [-1], expected [-1, 4]" in str(refused.value)


def test_what_does_not_fit_is_an_error_when_it_runs_where_the_compiler_cannot_know(folder):
    outer = graph_text("outer", {"a": node("wrong"), "part": "{step: graph, path: inner.yaml}"}, "part")
    graph = write(folder, inner=INNER, outer=outer)
    with (
        graph.mock() as server,
        pytest.raises(StepFailed, match="node 'part': graph 'inner' takes 'x' in datatype FP32, got FP64"),
    ):
        server.infer(x=[1])


@pytest.mark.parametrize(
    ("files", "text"),
    [
        ({"inner": OUTER.replace("inner.yaml", "outer.yaml")}, "a graph cannot be a node of itself: {0}/outer.yaml -> {0}/inner.yaml -> {0}/outer.yaml"),
        ({}, "outer.yaml:4: node 'part': graph file 'inner.yaml' does not exist"),
        ({"inner": "graph: [\n"}, "inner.yaml:2: not valid YAML"),
        ({"inner": INNER + "sequences: {}\n"}, "inner.yaml:6: 'sequences' is for the graph that is served, and this one is its node 'part'"),
        ({"inner": INNER.replace("answer: twice", "answer: twic")}, "inner.yaml:5: 'answer' names 'twic', which is no node; did you mean 'twice'?"),
        ({"inner": INNER.replace("python", "pyton")}, "inner.yaml:4: node 'part.twice': unknown step 'pyton'"),
        ({"inner": INNER.replace("graph: inner", "graph: ${NO_SUCH_NAME}")}, "inner.yaml:1: environment variable NO_SUCH_NAME is not set"),
        ({"inner": INNER.replace("double", "halves")}, "inner.yaml:1: node 'part': has a generator"),
        ({"inner": INNER.replace("double'", "double', after: other")}, "inner.yaml:4: node 'part.twice': 'after' names 'other'"),
    ],
)  # fmt: skip
def test_broken_graphs_are_told_with_file_line_and_node(folder, files, text):
    with pytest.raises(GraphInvalid) as refused:
        write(folder, **files, outer=OUTER).compile()
    assert text.format(folder) in str(refused.value)


def test_relative_paths_start_from_the_inner_file(folder):
    (folder / "deep").mkdir()
    (folder / "deep" / "labels.txt").write_text("no\nyes\n")
    (folder / "nested_steps.py").rename(folder / "deep" / "nested_steps.py")
    inner = INNER + "outputs: {y: {datatype: FP32, shape: [-1], labels: labels.txt}}\n"
    (folder / "deep" / "inner.yaml").write_text(inner)
    graph = write(folder, outer=graph_text("outer", {"part": "{step: graph, path: deep/inner.yaml}"}, "part"))
    assert ("no", "yes") == graph.compile().outputs["y"].labels.names
    (folder / "elsewhere").mkdir()
    graph.save(folder / "elsewhere" / "g.yaml")
    assert "path: ../deep/inner.yaml" in (folder / "elsewhere" / "g.yaml").read_text()
    assert graph == Graph.load(folder / "elsewhere" / "g.yaml")


def test_nodes_inside_and_the_whole_can_be_replaced_in_a_test(folder):
    graph = write(folder, inner=INNER, outer=OUTER)
    with graph.mock(replace={"part.twice": lambda value: {"y": value["x"] * 10}}) as server:
        assert [29] == server.infer(x=[3]).outputs["y"].tolist()
    with graph.mock(replace={"part": {"y": np.ones(1, "f4")}}) as server:
        assert [0] == server.infer(x=[3]).outputs["y"].tolist()
    with pytest.raises(GraphInvalid, match="there is no node 'part.twic' to replace; did you mean 'part.twice'?"):
        graph.mock(replace={"part.twic": {}})


def test_a_router_inside_has_its_seat(folder):
    branches = f"{{a: {node('double')}, b: {node('plus')}}}"
    inner = graph_text("inner", {"pick": f"{{router: ab, weights: {{a: 1, b: 0}}, branches: {branches}}}"}, "pick")
    outer = graph_text("outer", {"part": "{step: graph, path: inner.yaml}"}, "part")
    graph = write(folder, inner=inner, outer=outer)
    with graph.mock() as server:
        reply = server.infer(x=[3])
        assert ([6], "a") == (reply.outputs["y"].tolist(), reply.parameters["part.pick.variant"])
        path = "/admin/graphs/outer/routers/part.pick"
        assert 200 == server.request("PATCH", path, b'{"settings": {"weights": {"a": 0, "b": 1}}}').status
        assert [4] == server.infer(x=[3]).outputs["y"].tolist()
    with pytest.raises(GraphInvalid, match="node 'part': cannot batch: router 'part.pick' decides for each request"):
        write(folder, inner=inner, outer=outer.replace("inner.yaml}", "inner.yaml, batch: true}")).compile()


@pytest.mark.parametrize("place", ["inner", "node"])
def test_its_batch_time_limit_and_cache_are_the_nodes(folder, place):
    batch = "{max_rows: 3, max_delay_ms: 5000, wait_when_idle: true}"
    inner = graph_text("inner", {"count": node("runs")}, "count", **({"batch": batch} if place == "inner" else {}))
    keys = f", batch: {batch}" if place == "node" else ""
    outer = graph_text("outer", {"part": f"{{step: graph, path: inner.yaml{keys}}}"}, "part")
    graph = write(folder, inner=inner, outer=outer)

    async def main():
        async with graph.mock() as server:
            return await asyncio.gather(server.infer(x=[1]), server.infer(x=[2, 3]))

    assert [[1], [1, 1]] == [reply.outputs["y"].tolist() for reply in asyncio.run(main())]


def test_the_shorter_time_limit_counts(folder, manual_clock, run):
    inner = graph_text("inner", {"slow": node("slow")}, "slow", timeout_ms=50)
    graph = write(
        folder, inner=inner, outer=graph_text("outer", {"part": "{step: graph, path: inner.yaml, timeout_ms: 70}"}, "part")
    )
    assert 0.05 == graph.compile().nodes[0].timeout_s

    async def main():
        async with graph.mock() as server:
            asked = asyncio.ensure_future(server.infer(x=[1]))
            await manual_clock.settle()
            await manual_clock.advance(0.06)
            with pytest.raises(DeadlineExceeded, match="node 'part': took longer than its timeout_ms = 50"):
                await asked

    run(main())


def test_kept_answers_of_an_inner_graph_are_kept(folder):
    inner = graph_text("inner", {"count": node("runs", pure="true")}, "count", cache="{max_bytes: 1000}")
    graph = write(folder, inner=inner, outer=graph_text("outer", {"part": "{step: graph, path: inner.yaml}"}, "part"))
    with graph.mock() as server:
        assert [1, 1, 2] == [int(server.infer(x=[x]).outputs["y"][0]) for x in (5, 5, 6)]
    impure = graph_text("inner", {"count": node("runs")}, "count")
    outer = graph_text("outer", {"part": "{step: graph, path: inner.yaml, pure: true}"}, "part")
    with pytest.raises(GraphInvalid, match="node 'part': is not pure: node 'part.count' does not say 'pure: true'"):
        write(folder, inner=impure, outer=outer).compile()


def test_steps_inside_keep_state_for_the_sequences_of_the_outer_graph(folder):
    inner = graph_text("inner", {"sum": node("total")}, "sum")
    outer = graph_text("outer", {"part": "{step: graph, path: inner.yaml}"}, "part", sequences="{idle_ms: 600000}")
    graph = write(folder, inner=inner, outer=outer)
    with graph.mock() as server:
        sums = [
            server.infer(x=[x], parameters={"sequence_id": "a", "sequence_start": start}).outputs["y"].tolist()
            for x, start in ((1, True), (2, False))
        ]
    assert [[1], [3]] == sums
    for keys, text in (
        ("batch: true", "'batch' of a graph cannot go around 'part.sum'"),
        ("retry: {}", "'retry' would run a step twice"),
    ):
        with pytest.raises(GraphInvalid, match=text):
            write(folder, inner=inner, outer=outer.replace("inner.yaml}", f"inner.yaml, {keys}}}")).compile()


def test_a_free_form_graph_inside_a_free_form_graph(folder):
    inner = graph_text("inner", {"sum": node("pair")}, "sum", inputs="inputs: body\n")
    outer = graph_text("outer", {"part": "{step: graph, path: inner.yaml}"}, "part", inputs="inputs: body\n")
    graph = write(folder, inner=inner, outer=outer)
    with graph.mock() as server:
        assert {"y": 4} == server.invoke({"x": 3, "z": 1})
        with pytest.raises(InvalidRequest, match="graph 'outer' takes 'x' from the body"):
            server.invoke({"z": 3})


def test_a_caller_who_leaves_cancels_the_nodes_inside(folder, manual_clock, run):
    inner = graph_text("inner", {"slow": node("slow")}, "slow")
    graph = write(folder, inner=inner, outer=graph_text("outer", {"part": "{step: graph, path: inner.yaml}"}, "part"))

    async def main():
        async with graph.mock() as server:
            asked = asyncio.ensure_future(server.infer(x=[1]))
            await manual_clock.settle()
            asked.cancel()
            await asyncio.wait([asked])
            assert 0 == server.in_flight

    run(main())


def test_pictures_show_the_nodes_inside(folder):
    inner = graph_text("inner", {"a": node("double"), "b": node("minus")}, "b")
    plan = write(folder, inner=inner, outer=OUTER).compile()
    text = mermaid(plan)
    assert 'subgraph part["part: graph inner.yaml"]' in text
    assert "part__a --> part__b" in text
    assert "part --> last" in text
    draw(plan, folder / "g.dot")
    dot = (folder / "g.dot").read_text()
    for edge in ('inputs -> "part.a"', '"part.a" -> "part.b"', '"part.b" -> last'):
        assert edge in dot


def test_check_and_the_builder_know_it(folder):
    write(folder, inner=INNER, outer=OUTER)
    (plan,) = read_graphs(folder / "outer.yaml")
    assert 3 == len(plan.every_node())
    graph = Graph("g", inputs={"x": ("FP32", [-1])})
    graph.to(steps.Graph("inner.yaml"), timeout_ms=100).respond()
    with graph.mock() as server:
        assert [2] == server.infer(x=[1]).outputs["y"].tolist()
