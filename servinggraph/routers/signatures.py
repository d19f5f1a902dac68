"""What a router takes and gives when any one of its branches may answer."""

from __future__ import annotations

from collections.abc import Mapping

from servinggraph.errors import Problem
from servinggraph.tensors import Signature, TensorSpec

__all__ = ["common_signature", "union_of_inputs"]


def common_signature(branches: Mapping[str, Signature], problems: list[Problem]) -> Signature:
    """Return the signature of a router of which one branch answers; reports branches that give different tensors.

    A tensor whose size differs between branches has -1 there. Branches of which nothing is
    known make the outputs unknown.
    """
    outputs: dict[str, TensorSpec] | None = None
    first = ""
    for name, signature in branches.items():
        if signature.outputs is None:
            return Signature(union_of_inputs(branches), None)
        if outputs is None:
            outputs, first = dict(signature.outputs), name
            continue
        if set(signature.outputs) != set(outputs):
            gives = ", ".join(sorted(signature.outputs))
            text = (
                f"branch '{first}' gives {', '.join(sorted(outputs))}, but '{name}' gives {gives}: "
                "whoever answers, the answer has the same tensors; 'rename' or a chain makes them alike"
            )
            problems.append(Problem(text, node="branches"))
            continue
        for tensor, spec in signature.outputs.items():
            reason = spec.conflict_with(outputs[tensor])
            if reason:
                text = f"branches do not fit: output '{tensor}' of '{name}' against '{first}': its {reason}"
                problems.append(Problem(text, node="branches"))
            else:
                outputs[tensor] = _looser(outputs[tensor], spec)
    return Signature(union_of_inputs(branches), outputs)


def union_of_inputs(branches: Mapping[str, Signature]) -> Mapping[str, TensorSpec] | None:
    """Return the inputs that any branch takes; None where one takes whatever comes."""
    union: dict[str, TensorSpec] = {}
    for signature in branches.values():
        if signature.inputs is None:
            return None
        union.update(signature.inputs)
    return union


def _looser(one: TensorSpec, other: TensorSpec) -> TensorSpec:
    datatype = one.datatype if one.datatype == other.datatype else None
    if one.shape is None or other.shape is None:
        return TensorSpec(datatype, None)
    return TensorSpec(datatype, tuple(a if a == b else -1 for a, b in zip(one.shape, other.shape, strict=True)))
