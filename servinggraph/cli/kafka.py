"""`servinggraph kafka`: records to and from topics."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Coroutine
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from servinggraph.errors import GraphInvalid, ServingGraphError

if TYPE_CHECKING:
    from servinggraph.kafka import ConnectionOptions

__all__ = ["kafka"]


@click.group()
def kafka() -> None:
    """Write to topics and read from them, with nothing else installed."""


def connection_options(command: Any) -> Any:
    """Add the options that say which brokers."""
    command = click.option(
        "--brokers", envvar="SERVINGGRAPH_KAFKA_BROKERS", default=None, help="host:port, with commas between several."
    )(command)
    path = click.Path(path_type=Path, exists=True)
    return click.option("--graph", type=path, default=None, help="Graph file whose `kafka:` says which brokers.")(command)


@kafka.command()
@click.argument("topic")
@click.argument("bodies", nargs=-1, required=True, metavar="BODY...")
@click.option("--key", default=None, help="Key of the records.")
@click.option("--header", "headers", multiple=True, metavar="NAME=VALUE", help="A header; may be given more than once.")
@click.option("--content-type", default="application/json", show_default=True, help="The header `content-type`.")
@connection_options
def send(
    topic: str,
    bodies: tuple[str, ...],
    key: str | None,
    headers: tuple[str, ...],
    content_type: str,
    brokers: str | None,
    graph: Path | None,
) -> None:
    """Write records to TOPIC: each BODY is text, or @FILE for what is in a file, or - for standard input."""
    given = {"content-type": content_type}
    for header in headers:
        name, sign, value = header.partition("=")
        if not sign:
            raise click.UsageError(f"--header {header}: expected NAME=VALUE")
        given[name] = value
    contents = [_contents(body) for body in bodies]
    connection = connection_of(brokers, graph)

    async def main() -> None:
        from servinggraph.clients.console import send_records

        encoded = {name: value.encode() for name, value in given.items()}
        await send_records(connection, topic, contents, None if key is None else key.encode(), encoded)

    run(main())
    click.echo(f"{len(contents)} written to {topic}", err=True)


@kafka.command()
@click.argument("topic")
@click.option("--from-start", is_flag=True, help="Begin with the first record that is there, not with the next.")
@click.option("--count", type=click.IntRange(min=1), default=None, help="End after so many records.")
@connection_options
def read(topic: str, from_start: bool, count: int | None, brokers: str | None, graph: Path | None) -> None:
    """Print the records of TOPIC as they come, each as a line of JSON. Changes nothing: it belongs to no consumer group."""
    connection = connection_of(brokers, graph)

    async def main() -> None:
        from servinggraph.clients.console import read_records

        left = count
        async with aclosing(read_records(connection, topic, from_start=from_start)) as lines:  # type: ignore[type-var]
            async for line in lines:
                click.echo(line)
                sys.stdout.flush()
                left = None if left is None else left - 1
                if left == 0:
                    return

    run(main())


def _contents(body: str) -> bytes:
    if body == "-":
        return sys.stdin.buffer.read()
    if not body.startswith("@"):
        return body.encode()
    try:
        return Path(body[1:]).read_bytes()
    except OSError as error:
        raise click.UsageError(f"{body}: {error.strerror}") from None


def connection_of(brokers: str | None, graph: Path | None) -> ConnectionOptions:
    """Return how the brokers are reached: those named, with the security of the graph file where there is one."""
    from servinggraph.kafka import ConnectionOptions, SecurityOptions

    options = None if graph is None else graph_options(graph)
    if brokers is None and options is None:
        raise click.UsageError("which brokers? Give --brokers host:port, or --graph with a graph file that has 'kafka:'")
    security = SecurityOptions() if options is None else options.security
    try:
        return ConnectionOptions(brokers=brokers or (options.brokers if options else ""), security=security)
    except ValueError as error:
        raise click.UsageError(f"--brokers {brokers}: {error}") from None


def graph_options(graph: Path) -> Any:
    """Return the `kafka:` block of a graph file."""
    from servinggraph.server import read_graphs

    try:
        found = [plan.kafka for plan in read_graphs(graph, ()) if plan.kafka is not None]
    except GraphInvalid as error:
        click.echo(str(error), err=True)
        sys.exit(1)
    if not found:
        raise click.UsageError(f"{graph} has no 'kafka:'")
    return found[0]


def run(main: Coroutine[Any, Any, None]) -> None:
    """Run to the end; errors as one line, Ctrl-C as an end."""
    try:
        asyncio.run(main)
    except ServingGraphError as error:
        click.echo(str(error), err=True)
        sys.exit(1)
    except ModuleNotFoundError as error:
        click.echo(f"{error}: pip install 'servinggraph[kafka]'", err=True)
        sys.exit(1)
    except KeyboardInterrupt:
        pass
