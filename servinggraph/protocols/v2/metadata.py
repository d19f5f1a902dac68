"""What a server and a graph say of themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from servinggraph.lifecycle import Serving
from servinggraph.plan import Plan
from servinggraph.tensors import TensorSpec

__all__ = ["EXTENSIONS", "PLATFORM", "model_metadata", "server_metadata"]

EXTENSIONS: Final = (
    "classification",
    "sequence",
    "sequence(string_id)",
    "model_repository",
    "model_repository(unload_dependents)",
    "schedule_policy",
    "model_configuration",
    "binary_tensor_data",
    "parameters",
    "generate",
    "statistics",
    "trace",
    "logging",
)
"""Protocol extensions that always work here; names as Triton's. What only some servers offer joins them below."""

PLATFORM: Final = "servinggraph_graph"


def server_metadata(serving: Serving) -> dict[str, Any]:
    """Return the server's metadata, the same for all front ends."""
    options = serving.options
    extensions = [*EXTENSIONS, *serving.memory.extensions]
    return {"name": options.server_name, "version": options.server_version, "extensions": extensions}


def model_metadata(plan: Plan, versions: Sequence[str]) -> dict[str, Any]:
    """Return a graph's metadata; outputs that are not known before a request are left out.

    A graph that takes a free-form body has no inputs, and a parameter that says so.
    """
    document: dict[str, Any] = {
        "name": plan.name,
        "versions": list(versions),
        "platform": PLATFORM,
        "inputs": _tensors(plan.inputs),
        "outputs": _tensors(plan.outputs or {}),
    }
    if plan.body:
        document["parameters"] = {"inputs": "body"}
    return document


def _tensors(specs: Mapping[str, TensorSpec]) -> list[dict[str, Any]]:
    return [
        {"name": name, "datatype": spec.datatype, "shape": list(spec.shape)}
        for name, spec in specs.items()
        if spec.datatype is not None and spec.shape is not None
    ]
