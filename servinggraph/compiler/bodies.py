"""What the first nodes of a graph with `inputs: body` ask of the body."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from servinggraph.plan import INPUTS, PlanNode
from servinggraph.tensors import TensorSpec

__all__ = ["body_keys"]


def body_keys(nodes: Iterable[PlanNode]) -> Mapping[str, TensorSpec] | None:
    """Return what nodes look up by name in the body; None when each takes it whole.

    A request that lacks one of them is the caller's mistake and no failure of the node, so it
    is to be refused before a node runs.
    """
    keys: dict[str, TensorSpec] | None = None
    for node in nodes:
        if INPUTS not in node.sources:
            continue
        asked = _asked(node)
        if asked is None and len(node.sources) == 1:
            continue
        # What is joined with another node's result has to be a mapping, too.
        keys = _joined(keys or {}, asked or {})
    return keys


def _asked(node: PlanNode) -> dict[str, TensorSpec] | None:
    """Return what a node looks up by name, names as outside the node."""
    asked: dict[str, TensorSpec] | None = None
    if node.signature.inputs is not None:
        asked = dict(node.signature.inputs)
    if node.graph is not None and node.graph.body_keys is not None:
        asked = dict(node.graph.body_keys)
    for branch in node.branches.values():
        inside = _asked(branch)
        if inside is not None:
            asked = _joined(asked or {}, inside)
    outside = {new: old for old, new in node.renamed_inputs.items()}
    if asked is not None:
        asked = {outside.get(name, name): spec for name, spec in asked.items()}
    kept = node.keep if isinstance(node.keep, tuple) else ()
    for name in (*node.renamed_inputs, *kept):
        asked = _joined({name: TensorSpec()}, asked or {})
    return {} if asked is None and node.keep is not None else asked


def _joined(one: Mapping[str, TensorSpec], other: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
    """Return both; what one of them requires is required, and the more exact description counts."""
    joined = dict(one)
    for name, spec in other.items():
        known = joined.get(name, spec)
        joined[name] = TensorSpec(known.datatype or spec.datatype, known.shape or spec.shape, known.optional and spec.optional)
    return joined
