"""Outputs that members have in common: what is known of them before the first request, and what they give."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from servinggraph.errors import Problem, StepFailed
from servinggraph.tensors import Array, Signature, TensorSpec, datatype_of

__all__ = ["Members", "alike", "columns", "common_outputs", "require_tensors"]

Members = Mapping[str, Mapping[str, Array]]
"""What each member gave: tensors by name."""


def common_outputs(
    members: Mapping[str, Signature], tensors: Sequence[str] | None, problems: list[Problem]
) -> Mapping[str, TensorSpec] | None:
    """Return the outputs that are combined; reports members that do not fit each other.

    Args:
        members: what each is known to give.
        tensors: outputs to combine; None for all, which then must be the same.
        problems: joined by what is found.

    Returns:
        Name to what is known of it; None where no member's outputs are known.
    """
    known = {name: signature.outputs for name, signature in members.items() if signature.outputs is not None}
    if not known:
        return None
    first_name, first = next(iter(known.items()))
    names = tensors or list(first)
    for member, outputs in known.items():
        gives = ", ".join(sorted(outputs))
        if tensors is None and set(outputs) != set(first):
            text = (
                f"member '{first_name}' gives {', '.join(sorted(first))}, but '{member}' gives {gives}: "
                "rename them, or list those to combine in 'tensors'"
            )
            problems.append(Problem(text, node="branches"))
            return None
        missing = [name for name in names if name not in outputs]
        if missing:
            text = f"'tensors' names {', '.join(missing)}, but member '{member}' gives {gives}"
            problems.append(Problem(text, node="tensors"))
            return None
    specs: dict[str, TensorSpec] = {}
    for name in names:
        specs[name] = first[name]
        for member, outputs in known.items():
            reason = outputs[name].conflict_with(specs[name])
            if reason:
                text = f"members do not fit: output '{name}' of '{member}' against '{first_name}': its {reason}"
                problems.append(Problem(text, node="branches"))
                break
            specs[name] = _closer(specs[name], outputs[name])
    return specs


def _closer(one: TensorSpec, other: TensorSpec) -> TensorSpec:
    """Return what is known of a tensor that fits both."""
    shape = one.shape or other.shape
    if one.shape is not None and other.shape is not None:
        shape = tuple(b if a == -1 else a for a, b in zip(one.shape, other.shape, strict=True))
    labels = one.labels if one.labels == other.labels else None
    return TensorSpec(one.datatype or other.datatype, shape, labels=labels)


def require_tensors(members: Mapping[str, Any]) -> None:
    """Check that every member gave tensors by name.

    Raises:
        StepFailed: one gave something else.
    """
    for name, tensors in members.items():
        if not isinstance(tensors, Mapping):
            raise StepFailed(f"member '{name}' gave a {type(tensors).__name__}, expected a mapping of tensor name to array")


def columns(members: Members, tensors: Sequence[str] | None) -> Sequence[str]:
    """Return the names of the outputs to combine.

    Raises:
        StepFailed: a member did not give them, or members gave different ones.
    """
    require_tensors(members)
    if tensors is not None:
        for name, given in members.items():
            missing = [column for column in tensors if column not in given]
            if missing:
                raise StepFailed(f"member '{name}' gave {sorted(given)}, but no {', '.join(missing)}")
        return tensors
    first_name, first = next(iter(members.items()))
    for name, given in members.items():
        if given.keys() != first.keys():
            raise StepFailed(f"member '{first_name}' gave {sorted(first)}, but '{name}' gave {sorted(given)}")
    return list(first)


def alike(members: Members, column: str) -> list[Array]:
    """Return one output of all members, in order.

    Raises:
        StepFailed: they differ in shape or datatype.
    """
    arrays = [tensors[column] for tensors in members.values()]
    if not all(isinstance(array, np.ndarray | np.generic) for array in arrays):
        kinds = ", ".join(f"{name} gave a {type(tensors[column]).__name__}" for name, tensors in members.items())
        raise StepFailed(f"members' outputs '{column}' must be arrays: {kinds}")
    if any(array.shape != arrays[0].shape for array in arrays):
        shapes = ", ".join(f"{name} {list(tensors[column].shape)}" for name, tensors in members.items())
        raise StepFailed(f"members' outputs '{column}' differ in shape: {shapes}")
    if any(array.dtype != arrays[0].dtype for array in arrays):
        if all(datatype_of(array) == "BYTES" for array in arrays):  # in several widths, perhaps
            return arrays
        dtypes = ", ".join(f"{name} {tensors[column].dtype}" for name, tensors in members.items())
        raise StepFailed(f"members' outputs '{column}' differ in datatype: {dtypes}")
    return arrays
