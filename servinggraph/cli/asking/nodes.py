"""The table of `servinggraph top`."""

from __future__ import annotations

from rich.console import Group
from rich.table import Table
from rich.text import Text

from servinggraph.cli.asking.scrape import Look, quantile

__all__ = ["table"]

_COLUMNS = ("node", "req/s", "failed", "p50 ms", "p99 ms", "queue", "rows", "fill", "wait")
"""Rates a second; queue in milliseconds and rows of a batch, both means; requests that wait."""


def table(before: Look, now: Look, url: str, graph: str = "") -> Group:
    """Return what is shown of the time between two looks.

    Args:
        before: the earlier look.
        now: the later one.
        url: the server's address, for the first line.
        graph: the only graph to show; empty for all.
    """
    seconds = max(now.at - before.at, 1e-9)
    in_flight, limit = now.total("servinggraph_in_flight_requests"), now.total("servinggraph_in_flight_limit")
    state = "ready" if now.total("servinggraph_ready") else "not ready"
    parts: list[Text | Table] = [Text(f"{url}   {state}   in flight {in_flight:.0f} of {limit:.0f}", style="bold")]
    for name in now.label("servinggraph_graph_ready", "graph"):
        if graph and name != graph:
            continue
        for version in now.label("servinggraph_graph_ready", "version", graph=name):
            parts.append(_graph(before, now, seconds, name, version))
            parts += _routers(now, name, version)
    return Group(*parts)


def _graph(before: Look, now: Look, seconds: float, graph: str, version: str) -> Table:
    labels = {"graph": graph, "version": version}
    found = Table(title=f"{graph} version {version}", title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0))
    for column in _COLUMNS:
        found.add_column(column, justify="left" if column == "node" else "right", no_wrap=column != "node")
    flying = now.total("servinggraph_graph_in_flight_requests", **labels)
    found.add_row(
        f"requests, {flying:.0f} now",
        *_rates(before, now, seconds, "servinggraph_requests_total", **labels),
        *_latencies(before, now, "servinggraph_request_seconds", **labels),
        style="bold",
    )
    for node in now.label("servinggraph_node_requests_total", "node", **labels):
        found.add_row(node, *_node(before, now, seconds, labels | {"node": node}))
    return found


def _node(before: Look, now: Look, seconds: float, labels: dict[str, str]) -> list[str]:
    cells = _rates(before, now, seconds, "servinggraph_node_requests_total", **labels)
    cells += _latencies(before, now, "servinggraph_node_stage_seconds", stage="compute", **labels)
    if not now.select("servinggraph_batch_rows_count", **labels):
        return cells
    queue = _mean(before, now, "servinggraph_node_stage_seconds", stage="queue", **labels)
    rows = _mean(before, now, "servinggraph_batch_rows", **labels)
    fill = _mean(before, now, "servinggraph_batch_fill_ratio", **labels)
    cells += ["" if queue is None else f"{queue * 1e3:.2f}", "" if rows is None else f"{rows:.1f}"]
    return [*cells, "" if fill is None else f"{fill:.0%}", f"{now.total('servinggraph_queue_depth', **labels):.0f}"]


def _routers(now: Look, graph: str, version: str) -> list[Text]:
    lines = []
    for router in now.label("servinggraph_router_share", "router", graph=graph, version=version):
        labels = {"graph": graph, "version": version, "router": router}
        shares = {dict(found)["branch"]: value for found, value in now.select("servinggraph_router_share", **labels).items()}
        stages = [dict(found)["stage"] for found, value in now.select("servinggraph_router_stage", **labels).items() if value]
        text = f"router {router}: " + ", ".join(f"{branch} {share:.0%}" for branch, share in shares.items())
        lines.append(Text(text + (f" ({stages[0]})" if stages else ""), style="dim"))
    return lines


def _rates(before: Look, now: Look, seconds: float, name: str, **labels: str) -> list[str]:
    def rate(**more: str) -> float:
        return max(now.total(name, **labels, **more) - before.total(name, **labels, **more), 0.0) / seconds

    everything, fine = rate(), rate(code="ok")
    failed = everything - fine
    return [f"{everything:,.1f}", f"[red]{failed:,.1f}[/red]" if failed > 1e-9 else "0"]


def _latencies(before: Look, now: Look, name: str, **labels: str) -> list[str]:
    found = [quantile(before, now, name, share, **labels) for share in (0.5, 0.99)]
    return ["" if value is None else f"≤ {value * 1e3:g}" if value != float("inf") else "more" for value in found]


def _mean(before: Look, now: Look, name: str, **labels: str) -> float | None:
    count = now.total(f"{name}_count", **labels) - before.total(f"{name}_count", **labels)
    if count <= 0:
        return None
    return (now.total(f"{name}_sum", **labels) - before.total(f"{name}_sum", **labels)) / count
