"""Checks that a node that keeps state for sequences is run once for each request, and knows for which."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from servinggraph.errors import Problem
from servinggraph.interfaces import Router, Step
from servinggraph.plan import PlanNode
from servinggraph.spec import GraphSpec, Source
from servinggraph.spec.source import KeyPath

__all__ = ["keeper", "sequence_problems"]


def sequence_problems(
    spec: GraphSpec,
    order: Sequence[str],
    sources: Mapping[str, tuple[str, ...]],
    nodes: Mapping[str, PlanNode],
    source: Source,
) -> list[Problem]:
    """Return what is wrong with where nodes that keep state stand.

    Such a node takes the state of one request, or, batched itself, of one row each; in a batch
    that somebody else made it could not tell which. Behind a generator it would run for each
    item, and each time from where the request began.

    Args:
        spec: the graph.
        order: all nodes, each after its sources.
        sources: each node's predecessors.
        nodes: the nodes that are right so far.
        source: the definition, for lines.
    """
    if spec.sequences is None:
        return []
    problems: list[Problem] = []
    if spec.inputs == "body":
        text = "'sequences' are named by a request's parameters, which one with a free-form body has not: declare tensors"
        problems.append(source.problem(text, ("sequences",)))
    for name, node in nodes.items():
        if spec.batch is not None and (found := keeper(node)):
            text = f"'batch' for whole requests cannot go around node '{found}', which keeps state: batch that node itself"
            problems.append(source.problem(text, ("batch",)))
        waiting: list[tuple[KeyPath, PlanNode]] = [(("nodes", name), node)]
        while waiting:
            place, outer = waiting.pop()
            inside = [(found, short) for short, branch in outer.branches.items() if (found := keeper(branch))]
            if outer.graph is not None and outer.batch not in (None, False) and (found := keeper(outer)):
                text = f"'batch' of a graph cannot go around '{found}', which keeps state: batch that node itself"
                problems.append(source.problem(text, (*place, "batch"), outer.name))
            if inside and isinstance(outer.work, Router) and outer.work.detached:
                text = (
                    f"runs branches for requests that are answered already, and '{inside[0][0]}' keeps state for a sequence, "
                    "which has gone on by then: keep the state in front of this router"
                )
                problems.append(source.problem(text, (*place, "branches", inside[0][1]), outer.name))
            if inside and isinstance(outer.work, Router) and outer.work.repeats:
                text = (
                    f"runs its branch several times for a request, and '{inside[0][0]}' keeps state for a sequence: each time "
                    "it would begin where the request before ended; keep the state in front of this router, or behind it"
                )
                problems.append(source.problem(text, (*place, "branches", inside[0][1]), outer.name))
            if inside and outer.batch not in (None, False):
                text = f"'batch' of a router cannot go around '{inside[0][0]}', which keeps state: batch that branch itself"
                problems.append(source.problem(text, (*place, "batch"), outer.name))
            waiting.extend(((*place, "branches", short), branch) for short, branch in outer.branches.items())
    generator: dict[str, str] = {}
    for name in order:
        before = next((generator[giver] for giver in sources[name] if giver in generator), None)
        step = nodes.get(name)
        if before is not None and step is not None and (found := keeper(step)):
            text = f"'{found}' keeps state and comes after '{before}', a generator: keep the state in front of it, or in it"
            problems.append(source.problem(text, ("nodes", name), name))
        if before is not None or (step is not None and step.streams):
            generator[name] = before or name
    return problems


def keeper(node: PlanNode) -> str | None:
    """Return the name of a node, of this one and those in it, that keeps state."""
    if isinstance(node.work, Step) and node.work.keeps_state:
        return node.name
    return next((found for inner in node.inside if (found := keeper(inner))), None)
