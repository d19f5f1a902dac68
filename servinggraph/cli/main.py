"""Entry point: subcommands, and errors as sentences instead of tracebacks."""

from __future__ import annotations

import click

from servinggraph.cli.bench import bench
from servinggraph.cli.build import build
from servinggraph.cli.compare import compare
from servinggraph.cli.graph import check, plot, schema
from servinggraph.cli.health import health
from servinggraph.cli.infer import infer
from servinggraph.cli.kafka import kafka
from servinggraph.cli.project import init
from servinggraph.cli.replay import replay  # noqa: F401  (a command of `kafka`)
from servinggraph.cli.serve import serve
from servinggraph.cli.top import top
from servinggraph.version import __version__

__all__ = ["main"]


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="servinggraph")
def main() -> None:
    """Serve graphs of models and Python steps over the V2 inference protocol."""


@main.command()
def version() -> None:
    """Print the version of servinggraph and of what it runs on."""
    import platform
    from importlib.metadata import PackageNotFoundError, version as version_of

    click.echo(f"servinggraph {__version__}")
    click.echo(f"python {platform.python_version()}")
    for package in ("onnxruntime", "onnxruntime-gpu", "numpy", "uvicorn", "uvloop"):
        try:
            click.echo(f"{package} {version_of(package)}")
        except PackageNotFoundError:
            continue


for command in (serve, build, health, infer, bench, top, check, plot, schema, init, compare, kafka):
    main.add_command(command)
