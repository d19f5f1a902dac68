"""Join the rows of several requests into one value, and split the result again."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np

from servinggraph.tensors import Array

__all__ = ["group_key", "join", "pad", "rows_of_result", "slice_rows"]


def group_key(tensors: Mapping[str, Array]) -> Hashable:
    """Return what must be equal for two requests to share a batch: names, dtypes and row shapes."""
    if len(tensors) == 1:
        ((name, array),) = tensors.items()
        return name, array.dtype, array.shape[1:]
    # Sorted: the order in which a request lists its tensors does not matter.
    return tuple((name, tensors[name].dtype, tensors[name].shape[1:]) for name in sorted(tensors))


def join(values: Sequence[Mapping[str, Array]]) -> dict[str, Array]:
    """Concatenate the tensors of several values along the first axis; their names are equal."""
    return {name: np.concatenate([value[name] for value in values]) for name in values[0]}


def slice_rows(tensors: Mapping[str, Array], start: int, stop: int) -> dict[str, Array]:
    """Return rows `start` to `stop` of each tensor, as views."""
    return {name: array[start:stop] for name, array in tensors.items()}


def pad(tensors: Mapping[str, Array], rows: int, size: int) -> dict[str, Array]:
    """Lengthen each tensor from `rows` to `size` rows with copies of its last row.

    Copies of a real row, not zeros: they are sure to be valid input.
    """
    return {name: np.concatenate([array, np.repeat(array[-1:], size - rows, axis=0)]) for name, array in tensors.items()}


def rows_of_result(result: Any, rows: int) -> str | None:
    """Say why a batch's result cannot be split into `rows` rows; None when it can."""
    if type(result) is not dict and not isinstance(result, Mapping):
        return f"a batched step must return a mapping of tensor name to array, got {type(result).__name__}"
    for name, array in result.items():
        shape = getattr(array, "shape", None)
        if shape is None:
            return f"output '{name}' is a {type(array).__name__}, expected a numpy array"
        if not shape or shape[0] != rows:
            return (
                f"output '{name}' has shape {list(shape)}, but the batch has {rows} rows: "
                "the first axis of every output must be the batch"
            )
    return None
