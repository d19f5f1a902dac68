"""Requests at full load over HTTP while the weights of a router change again and again.

    .venv/bin/python loadtests/weights.py [--seconds 20] [--connections 32] [--changes-per-s 20]

The server is a process of its own; this one sends the load and changes the weights through
/admin. Each variant answers with a number of its own: an answer must name a variant, hold that
variant's number, and come from one that had a weight at some moment between its request and its
answer. Prints the figures that tests/routers/CHANGING_WEIGHTS.md records.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from collections import Counter
from itertools import cycle
from pathlib import Path
from statistics import median

import conditions
from harness import Launch, Server, run_program, stopping
from servers import SERVINGGRAPH

from servinggraph.server import new_event_loop

GRAPH = """\
graph: weights
inputs: {x: {datatype: FP64, shape: [-1]}}
nodes:
  split:
    router: ab
    weights: {a: 1, b: 1, c: 1}
    branches:
      a: {step: python, call: "steps:a"}
      b: {step: python, call: "steps:b"}
      c: {step: python, call: "steps:c"}
answer: split
"""
STEPS = """\
def a(value): return {"y": value["x"] + 1}
def b(value): return {"y": value["x"] + 2}
def c(value): return {"y": value["x"] + 3}
"""
NUMBERS = {"a": 1.0, "b": 2.0, "c": 3.0}
WEIGHTS = ({"a": 1, "b": 1, "c": 1}, {"a": 9, "b": 1, "c": 0}, {"a": 0, "b": 0, "c": 1}, {"a": 1, "b": 0, "c": 99})
BODY = json.dumps({"inputs": [{"name": "x", "datatype": "FP64", "shape": [1], "data": [0]}]}).encode()
INFER = b"POST /v2/models/weights/infer HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s" % (len(BODY), BODY)


class Settings:
    """Which weights were in force when; a change counts as both while it is under way."""

    def __init__(self) -> None:
        self._past: list[tuple[float, float, dict[str, float]]] = [(0.0, float("inf"), WEIGHTS[0])]

    def change(self, begun: float, done: float, weights: dict[str, float]) -> None:
        before, _, old = self._past[-1]
        self._past[-1] = (before, done, old)
        self._past.append((begun, float("inf"), weights))

    @property
    def changes(self) -> int:
        return len(self._past) - 1

    def had_weight(self, variant: str, begun: float, ended: float) -> bool:
        for since, until, weights in reversed(self._past):
            if since <= ended and until >= begun and weights[variant] > 0:
                return True
            if until < begun:
                return False
        return False


class Counts:
    """Every answer as it came, read when the load is over."""

    def __init__(self) -> None:
        self.raw: list[tuple[bytes, bytes, float, float]] = []
        self.answers: list[tuple[str, float, float]] = []
        self.failed: list[str] = []
        self.mixed = 0

    def read(self) -> None:
        for status, body, begun, ended in self.raw:
            if status != b"200":
                self.failed.append(body.decode())
                continue
            document = json.loads(body)
            variant, number = document["parameters"]["split.variant"], document["outputs"][0]["data"][0]
            self.mixed += NUMBERS[variant] != number
            self.answers.append((variant, begun, ended))


async def connection(port: int, counts: Counts, end: float) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    while (begun := time.perf_counter()) < end:
        writer.write(INFER)
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
        body = await reader.readexactly(length)
        counts.raw.append((head[9:12], body, begun, time.perf_counter()))
    writer.close()


async def change(port: int, settings: Settings, per_s: float, end: float) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for weights in cycle([*WEIGHTS[1:], WEIGHTS[0]]):
        await asyncio.sleep(1 / per_s)
        if (begun := time.perf_counter()) > end:
            break
        body = json.dumps({"settings": {"weights": weights}, "who": "loadtest", "why": "measured"}).encode()
        path = b"/admin/graphs/weights/routers/split"
        writer.write(b"PATCH %s HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s" % (path, len(body), body))
        head = await reader.readuntil(b"\r\n\r\n")
        text = await reader.readexactly(int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0]))
        if head[9:12] != b"200":
            raise SystemExit(f"a change was refused: {text.decode()}")
        settings.change(begun, time.perf_counter(), weights)
    writer.close()


async def load(port: int, seconds: float, connections: int, per_s: float) -> tuple[Counts, Settings]:
    counts, settings = Counts(), Settings()
    end = time.perf_counter() + seconds
    await asyncio.gather(change(port, settings, per_s, end), *(connection(port, counts, end) for _ in range(connections)))
    return counts, settings


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--connections", type=int, default=32)
    parser.add_argument("--changes-per-s", type=float, default=20)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "steps.py").write_text(STEPS)
        (Path(folder) / "graph.yaml").write_text(GRAPH)
        (Path(folder) / "body.json").write_bytes(BODY)
        server = Server("ours", "weights", Path(folder) / "body.json", Path(folder))
        with stopping([server]):
            server.start(
                Launch(
                    [
                        *map(str, (SERVINGGRAPH, "serve", f"{folder}/graph.yaml", "--http-port", server.port)),
                        "--grpc-port",
                        "off",
                    ],
                    {},
                )
            )
            server.first(server.infer)
            with asyncio.Runner(loop_factory=new_event_loop) as runner:
                counts, settings = runner.run(load(server.port, options.seconds, options.connections, options.changes_per_s))
    counts.read()
    undeclared = sum(not settings.had_weight(*answer) for answer in counts.answers)
    shares = Counter(variant for variant, _, _ in counts.answers)
    times = [ended - begun for _, begun, ended in counts.answers]
    print(
        f"{len(counts.answers) / options.seconds:,.0f} requests a second on {options.connections} connections, "
        f"{settings.changes} changes in {options.seconds:g} s"
    )
    print(f"answered {len(counts.answers):,}, failed {len(counts.failed)} {counts.failed[:3]}")
    print(f"variant and number differ: {counts.mixed}; by a variant without a weight: {undeclared}; {dict(shares)}")
    print(f"p50 {median(times) * 1e3:.1f} ms")
    for label, text in (conditions.machine() | {"versions": conditions.versions("ours")}).items():
        print(f"- {label}: {text}")
    return 1 if counts.failed or counts.mixed or undeclared else 0


if __name__ == "__main__":
    run_program(main)
