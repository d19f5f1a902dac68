"""Running compiled graphs: order, parallelism, failures, time limits, slots."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

import numpy as np
import pytest

from servinggraph import Graph, routers, steps
from servinggraph.context import Context
from servinggraph.errors import DeadlineExceeded, InvalidRequest, ServingGraphError, StepFailed, Unavailable
from servinggraph.executor import Executor
from servinggraph.interfaces import NodeSketch, RowErrors
from servinggraph.lifecycle import Admission
from servinggraph.testing import FakeModel, ManualClock

Run = Callable[[Coroutine[Any, Any, None]], None]


def graph_of(*nodes: tuple[str, Any, Any] | tuple[str, Any, Any, Mapping[str, Any]], **options: Any) -> Graph:
    """Make a graph of (name, work, after[, options]); the last node answers."""
    graph = Graph("g", inputs={"x": ("FP32", [-1, 1])}, **options)
    for name, work, after, *more in nodes:
        graph.add(work, name, after=after, **(more[0] if more else {}))
    graph.answer(nodes[-1][0])
    return graph


async def started(graph: Graph) -> Executor:
    executor = Executor(graph.compile())
    await executor.start()
    return executor


def x(*numbers: float) -> dict[str, np.ndarray]:
    return {"x": np.array(numbers or (1,), "f4").reshape(-1, 1)}


def answer(graph: Graph, value: Any = None, context: Context | None = None) -> Any:
    async def run() -> Any:
        executor = await started(graph)
        try:
            return await executor.run(x() if value is None else value, context or Context())
        finally:
            await executor.stop()

    return asyncio.run(run())


def plus(number: float, into: str = "x") -> Callable[[Any], Any]:
    return lambda value: {into: sum(value.values()) + number}


def later(function: Callable[[Any], Any], seconds: float = 0) -> Callable[[Any], Any]:
    async def run(value: Any) -> Any:
        await asyncio.sleep(seconds)
        return function(value)

    return run


def fails(error: BaseException) -> Callable[[Any], Any]:
    def step(value: Any) -> Any:
        raise error

    return step


def in_thread(function: Callable[..., Any], **options: Any) -> NodeSketch:
    return steps.Python(function, run="thread", **options)


class Hang:
    """An async step that never ends, and remembers being cancelled."""

    def __init__(self) -> None:
        self.cancelled = 0

    async def __call__(self, value: Any) -> Any:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise


class Blocked:
    """A step for a thread that waits until it is let go."""

    def __init__(self) -> None:
        self.begun = threading.Event()
        self.release = threading.Event()
        self.calls = 0

    def __call__(self, value: Any) -> Any:
        self.calls += 1
        self.begun.set()
        assert self.release.wait(20)
        return value


async def turn_until(condition: Callable[[], bool]) -> None:
    """Let the loop run until threads have had their effect."""
    while not condition():
        await asyncio.sleep(0)


# Shapes of graphs.

WAYS: list[Any] = [lambda f: f, later, in_thread]
way = pytest.mark.parametrize("way", WAYS, ids=["inline", "async", "thread"])


@way
def test_a_chain_runs_in_order(way: Any) -> None:
    graph = graph_of(("a", way(plus(1)), "inputs"), ("b", way(lambda v: {"x": v["x"] * 10}), "a"), ("c", way(plus(2)), "b"))
    assert [[22.0]] == answer(graph)["x"].tolist()


@way
def test_a_diamond_joins_what_its_branches_give(way: Any) -> None:
    graph = graph_of(
        ("a", way(plus(1)), "inputs"),
        ("b", way(plus(10, "b")), "a"),
        ("c", way(plus(100, "c")), "a"),
        ("d", way(lambda value: {"y": value["c"] - value["b"]}), ["b", "c"]),
    )
    assert [[90.0]] == answer(graph)["y"].tolist()


@way
def test_joins_of_different_depth_and_the_inputs_themselves_meet(way: Any) -> None:
    graph = graph_of(
        ("a", way(plus(1, "a")), "inputs"),
        ("b", way(plus(10, "b")), "a"),
        ("c", way(plus(100, "c")), ["a", "inputs"]),
        ("d", way(plus(1000, "d")), ["b", "c"]),
        ("e", way(lambda value: {"y": sum(value.values())}), ["a", "d", "inputs"]),
    )
    # a=2 b=12 c=2+1+100=103 d=12+103+1000=1115
    assert [[2 + 1115 + 1.0]] == answer(graph)["y"].tolist()


def test_a_fork_of_inline_steps_makes_no_task() -> None:
    tasks: list[Any] = []

    def look(name: str) -> Any:
        def step(value: Any) -> Any:
            tasks.append(asyncio.current_task())
            return {name: value["x"]}

        return step

    graph = graph_of(("b", look("b"), "inputs"), ("c", look("c"), "inputs"), ("d", look("d2"), "inputs"),
                     ("e", lambda value: {"n": np.array(len(value))}, ["b", "c", "d"]))  # fmt: skip
    assert 3 == answer(graph)["n"]
    assert 1 == len(set(tasks))


def test_one_branch_that_suspends_beside_inline_ones_makes_no_task_either() -> None:
    tasks: list[Any] = []

    async def wait(value: Any) -> Any:
        await asyncio.sleep(0)
        tasks.append(asyncio.current_task())
        return {"b": value["x"]}

    def look(value: Any) -> Any:
        tasks.append(asyncio.current_task())
        return {"c": value["x"]}

    graph = graph_of(("b", wait, "inputs"), ("c", look, "inputs"), ("d", lambda value: value, ["b", "c"]))
    assert {"b", "c"} == set(answer(graph))
    assert 1 == len(set(tasks))


def test_branches_that_wait_do_so_side_by_side(run: Run, manual_clock: ManualClock) -> None:
    async def check() -> None:
        executor = await started(
            graph_of(
                ("b", later(plus(1, "b"), 0.050), "inputs"),
                ("c", later(plus(2, "c"), 0.050), "inputs"),
                ("d", later(plus(0, "d"), 0.050), "c"),
                ("e", lambda value: value, ["b", "d"]),
            )
        )
        began = manual_clock.time()
        running = asyncio.ensure_future(executor.run(x(), Context()))
        await manual_clock.advance(0.099)
        assert not running.done()
        await manual_clock.advance(0.002)
        assert running.done()
        assert manual_clock.time() - began < 0.102
        assert {"b": [[2.0]], "d": [[3.0]]} == {name: array.tolist() for name, array in (await running).items()}
        await executor.stop()

    run(check())


def test_requests_do_not_wait_for_one_another(run: Run, manual_clock: ManualClock) -> None:
    async def check() -> None:
        executor = await started(graph_of(("a", later(plus(1), 0.050), "inputs")))
        running = [asyncio.ensure_future(executor.run(x(number), Context())) for number in range(20)]
        await manual_clock.advance(0.050)
        assert [number + 1 for number in range(20)] == [request.result()["x"].item() for request in running]
        await executor.stop()

    run(check())


def test_values_need_not_be_tensors_and_join_under_their_nodes_names() -> None:
    graph = graph_of(
        ("a", lambda value: "text", "inputs"),
        ("b", lambda value: [1, 2], "inputs"),
        ("c", lambda value: {"c": 3}, "inputs"),
        ("d", lambda value: {**value}, ["a", "b", "c"]),
    )
    assert {"a": "text", "b": [1, 2], "c": 3} == answer(graph)


def test_none_is_a_value_like_any_other() -> None:
    graph = graph_of(("a", later(lambda value: None), "inputs"), ("b", later(lambda value: None), "inputs"),
                     ("c", later(lambda value: value), ["a", "b"]))  # fmt: skip
    assert {"a": None, "b": None} == answer(graph)
    assert answer(graph_of(("a", lambda value: None, "inputs"))) is None


def test_two_sources_that_give_the_same_tensor_are_an_error_of_the_node_that_joins() -> None:
    graph = graph_of(("a", plus(1), "inputs"), ("b", plus(2), "inputs"), ("c", plus(3), ["a", "b"]))
    with pytest.raises(StepFailed, match="node 'c': 'a' and 'b' both give 'x': rename one"):
        answer(graph)


# What a node's definition asks for.


def test_rename_and_keep_at_run_time() -> None:
    work = lambda value: {"z": value["y"] * 2}  # noqa: E731
    rename = {"inputs": {"x": "y"}, "outputs": {"z": "w"}}
    result = answer(graph_of(("a", work, "inputs", {"rename": rename, "keep": ["x"]})))
    assert {"w": [[2.0]], "x": [[1.0]]} == {name: array.tolist() for name, array in result.items()}
    result = answer(graph_of(("a", work, "inputs", {"rename": rename, "keep": "all"})))
    assert ["w", "x"] == sorted(result)


def unknown(value: Any) -> Any:
    """Hide from the compiler what is there."""
    return {"x": value["x"], "y": value["x"]}


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"rename": {"inputs": {"nope": "z"}}}, "'rename.inputs' names 'nope', which did not arrive"),
        ({"rename": {"outputs": {"nope": "z"}}}, "'rename.outputs' names 'nope', which was not given"),
        ({"rename": {"inputs": {"x": "y"}}}, "'rename.inputs' makes two tensors one"),
        ({"rename": {"outputs": {"x": "y"}}}, "'rename.outputs' makes two tensors one"),
        ({"keep": ["nope"]}, "'keep' names 'nope', which did not arrive"),
        ({"keep": ["x"]}, "'keep' passes 'x', but the node gives a tensor of that name"),
        ({"outputs": {"w": ("FP32", [-1, 1])}}, "output 'w' must be a numpy array, got nothing"),
        ({"outputs": {"x": ("FP64", [-1, 1])}}, "output 'x' has datatype FP32, declared is FP64"),
        ({"outputs": {"x": ("FP32", [-1, 2])}}, r"output 'x' has shape \[1, 1\], declared is \[-1, 2\]"),
    ],
)
def test_what_a_definition_says_is_held_against_what_happens(options: dict[str, Any], text: str) -> None:
    same = lambda value: {**value}  # noqa: E731
    for step in (same, later(same)):
        with pytest.raises(StepFailed, match=f"node 'b': {text}"):
            answer(graph_of(("a", unknown, "inputs"), ("b", step, "a", options)))


def test_a_kept_tensor_is_what_arrived_whatever_the_node_does_to_it() -> None:
    def writes(value: Any) -> Any:
        value["x"][:] = 7
        return {"y": value["x"]}

    def takes_out(value: Any) -> Any:
        return {"y": value.pop("x")}

    with pytest.raises(StepFailed, match="node 'a'.*read-only"):
        answer(graph_of(("a", writes, "inputs", {"keep": ["x"]})))
    assert ["x", "y"] == sorted(answer(graph_of(("a", takes_out, "inputs", {"keep": ["x"]}))))


@way
def test_a_branch_cannot_change_its_siblings_input(way: Any) -> None:
    def adds(value: Any) -> Any:
        value["more"] = value.pop("x")
        return {"b": value["more"]}

    def looks(value: Any) -> Any:
        assert ["x"] == list(value)
        return {"c": value["x"]}

    def writes(value: Any) -> Any:
        value["x"] += 1
        return {"b": value["x"]}

    graph = graph_of(("a", way(plus(0)), "inputs"), ("b", way(adds), "a"), ("c", way(looks), "a"),
                     ("d", way(lambda value: value), ["b", "c"]))  # fmt: skip
    assert {"b": [[1.0]], "c": [[1.0]]} == {name: array.tolist() for name, array in answer(graph).items()}
    with pytest.raises(StepFailed, match="node 'b'.*read-only"):
        answer(graph_of(("a", way(plus(0)), "inputs"), ("b", way(writes), "a"), ("c", way(looks), "a"),
                        ("d", way(lambda value: value), ["b", "c"])))  # fmt: skip


def test_a_bare_array_at_a_fork_is_read_only_too() -> None:
    def writes(value: Any) -> Any:
        value[:] = 7
        return {"b": value}

    graph = graph_of(("a", lambda value: value["x"] + 0, "inputs"), ("b", writes, "a"), ("c", lambda value: {"c": value}, "a"),
                     ("d", lambda value: value, ["b", "c"]))  # fmt: skip
    with pytest.raises(StepFailed, match="node 'b'.*read-only"):
        answer(graph)


def test_in_a_chain_a_step_may_write_in_place() -> None:
    def writes(value: Any) -> Any:
        value["x"] += 1
        return value

    assert [[2.0]] == answer(graph_of(("a", writes, "inputs")))["x"].tolist()


def test_a_bad_row_of_an_unbatched_step_is_the_requests_failure() -> None:
    graph = graph_of(("a", lambda value: RowErrors(value, {1: "no", 0: "bad"}), "inputs"))
    with pytest.raises(StepFailed, match="node 'a': row 0: bad"):
        answer(graph)
    assert ["x"] == list(answer(graph_of(("a", lambda value: RowErrors(value, {}), "inputs"))))


def test_the_whole_graph_can_be_batched(run: Run, manual_clock: ManualClock) -> None:
    sizes: list[int] = []

    def remember(value: Any) -> Any:
        sizes.append(len(value["x"]))
        if (value["x"] < 0).any():
            raise ValueError("negative")
        return {"b": value["x"] * 2}

    async def check() -> None:
        executor = await started(
            graph_of(
                ("a", later(plus(0)), "inputs"),
                ("b", remember, "a"),
                ("c", later(plus(0, "c")), "a"),
                ("d", lambda value: {"y": value["b"] + value["c"]}, ["b", "c"]),
                batch={"max_rows": 4, "max_delay_ms": 1, "wait_when_idle": True},
            )
        )
        running = [asyncio.ensure_future(executor.run(x(number), Context())) for number in (1, 2, -3, 4)]
        outcomes = await asyncio.gather(*running, return_exceptions=True)
        assert [3.0, 6.0, None, 12.0] == [None if isinstance(o, Exception) else o["y"].item() for o in outcomes]
        assert isinstance(outcomes[2], StepFailed)
        assert "b" == outcomes[2].node
        assert [4, 1, 1, 1, 1] == sizes
        await executor.stop()

    run(check())


# Failures.


class Odd(BaseException):
    pass


@way
@pytest.mark.parametrize(
    "error",
    [
        ValueError("v"),
        SystemExit(2),
        StopIteration("s"),
        asyncio.CancelledError(),
        TimeoutError("t"),
        Odd("o"),
        GeneratorExit(),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("shape", ["chain", "fork", "branch", "batched"])
def test_whatever_a_step_raises_is_an_answer_that_names_the_node(run: Run, way: Any, error: BaseException, shape: str) -> None:
    if isinstance(error, GeneratorExit) and way is later:
        error = Odd("an event loop that ends closes coroutines with GeneratorExit: it is no step's to raise there")
    bad = way(fails(error))
    same = later(lambda value: {"c": value["x"]})
    nodes: dict[str, Any] = {
        "chain": [("a", way(plus(0)), "inputs"), ("bad", bad, "a"), ("c", way(plus(0)), "bad")],
        "fork": [("bad", bad, "inputs"), ("c", same, "inputs"), ("d", lambda value: value, ["bad", "c"])],
        "branch": [("e", routers.Ensemble({"bad": bad, "c": same}), "inputs")],
        "batched": [("bad", bad, "inputs", {"batch": {"max_rows": 4}})],
    }

    async def check() -> None:
        executor = await started(graph_of(*nodes[shape]))
        for _ in range(2):
            with pytest.raises(StepFailed) as caught:
                await executor.run(x(), Context())
            assert ("e.bad" if shape == "branch" else "bad") == caught.value.node
            cause = caught.value.__cause__
            # Python itself makes another error of one that a coroutine, a future or a task cannot raise.
            translated = isinstance(error, StopIteration | GeneratorExit | asyncio.CancelledError) and way is not WAYS[0]
            assert translated or type(error) is type(cause)
        await executor.stop()

    run(check())


def test_an_error_of_ours_keeps_its_type_and_the_innermost_node() -> None:
    inner = routers.Ensemble({"bad": fails(InvalidRequest("i")), "good": plus(0)})
    with pytest.raises(InvalidRequest, match="node 'outer.inner.bad': i"):
        answer(graph_of(("outer", routers.Ensemble({"inner": inner, "other": plus(0)}), "inputs")))


def test_the_first_failure_cancels_the_siblings_and_names_its_node(run: Run, manual_clock: ManualClock) -> None:
    hang, after = Hang(), FakeModel()

    async def check() -> None:
        executor = await started(
            graph_of(
                ("a", hang, "inputs"),
                ("b", later(fails(ValueError("v")), 0.010), "inputs"),
                ("c", later(fails(KeyError("k")), 0.020), "inputs"),
                ("d", after, ["a", "b", "c"]),
            )
        )
        running = asyncio.ensure_future(executor.run(x(), Context()))
        await manual_clock.advance(0.010)
        with pytest.raises(StepFailed, match="node 'b': ValueError: v") as caught:
            running.result()
        assert isinstance(caught.value.__cause__, ValueError)
        assert 1 == hang.cancelled
        assert [] == after.calls
        await executor.stop()

    run(check())


def test_a_step_that_cancels_its_own_task_at_a_fork_is_a_failure_and_no_empty_answer(run: Run) -> None:
    async def suicide(value: Any) -> Any:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        await asyncio.sleep(0)

    async def check() -> None:
        executor = await started(graph_of(("a", later(plus(0, "a")), "inputs"), ("b", suicide, "inputs"),
                                          ("c", lambda value: value, ["a", "b"])))  # fmt: skip
        with pytest.raises(StepFailed, match="cancelled from inside"):
            await executor.run(x(), Context())
        await executor.stop()

    run(check())


def test_cancelling_a_request_cancels_every_branch_of_it(run: Run, manual_clock: ManualClock) -> None:
    hangs = [Hang() for _ in range(3)]

    async def check() -> None:
        executor = await started(
            graph_of(*((f"n{n}", hang, "inputs") for n, hang in enumerate(hangs)), ("z", plus(0), ["n0", "n1", "n2"]))
        )
        running = asyncio.ensure_future(executor.run(x(), Context()))
        await manual_clock.settle()
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert [1, 1, 1] == [hang.cancelled for hang in hangs]
        await executor.stop()

    run(check())


# Time limits.


@pytest.mark.parametrize("where", ["node", "graph", "request"])
def test_time_limits_end_a_step_that_waits(run: Run, manual_clock: ManualClock, where: str) -> None:
    hang = Hang()

    async def check() -> None:
        node = {"timeout_ms": 50} if where == "node" else {}
        graph = {"timeout_ms": 50} if where == "graph" else {}
        executor = await started(graph_of(("a", plus(0), "inputs"), ("b", hang, "a", node), ("c", plus(0), "b"), **graph))
        deadline = manual_clock.time() + 0.050 if where == "request" else None
        running = asyncio.ensure_future(executor.run(x(), Context(deadline=deadline)))
        await manual_clock.advance(0.049)
        assert not running.done()
        await manual_clock.advance(0.002)
        text = "node 'b': took longer than its timeout_ms = 50" if where == "node" else "Request timeout expired"
        with pytest.raises(DeadlineExceeded, match=text):
            running.result()
        assert 1 == hang.cancelled
        await executor.stop()

    run(check())


def test_the_earliest_of_several_limits_counts_and_is_the_one_that_is_named(run: Run, manual_clock: ManualClock) -> None:
    async def check() -> None:
        executor = await started(graph_of(("a", Hang(), "inputs", {"timeout_ms": 50}), timeout_ms=80))
        for deadline, seconds, text in ((0.020, 0.020, "Request timeout expired"), (9.0, 0.050, "timeout_ms = 50")):
            context = Context(deadline=manual_clock.time() + deadline)
            running = asyncio.ensure_future(executor.run(x(), context))
            await manual_clock.advance(seconds)
            with pytest.raises(DeadlineExceeded, match=text):
                running.result()
        await executor.stop()

    run(check())


def test_a_step_sees_the_deadline_of_its_node_and_the_rest_of_the_context(run: Run, manual_clock: ManualClock) -> None:
    seen: list[Context] = []

    async def look(value: Any, context: Context) -> Any:
        seen.append(context)
        context.response_parameters["seen"] = True
        return value

    async def check() -> None:
        executor = await started(graph_of(("a", look, "inputs", {"timeout_ms": 50}), ("b", look, "a"), timeout_ms=80))
        context = Context("id", headers={"h": "v"}, parameters={"p": 1}, priority=2, graph="g")
        now = manual_clock.time()
        await executor.run(x(), context)
        assert [now + 0.050, now + 0.080] == [one.deadline for one in seen]
        assert all(("id", "v", 1, 2, "g") == (c.id, c.headers["h"], c.parameters["p"], c.priority, c.graph) for c in seen)
        assert {"seen": True} == context.response_parameters
        await executor.stop()

    run(check())


@way
def test_a_deadline_that_has_passed_before_a_node_stops_it_from_running(run: Run, manual_clock: ManualClock, way: Any) -> None:
    calls: list[int] = []

    def step(value: Any) -> Any:
        calls.append(1)
        return value

    async def check() -> None:
        executor = await started(graph_of(("a", way(step), "inputs")))
        with pytest.raises(DeadlineExceeded):
            await executor.run(x(), Context(deadline=manual_clock.time()))
        assert [] == calls
        await executor.stop()

    run(check())


@pytest.fixture
def slow(manual_clock: ManualClock, monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], Any]:
    """Return an inline step that holds the event loop for a second."""

    def step(value: Any) -> Any:
        late = manual_clock.time() + 1
        monkeypatch.setattr(manual_clock, "time", lambda: late)
        return value

    return step


def test_a_deadline_that_passes_in_an_inline_step_stops_the_next_one(run: Run, manual_clock: ManualClock, slow: Any) -> None:
    calls: list[int] = []

    def step(value: Any) -> Any:
        calls.append(1)
        return value

    async def check() -> None:
        graph = graph_of(("slow", slow, "inputs"), ("b", step, "slow"))
        executor = await started(graph)
        with pytest.raises(DeadlineExceeded, match="node 'b'"):
            await executor.run(x(), Context(deadline=manual_clock.time() + 0.5))
        assert [] == calls
        await executor.stop()

    run(check())


def test_the_late_answer_of_an_inline_step_with_a_limit_is_not_passed_on(run: Run, slow: Any) -> None:
    async def check() -> None:
        executor = await started(graph_of(("slow", slow, "inputs", {"timeout_ms": 50})))
        with pytest.raises(DeadlineExceeded, match="node 'slow': took longer than its timeout_ms = 50"):
            await executor.run(x(), Context())
        await executor.stop()

    run(check())


def test_a_timeout_that_a_step_raises_itself_is_its_own_failure(run: Run, manual_clock: ManualClock) -> None:
    async def impatient(value: Any) -> Any:
        async with asyncio.timeout(0.010):
            await asyncio.sleep(1)

    async def check() -> None:
        executor = await started(graph_of(("a", impatient, "inputs", {"timeout_ms": 500}), timeout_ms=800))
        running = asyncio.ensure_future(executor.run(x(), Context()))
        await manual_clock.advance(0.010)
        with pytest.raises(StepFailed, match="node 'a': TimeoutError"):
            running.result()
        await executor.stop()

    run(check())


def test_a_request_can_be_cancelled_at_the_very_moment_its_time_is_up(run: Run, manual_clock: ManualClock) -> None:
    async def check() -> None:
        executor = await started(graph_of(("a", Hang(), "inputs", {"timeout_ms": 50}), timeout_ms=50))
        running = asyncio.ensure_future(executor.run(x(), Context()))
        await manual_clock.settle()
        asyncio.get_running_loop().call_at(manual_clock.time() + 0.050, running.cancel)
        await manual_clock.advance(0.050)
        assert running.done()
        assert running.cancelled() or isinstance(running.exception(), DeadlineExceeded)
        await executor.stop()

    run(check())


# Slots.


@pytest.mark.parametrize("how", ["cancelled", "expired", "node expired"])
@pytest.mark.parametrize("batch", [None, {"max_rows": 4}, "whole graph"])
def test_a_slot_is_free_only_when_the_thread_has_ended(run: Run, manual_clock: ManualClock, how: str, batch: Any) -> None:
    blocked = Blocked()

    async def check() -> None:
        node = {"timeout_ms": 50} if how == "node expired" else {}
        if isinstance(batch, dict):
            node["batch"] = batch  # type: ignore[assignment]
        options = {"batch": {"max_rows": 4}} if batch == "whole graph" else {}
        executor = await started(graph_of(("a", in_thread(blocked), "inputs", node), **options))
        admission = Admission(1)
        deadline = manual_clock.time() + 0.050 if how == "expired" else None
        context = Context(deadline=deadline)

        async def request() -> Any:
            admission.enter()
            try:
                return await executor.run(x(), context)
            finally:
                context.when_idle(admission.leave)

        running = asyncio.ensure_future(request())
        await turn_until(blocked.begun.is_set)
        if how == "cancelled":
            running.cancel()
        await manual_clock.advance(0.050)
        outcome = (await asyncio.gather(running, return_exceptions=True))[0]
        assert isinstance(outcome, asyncio.CancelledError if how == "cancelled" else DeadlineExceeded)
        assert 1 == admission.in_flight
        blocked.release.set()
        await turn_until(lambda: admission.in_flight == 0)
        await executor.stop()

    run(check())


def test_a_call_that_is_cancelled_before_a_thread_takes_it_never_runs(run: Run, manual_clock: ManualClock) -> None:
    blocked = Blocked()

    async def check() -> None:
        executor = await started(graph_of(("a", in_thread(blocked, threads=1), "inputs")))
        first = asyncio.ensure_future(executor.run(x(), Context()))
        await turn_until(blocked.begun.is_set)
        second = asyncio.ensure_future(executor.run(x(), Context()))
        await manual_clock.settle()
        second.cancel()
        blocked.release.set()
        await first
        await executor.stop()
        assert 1 == blocked.calls

    run(check())


# Slow inline steps.


@pytest.mark.parametrize("options", [{}, {"batch": {"max_rows": 4}}], ids=["plain", "batched"])
def test_a_slow_inline_step_is_reported_once(
    options: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    moments = iter(range(0, 10**13, 10**9))
    for module in ("stretches", "wiring"):
        monkeypatch.setattr(f"servinggraph.executor.{module}.perf_counter_ns", lambda: next(moments))

    async def check() -> None:
        executor = await started(graph_of(("slow", plus(0), "inputs", options)))
        for _ in range(3):
            await executor.run(x(), Context())
        await executor.stop()

    with caplog.at_level(logging.WARNING, "servinggraph.executor"):
        asyncio.run(check())
    assert 1 == len(caplog.records)
    assert "node 'slow' held the event loop for 1000 ms" in caplog.text


# A plan's life.


def recording(events: list[str], name: str, error: BaseException | None = None) -> type:
    class Recorded:
        def load(self) -> None:
            events.append(f"load {name}")
            if error is not None:
                raise error

        def __call__(self, value: Any) -> Any:
            return value

        def unload(self) -> None:
            events.append(f"unload {name}")

    return Recorded


@pytest.mark.parametrize(
    "error", [ValueError("broken"), SystemExit("broken"), StopIteration("broken")], ids=lambda error: type(error).__name__
)
def test_one_step_that_fails_to_load_unloads_the_others_and_is_named(run: Run, error: BaseException) -> None:
    events: list[str] = []

    async def check() -> None:
        graph = graph_of(
            ("a", recording(events, "a"), "inputs"),
            ("b", recording(events, "b", error), "a"),
            ("c", recording(events, "c"), "b"),
        )
        with pytest.raises(StepFailed, match="node 'b': failed to load: .*broken"):
            await started(graph)

    run(check())
    assert {"unload a", "unload c"} <= set(events)
    assert 1 == events.count("unload a") == events.count("unload c")


def test_a_failing_unload_keeps_no_other_from_it(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    events: list[str] = []

    class Bad:
        def __call__(self, value: Any) -> Any:
            return value

        def unload(self) -> None:
            raise SystemExit("no")

    async def check() -> None:
        executor = await started(graph_of(("a", Bad, "inputs"), ("b", recording(events, "b"), "a")))
        await executor.stop()

    run(check())
    assert "unload b" in events
    assert "node 'a' failed to unload" in caplog.text


def test_a_graph_that_is_not_started_says_so() -> None:
    async def check() -> None:
        with pytest.raises(ServingGraphError, match="not started"):
            await Executor(graph_of(("a", plus(0), "inputs")).compile()).run(x(), Context())

    asyncio.run(check())


def test_a_request_that_is_under_way_when_the_graph_stops_is_answered(run: Run, manual_clock: ManualClock) -> None:
    """Its next step's threads are gone by then, or its batcher is closed: that is an answer, too."""

    async def check() -> None:
        for last in (in_thread(plus(0)), steps.Python(plus(0), batch=True)):
            executor = await started(graph_of(("a", later(plus(0), 0.010), "inputs"), ("b", last, "a")))
            running = asyncio.ensure_future(executor.run(x(), Context()))
            await manual_clock.settle()
            await executor.stop()
            await manual_clock.advance(0.010)
            with pytest.raises(Unavailable, match="node 'b': is shutting down"):
                running.result()

    run(check())
