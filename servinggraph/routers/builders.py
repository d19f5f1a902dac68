"""What stands for a router in the Python builder: its kind, options and branches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from servinggraph.interfaces import NodeSketch

__all__ = ["Ab", "Bandit", "Canary", "Chain", "Champion", "Choice", "Cycle", "Ensemble", "Fallback", "Filter", "Map", "Model"]


def Ab(  # noqa: N802  (reads as the kind that it makes)
    branches: Mapping[str, NodeSketch | Callable[..., Any]], weights: Mapping[str, float], **options: Any
) -> NodeSketch:
    """Return an A/B router for the builder.

    Args:
        branches: name to step, router or plain function.
        weights: name to weight.
        options: keys of the `ab` router and of any node: `key`, `state`, ...
    """
    return NodeSketch("router", "ab", {"weights": dict(weights), **options}, dict(branches))


def Bandit(  # noqa: N802
    branches: Mapping[str, NodeSketch | Callable[..., Any]], policy: str, **options: Any
) -> NodeSketch:
    """Return a bandit router for the builder.

    Args:
        branches: name to step, router or plain function.
        policy: "epsilon_greedy", "ucb1", "thompson" or "linucb".
        options: keys of the `bandit` router and of any node: `epsilon`, `features`, `scorer`, `state`, ...
    """
    return NodeSketch("router", "bandit", {"policy": policy, **options}, dict(branches))


def Canary(  # noqa: N802
    branches: Mapping[str, NodeSketch | Callable[..., Any]],
    baseline: str,
    challenger: str,
    steps: Sequence[str | float | Mapping[str, Any]],
    **options: Any,
) -> NodeSketch:
    """Return a canary router for the builder.

    Args:
        branches: name to step, router or plain function: two.
        baseline: the branch that is replaced if all goes well.
        challenger: the branch under trial.
        steps: the challenger's share in each step, rising: "1%", or `{"share": "1%", "hold": "1h"}`.
        options: keys of the `canary` router and of any node: `hold`, `guardrails`, `key`, `state`, ...
    """
    given = {"baseline": baseline, "challenger": challenger, "steps": list(steps)}
    return NodeSketch("router", "canary", {**given, **options}, dict(branches))


def Chain(branches: Mapping[str, NodeSketch | Callable[..., Any]], **options: Any) -> NodeSketch:  # noqa: N802
    """Return nodes that run one after the other, as one node, for the builder.

    Args:
        branches: name to step, router or plain function, in order.
        options: keys of any node: `timeout_ms`, `batch`, ...
    """
    return NodeSketch("router", "chain", options, dict(branches))


def Ensemble(  # noqa: N802  (reads as the kind that it makes)
    branches: Mapping[str, NodeSketch | Callable[..., Any]],
    combine: str | Callable[..., Any] = "mean",
    **options: Any,
) -> NodeSketch:
    """Return an ensemble router for the builder.

    Args:
        branches: name to step, router or plain function; with `stacker` the last one gets what the others gave.
        combine: "mean", "vote", "stacking", ... or a function; see the `ensemble` router.
        options: keys of the `ensemble` router and of any node: `weights`, `quorum`, `on_failure`, ...
    """
    return NodeSketch("router", "ensemble", {"combine": combine, **options}, dict(branches))


Branches = Mapping[str, NodeSketch | Callable[..., Any]]


def Champion(branches: Branches, champion: str, **options: Any) -> NodeSketch:  # noqa: N802
    """Return a champion router for the builder.

    Args:
        branches: name to step, router or plain function; all but one are challengers.
        champion: the branch that answers.
        options: keys of the `champion` router and of any node: `rate`, `compare`, `shadow`, `state`, ...
    """
    return NodeSketch("router", "champion", {"champion": champion, **options}, dict(branches))


def Choice(branches: Branches, when: Mapping[str, str], **options: Any) -> NodeSketch:  # noqa: N802
    """Return a choice router for the builder.

    Args:
        branches: name to step, router or plain function.
        when: branch to condition, in order.
        options: keys of the `choice` router and of any node: `default` or `otherwise`, ...
    """
    return NodeSketch("router", "choice", {"when": dict(when), **options}, dict(branches))


def Filter(  # noqa: N802
    branch: NodeSketch | Callable[..., Any], when: str, otherwise: Mapping[str, str], **options: Any
) -> NodeSketch:
    """Return a filter router for the builder.

    Args:
        branch: what is behind the filter.
        when: condition that lets a request through.
        otherwise: the error that others get: `error` (a code) and `message`.
        options: keys of any node.
    """
    return NodeSketch("router", "filter", {"when": when, "otherwise": dict(otherwise), **options}, {"then": branch})


def Fallback(branches: Branches, **options: Any) -> NodeSketch:  # noqa: N802
    """Return a fallback router for the builder.

    Args:
        branches: name to step, router or plain function, in the order in which they are tried.
        options: keys of the `fallback` router and of any node: `on`, ...
    """
    return NodeSketch("router", "fallback", options, dict(branches))


def Cycle(  # noqa: N802
    branch: NodeSketch | Callable[..., Any], repeat_while: str, max_iterations: int, **options: Any
) -> NodeSketch:
    """Return a cycle router for the builder.

    Args:
        branch: what is repeated.
        repeat_while: condition on what it gave.
        max_iterations: most turns of a request.
        options: keys of the `cycle` router and of any node: `at_limit`, ...
    """
    given = {"repeat_while": repeat_while, "max_iterations": max_iterations}
    return NodeSketch("router", "cycle", {**given, **options}, {"turn": branch})


def Map(branch: NodeSketch | Callable[..., Any], **options: Any) -> NodeSketch:  # noqa: N802
    """Return a map router for the builder.

    Args:
        branch: what runs for each item.
        options: keys of the `map` router and of any node: `concurrency`, `tolerate`, ...
    """
    return NodeSketch("router", "map", options, {"each": branch})


def Model(branches: Branches, by: str = "path", **options: Any) -> NodeSketch:  # noqa: N802
    """Return a model router for the builder.

    Args:
        branches: name to step, router or plain function.
        by: where a request names the branch: "path", "version", "header:x-model", ...
        options: keys of the `model` router and of any node: `aliases`, `default`, ...
    """
    return NodeSketch("router", "model", {"by": by, **options}, dict(branches))
