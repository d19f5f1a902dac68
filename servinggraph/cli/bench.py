"""`servinggraph bench`: load on a running server, and what became of it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Self

import click

from servinggraph.cli.params import SECONDS, headers_from

if TYPE_CHECKING:
    from collections.abc import Mapping

    from servinggraph.cli.asking.load import Outcome
    from servinggraph.tensors import Array

__all__ = ["bench"]

_PERCENTILES = (50, 90, 95, 99, 99.9)


@click.command()
@click.argument("url")
@click.argument("model")
@click.option(
    "-i", "--input", "inputs", multiple=True, metavar="NAME=VALUE", help="A tensor, as for `infer`; those not given are random."
)
@click.option("--body", metavar="VALUE", help="For a graph that takes bodies: JSON, or @FILE; over HTTP.")
@click.option("--content-type", help="With --body, its content type; by default JSON, or what the file's name says.")
@click.option("--rows", type=click.IntRange(1), default=1, show_default=True, help="Rows of random tensors.")
@click.option("--model-version", default="", help="By default the server's choice.")
@click.option("--header", "headers", multiple=True, metavar="NAME=VALUE", help="A header of each request (gRPC: metadata).")
@click.option(
    "-c", "--connections", type=click.IntRange(1, 4096), default=32, show_default=True, help="Requests at the same time."
)
@click.option("-d", "--seconds", type=SECONDS, default=10, show_default=True)
@click.option(
    "--warmup", type=click.FloatRange(min=0), default=1, show_default=True, help="Seconds of load before, not counted."
)
@click.option(
    "--rate",
    type=click.FloatRange(min=0, min_open=True),
    help="Requests a second, whatever the server does; by default each connection asks when it has its answer.",
)
@click.option("--plot", type=click.Path(path_type=Path, dir_okay=False), help="Draw the latencies: .png, .svg or .pdf.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
@click.option("--timeout-s", type=SECONDS, default=30, show_default=True)
def bench(
    url: str,
    model: str,
    inputs: tuple[str, ...],
    body: str | None,
    content_type: str | None,
    rows: int,
    model_version: str,
    headers: tuple[str, ...],
    connections: int,
    seconds: float,
    warmup: float,
    rate: float | None,
    plot: Path | None,
    as_json: bool,
    timeout_s: float,
) -> None:
    """Load MODEL on the server at URL (http://host:port or grpc://host:port), and print rate and latencies.

    With --rate latencies count from when a request was due, so that a server that stands still cannot hide it; one that finds
    no free connection waits, and that counts as well.
    """
    import asyncio
    from contextlib import closing

    import orjson

    from servinggraph.cli.asking.body import ask_with_body, read_body
    from servinggraph.cli.asking.load import Body, run_load
    from servinggraph.cli.asking.target import Target, failure
    from servinggraph.cli.asking.values import random_tensors, tensors_from

    if plot is not None:
        _see_to_plot(plot)  # a load may take long, and what it found must not be lost
    sent = headers_from(headers)
    target = Target(url, timeout_s)
    with closing(target):
        try:
            if body is not None:
                if inputs or target.is_grpc:
                    raise click.UsageError("--body goes over HTTP and without --input")
                what: Mapping[str, Array] | Body = Body(*read_body(body, content_type))
                status, text = ask_with_body(target.url, model, model_version, body, content_type, sent, timeout_s)
                if status >= 400:
                    raise OSError(f"[{status}] {text}")
            else:
                takes, _ = target.metadata(model, model_version, sent)
                if not takes:
                    raise click.UsageError(f"model '{model}' takes no tensors: give it a --body")
                what = random_tensors(takes, rows) | tensors_from(inputs, takes)
                target.infer(model, model_version, what, headers=sent)  # what fails for one fails for all
        except click.UsageError:
            raise
        except Exception as error:
            click.echo(f"{url} {model}: {failure(error)}", err=True)
            sys.exit(1)
    with Progress(warmup + seconds, hidden=as_json or not sys.stderr.isatty()) as tick:
        outcome = asyncio.run(run_load(target, model, model_version, what, sent, connections, warmup, seconds, rate, tick))
    if as_json:
        click.echo(orjson.dumps(_document(outcome)))
    else:
        _print(outcome, connections)
    if plot is not None:
        try:
            _draw(outcome, plot, f"{model}, {connections} connections" + (f", {rate:g}/s asked" if rate else ""))
        except OSError as error:
            click.echo(f"cannot write {plot}: {error.strerror}", err=True)
            sys.exit(1)
        if not as_json:
            click.echo(f"drew {plot}")
    sys.exit(0 if outcome.latencies_s and not outcome.errors else 1)


class Progress:
    """A progress bar of a known number of seconds, on the error stream."""

    def __init__(self, seconds: float, *, hidden: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress as Bar, TextColumn, TimeRemainingColumn

        columns = (BarColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
        self._bar = Bar(*columns, console=Console(stderr=True), disable=hidden, transient=True)
        self._task = self._bar.add_task("", total=seconds)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def __call__(self, elapsed_s: float, text: str) -> None:
        self._bar.update(self._task, completed=elapsed_s, description=text)


def _percentiles(outcome: Outcome) -> dict[str, float]:
    """Return percentiles of the latency in milliseconds, by name."""
    import numpy as np

    if not outcome.latencies_s:
        return {}
    values = np.percentile(np.array(outcome.latencies_s) * 1e3, _PERCENTILES)
    return {f"p{name:g}": float(value) for name, value in zip(_PERCENTILES, values, strict=True)}


def _document(outcome: Outcome) -> dict[str, object]:
    return {
        "requests": len(outcome.latencies_s),
        "seconds": outcome.seconds,
        "rate": len(outcome.latencies_s) / outcome.seconds,
        "latency_ms": _percentiles(outcome) | {"max": max(outcome.latencies_s, default=0) * 1e3},
        "errors": dict(outcome.errors),
        "client_cpu": outcome.client_cpu,
    }


def _print(outcome: Outcome, connections: int) -> None:
    count = len(outcome.latencies_s)
    click.echo(
        f"{count / outcome.seconds:,.0f} requests a second: {count:,} in {outcome.seconds:.1f} s, {connections} connections"
    )
    found = _percentiles(outcome)
    if found:
        found["max"] = max(outcome.latencies_s) * 1e3
        click.echo("latency, ms   " + "".join(f"{name:>9}" for name in found))
        click.echo("              " + "".join(f"{value:9.2f}" for value in found.values()))
    for text, times in outcome.errors.most_common(5):
        click.echo(f"failed {times:,}: {text}")
    if outcome.client_cpu > 0.9:
        click.echo(
            f"this program used {outcome.client_cpu:.0%} of a core: the server may answer more than it could ask", err=True
        )


def _see_to_plot(file: Path) -> None:
    """Refuse a plot that could not be drawn."""
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError as error:
        raise click.UsageError(f"{error}: --plot needs pip install 'servinggraph[tools]'") from error
    if file.suffix[1:].lower() not in FigureCanvasBase.get_supported_filetypes():
        raise click.UsageError(f"--plot {file}: expected a name that ends with .png, .svg or .pdf")
    if not file.parent.is_dir():
        raise click.UsageError(f"--plot {file}: there is no folder '{file.parent}'")


def _draw(outcome: Outcome, file: Path, title: str) -> None:
    """Draw latencies over time, and their distribution by percentile."""
    import numpy as np
    from matplotlib.figure import Figure

    latencies = np.array(outcome.latencies_s) * 1e3
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    figure.suptitle(title)
    left.plot(outcome.moments_s, latencies, ".", markersize=2, alpha=0.4)
    left.set(xlabel="seconds", ylabel="latency, ms", ylim=(0, None))
    shares = 1 - (np.arange(len(latencies)) + 0.5) / max(len(latencies), 1)
    right.plot(1 / shares, np.sort(latencies))
    right.set(xscale="log", xlabel="percentile", ylim=(0, None))
    right.set_xticks([2, 10, 100, 1000], ["50", "90", "99", "99.9"])
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(file, dpi=150)
