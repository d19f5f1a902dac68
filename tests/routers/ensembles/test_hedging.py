"""`wait: quorum`: the answer goes out when the quorum is there, and what the others hold is given back."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any

import numpy as np
import pytest

from servinggraph import Graph, routers, steps
from servinggraph.context import Context
from servinggraph.errors import StepFailed
from servinggraph.executor import Executor
from servinggraph.lifecycle.control import Control
from servinggraph.testing import ManualClock

Run = Callable[[Coroutine[Any, Any, None]], None]


def good(value: Any) -> Any:
    return {"y": value["x"] * 2}


async def soon(value: Any) -> Any:
    await asyncio.sleep(0.5)  # long enough for the others to have begun
    return good(value)


async def hangs(value: Any) -> Any:
    await asyncio.sleep(1000)


def rows(number: float) -> dict[str, np.ndarray]:
    return {"x": np.full((1, 1), number, np.float32)}


async def started(members: dict[str, Any], **options: Any) -> Executor:
    router = routers.Ensemble(members, **{"quorum": 1, "wait": "quorum", **options})
    executor = Executor(Graph("g", {"x": ("FP32", [-1, 1])}).to(router, "n").respond().compile())
    await executor.start()
    return executor


def test_a_late_member_leaves_the_queue_that_it_waits_in(run: Run, manual_clock: ManualClock) -> None:
    ran: list[int] = []

    async def slow(value: Any) -> Any:
        ran.append(len(value["x"]))
        await asyncio.sleep(10)
        return good(value)

    async def check() -> None:
        executor = await started({"good": good, "slow": steps.Python(slow, batch={"max_rows": 4})})
        results = [await executor.run(rows(number), Context()) for number in range(3)]
        assert [0.0, 2.0, 4.0] == [result["y"].item() for result in results]
        await manual_clock.settle()
        assert 0 == executor.batchers["n.slow"].queued
        await manual_clock.advance(30)
        assert ([1], 0) == (ran, executor.batchers["n.slow"].running)
        await executor.stop()

    run(check())


def test_a_late_member_in_a_thread_keeps_the_slot_until_it_has_ended() -> None:
    begun, end = threading.Event(), threading.Event()

    def blocks(value: Any) -> Any:
        begun.set()
        assert end.wait(30)
        return good(value)

    def waits_for_it(value: Any) -> Any:
        assert begun.wait(30)
        return good(value)

    async def check() -> None:
        executor = await started({"good": steps.Python(waits_for_it, run="thread"), "slow": steps.Python(blocks, run="thread")})
        context = Context()
        released = asyncio.Event()
        assert 2.0 == (await executor.run(rows(1), context))["y"].item()
        context.when_idle(released.set)
        await asyncio.sleep(0)
        assert not released.is_set()
        end.set()
        await asyncio.wait_for(released.wait(), 60)
        await executor.stop()

    asyncio.run(check())


def test_in_a_batch_a_late_member_keeps_the_slots_of_all_its_callers(run: Run, manual_clock: ManualClock) -> None:
    async def stubborn(value: Any) -> Any:
        try:
            await asyncio.sleep(1000)
        finally:
            await asyncio.sleep(5)

    async def check() -> None:
        executor = await started({"soon": soon, "slow": stubborn}, batch={"max_rows": 8})
        contexts = [Context() for _ in range(3)]
        released: list[int] = []
        requests = [asyncio.ensure_future(executor.run(rows(n), context)) for n, context in enumerate(contexts)]
        await manual_clock.advance(2)
        assert [0.0, 2.0, 4.0] == [request.result()["y"].item() for request in requests]
        assert ["soon"] * 3 == [context.response_parameters["n.members"] for context in contexts]
        for number, context in enumerate(contexts):
            context.when_idle(lambda number=number: released.append(number))
        await manual_clock.advance(1)
        assert [] == released
        await manual_clock.advance(5)
        assert [0, 1, 2] == sorted(released)
        await executor.stop()

    run(check())


def test_a_stop_waits_for_members_that_were_let_go(run: Run, manual_clock: ManualClock) -> None:
    ended: list[str] = []

    async def stubborn(value: Any) -> Any:
        try:
            await asyncio.sleep(1000)
        finally:
            await asyncio.sleep(5)
            ended.append("stubborn")

    async def check() -> None:
        router = routers.Ensemble({"soon": soon, "slow": stubborn}, quorum=1, wait="quorum")
        plan = Graph("g", {"x": ("FP32", [-1, 1])}).to(router, "n").respond().compile()
        executor = Executor(plan, Control().seats_of(plan))
        await executor.start()
        request = asyncio.ensure_future(executor.run(rows(1), Context()))
        await manual_clock.advance(1)
        assert request.done()
        stopping = asyncio.ensure_future(executor.stop())
        await manual_clock.advance(4)
        assert ([], False) == (ended, stopping.done())
        await manual_clock.advance(2)
        await stopping
        assert ["stubborn"] == ended

    run(check())


def test_a_cancelled_request_cancels_members_before_and_after_the_quorum(run: Run, manual_clock: ManualClock) -> None:
    async def check() -> None:
        executor = await started({"a": hangs, "b": hangs, "c": good}, quorum=2)
        request = asyncio.ensure_future(executor.run(rows(1), Context()))
        await manual_clock.settle()
        request.cancel()
        await manual_clock.settle()
        assert request.cancelled()
        assert asyncio.all_tasks() == {asyncio.current_task()}
        await executor.stop()

    run(check())


def test_failures_behind_the_one_that_decides_are_looked_at(run: Run) -> None:
    def fails(value: Any) -> Any:
        raise ValueError("no")

    async def check() -> None:
        executor = await started({"a": good, "b": fails, "c": fails}, on_failure="fail")
        with pytest.raises(StepFailed, match=r"n\.b"):
            await executor.run(rows(1), Context())
        await executor.stop()

    run(check())  # reports what nobody looked at
