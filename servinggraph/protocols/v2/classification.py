"""An output as its largest elements and what they stand for. Source: Triton, extension_classification.

Where Triton fails on BYTES outputs, puts not-a-number first, or takes 0 for a mistake, this
refuses, puts it last, and takes 0 for off.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Final

import numpy as np

from servinggraph.errors import InvalidRequest
from servinggraph.protocols.v2.json_data import shown
from servinggraph.tensors import Array, TensorSpec, datatype_of

__all__ = ["MOST_ELEMENTS", "classes", "classifier"]

MOST_ELEMENTS: Final = 1_000_000
"""Elements of a tensor that is classified."""

_TYPES: Final = frozenset({"INT8", "INT16", "INT32", "INT64", "UINT8", "UINT16", "UINT32", "UINT64", "FP32", "FP64"})


def classifier(
    name: str, parameters: Mapping[str, Any], known: Mapping[str, TensorSpec] | None
) -> Callable[[Array, bool], Array] | None:
    """Return what makes classes of an output, as its parameter `classification` asks for.

    Args:
        name: the output.
        parameters: its parameters.
        known: the graph's outputs, with their labels; None when they are not known.

    Returns:
        A callable that takes the output and whether its first axis is the batch; None without
        the parameter, or for 0.

    Raises:
        InvalidRequest: it is no whole number from 0 on, the output's type has no classes, or the
            output is asked for in shared memory.
    """
    count = parameters.get("classification")
    if count is None:
        return None
    if type(count) is not int or count < 0:
        raise InvalidRequest(f"'classification' of output '{name}' is a whole number from 0 on, got {shown(count)}")
    if count == 0:
        return None
    if "shared_memory_region" in parameters:
        raise InvalidRequest(f"output '{name}' can't use shared memory if classification is requested")
    spec = None if known is None else known.get(name)
    if spec is not None and spec.datatype is not None:
        _check_type(name, spec.datatype)
    labels = spec.labels.names if spec is not None and spec.labels is not None else ()
    return partial(_classified, name, count, labels)


def _classified(name: str, count: int, labels: Sequence[str], array: Array, batched: bool) -> Array:
    return classes(name, array, count, labels, batched=batched)


def classes(name: str, array: Array, count: int, labels: Sequence[str], *, batched: bool) -> Array:
    """Return the largest elements of a tensor, as texts `value:index` or `value:index:label`.

    Args:
        name: the tensor, for error texts.
        array: the tensor; all its axes, or all behind the batch, count as one of classes.
        count: how many elements at most.
        labels: names of classes by index; a class without one, or with an empty one, has none.
        batched: True when the first axis is the batch.

    Returns:
        BYTES tensor of shape [classes] or [rows, classes], largest first, of equals the lower
        index first, not-a-number last. Numbers with a point have six decimals.

    Raises:
        InvalidRequest: the datatype has no classes, or there are too many elements.
    """
    _check_type(name, datatype_of(array) or str(array.dtype))
    if array.size > MOST_ELEMENTS:
        raise InvalidRequest(
            f"classification output tensor too large: '{name}' has {array.size} elements, at most {MOST_ELEMENTS} are sorted"
        )
    rows = array.reshape(array.shape[0], -1) if batched and array.ndim and array.size else array.reshape(1, -1)
    if batched and not array.size:
        return np.empty((array.shape[0] if array.ndim else 1, 0), object)
    text = "%f" if array.dtype.kind == "f" else "%d"
    made = [[_text(text % row[index], index, labels) for index in _largest(row, count)] for row in rows]
    result = np.array(made, dtype=object).reshape(len(rows), -1)
    return result if batched else result[0]


def _check_type(name: str, datatype: str) -> None:
    if datatype not in _TYPES:
        raise InvalidRequest(f"class result not available for output due to unsupported type '{datatype}' (output '{name}')")


def _text(value: str, index: int, labels: Sequence[str]) -> bytes:
    label = labels[index] if index < len(labels) else ""
    return f"{value}:{index}:{label}".encode() if label else f"{value}:{index}".encode()


def _largest(row: Array, count: int) -> list[int]:
    """Return the indices of the largest elements in order."""
    valid = np.flatnonzero(~np.isnan(row)) if row.dtype.kind == "f" else np.arange(len(row))
    numbers = row[valid]
    if count < len(numbers):
        # Sorting all of a million elements for five of them would hold everybody else up.
        numbers_at = np.flatnonzero(numbers >= np.partition(numbers, len(numbers) - count)[len(numbers) - count])
        valid, numbers = valid[numbers_at], numbers[numbers_at]
    # Backwards twice: a stable sort in ascending order then has the lower index first among equals.
    order = len(numbers) - 1 - np.argsort(numbers[::-1], kind="stable")[::-1]
    chosen: list[int] = valid[order][:count].tolist()
    if len(chosen) < count and row.dtype.kind == "f":
        chosen += np.flatnonzero(np.isnan(row))[: count - len(chosen)].tolist()
    return chosen
