from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from servinggraph.concurrency import WorkerThreads
from servinggraph.context import Context
from servinggraph.interfaces import Operation

Function = Callable[[Any, Context], Any]


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
