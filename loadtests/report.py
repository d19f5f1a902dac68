"""Turns samples into medians, ratios and the results page. Runs nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from harness import Sample

DISTURBED_CORES = 0.3
"""A round during which other processes used more cores than this is left out where a calm one is left."""

RATIOS = (
    ("ours", "floor", "≥ 0.8", 0.8),
    ("ours", "floor-inline", "", 0.0),
    ("ours", "triton", "≥ 1", 1.0),
    ("ours", "mlserver", "", 0.0),
    ("graph4", "ours", "≥ 0.9", 0.9),
)
"""Which server's rate is divided by which other's, the target in words and as a number."""

Cell = tuple[str, int]
"""Model and number of connections."""

Samples = Mapping[Cell, Mapping[str, Sequence[Sample]]]
"""For each cell and server its sample of each round."""


@dataclass(frozen=True)
class Memory:
    """Resident memory of a server's processes, MB."""

    processes: int
    idle: float
    loaded: float


@dataclass(frozen=True)
class Run:
    """Everything that the page says.

    Attributes:
        title: the page's name.
        durations: rounds, seconds and warm-up in words.
        conditions: label to text.
        samples: what was measured.
        memory: model and server to its memory.
        left_out: server to why it was not measured.
    """

    title: str
    durations: str
    conditions: Mapping[str, str]
    samples: Samples
    memory: Mapping[tuple[str, str], Memory]
    left_out: Mapping[str, str]


def is_calm(sample: Sample) -> bool:
    """Tell whether the machine did little else during a sample."""
    return sample.others <= DISTURBED_CORES


def rate_ratios(above: Sequence[Sample], below: Sequence[Sample]) -> tuple[list[float], bool]:
    """Return the ratio of each round in which both were calm; of every round, and False, when there is none."""
    pairs = list(zip(above, below, strict=True))
    calm = [(a, b) for a, b in pairs if is_calm(a) and is_calm(b)]
    return [a.rate / b.rate for a, b in calm or pairs], bool(calm)


def page(run: Run) -> str:
    """Return the results page in Markdown."""
    parts = [
        f"# Load test {run.title}",
        "V2 JSON over HTTP, one row a request, closed loop (wrk). How to read this: [README](../README.md).",
        "## Ratios of requests a second",
        _ratio_table(run.samples),
        "Median of the ratios of each round (lowest to highest). ✗ misses the target, ~ stands on disturbed rounds only.",
        *_cell_sections(run.samples),
        "## Memory",
        _memory_table(run.memory),
        "Resident memory of all processes of a server, before and after all its load.",
        "## Conditions",
        table(("", ""), [("durations", run.durations), *run.conditions.items()]),
        _disturbances(run.samples),
    ]
    parts += [f"Not measured: {name}, because {reason}." for name, reason in run.left_out.items()]
    return "\n\n".join(parts) + "\n"


def _ratio_table(samples: Samples) -> str:
    rows = []
    for above, below, target, least in RATIOS:
        if not all(above in servers and below in servers for servers in samples.values()):
            continue
        cells = [_ratio_cell(servers[above], servers[below], least) for servers in samples.values()]
        rows.append((f"{above} / {below}", target, *cells))
    return table(("", "target", *map(_cell_name, samples)), rows)


def _ratio_cell(above: Sequence[Sample], below: Sequence[Sample], least: float) -> str:
    ratios, calm = rate_ratios(above, below)
    middle = median(ratios)
    missed = " ✗" if middle < least else ""
    return f"{'' if calm else '~'}**{middle:.2f}**{missed} ({min(ratios):.2f} to {max(ratios):.2f})"


def _cell_sections(samples: Samples) -> list[str]:
    header = ("server", "req/s", "spread", "p50 ms", "p99 ms", "calm rounds", "failed")
    parts = []
    for cell, servers in samples.items():
        rows = [_server_row(name, rounds) for name, rounds in servers.items()]
        parts += [f"## {_cell_name(cell)}", table(header, rows)]
    return parts


def _server_row(name: str, rounds: Sequence[Sample]) -> tuple[str, ...]:
    calm = [sample for sample in rounds if is_calm(sample)]
    used, mark = calm or rounds, "" if calm else "~"
    rates = [sample.rate for sample in used]
    middle = median(rates)
    failed = sum(sample.failed for sample in rounds)
    return (
        name,
        f"{mark}{middle:,.0f}",
        f"{(min(rates) - middle) / middle:+.0%} {(max(rates) - middle) / middle:+.0%}",
        f"{mark}{median(sample.p50_ms for sample in used):.2f}",
        f"{mark}{median(sample.p99_ms for sample in used):.2f}",
        f"{len(calm)} of {len(rounds)}",
        str(failed) if failed else "",
    )


def _memory_table(memory: Mapping[tuple[str, str], Memory]) -> str:
    rows = [
        (name, model, str(each.processes), f"{each.idle:.0f}", f"{each.loaded:.0f}", f"{each.loaded - each.idle:+.0f}")
        for (model, name), each in memory.items()
    ]
    return table(("server", "model", "processes", "idle MB", "loaded MB", "difference"), rows)


def _disturbances(samples: Samples) -> str:
    every = [sample for servers in samples.values() for rounds in servers.values() for sample in rounds]
    disturbed = [
        f"{_cell_name(cell)}, {name}, round {number + 1} ({sample.others:.1f})"
        for cell, servers in samples.items()
        for name, rounds in servers.items()
        for number, sample in enumerate(rounds)
        if not is_calm(sample)
    ]
    text = f"{len(disturbed)} of {len(every)} samples were disturbed: other processes used over {DISTURBED_CORES} cores."
    return f"{text} Which, and by how many: {'; '.join(disturbed)}." if disturbed else text


def _cell_name(cell: Cell) -> str:
    model, connections = cell
    return f"{model}, {connections} connection{'s' if connections > 1 else ''}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
