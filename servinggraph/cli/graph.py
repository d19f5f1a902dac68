"""`servinggraph check`, `plot` and `schema`."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from servinggraph.errors import GraphInvalid

__all__ = ["check", "plot", "schema"]

_PATH = click.argument("path", type=click.Path(path_type=Path))
_SET = click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key of the graph file.")


@click.command()
@_PATH
@_SET
def check(path: Path, overrides: tuple[str, ...]) -> None:
    """Say everything that start-up would refuse, without starting."""
    from servinggraph.server import read_graphs

    try:
        plans = read_graphs(path, overrides)
    except GraphInvalid as error:
        click.echo(str(error), err=True)
        sys.exit(1)
    for plan in plans:
        click.echo(f"{plan.name} version {plan.version}: {len(plan.every_node())} nodes, fine")


@click.command()
@_PATH
@_SET
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="File to write: .svg, .png, .dot or .mmd (Mermaid). By default Mermaid goes to the terminal.",
)
def plot(path: Path, overrides: tuple[str, ...], output: Path | None) -> None:
    """Draw a graph."""
    from servinggraph.plotting import PlotProblem, draw, mermaid
    from servinggraph.server import read_graphs

    try:
        plans = read_graphs(path, overrides)
        if len(plans) != 1:
            raise click.UsageError(f"{path} holds {len(plans)} graphs: name one of their files")
        if output is None:
            click.echo(mermaid(plans[0]))
        else:
            draw(plans[0], output)
    except GraphInvalid as error:
        click.echo(str(error), err=True)
        sys.exit(1)
    except PlotProblem as error:
        click.echo(str(error), err=True)
        sys.exit(1)
    except OSError as error:
        click.echo(f"cannot write {output}: {error.strerror}", err=True)
        sys.exit(1)


@click.command()
def schema() -> None:
    """Print the JSON Schema of graph files."""
    import orjson

    from servinggraph.compiler import json_schema

    click.echo(orjson.dumps(json_schema(), option=orjson.OPT_INDENT_2))
