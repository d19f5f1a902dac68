"""Kinds of routers, one file each. `routers.Ensemble(...)` and the like describe a node for the Python builder."""

from servinggraph.routers.builders import (
    Ab,
    Bandit,
    Canary,
    Chain,
    Champion,
    Choice,
    Cycle,
    Ensemble,
    Fallback,
    Filter,
    Map,
    Model,
)

__all__ = ["Ab", "Bandit", "Canary", "Chain", "Champion", "Choice", "Cycle", "Ensemble", "Fallback", "Filter", "Map", "Model"]
