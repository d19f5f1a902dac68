"""`servinggraph build`: an image of a graph."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import click

from servinggraph.cli.image.engines import ENGINES

__all__ = ["build"]


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("-t", "--tag", metavar="NAME", help="Name of the image, such as fraud:3.")
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Override a key of the graph file while it is checked, here and in the image; the file goes in as it is.",
)
@click.option(
    "--include", multiple=True, metavar="GLOB", help="Further files, from the graph's folder; may be given more than once."
)
@click.option(
    "--requirements",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Requirements file of the graph's code. By default requirements.txt beside the graph, or else the versions that are "
    "installed here of what the code imports.",
)
@click.option("--base", metavar="IMAGE", help="Image of servinggraph to build on.  [default: servinggraph:VERSION]")
@click.option("--engine", type=click.Choice(ENGINES), help="What builds it; by default the first that is there.")
@click.option(
    "--context-only",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="FOLDER",
    help="Write the build context and stop.",
)
@click.argument("more", nargs=-1, type=click.UNPROCESSED)
def build(
    path: Path,
    tag: str | None,
    overrides: tuple[str, ...],
    include: tuple[str, ...],
    requirements: Path | None,
    base: str | None,
    engine: str | None,
    context_only: Path | None,
    more: tuple[str, ...],
) -> None:
    """Build an image of a graph file, a folder of graphs, or a bare .onnx model.

    The image holds the graph, its code, the models that its steps name, and pinned versions of the packages that its code
    imports. The graph is checked here before and in the image after. What stands behind `--` goes to the engine.
    """
    from servinggraph.cli.image.collect import CannotCollect, collect
    from servinggraph.cli.image.context import default_base, write_context
    from servinggraph.cli.image.engines import NoEngine, build_command, find_engine
    from servinggraph.errors import GraphInvalid
    from servinggraph.server import read_graphs

    if (tag is None) == (context_only is None):
        raise click.UsageError("name the image with -t NAME, or a folder with --context-only FOLDER")
    if context_only is not None and more:
        raise click.UsageError(f"{' '.join(more)!r} is for an engine, and with --context-only there is none")
    try:
        collected = collect(path, read_graphs(path, overrides), overrides, include, requirements)
        for warning in collected.warnings:
            click.echo(f"warning: {warning}", err=True)
        if context_only is not None:
            write_context(collected, context_only, base or default_base(), overrides)
            click.echo(f"wrote {context_only}: {len(collected.files)} files, {len(collected.requirements)} requirements")
            return
        assert tag is not None
        found = find_engine(engine)
        with tempfile.TemporaryDirectory(prefix="servinggraph-build-") as folder:
            write_context(collected, Path(folder), base or default_base(), overrides)
            click.echo(f"building {tag} with {found}: {len(collected.files)} files, {len(collected.requirements)} requirements")
            done = subprocess.run(build_command(found, Path(folder), tag, more), check=False)  # noqa: S603  (what the person at the terminal asked for)
        if done.returncode and base is None:
            click.echo(
                f"not built. Is the base missing? deploy/docker/Dockerfile of the repository makes {default_base()}, "
                "and --base names another",
                err=True,
            )
        sys.exit(done.returncode)
    except (GraphInvalid, CannotCollect, NoEngine, OSError) as error:
        click.echo(str(error), err=True)
        sys.exit(1)
