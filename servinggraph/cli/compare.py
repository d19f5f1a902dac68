"""`servinggraph compare`: what a champion router of a running server has found out about its challengers."""

from __future__ import annotations

import getpass
import sys
from collections.abc import Mapping
from http.client import HTTPException
from typing import Any, NoReturn
from urllib.error import HTTPError, URLError
from urllib.parse import quote
from urllib.request import Request

import click
import orjson

from servinggraph.cli.params import SECONDS, opener, server_address

__all__ = ["compare", "report_text"]

_QUANTILES = ("p50", "p90", "p99", "max")


@click.command()
@click.argument("url")
@click.argument("graph")
@click.argument("node")
@click.option("--version", "graph_version", default="", help="Version of the graph; by default the latest that is ready.")
@click.option("--json", "as_json", is_flag=True, help="Print the router's report as it is, for programs.")
@click.option("--examples", is_flag=True, help="Print the requests that were kept as examples of disagreements, too.")
@click.option("--promote", default="", metavar="BRANCH", help="Make a challenger the champion, after printing.")
@click.option("--who", default=None, help="With --promote, who does it, for the audit log; by default the user's name.")
@click.option("--why", default="", help="With --promote, the reason, for the audit log.")
@click.option("--token", envvar="SERVINGGRAPH_ADMIN_TOKEN", default="", help="The server's --admin-token.")
@click.option("--timeout", "timeout_s", type=SECONDS, default=10.0, show_default=True, help="Seconds to wait for an answer.")
def compare(
    url: str,
    graph: str,
    node: str,
    graph_version: str,
    as_json: bool,
    examples: bool,
    promote: str,
    who: str | None,
    why: str,
    token: str,
    timeout_s: float,
) -> None:
    """Say how the challengers of router NODE in GRAPH do beside the champion, on the server at URL.

    Shares stand with their 95 % confidence interval. Latencies are of the same requests for both.
    """
    server_address(url)
    if not token.isascii() or not token.isprintable():
        raise click.UsageError("the token has line breaks or characters beyond ASCII, which no header can hold")
    place = f"{url.rstrip('/')}/admin/graphs/{quote(graph, safe='')}/routers/{quote(node, safe='')}"
    if graph_version:
        place += f"?version={quote(graph_version, safe='')}"
    found = _asked(Request(place), token, timeout_s)  # noqa: S310  (http or https, as just seen)
    report = found.get("report", {})
    if "challengers" not in report:
        _fail(f"router '{node}' has no challengers: it is {found.get('is', 'of another kind')}")
    if as_json:
        if not examples:
            for one in report["challengers"].values():
                one.pop("examples", None)
        click.echo(orjson.dumps(found, option=orjson.OPT_INDENT_2))
    else:
        click.echo(report_text(graph, found, examples=examples))
    if promote:
        # Only if nobody has changed it since this report.
        change = {
            "settings": {"champion": promote},
            "who": who or _user(),
            "why": why,
            "revision": found["revision"],
        }
        headers = {"content-type": "application/json"}
        request = Request(place, orjson.dumps(change), headers, method="PATCH")  # noqa: S310  (as above)
        settings = _asked(request, token, timeout_s)["settings"]
        click.echo(f"champion is {settings['champion']} now", err=as_json)


def report_text(graph: str, found: Mapping[str, Any], *, examples: bool = False) -> str:
    """Return a router's report for people.

    Args:
        graph: the graph.
        found: what the admin route gives for the router.
        examples: whether disagreements are shown.
    """
    report = found["report"]
    champion = report["champion"]
    requests, failed = report["decisions"].get(champion, 0), report["failures"].get(champion, 0)
    lines = [f"{graph}, router {found['node']}: champion {champion}, {requests:,} requests, of which it failed {failed:,}"]
    for name, one in report["challengers"].items():
        lines += ["", *_challenger(champion, name, one)]
        if examples:
            lines += _examples(one["examples"])
    return "\n".join(lines)


