"""Fixtures of all tests."""

from __future__ import annotations

import asyncio
import gc
import importlib.util
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
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


def _cluster(folder: Path, size: int) -> Any:
    # By path: tests are imported with importlib, which gives files of a folder no common package.
    name = "kafka_broker"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name].Cluster(folder, size)


@pytest.fixture(scope="session")
def kafka_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Return a real Kafka broker that ends with the tests; a test asks for `kafka`."""
    broker = _cluster(tmp_path_factory.mktemp("kafka"), 1)
    try:
        broker.start()
        yield broker
    finally:
        broker.stop()


@pytest.fixture
def kafka(kafka_process: Any) -> Iterator[Any]:
    """Return a real Kafka broker, `tests/kafka_broker.py`; what a test kills or pauses runs again for the next one."""
    yield kafka_process
    kafka_process.mend()


@pytest.fixture(scope="session")
def kafka_processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Return three brokers that end with the tests; a test asks for `kafka_cluster`."""
    cluster = _cluster(tmp_path_factory.mktemp("kafka-cluster"), 3)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture
def kafka_cluster(kafka_processes: Any) -> Iterator[Any]:
    """Return a cluster of three brokers, each with a replica of every topic."""
    yield kafka_processes
    kafka_processes.mend()
