"""Measures the binary wires, HTTP with binary tensors and gRPC, beside Triton and a bare gRPC servicer.

The load is perf_analyzer's, Triton's own generator: a closed loop at a fixed number of concurrent
requests. As in bench.py all servers run at once, one at a time is loaded, in rounds. Run by
`make bench`; README.md says how to read the page.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from statistics import median

import conditions
from harness import Launch, Sample, Server, foreign_cpu_seconds, free_port, run_program, stopping
from report import is_calm, rate_ratios, table
from servers import BENCH, HERE, MODELS, NAMES, PEERS, SERVINGGRAPH, prepared, set_up, triton

SHAPES = {"iris": "X:1,4", "mlp": "x:1,784"}
PROTOCOLS = ("http", "grpc")
RATIOS = (("ours", "triton", {"http": 1.2, "grpc": None}), ("ours", "bare", {"grpc": 0.95}))

Cell = tuple[str, str, int]
"""Protocol, model, concurrent requests."""


class WireServer(Server):
    """A server that is reached over HTTP and gRPC."""

    def __init__(self, server: Server) -> None:
        super().__init__(server.name, server.model, server.body, server.folder)
        self.grpc_port = free_port()

    def address(self, protocol: str) -> str:
        """Return host and port of a protocol."""
        return f"127.0.0.1:{self.port if protocol == 'http' else self.grpc_port}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; return 1 when a request to our own server failed."""
    options = _options(arguments)
    left_out = set_up(["triton", "perf_analyzer"])
    kinds = [kind for kind in ("ours", "triton", "bare") if kind not in left_out]
    servers = [WireServer(prepared(kind, model)) for kind in kinds for model in options.models]
    with stopping(servers):
        for server in servers:
            server.start(_launch(server))
        for server in servers:
            _wait(server)
        samples = _measure(servers, options)
        version = next((str(server.get("/v2")) for server in servers if server.name == "triton"), "")
    found = conditions.machine() | {
        "perf_analyzer": "of tritonclient 2.41.1",
        "ours, bare": conditions.versions("ours") + ", " + conditions.packages(Path(sys.executable), "grpcio", "protobuf"),
        "triton": conditions.versions("triton", re.findall(r'"version":"([^"]+)"', version)[0] if version else ""),
        "durations": f"{options.rounds} rounds of {options.seconds} s a cell and server",
    }
    target = options.out / f"{options.name}.md"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(_page(options.name, samples, found), encoding="utf-8")
    print(f"{target.read_text()}\nwritten to {target}")
    return 1 if any(s.failed for cell in samples.values() for s in cell["ours"]) else 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    name = f"{datetime.now():%Y-%m-%d}-{len(os.sched_getaffinity(0))}-cores-wire"
    parser.add_argument("--rounds", type=int, default=3, help="runs a server and cell (default 3)")
    parser.add_argument("--seconds", type=int, default=3, help="length of each (default 3)")
    parser.add_argument("--models", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--protocols", nargs="+", choices=PROTOCOLS, default=list(PROTOCOLS))
    parser.add_argument("--concurrency", nargs="+", type=int, default=[1, 32])
    parser.add_argument("--name", default=name, help=f"name of the results page (default {name})")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the page")
    return parser.parse_args(arguments)


def _launch(server: WireServer) -> Launch:
    ports = str(server.port), str(server.grpc_port)
    if server.name == "ours":
        command = [str(SERVINGGRAPH), "serve", str(MODELS / f"{server.model}.onnx"), "--log-level", "warning"]
        return Launch([*command, "--http-port", ports[0], "--grpc-port", ports[1]], {})
    if server.name == "bare":
        environment = {"MODEL": server.model, "MODELS": str(MODELS), "PORT": ports[1], "PYTHONPATH": str(PEERS)}
        return Launch([sys.executable, str(PEERS / "bare_grpc.py")], environment)
    launch = triton(server)
    command = [part for part in launch.command if part != "--allow-grpc=false"]
    return Launch([*command, "--grpc-address=127.0.0.1", f"--grpc-port={ports[1]}"], launch.environment)


def _wait(server: WireServer) -> None:
    protocol = "grpc" if server.name == "bare" else "http"
    server.first(lambda: _analyze(server, protocol, 1, 1), pause_s=0.5)


def _measure(servers: Sequence[WireServer], options: argparse.Namespace) -> dict[Cell, dict[str, list[Sample]]]:
    cells = [(p, m, c) for p in options.protocols for m in options.models for c in options.concurrency]
    samples: dict[Cell, dict[str, list[Sample]]] = {}
    for number in range(options.rounds):
        for protocol, model, concurrency in cells:
            group = [s for s in servers if s.model == model and (protocol == "grpc" or s.name != "bare")]
            first = number % len(group)
            rounds = samples.setdefault((protocol, model, concurrency), {s.name: [] for s in group})
            for server in group[first:] + group[:first]:
                rounds[server.name].append(_analyze(server, protocol, concurrency, options.seconds))
            rates = ", ".join(f"{name} {got[-1].rate:,.0f}{'' if is_calm(got[-1]) else '~'}" for name, got in rounds.items())
            print(f"round {number + 1}, {protocol} {model} c={concurrency}: {rates}", file=sys.stderr, flush=True)
    return samples


def _analyze(server: WireServer, protocol: str, concurrency: int, seconds: int) -> Sample:
    """Run perf_analyzer once.

    Raises:
        ConnectionError: it got no answer.
    """
    home = BENCH / "perf_analyzer" / "x"
    command = [str(next(home.glob("*.data/data/bin/perf_analyzer"))), "-m", server.model, "-u", server.address(protocol)]
    command += ["-i", protocol, "--shape", SHAPES[server.model], "--concurrency-range", f"{concurrency}:{concurrency}"]
    # It wants three windows before it says anything; how much they differ is for the rounds to show.
    command += ["-p", str(seconds * 1000 // 3), "-r", "3", "-s", "999", "--percentile=99"]
    environment = os.environ | {"LD_LIBRARY_PATH": str(home / "nvidia/cuda_runtime/lib")}
    before, started = foreign_cpu_seconds(server), time.monotonic()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    others = (foreign_cpu_seconds(server) - before) / (time.monotonic() - started)
    text = done.stdout + done.stderr
    rate = re.search(r"Throughput: ([\d.]+) infer/sec", text)
    count = re.search(r"Request count: (\d+)", text)
    if rate is None or count is None:
        raise ConnectionError(
            f"perf_analyzer measured nothing of {server} over {protocol}: {text.strip()[-500:]}; see {server.log}"
        )
    micro = {name: float(value) for name, value in re.findall(r"(p50|p99) latency: (\d+) usec", text)}
    failed = 0 if done.returncode == 0 or "stabil" in text else 1
    return Sample(int(count[1]), float(rate[1]), micro["p50"] / 1e3, micro["p99"] / 1e3, failed, max(0.0, others))


def _page(name: str, samples: dict[Cell, dict[str, list[Sample]]], found: dict[str, str]) -> str:
    ratios = []
    for above, below, targets in RATIOS:
        for cell, servers in samples.items():
            if above in servers and below in servers and cell[0] in targets:
                values, calm = rate_ratios(servers[above], servers[below])
                least = targets[cell[0]]
                mark = " ✗" if least is not None and median(values) < least else ""
                shown = f"{'' if calm else '~'}**{median(values):.2f}**{mark} ({min(values):.2f} to {max(values):.2f})"
                ratios.append((f"{above} / {below}", _cell(cell), "" if least is None else f"≥ {least}", shown))
    rows = [
        (_cell(cell), server, f"{median(s.rate for s in got):,.0f}", f"{median(s.p50_ms for s in got):.2f}",
         f"{median(s.p99_ms for s in got):.2f}", f"{sum(map(is_calm, got))} of {len(got)}")
        for cell, servers in samples.items() for server, got in servers.items()
    ]  # fmt: skip
    parts = [
        f"# Load test {name}",
        "Binary tensors over HTTP and gRPC, one row a request, closed loop (perf_analyzer).",
        "How to read this: [README](../README.md).",
        "## Ratios of requests a second",
        table(("", "cell", "target", "median of the rounds (lowest to highest)"), ratios),
        "✗ misses the target, ~ stands on disturbed rounds only.",
        "`bare` is a grpc.aio servicer with the model and a small batcher.",
        "## Figures",
        table(("cell", "server", "req/s", "p50 ms", "p99 ms", "calm rounds"), rows),
        "## Conditions",
        table(("", ""), list(found.items())),
    ]
    return "\n\n".join(parts) + "\n"


def _cell(cell: Cell) -> str:
    protocol, model, concurrency = cell
    return f"{'HTTP binary' if protocol == 'http' else 'gRPC'}, {model}, {concurrency} at once"


if __name__ == "__main__":
    if shutil.which("wrk") is None:
        sys.exit("wrk is missing: run loadtests/setup.sh wrk")
    run_program(main)
