"""Measures how exactly a deadline ends a call of a server that never answers: `.venv/bin/python tests/steps/remote/deadlines.py`.

Prints a table for deadlines.md.
"""

from __future__ import annotations

import asyncio
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from conftest import Other

from servinggraph import Graph, steps
from servinggraph.errors import DeadlineExceeded
from servinggraph.server import new_event_loop

ROUNDS = 100
_P99 = ROUNDS * 99 // 100 - 1
REQUEST = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1], "data": "{x}"}]}
DEADLINES_MS = (20, 100, 500)


async def overruns(make: Callable[[], Any], deadline_ms: float, at_once: int) -> tuple[list[float], list[float]]:
    """Return by how many milliseconds the answers came after the deadline, and bare timers that were set with them."""
    graph = Graph("g", inputs={"x": ("FP32", [-1])})
    graph.to(make(), name="far").respond()
    found: list[float] = []
    timers: list[float] = []
    loop = asyncio.get_running_loop()
    async with graph.mock() as server:

        async def ask() -> None:
            began = time.perf_counter()
            loop.call_later(deadline_ms / 1e3, lambda: timers.append((time.perf_counter() - began) * 1e3 - deadline_ms))
            try:
                await server.infer(x=[1], timeout_s=deadline_ms / 1e3)
            except DeadlineExceeded:
                found.append((time.perf_counter() - began) * 1e3 - deadline_ms)

        await ask()  # the connection is made
        found.clear()
        timers.clear()
        for _ in range(ROUNDS // at_once):
            await asyncio.gather(*(ask() for _ in range(at_once)))
    return found, timers


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        other = Other(Path(folder))
        ways: dict[str, Callable[[], Any]] = {
            "v2 over HTTP": lambda: steps.V2(other.http, "slow", metadata="ignore"),
            "rest": lambda: steps.Rest(f"{other.http}/v2/models/slow/infer", send=REQUEST, outputs={"y": ("FP32", [-1])}),
            "v2 over gRPC": lambda: steps.V2(other.grpc, "slow", metadata="ignore"),
        }
        print(f"{time.strftime('%d %B %Y')}, Python {platform.python_version()}, {platform.system()}, ms after the deadline\n")
        print("| | deadline | at once | least | median | p99 | most | timer: p99 | most | timed out |")
        print("|---|---|---|---|---|---|---|---|---|---|")
        try:
            for name, make in ways.items():
                for deadline_ms in DEADLINES_MS:
                    for at_once in (1, 20):
                        with asyncio.Runner(loop_factory=new_event_loop) as runner:
                            found, timers = (sorted(values) for values in runner.run(overruns(make, deadline_ms, at_once)))
                        figures = [found[0], statistics.median(found), found[_P99], found[-1], timers[_P99], timers[-1]]
                        texts = " | ".join(f"{value:.1f}" for value in figures)
                        print(f"| {name} | {deadline_ms} ms | {at_once} | {texts} | {len(found)} of {ROUNDS} |", flush=True)
        finally:
            other.stop()


if __name__ == "__main__":
    main()
