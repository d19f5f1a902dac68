"""`servinggraph kafka replay`."""

from __future__ import annotations

import re
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

from servinggraph.cli.kafka import connection_of, connection_options, graph_options, kafka, run
from servinggraph.errors import ErrorCode

if TYPE_CHECKING:
    from servinggraph.clients.dead_letters import Summary

__all__ = ["replay"]

_CODES = click.Choice([code.value for code in ErrorCode])
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def _moment(context: click.Context, option: click.Parameter, value: str | None) -> int | None:
    """Return milliseconds since 1970 of a date and time, or of a duration before now."""
    if value is None:
        return None
    ago = re.fullmatch(r"(\d+)([smhd])", value)
    if ago:
        return int((time.time() - int(ago[1]) * _UNITS[ago[2]]) * 1e3)
    try:
        moment = datetime.fromisoformat(value)
    except ValueError:
        expected = "a date and time, as 2026-01-31T12:00 (UTC if it says no zone), or 90m, 2h, 1d ago"
        raise click.BadParameter(f"expected {expected}; got {value!r}") from None
    return int((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() * 1e3)


@kafka.command()
@click.argument("topic", required=False)
@click.option(
    "--error", "errors", multiple=True, type=click.Choice([code.value for code in ErrorCode]), help="Only this error code."
)
@click.option("--node", "nodes", multiple=True, metavar="PATTERN", help="Only letters of which this node failed; * is allowed.")
@click.option("--from-topic", "topics", multiple=True, help="Only letters that came from this topic.")
@click.option("--since", callback=_moment, help="Only letters given up since then: a date and time, or 90m, 2h, 1d ago.")
@click.option("--until", callback=_moment, help="Only letters given up before then.")
@click.option("--most-replays", type=click.IntRange(min=1), help="None that was sent back this often and died again.")
@click.option("--limit", type=click.IntRange(min=1), help="At most so many.")
@click.option("--to", help="Send them to this topic, not to those that they came from.")
@click.option("--group", help="Consumer group that keeps what was sent; by default servinggraph-replay-TOPIC.")
@click.option("--again", is_flag=True, help="Send also what was sent before.")
@click.option("--dry-run", is_flag=True, help="Say what would be sent; send and note nothing.")
@connection_options
def replay(
    topic: str | None,
    errors: tuple[str, ...],
    nodes: tuple[str, ...],
    topics: tuple[str, ...],
    since: int | None,
    until: int | None,
    most_replays: int | None,
    limit: int | None,
    to: str | None,
    group: str | None,
    again: bool,
    dry_run: bool,
    brokers: str | None,
    graph: Path | None,
) -> None:
    """Send the dead letters on TOPIC back to where they came from, each once.

    TOPIC is by default the one that the graph file names under `errors`. What was sent is noted, so that a second run, also
    with other filters, sends none of them again.
    """
    connection = connection_of(brokers, graph)
    topic = topic or (None if graph is None else graph_options(graph).errors.topic)
    if topic is None:
        raise click.UsageError("which topic? Name it, or give --graph with a file that has 'kafka: {errors: {topic: ...}}'")
    of_dead_letters = topic

    async def main() -> None:
        from servinggraph.clients.dead_letters import Selection, replay as send_back

        selection = Selection(frozenset(errors), nodes, frozenset(topics), since, until, most_replays, limit)
        summary = await send_back(connection, of_dead_letters, selection, to=to, group=group, again=again, dry_run=dry_run)
        click.echo("\n".join(_report(of_dead_letters, summary, dry_run=dry_run)))

    run(main())


def _report(topic: str, summary: Summary, *, dry_run: bool) -> list[str]:
    lines = [f"{topic}: {summary.read} dead letters"]
    for (error, node, target), count in sorted(summary.sent.items()):
        at = f" at {node}" if node else ""
        lines.append(f"  {count:>7}  {'would go' if dry_run else 'sent'} to {target}: {error}{at}")
    lines += [f"  {count:>7}  cannot be sent: {reason}" for reason, count in sorted(summary.impossible.items())]
    if summary.before:
        lines.append(f"  {summary.before:>7}  sent before")
    if summary.left:
        lines.append(f"  {summary.left:>7}  left, not selected")
    return lines
