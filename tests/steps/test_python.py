"""The python step: what a function is given, where it runs, what a class may do."""

import asyncio
import threading
import time

import numpy as np
import pytest

from servinggraph import Context, Graph, InvalidRequest, RowErrors, signature, steps
from servinggraph.errors import DeadlineExceeded, GraphInvalid, StepFailed

ONES = np.ones((2, 3), "f4")


def graph_of(work, inputs=None, **options):
    graph = Graph("g", inputs=inputs or {"x": ("FP32", [-1, 3])})
    graph.to(work if not options else steps.Python(work, **options), name="f").respond()
    return graph


def answer(work, inputs=None, tensors=None, **options):
    with graph_of(work, inputs, **options).mock() as server:
        return server.infer(tensors or {"x": ONES}).outputs


def test_one_parameter_gets_the_whole_value():
    assert 3 == answer(lambda anything: {"y": np.array([anything["x"].shape[1]])})["y"][0]


def test_several_parameters_get_tensors_by_name():
    two = {"a": ("FP32", [-1]), "b": ("FP32", [-1])}
    result = answer(lambda b, a: {"y": a - b}, two, {"a": np.float32([5]), "b": np.float32([3])})
    assert [2] == result["y"].tolist()


def test_a_parameter_called_context_gets_the_context():
    def step(value, context):
        assert isinstance(context, Context)
        context.response_parameters["graph"] = context.graph
        return value

    with graph_of(step).mock() as server:
        reply = server.infer(x=ONES, id="r1")
    assert {"graph": "g"} == reply.parameters
    assert "r1" == reply.id


def test_context_first_and_tensors_by_name_work_too():
    def first(context, value):
        return {"y": np.array([len(context.id)])}

    def named(x, z, context):
        return {"y": np.array([len(context.id)])}

    with graph_of(first).mock() as server:
        assert [3] == server.infer(x=ONES, id="abc").outputs["y"].tolist()
    both = {"x": ("FP32", [-1, 3]), "z": ("FP32", [-1, 3])}
    with graph_of(named, both).mock() as server:
        assert [2] == server.infer(x=ONES, z=ONES, id="ab").outputs["y"].tolist()


def test_a_parameter_with_a_default_is_a_setting_beside_one_value():
    def scale(value, factor=2):
        return {"y": value["x"] * np.float32(factor)}

    assert 2.0 == answer(scale)["y"][0, 0]


def test_an_optional_tensor_may_be_left_out():
    def step(a, b, bias=None):
        return {"y": a + b + (0 if bias is None else bias)}

    inputs = {name: {"datatype": "FP32", "shape": [-1], "optional": name == "bias"} for name in ("a", "b", "bias")}
    one = np.float32([1])
    assert [2] == answer(step, inputs, {"a": one, "b": one})["y"].tolist()
    assert [3] == answer(step, inputs, {"a": one, "b": one, "bias": one})["y"].tolist()


def test_keyword_parameters_take_every_tensor():
    assert ["x"] == list(answer(lambda **tensors: tensors))


def test_keyword_parameters_take_every_tensor_and_the_context_comes_beside_them():
    def step(context, **tensors):
        assert isinstance(context, Context)
        return tensors

    assert ["x"] == list(answer(step))


def test_async_functions_are_awaited():
    async def step(value):
        return {"y": value["x"]}

    assert (2, 3) == answer(step)["y"].shape


def test_a_class_is_constructed_loaded_called_and_unloaded():
    class Step:
        events = []

        def __init__(self, factor):
            self.factor = factor

        def load(self):
            self.events.append("load")

        def infer(self, value):
            self.events.append("infer")
            return {"y": value["x"] * np.float32(self.factor)}

        def unload(self):
            self.events.append("unload")

    assert 5.0 == answer(Step, init={"factor": 5})["y"][0, 0]
    assert ["load", "infer", "unload"] == Step.events


def test_a_load_that_fails_names_the_node():
    class Step:
        def load(self):
            raise OSError("no model here")

        def __call__(self, value):
            return value

    with pytest.raises(StepFailed, match="node 'f': failed to load: OSError: no model here"), graph_of(Step).mock():
        pass


def test_run_thread_leaves_the_event_loop():
    threads = []

    def step(value):
        threads.append(threading.current_thread().name)
        return value

    answer(step, run="thread")
    answer(step)
    assert threads[0].startswith("f-")
    assert not threads[1].startswith("f-")


