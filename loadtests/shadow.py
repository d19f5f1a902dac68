"""Measures what a challenger does to the champion's latency: nothing, whatever it does, or how much.

Servers with one champion and challengers of all kinds run at once, and one at a time gets requests at a
fixed mean rate, at random moments (an open load: a slow answer holds back no later request), in rounds.
Two of them have no shadow: what lies between these two is noise. README.md says how to read the page.

    .venv/bin/python loadtests/shadow.py [--rounds 6] [--seconds 2.5] [--rate 150]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import conditions
from harness import Launch, Server, foreign_cpu_seconds, run_program, stopping
from servers import HERE, SERVINGGRAPH

MODELS = HERE.parent / "examples" / "digits" / "models"
CONNECTIONS = 16
DISTURBED_CORES = 0.6
"""A round during which other programs used more is left out where a calm one is left."""
ONNX = f"{{step: onnx, path: {MODELS / 'mlp.onnx'}}}"


def step(call: str, more: str = "") -> str:
    return f"{{step: python, call: 'shadow_steps:{call}'{more}}}"


CHALLENGERS = {
    "no shadow": (ONNX, 0.0, ""),
    "no shadow, again": (ONNX, 0.0, ""),
    "the same model": (ONNX, 1.0, ""),
    "hangs": (step("hangs"), 1.0, ""),
    "crashes": (step("crashes"), 1.0, ""),
    "raises CancelledError, SystemExit, GeneratorExit": (step("leaks"), 1.0, ""),
    "100 times slower, waits": (step("slow"), 1.0, ""),
    "100 times slower, holds the event loop": (step("slow_python"), 1.0, ""),
    "the same, let (`max_loop_share: 1`)": (step("slow_python"), 1.0, ", max_loop_share: 1"),
    "100 times slower, native code in one thread": (step("slow_native", ", run: thread, threads: 1"), 1.0, ""),
    "100 times slower, Python in one thread": (step("slow_python", ", run: thread, threads: 1"), 1.0, ""),
    "100 times slower, Python in another process": ("{step: v2, url: URL, model: aside}", 1.0, ""),
}
"""Name to challenger, rate and limits; URL is the address of a server that computes with Python."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; return 1 when a request failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    name = f"{datetime.now():%Y-%m-%d}-{len(os.sched_getaffinity(0))}-cores-shadow"
    parser.add_argument("--rounds", type=int, default=6, help="runs of each (default 6)")
    parser.add_argument("--seconds", type=float, default=2.5, help="length of each (default 2.5)")
    parser.add_argument("--rate", type=float, default=150, help="requests a second (default 150)")
    parser.add_argument("--nice", type=int, default=0, help="of this session and the servers', on a busy machine (root)")
    parser.add_argument("--name", default=name, help=f"name of the results page (default {name})")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the page")
    options = parser.parse_args(arguments)
    loads = [f"{os.getloadavg()[0]:.2f}"]
    with TemporaryDirectory() as folder:
        aside = _server("aside", "aside", f"{{score: {step('slow_python')}}}", Path(folder) / "aside")
        servers = [
            _server(name, "shadow", _nodes(name, aside.url), Path(folder) / str(number))
            for number, name in enumerate(CHALLENGERS)
        ]
        with stopping([aside, *servers]):
            for server in (aside, *servers):
                server.first(server.infer)
            _prefer(options.nice, servers)
            before = [server.resident_mb() for server in servers]
            samples = _measure(servers, aside, options)
            rows = [_row(server, mb, samples) for server, mb in zip(servers, before, strict=True)]
    loads.append(f"{os.getloadavg()[0]:.2f}")
    found = conditions.machine() | {
        "versions": conditions.versions("ours"),
        "load": f"{options.rate:g} requests a second at random moments, one row each, {CONNECTIONS} connections; "
        f"{options.rounds} rounds of {options.seconds:g} s for each server",
        "priority": f"scheduling groups of the servers and of the load at nice {options.nice}",
        "load average before and after": ", ".join(loads),
        "cores that others used meanwhile": f"median {median(o for rounds in samples.values() for _, o, _ in rounds):.2f}",
    }
    target = options.out / f"{options.name}.md"
    target.write_text(_page(options.name, rows, found), encoding="utf-8")
    print(f"{target.read_text()}\nwritten to {target}")
    return 1 if any(failed for rounds in samples.values() for *_, failed in rounds) else 0


def _prefer(nice: int, servers: Sequence[Server]) -> None:
    """Give the sessions of the servers and of the load precedence: the scheduler's groups, which count before processes."""
    for pid in ("self", *(pid for server in servers for pid in server.pids())) if nice else ():
        Path(f"/proc/{pid}/autogroup").write_text(str(nice))


def _nodes(name: str, aside: str) -> str:
    challenger, rate, limits = CHALLENGERS[name]
    branches = f"{{champion: {ONNX}, challenger: {challenger.replace('URL', aside)}}}"
    options = f"champion: champion, rate: {rate}, compare: {{by: label}}, shadow: {{timeout_ms: 1000{limits}}}"
    return f"{{score: {{router: champion, {options}, branches: {branches}}}}}"


