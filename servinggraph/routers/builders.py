"""What stands for a router in the Python builder: its kind, options and branches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from servinggraph.interfaces import NodeSketch

__all__ = ["Ab", "Chain", "Ensemble"]


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
        branches: name to step, router or plain function.
        combine: "mean", "weighted_mean", "vote", or a function; see the `ensemble` router.
        options: keys of the `ensemble` router and of any node: `weights`, `quorum`, ...
    """
    return NodeSketch("router", "ensemble", {"combine": combine, **options}, dict(branches))