def test_threads_run_side_by_side():
    meeting = threading.Barrier(3, timeout=30)

    def step(value):
        meeting.wait()
        return value

    with graph_of(step, run="thread", threads=3).mock() as server:
        callers = [threading.Thread(target=server.infer, kwargs={"x": ONES}) for _ in range(3)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join(10)
    assert not meeting.broken


def test_run_thread_is_for_blocking_functions():
    async def step(value):
        return value

    with pytest.raises(GraphInvalid, match="'run: thread' is for blocking functions"):
        graph_of(step, run="thread").compile()


def test_an_exception_becomes_an_error_with_the_node_and_keeps_its_cause():
    def step(value):
        raise KeyError("age")

    with graph_of(step).mock() as server, pytest.raises(StepFailed, match="node 'f': KeyError: 'age'") as failed:
        server.infer(x=ONES)
    assert isinstance(failed.value.__cause__, KeyError)


def test_a_step_may_blame_the_request():
    def step(value):
        raise InvalidRequest("age must be positive")

    with graph_of(step).mock() as server, pytest.raises(InvalidRequest, match="node 'f': age must be positive"):
        server.infer(x=ONES)


def test_a_slow_inline_step_is_reported_once(caplog):
    def step(value):
        time.sleep(0.06)
        return value

    with graph_of(step).mock() as server:
        server.infer(x=ONES)
        server.infer(x=ONES)
    reports = [record for record in caplog.records if "held the event loop" in record.message]
    assert 1 == len(reports)
    assert "node 'f'" in reports[0].message


def test_row_errors_fail_their_callers_only():
    def step(value):
        bad = {row: "negative" for row in np.flatnonzero(value["x"][:, 0] < 0)}
        return RowErrors({"y": value["x"]}, bad)

    with graph_of(step, batch={"max_rows": 8}).mock() as server:
        assert 1.0 == server.infer(x=ONES).outputs["y"][0, 0]
        with pytest.raises(StepFailed, match="row 1: negative"):
            server.infer(x=np.float32([[1, 1, 1], [-1, 1, 1]]))
    with graph_of(step).mock() as server, pytest.raises(StepFailed, match="row 0: negative"):
        server.infer(x=-ONES)


def test_declared_signatures_are_the_metadata_and_are_checked():
    @signature(outputs={"y": ("FP32", [-1, 3])})
    def good(value):
        return {"y": value["x"]}

    with graph_of(good).mock() as server:
        outputs = server.request("GET", "/v2/models/g").json()["outputs"]
    assert [{"name": "y", "datatype": "FP32", "shape": [-1, 3]}] == outputs


@pytest.mark.parametrize(
    ("result", "text"),
    [
        ([1, 2], "gave a list as the answer, expected a mapping of tensor name to numpy array"),
        ({"y": [1, 2]}, "answer tensor 'y' is a list, expected a numpy array"),
        ({"y": np.array([1j])}, "output 'y' has dtype complex128, which no V2 datatype stands for"),
    ],
)
def test_an_answer_that_is_no_tensors_is_the_nodes_failure(result, text):
    with graph_of(lambda value: result).mock() as server, pytest.raises(StepFailed, match=text) as failed:
        server.infer(x=ONES)
    assert "f" == failed.value.node


@pytest.mark.parametrize(
    ("result", "text"),
    [
        ({"z": ONES}, "output 'y' must be a numpy array, got nothing"),
        ({"y": ONES.astype("f8")}, "output 'y' has datatype FP64, declared is FP32"),
        ({"y": ONES[:, :2]}, r"output 'y' has shape \[2, 2\], declared is \[-1, 3\]"),
    ],
)
def test_declared_outputs_are_checked_on_every_answer(result, text):
    options = {"outputs": {"y": {"datatype": "FP32", "shape": [-1, 3]}}}
    with graph_of(lambda value: result, **options).mock() as server, pytest.raises(StepFailed, match=text):
        server.infer(x=ONES)


def test_a_missing_tensor_by_name_is_named():
    graph = Graph("g", inputs={"x": ("FP32", [-1, 3])})
    graph.to(lambda value: {"q": value["x"]}, name="first").to(lambda a, b: a, name="second").respond()
    with graph.mock() as server, pytest.raises(StepFailed, match="node 'second': takes tensors a, b, but got q"):
        server.infer(x=ONES)


def test_module_of_another_folder_under_the_same_name_is_refused(tmp_path):
    for name, number in (("one", 1), ("two", 2)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "same_named_steps.py").write_text(f"def f(value): return {number}\n")
        (tmp_path / name / "g.yaml").write_text(
            "graph: g\ninputs: {x: {datatype: FP32, shape: [1]}}\n"
            "nodes: {a: {step: python, call: 'same_named_steps:f'}}\nanswer: a\n"
        )
    Graph.load(tmp_path / "one" / "g.yaml").compile()
    with pytest.raises(GraphInvalid, match="one process cannot hold both under one name"):
        Graph.load(tmp_path / "two" / "g.yaml").compile()


def test_a_step_in_a_thread_can_see_that_nobody_waits_any_more(manual_clock, run):
    begun, seen = threading.Event(), threading.Event()

    def step(value, context):
        assert not context.cancelled
        begun.set()
        while not context.cancelled:
            time.sleep(0.001)
        seen.set()
        return value

    async def main():
        async with graph_of(step, run="thread").mock() as server:
            asked = asyncio.ensure_future(server.infer(x=ONES, timeout_s=0.3))
            assert await asyncio.to_thread(begun.wait, 60)
            await manual_clock.advance(0.4)
            with pytest.raises(DeadlineExceeded):
                await asked
            assert await asyncio.to_thread(seen.wait, 60)

    run(main())
