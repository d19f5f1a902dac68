"""Measures what needs no peer: the executor in process, imports, start-up and memory. Prints Markdown.

usage: loadtests/micro.py [--requests N] [FIGURE ...]     README.md says what the figures mean.
"""

from __future__ import annotations

import argparse
import asyncio
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import conditions
import numpy as np
from harness import load, run_program, stopping
from servers import ours, prepared, set_up

from servinggraph import Context, Graph, routers
from servinggraph.executor import Executor
from servinggraph.interfaces import NodeSketch, Observer, Selector
from servinggraph.lifecycle.control import Control
from servinggraph.server import new_event_loop

EVENTS, ROUNDS = 20_000, 5
BEST = f"best of {ROUNDS} rounds of {EVENTS:,}"
IMPORTS, STARTS = 9, 5
LOAD_CONNECTIONS, LOAD_SLICE_S, LOAD_LIMIT_S = 32, 5, 600
INPUTS = {"x": ("INT64", [-1])}


@dataclass(frozen=True)
class Figure:
    """One row of the table.

    Attributes:
        what: what was measured, and how its value was chosen.
        value: the value in `unit`.
        unit: "µs", "ms", "s" or "MB".
        at_most: the target, None without one.
    """

    what: str
    value: float
    unit: str
    at_most: float | None = None

    def row(self) -> str:
        """Return it as a row of a Markdown table."""
        if self.at_most is None:
            return f"| {self.what} | {self.value:.3g} {self.unit} | | |"
        verdict = "met" if self.value <= self.at_most else "**missed**"
        return f"| {self.what} | {self.value:.3g} {self.unit} | ≤ {self.at_most:g} {self.unit} | {verdict} |"


def add(value: int) -> int:
    return value + 1


def double(value: int) -> int:
    return value * 2


def subtract(value: int) -> int:
    return value - 3


def join(double: int, subtract: int) -> int:
    return double + subtract


async def wait(value: int) -> int:
    await asyncio.sleep(0.05)
    return value


def chain() -> Iterator[Figure]:
    graph = Graph("chain", INPUTS)
    graph.to(add).to(double).to(subtract).respond()
    seconds = min(_in_process(graph, 5, 9, _one_by_one))
    yield Figure(f"chain of three plain steps, an event ({BEST})", seconds / EVENTS * 1e6, "µs", 2)


def fork() -> Iterator[Figure]:
    graph = Graph("fork", INPUTS)
    graph.add(double, after="inputs")
    graph.add(subtract, after="inputs")
    graph.add(join, after=["double", "subtract"]).respond()
    seconds = min(_in_process(graph, 5, 12, _one_by_one))
    yield Figure(f"fork of two plain steps and a join, an event ({BEST})", seconds / EVENTS * 1e6, "µs")


def passing(value: Any) -> Any:
    return value


TENSORS = {"x": ("FP32", [-1, 4])}
ROWS = {"x": np.zeros((1, 4), np.float32)}
PLAIN = {"a": passing, "b": passing}
"""Two plain steps that do as good as nothing, so that what is left is the router."""


def routed() -> Iterator[Figure]:
    """What each router adds to a bare step; rounds of all of them are interleaved, since the machine's speed moves."""
    bare = Graph("bare", TENSORS)
    bare.to(passing).respond()
    graphs = {"": bare}
    for label, (sketch, _) in ROUTERS.items():
        graph = Graph("routed", TENSORS)
        graph.to(sketch, "n").respond()
        graphs[label] = graph
    times = _interleaved(graphs)
    base = min(times.pop(""))
    for label, seconds in times.items():
        yield Figure(f"{label}, over a bare step ({BEST})", (min(seconds) - base) / EVENTS * 1e6, "µs", ROUTERS[label][1])


def decided() -> Iterator[Figure]:
    """What deciding alone costs a request, without the branch: what a canary sees of the end of a request included."""
    for label in ("ab of two by chance", "ab of two by key", "canary by chance", "canary by key"):
        seconds = min(_decisions(ROUTERS[label][0]))
        yield Figure(f"decision of {label} ({BEST})", seconds / EVENTS * 1e6, "µs", 2)


