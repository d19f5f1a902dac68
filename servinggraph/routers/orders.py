"""Rules of ensembles that order what members gave, element by element: median, trimmed mean, maximum."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from servinggraph.errors import StepFailed
from servinggraph.tensors import Array

__all__ = ["maximum", "median", "trimmed_mean"]


def median(arrays: Sequence[Array], column: str) -> Array:
    """Return the middle value of each element; of an even number of members the mean of the two in the middle."""
    return _narrowed(np.median(_stacked(arrays, column), axis=0), arrays[0])


def trimmed_mean(arrays: Sequence[Array], column: str, trim: float) -> Array:
    """Return the mean of each element without the share `trim` of its smallest and of its largest values, rounded down."""
    ordered = np.sort(_stacked(arrays, column), axis=0)
    cut = int(trim * len(arrays) + 1e-9)  # 0.2 of 5 is one, whatever floats say
    return _narrowed(ordered[cut : len(arrays) - cut].mean(axis=0), arrays[0])


def maximum(arrays: Sequence[Array], column: str) -> Array:
    """Return the largest value of each element; not-a-number, where a member gave that."""
    return _narrowed(_stacked(arrays, column).max(axis=0), arrays[0])


def _stacked(arrays: Sequence[Array], column: str) -> Array:
    dtype = arrays[0].dtype
    if dtype.kind != "f" and dtype.name != "bfloat16":
        raise StepFailed(f"output '{column}' is {dtype}, and labels have no order that means anything; vote over it")
    # Numbers of 16 bits are computed in 32: their sum may overflow where their mean does not.
    return np.stack(arrays).astype(np.float32 if dtype.itemsize == 2 else dtype, copy=False)


def _narrowed(result: Array, like: Array) -> Array:
    return np.asarray(result).astype(like.dtype, copy=False)
