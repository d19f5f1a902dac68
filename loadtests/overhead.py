"""Measures what metrics, an access log and traces cost: one model served in several ways at once, loaded in turn.

All servers run at once and are idle but for the one under load, rounds go over them in another order each time, and those that
have metrics are scraped as often as is usual, by their time under load. A collector that reads and forgets takes the spans.
After some rounds all are started anew. What metrics alone cost is then measured once more within one process, which two servers
side by side cannot tell so exactly: see overhead_switched.py.

usage: .venv/bin/python loadtests/overhead.py [--starts 6] [--rounds 8] [--seconds 1]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from statistics import mean, median

import conditions
import overhead_switched
from harness import Launch, Sample, Server, ServerFailed, load, run_program, stopping
from servers import HERE, MODELS, ours, prepared, set_up

WARM_UP_S = 1
SCRAPE_S = 15
"""Of load on a server between two scrapes of it; Prometheus' own default is a minute."""
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
    parser.add_argument("--starts", type=int, default=6, help="how often all servers are started")
    parser.add_argument("--rounds", type=int, default=8, help="after each start")
    parser.add_argument("--seconds", type=int, default=1, help="of load on a server in a round")
    parser.add_argument("--switched-seconds", type=int, default=12, help="of load on a server that switches, after each start")
    parser.add_argument("--connections", type=int, default=32)
    name = f"{datetime.now():%Y-%m-%d}-{len(os.sched_getaffinity(0))}-cores-overhead"
    parser.add_argument("--out", type=Path, default=HERE / "results" / f"{name}.md")
    options = parser.parse_args(arguments)
    set_up([])
    rounds: dict[str, list[Cost]] = {}
    inside = []
    with collecting() as collector:
        for start in range(options.starts):
            model = prepared("overhead", "iris")
            for way, costs in beside_each_other(model, collector, start, options).items():
                rounds.setdefault(way, []).extend(costs)
            inside.append(switched(model, options))
    text = page(rounds, inside, options)
    options.out.write_text(text, encoding="utf-8")
    print(f"{text}\nwritten to {options.out}")
    return int(any(cost.sample.failed for costs in rounds.values() for cost in costs))


def beside_each_other(model: Server, collector: int, start: int, options: argparse.Namespace) -> dict[str, list[Cost]]:
    """Start a server for each way, and load them in turn."""
    servers = {way: Server(way, "iris", model.body, _folder(model.folder, way)) for way in ways(collector, model.folder)}
    with stopping(list(servers.values())):
        for way, flags in ways(collector, model.folder).items():
            launch = ours(servers[way])
            servers[way].start(Launch([*launch.command, *flags], launch.environment))
        for server in servers.values():
            server.first(server.infer)
        return measure(servers, start, options)


def measure(servers: dict[str, Server], start: int, options: argparse.Namespace) -> dict[str, list[Cost]]:
    """Load the servers in turn."""
    rounds: dict[str, list[Cost]] = {way: [] for way in servers}
    for server in servers.values():
        load(server, options.connections, WARM_UP_S)
    names = list(servers)
    for number in range(start * options.rounds, (start + 1) * options.rounds):
        first = number % len(names)
        for way in names[first:] + names[:first]:
            server = servers[way]
            loaded_s = number * options.seconds
            due = (loaded_s + options.seconds) // SCRAPE_S > loaded_s // SCRAPE_S
            with scraping(server, on=due and not way.startswith(NOTHING)):
                before = server.cpu_seconds()
                sample = load(server, options.connections, options.seconds)
                spent = server.cpu_seconds() - before
            rounds[way].append(Cost(sample, spent / sample.requests * 1e6))
        last = ", ".join(f"{way} {costs[-1].sample.rate:,.0f}/s {costs[-1].cpu_us:.1f} us" for way, costs in rounds.items())
        print(f"round {number + 1}: {last}", file=sys.stderr, flush=True)
    return rounds


def switched(model: Server, options: argparse.Namespace) -> list[list[float]]:
    """Load a server that switches between ways; return microseconds a request of each way by round."""
    server = Server("switched", "iris", model.body, _folder(model.folder, "switched"))
    out = server.folder / "rounds.json"
    program = str(HERE / "overhead_switched.py")
    with stopping([server]):
        server.start(Launch([sys.executable, program, str(server.port), str(MODELS / "iris.onnx"), str(out)], {}))
        server.first(server.infer)
        load(server, options.connections, WARM_UP_S)
        sample = load(server, options.connections, options.switched_seconds)
    if sample.failed:
        raise ServerFailed(f"{sample.failed} requests failed; see {server.log}")
    found: list[list[float]] = json.loads(out.read_text(encoding="utf-8"))
    return found


