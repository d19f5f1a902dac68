"""Measures servinggraph beside its peers and writes a results page.

All servers run at once, each in its own process, and are idle but for the one under load. Short
wrk runs go round the servers, each round in another order, so that what the machine does
meanwhile meets all of them. Run by `make bench`; README.md says how to read the page.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import conditions
import numpy as np
import onnxruntime as ort
from harness import Sample, Server, ServerFailed, load, run_program, stopping
from report import Cell, Memory, Run, is_calm, page
from servers import BENCH, HERE, KINDS, MODELS, NAMES, prepared, request_body, set_up

WARM_UP_S = 1
OURS = ("ours", "graph4")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; return 1 when a request to our own server failed."""
    options = _options(arguments)
    left_out = set_up(options.peers)
    kinds = ["ours", *(kind for kind in KINDS if kind in options.peers and kind not in left_out)]
    servers = [prepared(kind, model) for model in options.models for kind in kinds]
    with stopping(servers):
        left_out |= _start(servers)
        servers = [server for server in servers if server.name not in left_out]
        _say(f"{len(servers)} servers answer alike; about {_minutes(options, len(servers)):.1f} minutes from here")
        triton = next((server for server in servers if server.name == "triton"), None)
        triton_version = json.loads(triton.get("/v2"))["version"] if triton else ""
        found = conditions.machine() | _versions({server.name for server in servers}, triton_version)
        idle = {server: server.resident_mb() for server in servers}
        samples = _measure(servers, options)
        memory = {
            (server.model, server.name): Memory(len(server.pids()), idle[server], server.resident_mb()) for server in servers
        }
    run = Run(
        title=options.name,
        durations=f"{options.rounds} rounds of {options.seconds} s a cell and server, {WARM_UP_S} s of warm-up before",
        conditions=found,
        samples=samples,
        memory=memory,
        left_out=left_out,
    )
    target = options.out / f"{options.name}.md"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(page(run), encoding="utf-8")
    print(f"{page(run)}\nwritten to {target}")
    failed = sum(s.failed for cell in samples.values() for kind in OURS for s in cell.get(kind, ()))
    return 1 if failed else 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    peers = [kind for kind in KINDS if kind != "ours"]
    default_name = f"{datetime.now():%Y-%m-%d}-{len(os.sched_getaffinity(0))}-cores"
    parser.add_argument("--rounds", type=_positive, default=5, help="wrk runs a server and cell (default 5)")
    parser.add_argument("--seconds", type=_positive, default=3, help="length of each (default 3)")
    parser.add_argument("--peers", type=_choice_of(peers), default=peers, help=f"default {','.join(peers)}")
    parser.add_argument("--models", type=_choice_of(NAMES), default=list(NAMES), help=f"default {','.join(NAMES)}")
    parser.add_argument("--connections", type=_numbers, default=[1, 32], help="default 1,32")
    parser.add_argument("--name", default=default_name, help=f"name of the results page (default {default_name})")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the page (default loadtests/results)")
    return parser.parse_args(arguments)


def _start(servers: Sequence[Server]) -> dict[str, str]:
    """Start all servers and check their answers; return those that failed, with the reason.

    Raises:
        SystemExit: our own server failed.
    """
    for server in servers:
        server.start(KINDS[server.name](server))
    failed = {}
    for server in servers:
        try:
            _check(server, server.first(server.infer))
        except ServerFailed as error:
            if server.name in OURS:
                raise SystemExit(str(error)) from error
            failed[server.name] = str(error).replace(str(BENCH), "$BENCH")
            _say(f"left out: {error}")
    return failed


def _check(server: Server, answer: dict[str, Any]) -> None:
    """Compare an answer with what ONNX Runtime says here.

    Raises:
        ServerFailed: they differ.
    """
    session = ort.InferenceSession(str(MODELS / f"{server.model}.onnx"), providers=["CPUExecutionProvider"])
    tensor = json.loads(request_body(server.model).read_text())["inputs"][0]
    rows = np.array(tensor["data"], np.float32).reshape(tensor["shape"])
    names = [output.name for output in session.get_outputs()]
    given = {output["name"]: output["data"] for output in answer["outputs"]}
    # Data alone: Triton calls a label per row [rows, 1], the model [rows].
    for name, expected in zip(names, session.run(names, {tensor["name"]: rows}), strict=True):
        if name not in given or not np.allclose(given[name], expected.ravel(), rtol=1e-4, atol=1e-5):
            raise ServerFailed(f"{server} answers wrongly: output '{name}' is {given.get(name)}, expected {expected.tolist()}")


def _measure(servers: Sequence[Server], options: argparse.Namespace) -> dict[Cell, dict[str, list[Sample]]]:
    cells: list[Cell] = [(model, connections) for model in options.models for connections in options.connections]
    samples: dict[Cell, dict[str, list[Sample]]] = {
        (model, connections): {server.name: [] for server in servers if server.model == model} for model, connections in cells
    }
    for server in servers:
        for connections in options.connections:
            load(server, connections, WARM_UP_S)
    for number in range(options.rounds):
        for model, connections in cells:
            group = [server for server in servers if server.model == model]
            first = number % len(group)
            for server in group[first:] + group[:first]:
                samples[model, connections][server.name].append(load(server, connections, options.seconds))
            _say(_progress(number, model, connections, samples[model, connections]))
    return samples


def _progress(number: int, model: str, connections: int, rounds: dict[str, list[Sample]]) -> str:
    last = {name: samples[-1] for name, samples in rounds.items()}
    rates = [f"{name} {sample.rate:,.0f}{'' if is_calm(sample) else '~'}" for name, sample in last.items()]
    return f"round {number + 1}, {model} c={connections}: {', '.join(rates)}"


def _versions(names: set[str], triton: str) -> dict[str, str]:
    own = [name for name in KINDS if name in names and name not in ("triton", "mlserver")]
    found = {", ".join(own): conditions.versions("ours")}
    return found | {name: conditions.versions(name, triton) for name in ("triton", "mlserver") if name in names}


def _minutes(options: argparse.Namespace, servers: int) -> float:
    return servers * len(options.connections) * (options.rounds * options.seconds + WARM_UP_S) / 60


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number, 1 or more, got '{text}'")
    return int(text)


def _numbers(text: str) -> list[int]:
    return [_positive(part) for part in text.split(",")]


def _choice_of(known: Sequence[str]) -> Any:
    def parse(text: str) -> list[str]:
        chosen = [part for part in text.split(",") if part]
        if unknown := [part for part in chosen if part not in known]:
            raise argparse.ArgumentTypeError(f"no {', '.join(unknown)}; there is {', '.join(known)}")
        return chosen

    return parse


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    run_program(main)
