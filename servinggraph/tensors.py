"""Datatypes and shapes of tensors: the V2 names, their numpy dtypes, and what fits what.

Knows no requests, nodes or wire formats. Source of the datatype names: Open Inference
Protocol, "Tensor Data Types"; BF16 as in Triton.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Final

import ml_dtypes
import numpy as np
import numpy.typing as npt

__all__ = [
    "DATATYPES",
    "Array",
    "Labels",
    "Shape",
    "Signature",
    "TensorSpec",
    "datatype_of",
    "fits_shape",
    "row_count",
]

Array = npt.NDArray[Any]
Shape = tuple[int, ...]

DATATYPES: Final[Mapping[str, np.dtype[Any]]] = {
    "BOOL": np.dtype(np.bool_),
    "UINT8": np.dtype(np.uint8),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "INT8": np.dtype(np.int8),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP16": np.dtype("<f2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "BYTES": np.dtype(np.object_),
}
"""V2 datatype name to numpy dtype. BYTES tensors hold `bytes` (or `str`) objects."""

_NAMES: Final[dict[np.dtype[Any], str]] = {dtype: name for name, dtype in DATATYPES.items()}


def datatype_of(array: Array) -> str | None:
    """Return the V2 datatype of an array, or None when V2 has none for its dtype.

    numpy's own text (`<U5`, `S5`, `StringDType`) counts as BYTES.
    """
    name = _NAMES.get(array.dtype)
    if name is None and array.dtype.kind in "UST":
        return "BYTES"
    return name


@dataclass(frozen=True, slots=True)
class Labels:
    """Names of classes.

    Attributes:
        file: path of the file they came from, as the graph has it.
        names: name of each class by its index.
    """

    file: str
    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What is known of a tensor before any request arrives.

    Attributes:
        datatype: V2 datatype name; None when unknown.
        shape: size of each axis, -1 for any; None when unknown.
        optional: True for an input that a request may leave out.
        labels: what the elements of an output stand for, for classification; None without.
    """

    datatype: str | None = None
    shape: Shape | None = None
    optional: bool = False
    labels: Labels | None = None

    def conflict_with(self, other: TensorSpec) -> str | None:
        """Say why a tensor described by `self` can never be one described by `other`.

        Returns:
            The reason, or None when nothing known contradicts it.
        """
        if self.datatype and other.datatype and self.datatype != other.datatype:
            return f"datatype is {self.datatype}, expected {other.datatype}"
        if self.shape is None or other.shape is None:
            return None
        sizes_meet = len(self.shape) == len(other.shape) and all(
            a == b or a == -1 or b == -1 for a, b in zip(self.shape, other.shape, strict=True)
        )
        return None if sizes_meet else f"shape is {list(self.shape)}, expected {list(other.shape)}"


@dataclass(frozen=True, slots=True)
class Signature:
    """Tensors that a node takes and gives; None where that is not known.

    A node whose `inputs` are None takes the whole value of the edge, whatever it is.
    """

    inputs: Mapping[str, TensorSpec] | None = None
    outputs: Mapping[str, TensorSpec] | None = None


def fits_shape(shape: Sequence[int], declared: Shape) -> bool:
    """Tell whether a concrete shape fits a declared one, in which -1 is any size."""
    if shape == declared or (len(shape) == len(declared) and shape[1:] == declared[1:] and declared[0] == -1):
        return True  # nearly always: only the first axis, the batch, is free
    if len(shape) != len(declared):
        return False
    for size, expected in zip(shape, declared, strict=True):  # noqa: SIM110  (all() costs twice as much here)
        if size != expected and expected != -1:
            return False
    return True


def row_count(tensors: Mapping[str, Array]) -> int:
    """Return the common size of the first axis.

    Raises:
        ValueError: there are no tensors, one is a scalar, or the sizes differ; names the tensor.
    """
    rows = -1
    first = ""
    for name, array in tensors.items():
        if array.ndim == 0:
            raise ValueError(f"tensor '{name}' is a scalar and has no rows to batch")
        if rows == -1:
            rows, first = array.shape[0], name
        elif array.shape[0] != rows:
            raise ValueError(
                f"tensor '{name}' has {array.shape[0]} rows but '{first}' has {rows}: "
                "all tensors of a batched node share their first axis"
            )
    if rows == -1:
        raise ValueError("there is no tensor to count rows of")
    return rows


def element_count(shape: Sequence[int]) -> int:
    """Return the number of elements of a shape; 1 for a scalar."""
    return prod(shape)
