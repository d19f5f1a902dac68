"""What stands for a router in the Python builder: its kind, options and branches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from servinggraph.interfaces import NodeSketch

__all__ = ["Ensemble"]


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