RAILS = {"failures": {"watch": "error_rate", "margin": "1%"}, "slow": {"watch": "latency", "quantile": "p99", "ratio": 1.25}}
TRIAL = {"baseline": "a", "challenger": "b", "steps": ["10%", "100%"], "guardrails": RAILS}
ROUTERS: dict[str, tuple[NodeSketch, float | None]] = {
    "ab of two by chance": (routers.Ab(PLAIN, {"a": 9, "b": 1}), None),
    "ab of two by key": (routers.Ab(PLAIN, {"a": 9, "b": 1}, key="parameter:user"), None),
    "canary by chance": (routers.Canary(PLAIN, **TRIAL), None),
    "canary by key": (routers.Canary(PLAIN, **TRIAL, key="parameter:user"), None),
    "bandit of two, ucb1": (routers.Bandit(PLAIN, "ucb1"), None),
    "bandit of two, thompson": (routers.Bandit(PLAIN, "thompson"), None),
    "champion of two, nothing copied": (routers.Champion(PLAIN, "a", rate=0.0), None),
    "choice by a parameter": (routers.Choice(PLAIN, when={"a": "parameters['user'] == 'ann'"}, default="b"), None),
    "fallback whose first branch answers": (routers.Fallback(PLAIN), None),
    "chain of two steps": (routers.Chain(PLAIN), None),
    "map over one row": (routers.Map(passing), None),
    "ensemble of two, mean": (routers.Ensemble(PLAIN), 60),
    "ensemble of two with a quorum": (routers.Ensemble(PLAIN, quorum=1), None),
}
"""What is measured, with its target in microseconds."""


def concurrent() -> Iterator[Figure]:
    graph = Graph("concurrent", INPUTS)
    graph.to(wait).respond()
    seconds = median(_in_process(graph, 5, 5, _twenty_at_once))
    yield Figure(f"20 requests at once on an async step of 50 ms (median of {ROUNDS})", seconds * 1e3, "ms", 60)


def imports() -> Iterator[Figure]:
    for statement, at_most in (("import servinggraph", 0.3), ("from servinggraph import Graph", None)):
        code = f"import time; start = time.perf_counter(); {statement}; print(time.perf_counter() - start)"
        times = [float(subprocess.check_output([sys.executable, "-c", code])) for _ in range(IMPORTS)]
        yield Figure(f"`{statement}` in a new process (median of {IMPORTS})", median(times), "s", at_most)


def start() -> Iterator[Figure]:
    seconds = median(_seconds_until_ready() for _ in range(STARTS))
    yield Figure(f"`servinggraph serve iris.onnx` until ready (median of {STARTS})", seconds, "s", 1)


def _seconds_until_ready() -> float:
    server = prepared("ours", "iris")
    with stopping([server]):
        started = time.perf_counter()
        server.start(ours(server))
        server.first(lambda: server.get("/v2/health/ready"), pause_s=0.005)
        return time.perf_counter() - started


def memory(requests: int) -> Iterator[Figure]:
    server = prepared("ours", "iris")
    with stopping([server]):
        server.start(ours(server))
        server.first(server.infer)
        yield Figure("resident memory with iris, idle", server.resident_mb(), "MB")
        answered = failed = 0
        end = time.monotonic() + LOAD_LIMIT_S
        while answered < requests and time.monotonic() < end:
            sample = load(server, LOAD_CONNECTIONS, LOAD_SLICE_S)
            if not answered:
                yield Figure(f"the same after the first {sample.requests:,} requests over HTTP", server.resident_mb(), "MB")
            answered, failed = answered + sample.requests, failed + sample.failed
        note = f", {failed:,} of them failed" if failed else ""
        yield Figure(f"the same after {answered:,} requests{note}", server.resident_mb(), "MB")


Measure = Callable[[Callable[[], Awaitable[Any]]], Awaitable[None]]