@dataclass(frozen=True)
class Inside:
    """What one process that switches showed.

    Attributes:
        nothing: microseconds a request without metrics.
        apart: how far the two ways without them were apart, of that.
        more: how much longer a request took with metrics, of that.
        rounds: in how many rounds all ways had their slice.
    """

    nothing: float
    apart: float
    more: float
    rounds: int


def compared(rounds: list[list[float]]) -> Inside:
    """Compare ways by round: the mean difference, without a twentieth at each end, when the machine did something else."""
    first, again, metrics = zip(*rounds, strict=True)
    nothing = [mean(pair) for pair in zip(first, again, strict=True)]
    usual = median(nothing)

    def more(times: Sequence[float]) -> float:
        differences = sorted(each - base for each, base in zip(times, nothing, strict=True))
        cut = len(differences) // 20
        return mean(differences[cut : len(differences) - cut]) / usual

    return Inside(usual, 2 * abs(more(first)), more(metrics), len(rounds))


def page(rounds: dict[str, list[Cost]], inside: list[list[list[float]]], options: argparse.Namespace) -> str:
    """Return the results page."""
    others = [cost.sample.others for costs in rounds.values() for cost in costs]
    lines = [
        f"# What metrics, access log and traces cost ({datetime.now():%d %B %Y})",
        "",
        f"iris, V2 JSON over HTTP, {options.connections} connections. Written by `loadtests/overhead.py`.",
        "",
        "## Servers side by side",
        "",
        f"All run at once, {options.rounds} rounds of {options.seconds} s a server, interleaved, and that after each of",
        f"{options.starts} starts; medians. `nothing` is `--metrics off`, and stands there twice: how far the two are apart is",
        f"what the run cannot tell; shares are of the mean of both. Each {SCRAPE_S} s of load metrics are scraped.",
        "",
        "| | requests a second | of `nothing`: median (quartiles) | processor time of the server for a request |",
        "|---|---|---|---|",
    ]
    bases = [costs for way, costs in rounds.items() if way.startswith(NOTHING)]
    base = [mean(cost.sample.rate for cost in costs) for costs in zip(*bases, strict=True)]
    for way, costs in rounds.items():
        shares = sorted(cost.sample.rate / rate for cost, rate in zip(costs, base, strict=True))
        quarter = len(shares) // 4
        spread = f"{median(shares):.3f} ({shares[quarter]:.3f} to {shares[-1 - quarter]:.3f})"
        rate, us = median(cost.sample.rate for cost in costs), median(cost.cpu_us for cost in costs)
        lines.append(f"| {way} | {rate:,.0f} | {spread} | {us:.1f} µs |")
    found = [compared(each) for each in inside]
    usual, more, apart = (median(values) for values in zip(*((one.nothing, one.more, one.apart) for one in found), strict=True))
    switched_ways = ", ".join(overhead_switched.WAYS)
    lines += [
        "",
        "## Metrics on and off in one process",
        "",
        f"One server that goes over {switched_ways}, every 10 to 20 ms to another, in random order, under the same load for",
        f"{options.switched_seconds} s; its requests by each way, compared round by round (`loadtests/overhead_switched.py`).",
        "",
        "| process | rounds | a request without | with metrics | `nothing again`: apart |",
        "|---|---|---|---|---|",
    ]
    for number, one in enumerate(found, 1):
        cost = f"{one.nothing * one.more:+.2f} µs ({one.more:+.1%})"
        lines.append(f"| {number} | {one.rounds} | {one.nothing:.1f} µs | {cost} | {one.apart:.1%} |")
    lines += [
        "",
        f"Metrics cost {more:.1%} of a server at its limit, {usual * more:.1f} µs of {usual:.1f} (medians; the method",
        f"cannot tell {apart:.1%}).",
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
    """Scrape a server once meanwhile."""
    thread = threading.Timer(0.5, server.get, ["/metrics"])
    if on:
        thread.start()
    try:
        yield
    finally:
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
