"""Members that share the queue of their ensemble: one wake-up for all of them, and each caller's rows its own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, save

from servinggraph import Graph, routers, steps
from servinggraph.context import Context
from servinggraph.errors import DeadlineExceeded, LimitExceeded, ShapeMismatch, StepFailed
from servinggraph.executor import Executor
from servinggraph.testing import ManualClock

Run = Callable[[Coroutine[Any, Any, None]], None]


@pytest.fixture
def model(tmp_path: Path) -> str:
    """Return the path of a model that gives y = x + x."""
    tensors = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, 2]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Add", ["x", "x"], ["y"])], "g", tensors[:1], tensors[1:])
    path = tmp_path / "double.onnx"
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), str(path))
    return str(path)


def rows(number: float) -> dict[str, np.ndarray]:
    return {"x": np.full((1, 2), number, np.float32)}


def fused(model: str, *others: Any, run: str = "auto", **options: Any) -> Graph:
    members = {"a": steps.Onnx(model, run=run), "b": steps.Onnx(model, run=run)}
    members |= {f"other{at}": other for at, other in enumerate(others)}
    options = {"batch": {"max_rows": 64}, **options}
    return Graph("g", {"x": ("FP32", [-1, 2])}).to(routers.Ensemble(members, **options), "n").respond()


async def started(graph: Graph) -> Executor:
    executor = Executor(graph.compile())
    await executor.start()
    return executor


@pytest.mark.parametrize("run_in", ["inline", "thread"])
def test_requests_at_once_are_one_batch_for_all_members(model: str, run_in: str) -> None:
    async def check() -> None:
        executor = await started(fused(model, run=run_in))
        try:
            numbers = range(50)
            results = await asyncio.gather(*(executor.run(rows(number), Context()) for number in numbers))
            assert [[[2.0 * number] * 2] for number in numbers] == [result["y"].tolist() for result in results]
            assert ["n"] == list(executor.batchers)
            nodes = executor.statistics.nodes
            runs = sum(batch.count for batch in nodes["n"].batches.values())
            assert (50, True) == (nodes["n"].success, runs <= 2)
            assert (runs, runs) == (nodes["n.a"].success, nodes["n.b"].success)
        finally:
            await executor.stop()

    asyncio.run(check())


def test_a_member_with_a_policy_of_its_own_keeps_its_queue(model: str) -> None:
    members = {"a": steps.Onnx(model), "b": steps.Onnx(model, batch={"max_rows": 2})}
    graph = Graph("g", {"x": ("FP32", [-1, 2])}).to(routers.Ensemble(members, batch=True), "n").respond()

    async def check() -> None:
        executor = await started(graph)
        assert {"n", "n.b"} == set(executor.batchers)
        assert [[6.0] * 2] == (await executor.run(rows(3), Context()))["y"].tolist()
        await executor.stop()

    asyncio.run(check())


class Gate:
    """A member that runs until it is let go."""

    def __init__(self) -> None:
        self.open = asyncio.Event()
        self.sizes: list[int] = []

    async def __call__(self, value: Any) -> Any:
        self.sizes.append(len(value["x"]))
        await self.open.wait()
        if (value["x"] < 0).any():
            raise ValueError("poison")
        return {"y": value["x"] * 2}


def test_who_leaves_or_is_late_leaves_the_queue_and_the_others_are_answered(
    model: str, run: Run, manual_clock: ManualClock
) -> None:
    async def check() -> None:
        gate = Gate()
        executor = await started(fused(model, gate.__call__))
        first = asyncio.ensure_future(executor.run(rows(1), Context()))
        await manual_clock.settle()
        contexts = [Context(), Context(deadline=executor.now() + 5), Context()]
        leaves, late, stays = (asyncio.ensure_future(executor.run(rows(n), c)) for n, c in enumerate(contexts, 2))
        await manual_clock.settle()
        leaves.cancel()
        await manual_clock.advance(6)
        assert isinstance(late.exception(), DeadlineExceeded)
        gate.open.set()
        assert [[[2.0] * 2], [[8.0] * 2]] == [(await request)["y"].tolist() for request in (first, stays)]
        assert leaves.cancelled()
        assert [1, 1] == gate.sizes
        await executor.stop()

    run(check())


def test_when_all_callers_of_a_running_batch_leave_every_member_is_cancelled(
    model: str, run: Run, manual_clock: ManualClock
) -> None:
    async def check() -> None:
        gate = Gate()
        executor = await started(fused(model, gate.__call__))
        released: list[int] = []
        contexts = [Context() for _ in range(3)]
        requests = [asyncio.ensure_future(executor.run(rows(n), context)) for n, context in enumerate(contexts)]
        await manual_clock.settle()
        for request in requests:
            request.cancel()
        await manual_clock.settle()
        assert all(request.cancelled() for request in requests)
        for number, context in enumerate(contexts):
            context.when_idle(lambda number=number: released.append(number))
        assert [0, 1, 2] == released
        await executor.stop()

    run(check())


def test_a_fault_is_its_callers_alone_in_every_member(model: str, run: Run, manual_clock: ManualClock) -> None:
    async def check() -> None:
        gate = Gate()
        gate.open.set()
        executor = await started(fused(model, gate.__call__))
        values = [rows(1), rows(-1), rows(3), {"x": np.zeros((1, 3), np.float32)}]
        outcomes = await asyncio.gather(*(executor.run(value, Context()) for value in values), return_exceptions=True)
        assert [[[2.0] * 2], [[6.0] * 2]] == [outcomes[at]["y"].tolist() for at in (0, 2)]
        assert (StepFailed, "n.other0") == (type(outcomes[1]), outcomes[1].node)
        assert (ShapeMismatch, "n.a") == (type(outcomes[3]), outcomes[3].node)
        await executor.stop()

    run(check())


def test_the_one_queue_is_bounded(model: str, run: Run, manual_clock: ManualClock) -> None:
    async def check() -> None:
        gate = Gate()
        executor = await started(fused(model, gate.__call__, batch={"max_rows": 1, "max_queue": 2}))
        requests = [asyncio.ensure_future(executor.run(rows(number), Context())) for number in range(5)]
        await manual_clock.settle()
        refused = [request.exception() for request in requests if request.done()]
        assert 2 == len(refused)
        assert all(isinstance(error, LimitExceeded) for error in refused)
        gate.open.set()
        assert 3 == len(
            [request for request in await asyncio.gather(*requests, return_exceptions=True) if type(request) is dict]
        )
        await executor.stop()

    run(check())
