"""An ensemble of two ONNX models in process: a batch queue for each member, or one in front of both. Prints Markdown.

    .venv/bin/python loadtests/ensembles.py [--rounds 5] [--seconds 1]

Each caller asks again as soon as it is answered, for one row of 64 pixels, of the models of
examples/digits on the event loop. Rounds of both ways are interleaved, since the machine's speed moves.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Sequence
from itertools import product
from statistics import median
from typing import Any

import conditions
import numpy as np
from harness import run_program
from servers import HERE

from servinggraph import Context, Graph, routers, steps
from servinggraph.executor import Executor
from servinggraph.server import new_event_loop

MODELS = HERE.parent / "examples" / "digits" / "models"
POLICY = {"max_rows": 64}
MEMBERS = {"two of mlp.onnx": ("mlp", "mlp"), "mlp.onnx and tree.onnx": ("mlp", "tree")}
WAYS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "a queue for each member": ({"batch": POLICY}, {}),
    "one queue": ({}, {"batch": POLICY}),
}
CALLERS = (1, 8, 32, 128)


def graph_of(models: Sequence[str], way: str) -> Graph:
    member, ensemble = WAYS[way]
    branches = {f"m{at}": steps.Onnx(str(MODELS / f"{name}.onnx"), run="inline", **member) for at, name in enumerate(models)}
    router = routers.Ensemble(branches, "mean", tensors=["probabilities"], **ensemble)
    return Graph("ensemble", {"pixels": ("FP32", [-1, 64])}).to(router, "score").respond()


async def round_of(executor: Executor, callers: int, seconds: float) -> tuple[float, float]:
    """Return requests a second and the latency that 99 % stay below, milliseconds."""
    rows = [{"pixels": row[None]} for row in np.random.default_rng(0).random((callers, 64), np.float32)]
    latencies: list[float] = []
    began = time.perf_counter()

    async def caller(row: dict[str, Any]) -> None:
        while (asked := time.perf_counter()) - began < seconds:
            await executor.run(row, Context())
            latencies.append(time.perf_counter() - asked)

    await asyncio.gather(*map(caller, rows))
    return len(latencies) / (time.perf_counter() - began), float(np.percentile(latencies, 99)) * 1e3


async def measured(rounds: int, seconds: float) -> None:
    """Measure, and print a row for each way, ensemble and number of callers."""
    for (label, models), callers in product(MEMBERS.items(), CALLERS):
        executors = {way: Executor(graph_of(models, way).compile()) for way in WAYS}
        for executor in executors.values():
            await executor.start()
        seen: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
        for _ in range(rounds):
            for way, executor in executors.items():
                seen[way].append(await round_of(executor, callers, seconds))
        for executor in executors.values():
            await executor.stop()
        rates = {way: median(rate for rate, _ in figures) for way, figures in seen.items()}
        late = {way: median(latency for _, latency in figures) for way, figures in seen.items()}
        cells = " | ".join(f"{rates[way]:,.0f} | {late[way]:.2f} ms" for way in WAYS)
        gain = rates["one queue"] / rates["a queue for each member"]
        print(f"| {label} | {callers} | {cells} | {gain:.1f} |", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the figures as a Markdown table with its conditions below."""
    parser = argparse.ArgumentParser(description="Measures ensembles with a queue for each member, and with one.")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each way (default 5)")
    parser.add_argument("--seconds", type=float, default=1.0, help="length of a round (default 1)")
    options = parser.parse_args(arguments)
    print("| members | callers | a queue for each: requests/s | 99 % | one queue: requests/s | 99 % | gain |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(measured(options.rounds, options.seconds))
    print()
    for label, text in (conditions.machine() | {"versions": conditions.versions("ours")}).items():
        print(f"- {label}: {text}")
    print(f"- median of {options.rounds} rounds of {options.seconds:g} s, interleaved")
    return 0


if __name__ == "__main__":
    run_program(main)
