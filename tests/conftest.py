"""Fixtures of all tests."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import time
from collections.abc import Callable, Coroutine, Iterator
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


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Return the address of a real Redis that ends with the tests."""
    folder = tmp_path_factory.mktemp("redis")
    socket = folder / "redis.sock"
    command = [
        "redis-server",
        "--port",
        "0",
        "--unixsocket",
        str(socket),
        "--dir",
        str(folder),
        "--save",
        "",
        "--daemonize",
        "no",
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 10
        while not socket.exists():
            assert process.poll() is None
            assert time.monotonic() < end, "redis-server did not start"
            time.sleep(0.01)
        yield f"unix://{socket}"
    finally:
        process.terminate()
        process.wait(10)
