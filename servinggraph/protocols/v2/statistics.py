"""Statistics as Triton's extension has them: a graph's, then those of its nodes as `graph.node`.

Source: Triton, extension_statistics.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from servinggraph.errors import InvalidRequest
from servinggraph.lifecycle import ServedGraph

__all__ = ["model_statistics"]


def model_statistics(graphs: Sequence[ServedGraph], name: str = "", version: str = "") -> dict[str, Any]:
    """Return the statistics of all that is ready, or of one graph or node.

    Args:
        graphs: everything that is served.
        name: a graph, whose nodes come after it, or a node as `graph.node`; empty for all.
        version: its version; empty for each that is ready.

    Returns:
        What is sent as JSON; the same keys as the protobuf message.

    Raises:
        InvalidRequest: there is no such graph, node or version.
    """
    entries: list[dict[str, Any]] = []
    known = False
    for graph in graphs:
        found = _entries(graph, name) if graph.ready else []
        known = known or bool(found)
        if not version or version == graph.plan.version or version in graph.plan.versions:
            entries += found
    if name and not entries:
        what = "model version is" if known else f"model '{name}' is"
        raise InvalidRequest(f"requested {what} not available")
    return {"model_stats": entries}


def _entries(graph: ServedGraph, name: str) -> list[dict[str, Any]]:
    plan, statistics = graph.plan, graph.executor.statistics
    reports = {f"{plan.name}.{node}": counters.report for node, counters in statistics.nodes.items()}
    if name in ("", plan.name):
        reports = {plan.name: statistics.report, **reports}
    else:
        reports = {name: reports[name]} if name in reports else {}
    return [{"name": entry, "version": plan.version, **report()} for entry, report in reports.items()]
