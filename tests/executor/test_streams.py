"""Generators in graphs: order, one item at a time, ends of every kind, and nothing left behind."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Coroutine
from contextlib import aclosing
from typing import Any

import numpy as np
import pytest

from servinggraph import Graph, routers, steps
from servinggraph.context import Context
from servinggraph.errors import DeadlineExceeded, GraphInvalid, InvalidRequest, ServingGraphError, StepFailed, Unsupported
from servinggraph.executor import Executor
from servinggraph.interfaces import RowErrors
from servinggraph.lifecycle import Serving, infer, stream
from servinggraph.messages import InferenceRequest
from servinggraph.testing import ManualClock

Run = Callable[[Coroutine[Any, Any, None]], None]


def graph_of(*nodes: Any, **options: Any) -> Graph:
    """Make a graph of (name, work, after[, options]); the last node answers."""
    graph = Graph("g", inputs={"x": ("FP32", [-1])}, **options)
    for name, work, after, *more in nodes:
        graph.add(work, name, after=after, **(more[0] if more else {}))
    graph.answer(nodes[-1][0])
    return graph


def x(*numbers: float) -> dict[str, np.ndarray]:
    return {"x": np.array(numbers, "f4")}


async def started(graph: Graph) -> Executor:
    executor = Executor(graph.compile())
    await executor.start()
    return executor


async def collect(graph: Graph, value: Any = None, context: Context | None = None) -> list[Any]:
    executor = await started(graph)
    try:
        async with aclosing(executor.stream(x(3) if value is None else value, context or Context())) as answers:
            return [answer async for answer in answers]
    finally:
        await executor.stop()


def answers(graph: Graph, value: Any = None) -> list[Any]:
    """Return all answers, tensors as lists."""
    return [{name: array.tolist() for name, array in answer.items()} for answer in asyncio.run(collect(graph, value))]


class Source:
    """A generator that gives 0, 1, 2, ... as tensor `x`, and remembers how far it came.

    Args:
        way: "inline", "async" or "thread".
        error: what it raises before item number `at`.
    """

    def __init__(
        self, way: str = "inline", *, count: int | None = None, error: BaseException | None = None, at: int = 0
    ) -> None:
        self.made = 0
        self.closed = 0
        self.closed_in = ""
        self._way, self._count, self._error, self._at = way, count, error, at

    def step(self) -> Any:
        if self._way == "async":
            return self._items_async
        return steps.Python(self._items, run="thread") if self._way == "thread" else self._items

    def _next(self, wanted: int) -> bool:
        if self._error is not None and self.made == self._at:
            raise self._error
        return self.made < wanted

    def _items(self, value: Any) -> Any:
        wanted = int(value["x"][0]) if self._count is None else self._count
        try:
            while self._next(wanted):
                self.made += 1
                yield {"x": np.array([self.made - 1], "f4")}
        finally:
            self.closed += 1
            self.closed_in = threading.current_thread().name

    async def _items_async(self, value: Any) -> Any:
        wanted = int(value["x"][0]) if self._count is None else self._count
        try:
            while self._next(wanted):
                await asyncio.sleep(0)
                self.made += 1
                yield {"x": np.array([self.made - 1], "f4")}
        finally:
            await asyncio.sleep(0)
            self.closed += 1


WAYS = ["inline", "async", "thread"]
way = pytest.mark.parametrize("way", WAYS)


def plus(number: float) -> Callable[[Any], Any]:
    return lambda value: {"x": value["x"] + np.float32(number)}


def renamed(into: str) -> dict[str, Any]:
    return {"rename": {"outputs": {"x": into}}}


# What comes out.


@way
def test_every_item_is_an_answer(way: str) -> None:
    assert [{"x": [0]}, {"x": [1]}, {"x": [2]}] == answers(graph_of(("count", Source(way).step(), "inputs")))


@way
def test_no_item_is_no_answer(way: str) -> None:
    assert [] == answers(graph_of(("count", Source(way).step(), "inputs")), x(0))


def test_a_graph_without_generators_streams_its_one_answer() -> None:
    assert [{"x": [4]}] == answers(graph_of(("add", plus(1), "inputs")))


def test_a_class_with_state_may_be_a_generator() -> None:
    class Counter:
        def __init__(self, start: int) -> None:
            self.start = start

        async def infer(self, value: Any, context: Context) -> Any:
            for number in range(2):
                yield {"x": np.array([self.start + number], "f4")}

    graph = graph_of(("count", steps.Python(Counter, init={"start": 7}), "inputs"))

    assert [{"x": [7]}, {"x": [8]}] == answers(graph)


def test_an_object_that_is_called_may_be_a_generator() -> None:
    class Counter:
        def __call__(self, value: Any, context: Context) -> Any:
            yield value
            yield {"x": value["x"] + 1}

    assert [{"x": [3]}, {"x": [4]}] == answers(graph_of(("count", Counter(), "inputs")))


@way
def test_items_go_one_by_one_through_the_steps_behind(way: str) -> None:
    async def double(value: Any) -> Any:
        await asyncio.sleep(0)
        return {"x": value["x"] * 2}

    graph = graph_of(("count", Source(way).step(), "inputs"), ("add", plus(1), "count"), ("double", double, "add"))

    assert [{"x": [2]}, {"x": [4]}, {"x": [6]}] == answers(graph)


def test_what_comes_before_a_generator_runs_once() -> None:
    calls = []

    def before(value: Any) -> Any:
        calls.append(value)
        return value

    assert 3 == len(answers(graph_of(("before", before, "inputs"), ("count", Source().step(), "before"))))
    assert 1 == len(calls)


def test_what_stands_beside_a_generator_runs_once_and_joins_every_item() -> None:
    calls = []

    async def beside(value: Any) -> Any:
        calls.append(value)
        await asyncio.sleep(0)
        return {"beside": value["x"]}

    graph = graph_of(
        ("beside", beside, "inputs"),
        ("count", Source().step(), "inputs", renamed("number")),
        ("join", lambda value: value, ["beside", "count", "inputs"]),
    )

    assert [{"beside": [3], "number": [n], "x": [3]} for n in range(3)] == answers(graph)
    assert 1 == len(calls)


def test_items_fork_and_join_behind_a_generator() -> None:
    running = most = 0

    def branch(number: float) -> Any:
        async def run(value: Any) -> Any:
            nonlocal running, most
            running += 1
            most = max(most, running)
            await asyncio.sleep(0)
            running -= 1
            return {"x": value["x"] + number}

        return run

    graph = graph_of(
        ("count", Source().step(), "inputs"),
        ("left", branch(10), "count", renamed("left")),
        ("right", branch(20), "count", renamed("right")),
        ("join", lambda value: value, ["left", "right", "count"]),
    )

    assert [{"left": [10 + n], "right": [20 + n], "x": [n]} for n in range(3)] == answers(graph)
    assert 2 == most


def test_generators_nest() -> None:
    def again(value: Any) -> Any:
        for number in range(int(value["x"][0])):
            yield {"y": np.array([number], "f4")}

    graph = graph_of(
        ("outer", Source("async").step(), "inputs"),
        ("add", plus(1), "outer"),
        ("inner", again, "add"),
        ("join", lambda value: value, ["outer", "inner"]),
    )

    expected = [(0, 0), (1, 0), (1, 1), (2, 0), (2, 1), (2, 2)]
    assert [{"x": [outer], "y": [inner]} for outer, inner in expected] == answers(graph)


def test_a_generator_may_follow_a_fork() -> None:
    def both(left: Any, right: Any) -> Any:
        yield {"sum": left + right}
        yield {"difference": left - right}

    graph = graph_of(
        ("left", plus(1), "inputs", renamed("left")),
        ("right", plus(2), "inputs", renamed("right")),
        ("both", both, ["left", "right"]),
    )

    assert [{"sum": [9]}, {"difference": [-1]}] == answers(graph)


def test_batched_steps_and_routers_take_items_as_calls_of_their_own() -> None:
    rows = []

    def batched(value: Any) -> Any:
        rows.append(len(value["x"]))
        return value

    graph = graph_of(
        ("count", Source().step(), "inputs"),
        ("batched", batched, "count", {"batch": {"max_rows": 4}}),
        ("mean", routers.Ensemble({"a": plus(1), "b": plus(3)}), "batched"),
    )

    assert [{"x": [2]}, {"x": [3]}, {"x": [4]}] == answers(graph)
    assert [1, 1, 1] == rows


def test_streams_of_several_callers_share_a_batch_behind() -> None:
    sizes = []

    async def batched(value: Any) -> Any:
        sizes.append(len(value["x"]))
        await asyncio.sleep(0.001)
        return value

    async def check() -> None:
        graph = graph_of(("count", Source(count=4).step(), "inputs"), ("batched", batched, "count", {"batch": {"max_rows": 8}}))
        executor = await started(graph)

        async def one() -> int:
            async with aclosing(executor.stream(x(1), Context())) as stream:
                return len([answer async for answer in stream])

        source_counts = await asyncio.gather(*(one() for _ in range(4)))
        assert sum(source_counts) == sum(sizes)
        assert max(sizes) > 1
        await executor.stop()

    asyncio.run(check())


def test_names_kept_tensors_and_declared_outputs_hold_for_each_item() -> None:
    def two(value: Any) -> Any:
        yield {"y": value["z"]}
        yield {"y": value["z"].astype("f8")}

    options = {
        "rename": {"inputs": {"x": "z"}, "outputs": {"y": "w"}},
        "keep": ["x"],
        "outputs": {"y": {"datatype": "FP32", "shape": [-1]}},
    }
    got = []

    async def check() -> None:
        executor = await started(graph_of(("two", two, "inputs", options)))
        stream = executor.stream(x(3), Context())
        got.append(await anext(stream))
        with pytest.raises(StepFailed, match="node 'two': output 'y' has datatype FP64, declared is FP32"):
            await anext(stream)
        await executor.stop()

    asyncio.run(check())
    assert {"w": [3], "x": [3]} == {name: array.tolist() for name, array in got[0].items()}


def test_an_item_may_be_rows_that_are_all_good_and_must_not_be_bad_ones() -> None:
    def rows(value: Any) -> Any:
        yield RowErrors(value, {})
        yield RowErrors(value, {0: "bad"})

    async def check() -> None:
        executor = await started(graph_of(("rows", rows, "inputs")))
        stream = executor.stream(x(3), Context())
        assert [3] == (await anext(stream))["x"].tolist()
        with pytest.raises(StepFailed, match="node 'rows': row 0: bad"):
            await anext(stream)
        await executor.stop()

    asyncio.run(check())


def test_a_step_behind_cannot_change_what_others_get() -> None:
    def spoils(value: Any) -> Any:
        value["x"][0] = 99
        return {"y": value["x"]}

    alone = graph_of(("count", Source().step(), "inputs"), ("spoils", spoils, "count"))
    shared = graph_of(("count", Source().step(), "inputs", renamed("n")), ("spoils", spoils, ["inputs", "count"]))

    assert [{"y": [99]}] * 3 == answers(alone)
    with pytest.raises(StepFailed, match="node 'spoils': ValueError: assignment destination is read-only"):
        answers(shared)


def test_response_parameters_belong_to_the_answer_that_they_were_set_for() -> None:
    def before(value: Any, context: Context) -> Any:
        context.response_parameters["before"] = True
        return value

    def count(value: Any, context: Context) -> Any:
        for number in range(3):
            if number == 1:
                context.response_parameters["odd"] = True
            yield {"x": np.array([number], "f4")}

    def behind(value: Any, context: Context) -> Any:
        context.response_parameters["number"] = int(value["x"][0])
        return value

    async def check() -> list[dict[str, Any]]:
        serving = Serving()
        await serving.catalog.load(
            [graph_of(("before", before, "inputs"), ("count", count, "before"), ("behind", behind, "count")).compile()]
        )
        responses = [response async for response in stream(serving.catalog.get("g"), InferenceRequest(x(3), "r"), Context())]
        await serving.catalog.stop()
        assert ["r"] * 3 == [response.id for response in responses]
        return [dict(response.parameters) for response in responses]

    first, second, third = asyncio.run(check())
    assert ({"before": True, "number": 0}, {"before": True, "number": 2}) == (first, third)
    assert {"before": True, "odd": True, "number": 1} == second


# Pull, not push.


@way
def test_the_next_item_is_made_when_it_is_asked_for(way: str, run: Run) -> None:
    source = Source(way, count=100)

    async def check() -> None:
        executor = await started(graph_of(("count", source.step(), "inputs"), ("add", plus(1), "count")))
        stream = executor.stream(x(1), Context())
        assert 0 == source.made
        for number in range(1, 5):
            await anext(stream)
            for _ in range(50):
                await asyncio.sleep(0)
            assert number == source.made
        await stream.aclose()
        await executor.stop()

    run(check())
    assert 1 == source.closed


def test_a_plain_generator_with_a_fast_reader_lets_others_run(run: Run) -> None:
    async def check() -> None:
        executor = await started(graph_of(("count", Source(count=100).step(), "inputs")))
        turns = 0

        async def other() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        task = asyncio.ensure_future(other())
        assert 100 == len([answer async for answer in executor.stream(x(1), Context())])
        assert turns >= 100
        task.cancel()
        await asyncio.wait([task])
        await executor.stop()

    run(check())


# Ends.


@way
@pytest.mark.parametrize("after", [0, 1, 3])
def test_closing_between_items_ends_the_generator_at_once(way: str, after: int, run: Run) -> None:
    source = Source(way, count=100)

    async def check() -> None:
        executor = await started(
            graph_of(("before", plus(0), "inputs"), ("count", source.step(), "before"), ("add", plus(1), "count"))
        )
        context = Context()
        stream = executor.stream(x(1), context)
        for _ in range(after):
            await anext(stream)
        await stream.aclose()
        assert (after, min(after, 1), after > 0) == (source.made, source.closed, context.cancelled)
        with pytest.raises(StopAsyncIteration):
            await anext(stream)
        await executor.stop()

    run(check())


@way
def test_a_stream_that_has_ended_leaves_a_request_that_was_not_abandoned(way: str, run: Run) -> None:
    source = Source(way)

    async def check() -> None:
        context = Context()
        await collect(graph_of(("count", source.step(), "inputs")), context=context)
        assert (1, False) == (source.closed, context.cancelled)

    run(check())


def test_a_thread_closes_the_generator_that_it_runs(run: Run) -> None:
    source = Source("thread", count=9)

    async def check() -> None:
        executor = await started(graph_of(("count", source.step(), "inputs")))
        stream = executor.stream(x(1), Context())
        await anext(stream)
        await stream.aclose()
        await executor.stop()

    run(check())
    assert source.closed_in.startswith("count-")


def test_cancelling_during_an_item_ends_an_async_generator(run: Run) -> None:
    ended = []

    async def waits(value: Any) -> Any:
        try:
            yield value
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            ended.append(True)

    async def check() -> None:
        executor = await started(graph_of(("waits", waits, "inputs")))
        task = asyncio.ensure_future(_drain(executor))
        await _turns()
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()
        await executor.stop()

    run(check())
    assert [True] == ended


def test_cancelling_during_an_item_closes_a_generator_in_a_thread_when_the_item_is_made(run: Run) -> None:
    begun, go_on = threading.Event(), threading.Event()
    made, ended = [], []

    def blocks(value: Any) -> Any:
        try:
            for number in range(9):
                if number:
                    begun.set()
                    assert go_on.wait(20)
                made.append(number)
                yield value
        finally:
            ended.append(threading.current_thread().name)

    async def check() -> None:
        executor = await started(graph_of(("blocks", steps.Python(blocks, run="thread"), "inputs")))
        context, idle = Context(), []
        task = asyncio.ensure_future(_drain(executor, context))
        while not begun.is_set():
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        context.when_idle(lambda: idle.append(True))
        assert ([], [], True) == (ended, idle, context.cancelled)
        go_on.set()
        while not idle:  # the slot is given back when the thread has ended the generator
            await asyncio.sleep(0)
        assert 1 == len(ended)
        await executor.stop()

    run(check())
    assert ([0, 1], True) == (made, ended[0].startswith("blocks-"))


def test_cancelling_while_a_step_behind_works_ends_all_generators_inner_ones_first(run: Run) -> None:
    ended: list[str] = []

    def source(name: str) -> Any:
        async def items(value: Any) -> Any:
            try:
                while True:
                    yield value
            finally:
                ended.append(name)

        return items

    async def hang(value: Any) -> Any:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("step")

    async def check() -> None:
        graph = graph_of(("outer", source("outer"), "inputs"), ("inner", source("inner"), "outer"), ("hang", hang, "inner"))
        executor = await started(graph)
        task = asyncio.ensure_future(_drain(executor))
        await _turns()
        task.cancel()
        await asyncio.wait([task])
        await executor.stop()

    run(check())
    assert ["step", "inner", "outer"] == ended


def test_a_generator_that_catches_its_cancellation_is_closed_all_the_same(run: Run) -> None:
    made = []

    async def stubborn(value: Any) -> Any:
        while True:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                made.append(True)
                yield value

    async def check() -> None:
        executor = await started(graph_of(("stubborn", stubborn, "inputs")))
        task = asyncio.ensure_future(_drain(executor))
        await _turns()
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()
        await executor.stop()

    run(check())
    assert [True] == made


@way
def test_a_generator_that_catches_its_end_once_is_told_again(way: str, run: Run) -> None:
    ended = []

    def stubborn(value: Any) -> Any:
        try:
            yield value
        except GeneratorExit:
            pass
        try:
            yield value
        finally:
            ended.append(True)

    async def stubborn_async(value: Any) -> Any:
        try:
            yield value
        except GeneratorExit:
            pass
        try:
            yield value
        finally:
            ended.append(True)

    async def check() -> None:
        step = stubborn_async if way == "async" else steps.Python(stubborn, run=way)
        executor = await started(graph_of(("stubborn", step, "inputs")))
        stream = executor.stream(x(1), Context())
        await anext(stream)
        await stream.aclose()
        assert [True] == ended
        await executor.stop()

    run(check())


@way
def test_a_generator_that_will_not_end_is_reported_and_left(way: str, run: Run, caplog: pytest.LogCaptureFixture) -> None:
    made: list[bool] = []
    mercy: list[bool] = []  # when it is freed, Python would have a word on it, too

    def endless(value: Any) -> Any:
        while not mercy:
            try:
                made.append(True)
                yield value
            except GeneratorExit:
                pass

    async def endless_async(value: Any) -> Any:
        while not mercy:
            try:
                made.append(True)
                yield value
            except GeneratorExit:
                pass

    async def check() -> None:
        step = endless_async if way == "async" else steps.Python(endless, run=way)
        executor = await started(graph_of(("endless", step, "inputs")))
        stream = executor.stream(x(1), Context())
        await anext(stream)
        await stream.aclose()
        assert len(made) <= 4
        mercy.append(True)
        await executor.stop()

    run(check())
    assert ["node 'endless' failed while its stream was closed"] == _told(caplog)
    assert "ignored GeneratorExit" in caplog.text


@way
def test_what_a_generator_raises_while_it_is_closed_is_logged_and_no_other_generator_is_forgotten(
    way: str, run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    outer = Source("async", count=9)

    def fails(value: Any) -> Any:
        try:
            yield value
            yield value
        finally:
            raise ValueError("no")

    async def fails_async(value: Any) -> Any:
        try:
            yield value
            yield value
        finally:
            raise ValueError("no")

    async def check() -> None:
        step = fails_async if way == "async" else steps.Python(fails, run=way)
        executor = await started(graph_of(("outer", outer.step(), "inputs"), ("fails", step, "outer")))
        stream = executor.stream(x(1), Context())
        await anext(stream)
        await stream.aclose()
        await executor.stop()

    run(check())
    assert 1 == outer.closed
    assert ["node 'fails' failed while its stream was closed"] == _told(caplog)


# Failures.


@way
@pytest.mark.parametrize("at", [0, 1, 3])
def test_what_a_generator_raises_names_it_and_comes_after_its_items(way: str, at: int, run: Run) -> None:
    source = Source(way, count=9, error=ValueError("broken"), at=at)

    async def check() -> None:
        executor = await started(graph_of(("count", source.step(), "inputs"), ("add", plus(1), "count")))
        got = []
        with pytest.raises(StepFailed, match="node 'count': ValueError: broken") as failure:
            async for answer in executor.stream(x(1), Context()):
                got.append(answer)
        assert (at, 1) == (len(got), source.closed)
        assert isinstance(failure.value.__cause__, ValueError)
        await executor.stop()

    run(check())


@way
@pytest.mark.parametrize("error", [SystemExit(1), StopIteration(), StopAsyncIteration(), asyncio.CancelledError()], ids=repr)
def test_whatever_a_generator_raises_becomes_an_error(way: str, error: BaseException, run: Run) -> None:
    source = Source(way, count=9, error=error, at=1)

    async def check() -> None:
        executor = await started(graph_of(("count", source.step(), "inputs")))
        stream = executor.stream(x(1), Context())
        await anext(stream)
        with pytest.raises(StepFailed, match="node 'count'"):
            await anext(stream)
        await executor.stop()

    run(check())


def test_a_caller_at_fault_is_told_by_the_generator(run: Run) -> None:
    async def check() -> None:
        source = Source(error=InvalidRequest("too long"))
        with pytest.raises(InvalidRequest, match="node 'count': too long"):
            await collect(graph_of(("count", source.step(), "inputs")))

    run(check())


@way
def test_a_step_behind_that_fails_ends_the_generator_and_is_named(way: str, run: Run) -> None:
    source = Source(way, count=9)

    def fails(value: Any) -> Any:
        if value["x"][0] == 1:
            raise ValueError("broken")
        return value

    async def check() -> None:
        executor = await started(graph_of(("count", source.step(), "inputs"), ("fails", fails, "count")))
        stream = executor.stream(x(1), Context())
        await anext(stream)
        with pytest.raises(StepFailed, match="node 'fails': ValueError: broken"):
            await anext(stream)
        assert (2, 1) == (source.made, source.closed)
        await executor.stop()

    run(check())


def test_a_node_beside_that_fails_leaves_the_generator_unbegun(run: Run) -> None:
    source = Source("async", count=9)

    async def fails(value: Any) -> Any:
        raise ValueError("broken")

    async def check() -> None:
        with pytest.raises(StepFailed, match="node 'fails'"):
            await collect(
                graph_of(
                    ("count", source.step(), "inputs"), ("fails", fails, "inputs"), ("join", lambda v: v, ["count", "fails"])
                )
            )

    run(check())
    assert 0 == source.made


def test_a_generator_that_cannot_be_called_is_named(run: Run) -> None:
    def two(x: Any, y: Any) -> Any:
        yield {"x": x + y}

    async def check() -> None:
        with pytest.raises(StepFailed, match="node 'two': takes tensors x, y, but got z"):
            await collect(graph_of(("any", lambda value: {"z": value["x"]}, "inputs"), ("two", two, "any")))

    run(check())


# Time.


def test_a_deadline_holds_for_the_whole_stream(run: Run, manual_clock: ManualClock) -> None:
    ended = []

    async def slow(value: Any) -> Any:
        try:
            while True:
                await asyncio.sleep(0.4)
                yield value
        finally:
            ended.append(True)

    async def check() -> None:
        executor = await started(graph_of(("slow", slow, "inputs")))
        got = []

        async def read() -> None:
            async for answer in executor.stream(x(1), Context(deadline=executor.now() + 1)):
                got.append(answer)

        task = asyncio.ensure_future(read())
        await manual_clock.advance(1.1)
        with pytest.raises(DeadlineExceeded, match="Request timeout expired"):
            await task
        assert (2, [True]) == (len(got), ended)
        await executor.stop()

    run(check())


def test_a_deadline_that_passes_while_the_reader_pauses_ends_the_stream(run: Run, manual_clock: ManualClock) -> None:
    source = Source(count=9)

    async def check() -> None:
        executor = await started(graph_of(("count", source.step(), "inputs"), timeout_ms=1000))
        stream = executor.stream(x(1), Context())
        await anext(stream)
        await manual_clock.advance(1.1)
        with pytest.raises(DeadlineExceeded):
            await anext(stream)
        assert (1, 1) == (source.made, source.closed)
        await executor.stop()

    run(check())


def test_the_time_limit_of_a_generator_is_for_each_item(run: Run, manual_clock: ManualClock) -> None:
    async def slower(value: Any) -> Any:
        for seconds in (0.3, 0.3, 0.3, 0.6):
            await asyncio.sleep(seconds)
            yield value

    async def check() -> None:
        executor = await started(graph_of(("slower", slower, "inputs", {"timeout_ms": 500})))
        got = []

        async def read() -> None:
            async for answer in executor.stream(x(1), Context()):
                got.append(answer)

        task = asyncio.ensure_future(read())
        await manual_clock.advance(3)
        with pytest.raises(DeadlineExceeded, match="node 'slower': took longer than its timeout_ms = 500"):
            await task
        assert 3 == len(got)
        await executor.stop()

    run(check())


def test_a_plain_generator_that_holds_the_loop_is_reported_once(caplog: pytest.LogCaptureFixture) -> None:
    import time

    def slow(value: Any) -> Any:
        for _ in range(4):
            end = time.perf_counter() + 0.06
            while time.perf_counter() < end:
                pass
            yield value

    with caplog.at_level(logging.WARNING):
        answers(graph_of(("slow", slow, "inputs")))

    # Once for its items; the call that makes it is watched for itself, and a machine that stands still may hold that up.
    assert 1 <= caplog.text.count("node 'slow' held the event loop") <= 2


# What a front end is told, and what the compiler refuses.


def test_a_graph_says_whether_it_is_decoupled() -> None:
    assert graph_of(("count", Source().step(), "inputs")).compile().decoupled
    assert not graph_of(("add", plus(1), "inputs")).compile().decoupled


def test_a_decoupled_graph_takes_no_call_that_expects_one_answer(run: Run) -> None:
    async def check() -> None:
        serving = Serving()
        await serving.catalog.load([graph_of(("count", Source().step(), "inputs")).compile()])
        with pytest.raises(Unsupported, match="decoupled"):
            await infer(serving.catalog.get("g"), InferenceRequest(x(3)), Context())
        await serving.catalog.stop()

    run(check())


def test_a_graph_counts_its_streams_until_they_have_ended(run: Run) -> None:
    async def check() -> None:
        serving = Serving()
        await serving.catalog.load([graph_of(("count", Source(count=9).step(), "inputs")).compile()])
        graph = serving.catalog.get("g")
        answers = stream(graph, InferenceRequest(x(3)), Context())
        await anext(answers)
        assert 1 == graph.requests
        await answers.aclose()
        assert 0 == graph.requests
        await serving.catalog.stop()

    run(check())


def test_an_answer_that_the_metadata_do_not_promise_ends_the_stream(run: Run) -> None:
    source = Source(count=9)

    async def check() -> None:
        graph = graph_of(("count", source.step(), "inputs"), outputs={"x": ("FP64", [-1])})
        serving = Serving()
        await serving.catalog.load([graph.compile()])
        with pytest.raises(ServingGraphError, match="answer tensor 'x' has datatype FP32, declared is FP64"):
            await anext(stream(serving.catalog.get("g"), InferenceRequest(x(3)), Context()))
        assert 1 == source.closed
        await serving.catalog.stop()

    run(check())


def count(value: Any) -> Any:
    yield value


async def count_async(value: Any) -> Any:
    yield value


REFUSED = {
    "two streams meet": (
        [("a", count, "inputs"), ("b", count, "inputs", renamed("y")), ("join", plus(1), ["a", "b"])],
        {},
        "node 'join': the streams of 'a' and 'b' meet here",
    ),
    "a generator as a branch": (
        [("mean", routers.Ensemble({"a": plus(1), "b": count}), "inputs")],
        {},
        "node 'mean.b': is a generator, and a router takes one value of each branch",
    ),
    "a batch of generators": ([("a", count, "inputs", {"batch": True})], {}, "node 'a': cannot batch: it is a generator"),
    "a batch of whole requests": (
        [("a", count, "inputs"), ("b", plus(1), "a")],
        {"batch": {"max_rows": 8}},
        "'batch' joins whole requests, and node 'a' is a generator",
    ),
    "an async generator in a thread": (
        [("a", steps.Python(count_async, run="thread"), "inputs")],
        {},
        "'run: thread' is for blocking functions, and 'count_async' is async",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_the_compiler_refuses(case: str) -> None:
    nodes, options, text = REFUSED[case]
    if "batch" in options:
        from servinggraph.interfaces import BatchPolicy

        options = {"batch": BatchPolicy(**options["batch"])}

    with pytest.raises(GraphInvalid) as refusal:
        graph_of(*nodes, **options).compile()

    assert 1 == len(refusal.value.problems)
    assert text in str(refusal.value)


def test_a_generator_may_say_that_it_is_never_batched() -> None:
    assert graph_of(("a", count, "inputs", {"batch": False})).compile().decoupled


def test_a_stand_in_decides_whether_a_graph_streams() -> None:
    graph = graph_of(("count", count, "inputs"))

    assert not graph.compile({"count": plus(1)}).decoupled
    assert graph.compile({"count": count_async}).decoupled


async def _drain(executor: Executor, context: Context | None = None) -> None:
    async with aclosing(executor.stream(x(1), context or Context())) as answers:
        async for _ in answers:
            pass


def _told(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return what was logged, but for steps that seem slow because the machine stood still."""
    return [message for message in caplog.messages if "held the event loop" not in message]


async def _turns() -> None:
    for _ in range(20):
        await asyncio.sleep(0)