def _challenger(champion: str, name: str, one: Mapping[str, Any]) -> list[str]:
    dropped, errors, agreement = sum(one["dropped"].values()), one["errors"], one["agreement"]
    lines = [
        f"{name} beside {champion}, {one['rate']:.4g} of the requests copied",
        f"  copies      {one['sampled']:,}: {one['answered']:,} answered, {errors['failed']:,} failed, {dropped:,} dropped",
        f"  agreement   {_share(agreement)}   {agreement['agreed']:,} of {agreement['of']:,}",
    ]
    rows = one["rows"]
    if rows["of"] not in (0, agreement["of"]):  # else one row a request, and nothing new
        lines.append(f"  rows        {_percent(rows['rate'])}   {rows['agreed']:,} of {rows['of']:,}")
    lines.append(f"  errors      {_share(errors)}   {errors['failed']:,} of {errors['of']:,}")
    for label, counts in (
        ("by code", one["errors_by_code"]),
        ("dropped", one["dropped"]),
        ("differ in", one["disagreements"]),
    ):
        if counts:
            lines.append(f"  {label:10}  " + ", ".join(f"{key} {count:,}" for key, count in _most_first(counts)))
    if one["last_error"]:
        lines.append(f"  last error  {one['last_error']}")
    if one["not_compared"]:
        lines.append(f"  {one['not_compared']:,} answers could not be compared: {one['last_comparison_error']}")
    latencies = one["latency_ms"]
    lines += _table("latency, ms", {champion: latencies["champion"], name: latencies["challenger"]})
    if one["differences"]:
        lines += _table("difference", one["differences"])
    return lines


def _table(title: str, rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    width = max(len(title), *(len(name) + 2 for name in rows))
    lines = ["  " + title.ljust(width) + "".join(name.rjust(10) for name in _QUANTILES)]
    for name, row in rows.items():
        cells = "".join(("-" if row[q] is None else f"{row[q]:.3g}").rjust(10) for q in _QUANTILES)
        note = f"   {row['infinite']:,} infinite" if row.get("infinite") else ""
        lines.append("    " + name.ljust(width - 2) + cells + note)
    return lines


def _examples(examples: list[Mapping[str, Any]]) -> list[str]:
    lines = [f"  {len(examples)} examples of disagreements" if examples else "  no example of a disagreement"]
    for example in examples:
        lines.append(f"    {example['time']}  {example['id'] or '(no id)'}  {example['reason']}")
        lines += [f"      {part:10}  {orjson.dumps(example[part]).decode()}" for part in ("inputs", "champion", "challenger")]
    return lines


def _share(share: Mapping[str, Any]) -> str:
    if share["rate"] is None:
        return "-"
    return f"{_percent(share['rate'])} ({_percent(share['low'])} to {_percent(share['high'])})"


def _percent(share: float) -> str:
    return f"{share * 100:.2f} %"


def _most_first(counts: Mapping[str, int]) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda item: -item[1])


def _asked(request: Request, token: str, timeout_s: float) -> dict[str, Any]:
    """Return a JSON answer of the admin routes; prints one sentence and ends where there is none."""
    if token:
        request.add_header("authorization", f"Bearer {token}")
    try:
        with opener().open(request, timeout=timeout_s) as response:
            text = response.read()
    except HTTPError as error:
        with error:
            text = error.read()
        _fail(_reason(text) or f"{request.host} answered {error.code} {error.reason}")
    except (URLError, HTTPException, OSError, ValueError) as error:
        _fail(f"cannot ask {request.host}: {getattr(error, 'reason', error)}")
    try:
        found = orjson.loads(text)
    except orjson.JSONDecodeError:
        found = None
    if not isinstance(found, dict):
        _fail(f"{request.host} does not answer as a servinggraph server does")
    return found


def _reason(text: bytes) -> str:
    try:
        found = orjson.loads(text)
    except orjson.JSONDecodeError:
        return ""
    return str(found.get("error", "")) if isinstance(found, dict) else ""


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):  # no such user, as in some containers
        return ""


def _fail(text: str) -> NoReturn:
    click.echo(text, err=True)
    sys.exit(1)
