"""Measures what metrics, an access log and traces cost: one model served in several ways at once, loaded in turn.

All servers run at once and are idle but for the one under load, rounds go over them in another order each time, and a scrape
a second (fifteen times as often as is usual) meets those that have metrics. A collector that reads and forgets takes the spans.

usage: .venv/bin/python loadtests/overhead.py [--rounds 15] [--seconds 2]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from statistics import median

import conditions
from harness import Launch, Sample, Server, load, run_program, stopping
from servers import HERE, MODELS, ours, prepared, set_up

WARM_UP_S = 2
SCRAPE_S = 1.0
NOTHING = "nothing"


@dataclass(frozen=True)
class Cost:
    """One round of one server: what wrk saw, and processor time of the server for each request, microseconds."""

    sample: Sample
    cpu_us: float


def ways(collector: int, folder: Path) -> dict[str, list[str]]:
    """Return the options of each way to serve."""
    traces = ["--otel", "on", "--otel-endpoint", f"http://127.0.0.1:{collector}", "--otel-sample", "0.01"]
    return {
        NOTHING: ["--metrics", "off"],
        "nothing again": ["--metrics", "off"],
        "metrics": [],
        "metrics, access log": ["--access-log", str(folder / "access.log")],
        "metrics, 1 % traces": traces,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it; return 1 when a request failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=int, default=2)
    parser.add_argument("--connections", type=int, default=32)
    parser.add_argument("--trials", type=int, default=600, help="of the part without sockets")
    name = f"{datetime.now():%Y-%m-%d}-{len(os.sched_getaffinity(0))}-cores-overhead"
    parser.add_argument("--out", type=Path, default=HERE / "results" / f"{name}.md")
    options = parser.parse_args(arguments)
    set_up([])
    with collecting() as collector:
        first = prepared("overhead", "iris")
        servers = {way: Server(way, "iris", first.body, _folder(first.folder, way)) for way in ways(collector, first.folder)}
        with stopping(list(servers.values())):
            for way, flags in ways(collector, first.folder).items():
                launch = ours(servers[way])
                servers[way].start(Launch([*launch.command, *flags], launch.environment))
            for server in servers.values():
                server.first(server.infer)
            rounds = measure(servers, options)
        inside = without_sockets(options.trials, first)
    text = page(rounds, inside, options)
    options.out.write_text(text, encoding="utf-8")
    print(f"{text}\nwritten to {options.out}")
    return int(any(cost.sample.failed for costs in rounds.values() for cost in costs))


def measure(servers: dict[str, Server], options: argparse.Namespace) -> dict[str, list[Cost]]:
    """Load the servers in turn."""
    rounds: dict[str, list[Cost]] = {way: [] for way in servers}
    for server in servers.values():
        load(server, options.connections, WARM_UP_S)
    names = list(servers)
    for number in range(options.rounds):
        first = number % len(names)
        for way in names[first:] + names[:first]:
            server = servers[way]
            with scraping(server, on=not way.startswith(NOTHING)):
                before = server.cpu_seconds()
                sample = load(server, options.connections, options.seconds)
                spent = server.cpu_seconds() - before
            rounds[way].append(Cost(sample, spent / sample.requests * 1e6))
        last = ", ".join(f"{way} {costs[-1].sample.rate:,.0f}/s {costs[-1].cpu_us:.1f} us" for way, costs in rounds.items())
        print(f"round {number + 1}: {last}", file=sys.stderr, flush=True)
    return rounds


def without_sockets(trials: int, model: Server) -> dict[str, float]:
    """Return microseconds a request of each way in process; see overhead_inside.py."""
    program = [
        sys.executable,
        str(HERE / "overhead_inside.py"),
        str(trials),
        str(MODELS / f"{model.model}.onnx"),
        str(model.body),
    ]
    done = subprocess.run(program, capture_output=True, text=True, timeout=600, check=True)
    return dict(json.loads(done.stdout))


def page(rounds: dict[str, list[Cost]], inside: dict[str, float], options: argparse.Namespace) -> str:
    """Return the results page."""
    others = [cost.sample.others for costs in rounds.values() for cost in costs]
    lines = [
        f"# What metrics, access log and traces cost ({datetime.now():%d %B %Y})",
        "",
        f"iris, V2 JSON over HTTP, {options.connections} connections, {options.rounds} rounds of {options.seconds} s a server,",
        "interleaved; all servers run at once; medians. `nothing` is `--metrics off`, and stands there twice: how far the two",
        f"are apart is what the run cannot tell. Metrics are scraped every {SCRAPE_S:g} s. Written by `loadtests/overhead.py`.",
        "",
        "Processor time is the server's, of its calmest round. Without sockets the same requests go to the application in one",
        "process, the calmest tenth of many short trials: other programs disturb that least, and its difference is the cost.",
        "",
        "| | requests a second | of `nothing`: median (quartiles) | processor time a request | without sockets | difference |",
        "|---|---|---|---|---|---|",
    ]
    for way, costs in rounds.items():
        shares = sorted(cost.sample.rate / base.sample.rate for cost, base in zip(costs, rounds[NOTHING], strict=True))
        quarter = len(shares) // 4
        spread = f"{median(shares):.3f} ({shares[quarter]:.3f} to {shares[-1 - quarter]:.3f})"
        rate, us = median(cost.sample.rate for cost in costs), min(cost.cpu_us for cost in costs)
        more = inside[way] - inside[NOTHING]
        lines.append(f"| {way} | {rate:,.0f} | {spread} | {us:.1f} µs | {inside[way]:.2f} µs | {more:+.2f} µs |")
    whole = min(cost.cpu_us for way, costs in rounds.items() if way.startswith(NOTHING) for cost in costs)
    paid = inside["metrics"] - inside[NOTHING]
    lines += [
        "",
        f"Metrics cost {paid:.2f} µs of the {whole:.1f} µs that a request costs the server without them: {paid / whole:.1%}.",
        "",
        f"Other programs used {median(others):.2f} cores meanwhile (median; up to {max(others):.2f}).",
        "",
        *(f"- {label}: {text}" for label, text in conditions.machine().items()),
        f"- servinggraph: {conditions.versions('ours')}",
        "",
    ]
    return "\n".join(lines)


@contextmanager
def scraping(server: Server, *, on: bool) -> Iterator[None]:
    """Scrape a server once a second meanwhile."""
    done = threading.Event()

    def scrape() -> None:
        while not done.wait(SCRAPE_S):
            server.get("/metrics")

    thread = threading.Thread(target=scrape, daemon=True)
    if on:
        thread.start()
    try:
        yield
    finally:
        done.set()
        if on:
            thread.join()


@contextmanager
def collecting() -> Iterator[int]:
    """Run a collector that forgets what it gets; give its port."""

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Collector)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()


def _folder(around: Path, way: str) -> Path:
    folder = around / way.replace(" ", "-").replace(",", "").replace("%", "")
    folder.mkdir()
    return folder


if __name__ == "__main__":
    run_program(main)