async def _one_by_one(call: Callable[[], Awaitable[Any]]) -> None:
    for _ in range(EVENTS):
        await call()


async def _twenty_at_once(call: Callable[[], Awaitable[Any]]) -> None:
    await asyncio.gather(*(call() for _ in range(20)))


def _in_process(graph: Graph, value: int, expected: int, drive: Measure) -> list[float]:
    """Compile a graph, and return how many seconds each round of `drive` took on the server's kind of event loop."""

    async def run() -> list[float]:
        executor = Executor(graph.compile())
        await executor.start()
        answer = await executor.run(value, Context())
        assert answer == expected, f"graph '{graph.name}' answers {answer}, expected {expected}"
        times = []
        for _ in range(ROUNDS):
            started = time.perf_counter()
            await drive(lambda: executor.run(value, Context()))
            times.append(time.perf_counter() - started)
        await executor.stop()
        return times

    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        return runner.run(run())


def _interleaved(graphs: dict[str, Graph]) -> dict[str, list[float]]:
    """Return how many seconds each round of events took, by graph."""

    async def run() -> dict[str, list[float]]:
        executors = {}
        for label, graph in graphs.items():
            plan = graph.compile()
            executors[label] = Executor(plan, Control().seats_of(plan))
            await executors[label].start()
        times: dict[str, list[float]] = {label: [] for label in graphs}
        for _ in range(ROUNDS):
            for label, executor in executors.items():
                started = time.perf_counter()
                await _one_by_one(lambda executor=executor: executor.run(ROWS, Context("1", parameters={"user": "ann"})))
                times[label].append(time.perf_counter() - started)
        for executor in executors.values():
            await executor.stop()
        return times

    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        return runner.run(run())


def _decisions(sketch: NodeSketch) -> list[float]:
    """Return how many seconds each round of decisions took."""

    async def run() -> list[float]:
        graph = Graph("decided", TENSORS)
        graph.to(sketch, "n").respond()
        plan = graph.compile()
        executor = Executor(plan, Control().seats_of(plan))
        await executor.start()
        router = plan.nodes[0].work
        context = Context("1", parameters={"user": "ann"})
        times = []
        for _ in range(ROUNDS):
            started = time.perf_counter()
            if isinstance(router, Selector):
                for _ in range(EVENTS):
                    router.choose(ROWS, context)
            else:
                assert isinstance(router, Observer)
                for _ in range(EVENTS):
                    router.end(router.begin(ROWS, context)[2], None)
            times.append(time.perf_counter() - started)
        await executor.stop()
        return times

    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        return runner.run(run())


FIGURES: dict[str, Callable[[], Iterator[Figure]]] = {
    "chain": chain,
    "fork": fork,
    "routers": routed,
    "decisions": decided,
    "concurrent": concurrent,
    "imports": imports,
    "start": start,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the chosen figures as a Markdown table with its conditions below."""
    names = [*FIGURES, "memory"]
    parser = argparse.ArgumentParser(description="Measures what needs no peer, and prints Markdown.")
    parser.add_argument("figures", nargs="*", metavar="FIGURE", help=f"{', '.join(names)}; default all")
    parser.add_argument("--requests", type=int, default=1_000_000, help="requests for `memory` (default 1000000)")
    options = parser.parse_args(arguments)
    chosen = options.figures or names
    if unknown := [name for name in chosen if name not in names]:
        parser.error(f"no {', '.join(unknown)}; there is {', '.join(names)}")
    if {"start", "memory"} & set(chosen):
        set_up(())
    print("| figure | value | target | |\n| --- | --- | --- | --- |")
    for name in chosen:
        for figure in memory(options.requests) if name == "memory" else FIGURES[name]():
            print(figure.row(), flush=True)
    print()
    for label, text in (conditions.machine() | {"versions": conditions.versions("ours")}).items():
        print(f"- {label}: {text}")
    return 0


if __name__ == "__main__":
    run_program(main)
