"""Fixtures of all tests."""

from __future__ import annotations

import asyncio
import gc
import importlib.util
import logging
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

# At once: pytest parses it, and CPython 3.11 may not when a collection comes in between, deep in a test's stack.
import hypothesis.internal.conjecture.optimiser  # noqa: F401
import pytest
from hypothesis import HealthCheck, settings
from redis import Redis

from servinggraph.testing import ManualClock

# The normal run tries the same examples each time, however slow the machine is. What others find is a matter of runs of
# their own: SERVINGGRAPH_PROPERTIES=deep tries many, each time others.
_CHECKS = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]
settings.register_profile(
    "ci", max_examples=300, derandomize=True, deadline=None, database=None, suppress_health_check=_CHECKS, print_blob=True
)
settings.register_profile(
    "deep",
    max_examples=int(os.environ.get("SERVINGGRAPH_EXAMPLES", "20000")),
    deadline=None,
    database=None,
    suppress_health_check=_CHECKS,
    print_blob=True,
)
settings.load_profile(os.environ.get("SERVINGGRAPH_PROPERTIES", "ci"))


def pytest_collection_finish() -> None:
    """Keep what stays until the end out of collections: `run` has one in each test, and the longer they take the rarer they are."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _the_same_chances() -> None:
    """Whatever is left to chance falls out alike in each run."""
    random.seed(1)


@pytest.fixture(autouse=True)
def _the_same_logging() -> Iterator[None]:
    """A test that sets logging up, as every command does, does so for itself."""
    loggers = [logging.getLogger(), logging.getLogger("servinggraph")]
    before = [(logger.level, list(logger.handlers)) for logger in loggers]
    yield
    for logger, (level, handlers) in zip(loggers, before, strict=True):
        logger.setLevel(level)
        for handler in set(logger.handlers).difference(handlers):
            if not type(handler).__module__.startswith("_pytest"):
                logger.removeHandler(handler)


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


def _free_port() -> int:
    chance = random.SystemRandom()
    while True:
        with socket.socket() as found, suppress(OSError):
            found.bind(("127.0.0.1", chance.randrange(12_000, 32_000)))
            return int(found.getsockname()[1])


@pytest.fixture(scope="session")
def free_port() -> Callable[[], int]:
    """Return what finds a port for a server that takes a while to listen.

    It is none of those that the system gives to connections meanwhile, as it gave the ones that are bound as 0.
    """
    return _free_port


def _listens(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as connection:
        return connection.connect_ex(str(path)) == 0


@pytest.fixture(scope="session")
def redis_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Return the address of a real Redis that ends with the tests; a test asks for `redis_url`."""
    folder = tmp_path_factory.mktemp("redis")
    path = folder / "redis.sock"
    command = [
        "redis-server",
        "--port",
        "0",
        "--unixsocket",
        str(path),
        "--dir",
        str(folder),
        "--save",
        "",
        "--daemonize",
        "no",
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 30
        while not _listens(path):  # the file is there earlier
            assert process.poll() is None
            assert time.monotonic() < end, "redis-server did not start"
            time.sleep(0.01)
        yield f"unix://{path}"
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture
def redis_url(redis_process: str) -> str:
    """Return the address of a real Redis that is empty."""
    with Redis.from_url(redis_process) as client:
        client.flushall()
    return redis_process


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
