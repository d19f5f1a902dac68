from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest

from servinggraph.concurrency import WorkerThreads
from servinggraph.context import Context
from servinggraph.interfaces import Operation
from servinggraph.testing import ManualClock

Function = Callable[[Any, Context], Any]


@pytest.fixture
def run(manual_clock: ManualClock) -> Callable[[Coroutine[Any, Any, None]], None]:
    """Return what runs a test on the manual clock; nothing may be left behind or go unnoticed."""
    unhandled: list[dict[str, Any]] = []

    async def watched(main: Coroutine[Any, Any, None]) -> None:
        asyncio.get_running_loop().set_exception_handler(lambda loop, what: unhandled.append(what))
        await main
        await manual_clock.settle()
        left = asyncio.all_tasks() - {asyncio.current_task()}
        assert not left, left

    def start(main: Coroutine[Any, Any, None]) -> None:
        manual_clock.run(watched(main))
        gc.collect()
        assert [] == unhandled

    return start


@pytest.fixture(params=["inline", "thread", "async"])
def operation_of(request: pytest.FixtureRequest) -> Iterator[Callable[[Function], Operation]]:
    """Return what makes an operation of a plain function, in each way that a step can run."""
    started: list[WorkerThreads] = []

    def make(function: Function) -> Operation:
        if request.param == "inline":
            return Operation(function, suspends=False)
        if request.param == "thread":
            threads = WorkerThreads(1, "test")
            threads.start()
            started.append(threads)
            return Operation(lambda value, context: threads.call(function, value, context), suspends=True)

        async def call(value: Any, context: Context) -> Any:
            await asyncio.sleep(0)
            return function(value, context)

        return Operation(call, suspends=True)

    yield make
    for threads in started:
        threads.stop()
