"""Join the rows of several requests into one value, and split the result again."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np

from servinggraph.tensors import Array

__all__ = ["Unjoinable", "group_key", "join", "join_results", "pad", "rows_of_result", "slice_rows", "why_bad_errors"]


class Unjoinable(Exception):
    """The results of one request's pieces do not fit each other."""


def group_key(tensors: Mapping[str, Array]) -> Hashable:
    """Return what must be equal for two requests to share a batch: names, dtypes and row shapes."""
    if len(tensors) == 1:
        ((name, array),) = tensors.items()
        return name, array.dtype, array.shape[1:]
    # Sorted: the order in which a request lists its tensors does not matter.
    return tuple((name, tensors[name].dtype, tensors[name].shape[1:]) for name in sorted(tensors))


def join(values: Sequence[Mapping[str, Array]]) -> dict[str, Array]:
    """Concatenate the tensors of several values along the first axis; their names are equal."""
    # The datatype is said, because concatenation alone would change the byte order to the machine's.
    return {name: np.concatenate([value[name] for value in values], dtype=array.dtype) for name, array in values[0].items()}


def join_results(results: Sequence[Mapping[str, Array]]) -> dict[str, Array]:
    """Concatenate what a step gave for the pieces of one request.

    Raises:
        Unjoinable: they differ in names, datatypes or shapes, which concatenation would hide.
    """
    first = results[0]
    for result in results[1:]:
        if result.keys() != first.keys():
            raise Unjoinable(f"one gave outputs {sorted(first)}, another {sorted(result)}")
        for name, array in result.items():
            if array.dtype != first[name].dtype:
                raise Unjoinable(f"output '{name}' is {first[name].dtype} in one and {array.dtype} in another")
            if array.shape[1:] != first[name].shape[1:]:
                raise Unjoinable(
                    f"output '{name}' has shape {list(first[name].shape)} in one and {list(array.shape)} in another"
                )
    return join(results)


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


def why_bad_errors(errors: Any, rows: int) -> str | None:
    """Say why what `RowErrors` holds is not a mapping from rows of the batch; None when it is."""
    if not isinstance(errors, Mapping):
        return f"RowErrors takes a mapping of row to what was wrong with it, got a {type(errors).__name__}"
    for row in errors:
        if not isinstance(row, int | np.integer) or not 0 <= row < rows:
            return f"RowErrors names row {row!r}, but the batch has rows 0 to {rows - 1}"
    return None
