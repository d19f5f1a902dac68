"""Fixtures of all tests."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from servinggraph.testing import ManualClock


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