def _server(name: str, graph: str, nodes: str, folder: Path) -> Server:
    """Start a server with a graph of one node."""
    folder.mkdir()
    inputs = "{pixels: {datatype: FP32, shape: [-1, 64]}}"
    (folder / "graph.yaml").write_text(f"graph: {graph}\ninputs: {inputs}\nnodes: {nodes}\nanswer: score\n")
    body = folder / "body.json"
    pixels = {"name": "pixels", "datatype": "FP32", "shape": [1, 64], "data": [number / 64 for number in range(64)]}
    body.write_text(json.dumps({"inputs": [pixels]}))
    server = Server(name, graph, body, folder)
    command = [str(SERVINGGRAPH), "serve", "graph.yaml", "--log-level", "error", "--grpc-port", "off"]
    # One core for a thread, whatever numpy would take.
    environment = {"PYTHONPATH": str(HERE), "OPENBLAS_NUM_THREADS": "1"}
    server.start(Launch([*command, "--http-port", str(server.port)], environment))
    return server


Round = tuple[list[float], float, int]
"""Latencies in ms, in order of size; cores that others used; failed requests."""


def _measure(servers: Sequence[Server], aside: Server, options: argparse.Namespace) -> dict[str, list[Round]]:
    samples: dict[str, list[Round]] = {server.name: [] for server in servers}
    for number in range(options.rounds):
        first = number * 3 % len(servers)
        for server in [*servers[first:], *servers[:first]]:
            asyncio.run(_load(server, options.rate, 0.5))  # warm-up
            began, others = time.monotonic(), foreign_cpu_seconds(server) - aside.cpu_seconds()
            latencies, failed = asyncio.run(_load(server, options.rate, options.seconds))
            others = (foreign_cpu_seconds(server) - aside.cpu_seconds() - others) / (time.monotonic() - began)
            milliseconds = sorted(second * 1e3 for second in latencies)
            samples[server.name].append((milliseconds, others, failed))
            figures = f"p50 {_quantile(milliseconds, 0.5):.2f}, p99 {_quantile(milliseconds, 0.99):.2f} ms"
            text = f"round {number + 1}, {server.name}: {figures}, others {others:.2f}"
            print(text, file=sys.stderr, flush=True)
    return samples


def _quantile(ordered: Sequence[float], share: float) -> float:
    return ordered[int(len(ordered) * share)]


async def _load(server: Server, rate: float, seconds: float) -> tuple[list[float], int]:
    """Send requests at random moments; returns how long each took from its moment on, seconds, and how many failed."""
    body = server.body.read_bytes()
    head = f"POST /v2/models/shadow/infer HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    request = head.encode() + body
    free: asyncio.Queue[Any] = asyncio.Queue()
    for _ in range(CONNECTIONS):
        free.put_nowait(await asyncio.open_connection("127.0.0.1", server.port))
    latencies: list[float] = []
    failed = 0

    async def ask(moment: float) -> None:
        nonlocal failed
        reader, writer = connection = await free.get()
        writer.write(request)
        answer = await reader.readuntil(b"\r\n\r\n")
        length = next(line for line in answer.lower().split(b"\r\n") if line.startswith(b"content-length:"))
        await reader.readexactly(int(length.split(b":")[1]))
        latencies.append(time.perf_counter() - moment)
        failed += not answer.startswith(b"HTTP/1.1 200")
        free.put_nowait(connection)

    async with asyncio.TaskGroup() as group:
        moment = time.perf_counter()
        end = moment + seconds
        while (moment := moment + random.expovariate(rate)) < end:
            # A moment that was slept over is not the server's fault: what counts begins when it is sent.
            await asyncio.sleep(max(0.0, moment - time.perf_counter()))
            group.create_task(ask(time.perf_counter()))
    while not free.empty():
        free.get_nowait()[1].close()
    return latencies, failed


def _row(server: Server, before_mb: float, samples: Mapping[str, Sequence[Round]]) -> list[str]:
    rounds, base = _calm(samples[server.name]), _calm(samples["no shadow"])
    report = json.loads(server.get("/admin/graphs/shadow/routers/score"))["report"]["challengers"]["challenger"]
    usual = median(_quantile(latencies, 0.99) for latencies, *_ in base)
    ratios = sorted(_quantile(latencies, 0.99) / usual for latencies, *_ in rounds)
    mark = "" if rounds[0][1] <= DISTURBED_CORES else "~"
    every = sorted(ms for latencies, *_ in rounds for ms in latencies)
    ends = {"answered": report["answered"], **report["errors_by_code"]} | {
        f"dropped ({reason})": count for reason, count in report["dropped"].items()
    }
    return [
        server.name,
        f"{len(rounds)}{mark}",
        f"{_quantile(every, 0.5):.2f}",
        f"{_quantile(every, 0.99):.2f}",
        f"{median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})",
        f"{before_mb:.0f} → {server.resident_mb():.0f}",
        f"{report['sampled']:,}",
        ", ".join(f"{name} {count:,}" for name, count in ends.items() if count) or "-",
    ]


def _calm(rounds: Sequence[Round]) -> Sequence[Round]:
    """Return the rounds that nothing else has disturbed; all where there is none."""
    return [one for one in rounds if one[1] <= DISTURBED_CORES] or rounds


def _page(name: str, rows: Sequence[Sequence[str]], found: Mapping[str, str]) -> str:
    head = ["challenger", "rounds", "p50, ms", "p99, ms", "p99 / no shadow", "memory, MB", "copies", "what became of them"]
    lines = [f"# What a challenger costs the champion: {name}", ""]
    lines += [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]
    note = (
        f"Latency is the champion's answer at the client. Rounds in which other programs used more than {DISTURBED_CORES} "
        "cores are left out; ~ where there is no other. The last ratio is that of each round's p99 to the median of those "
        "without a shadow, and the second row says what of it is noise."
    )
    lines += ["", note, ""]
    lines += [*(f"- {label}: {text}" for label, text in found.items()), ""]
    return "\n".join(lines)


if __name__ == "__main__":
    run_program(main)
