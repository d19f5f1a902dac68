"""What stands in for a member that gave nothing: tensors that the graph declares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np

from servinggraph.errors import Problem, StepFailed, nearest
from servinggraph.routers.ensembles.outputs import Members, require_tensors
from servinggraph.tensors import DATATYPES, Array, Signature, TensorSpec, row_count

__all__ = ["Defaults", "defaults_of"]

Given = Mapping[str, Mapping[str, Any]]
"""Member to tensor to value: a number, a text, or nested lists of them."""

_KINDS: Final = {"b": ("b",), "i": ("i", "u"), "u": ("i", "u"), "f": ("f", "i", "u"), "O": ("U", "S")}
"""Kind of a tensor's dtype to kinds of values that it can be made of without losing anything."""


class Defaults:
    """Tensors that stand in for members.

    Args:
        values: member to tensor to its value.
        specs: member to what is known of its tensors, where members need not be alike; None where they are, so
            that a default takes shape and datatype of what another member gave.
    """

    def __init__(self, values: Mapping[str, Mapping[str, Array]], specs: Mapping[str, Mapping[str, TensorSpec]] | None) -> None:
        self._values = values
        self._specs = specs

    def filled(self, members: Members, names: Sequence[str], value: Any) -> dict[str, Mapping[str, Array]]:
        """Return what all members give, defaults for those that gave nothing.

        Args:
            members: what those that answered gave; one at least.
            names: all members, in order.
            value: the request's value, whose rows a default has.

        Raises:
            StepFailed: a default does not fit.
        """
        require_tensors(members)
        like = next(iter(members.values()))
        return {name: members[name] if name in members else self._default(name, like, value) for name in names}

    def _default(self, member: str, like: Mapping[str, Array], value: Any) -> dict[str, Array]:
        made: dict[str, Array] = {}
        for tensor, default in self._values[member].items():
            if self._specs is None:
                if tensor not in like:
                    raise StepFailed(f"'defaults' gives '{tensor}' for '{member}', but members give {sorted(like)}")
                shape, dtype = like[tensor].shape, like[tensor].dtype
            else:
                spec = self._specs[member][tensor]
                shape, dtype = _with_rows(spec.shape or (), value), DATATYPES[spec.datatype or ""]
            try:
                made[tensor] = np.broadcast_to(_typed(default, dtype), shape)
            except ValueError as error:
                raise StepFailed(f"the default of '{member}' for '{tensor}' does not fit {list(shape)}: {error}") from None
        return made


def _with_rows(shape: tuple[int, ...], value: Any) -> tuple[int, ...]:
    if not shape or shape[0] != -1:
        return shape
    return (row_count(value), *shape[1:])


def defaults_of(
    given: Given,
    members: Mapping[str, Signature],
    combined: Mapping[str, TensorSpec] | None,
    problems: list[Problem],
    *,
    same: bool,
) -> Defaults:
    """Return what a graph declares for members that give nothing; reports what cannot stand in for them.

    Args:
        given: member to tensor to value.
        members: what each is known to take and give.
        combined: outputs that are combined, as far as known.
        problems: joined by what is found.
        same: True where members give the same outputs, by which a default is shaped.
    """
    values: dict[str, dict[str, Array]] = {}
    specs: dict[str, Mapping[str, TensorSpec]] = {}

    def report(text: str) -> None:
        problems.append(Problem(text, node="defaults"))

    for member, tensors in given.items():
        if member not in members:
            report(f"'defaults' names '{member}', which is no member{nearest(member, list(members))}")
            continue
        known = combined if same else members[member].outputs
        if known is None and not same:
            report(f"'defaults' for '{member}' needs its outputs, which are not known: declare them there, with 'outputs'")
            continue
        if missing := [name for name in known or () if name not in tensors]:
            report(f"'defaults' for '{member}' has none for {', '.join(missing)}")
        values[member], specs[member] = {}, known or {}
        for tensor, value in tensors.items():
            spec = TensorSpec() if known is None else known.get(tensor)
            if spec is None:
                report(f"'defaults' for '{member}' names '{tensor}'{nearest(tensor, list(known or ()))}")
                continue
            if not same and (spec.datatype is None or spec.shape is None or -1 in spec.shape[1:]):
                report(f"'defaults' for '{member}': datatype and shape of '{tensor}' have to be known, all but the first axis")
                continue
            try:
                values[member][tensor] = _checked(value, spec)
            except ValueError as error:
                report(f"the default of '{member}' for '{tensor}' does not fit: {error}")
    return Defaults(values, None if same else specs)


def _checked(value: Any, spec: TensorSpec) -> Array:
    """Return a value as an array, held against what is known of the tensor.

    Raises:
        ValueError: it does not fit.
    """
    array = np.asarray(value)
    if array.dtype.kind not in "biufUS":
        raise ValueError("expected a number, a truth value, a text, or lists of them, all of one length")
    if spec.datatype is not None:
        array = _typed(array, DATATYPES[spec.datatype])
    if spec.shape is not None:
        fits = len(array.shape) <= len(spec.shape) and all(
            size == 1 or expected in (size, -1) for size, expected in zip(array.shape[::-1], spec.shape[::-1], strict=False)
        )
        if not fits:
            raise ValueError(f"its shape is {list(array.shape)}, expected {list(spec.shape)}")
    return array


def _typed(array: Array, dtype: np.dtype[Any]) -> Array:
    """Return an array in another dtype.

    Raises:
        ValueError: a value would be another one.
    """
    if array.dtype == dtype:
        return array
    kind = "f" if dtype.name == "bfloat16" else dtype.kind
    if array.dtype.kind not in _KINDS.get(kind, (kind,)):
        raise ValueError(f"its values are {array.dtype}, expected {dtype}")
    if kind in "iu" and array.size:
        limits = np.iinfo(dtype)
        if int(array.min()) < limits.min or int(array.max()) > limits.max:
            raise ValueError(f"its values go beyond {dtype}")
    if kind == "O":
        encoded = np.empty(array.shape, object)
        encoded[...] = np.vectorize(lambda text: text.encode() if isinstance(text, str) else text, otypes=[object])(array)
        return encoded
    with np.errstate(over="ignore"):
        typed = array.astype(dtype)
    if kind == "f" and not np.array_equal(np.isinf(array.astype(float)), np.isinf(typed)):
        raise ValueError(f"its values go beyond {dtype}")
    return typed
