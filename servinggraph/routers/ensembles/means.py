"""Rules of ensembles that compute with what members gave, element by element: means, median, maximum."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from servinggraph.errors import StepFailed
from servinggraph.tensors import Array

__all__ = ["is_floating", "maximum", "mean", "median", "trimmed_mean"]


def is_floating(dtype: np.dtype[Any]) -> bool:
    """Tell whether a dtype is one of fractions, bfloat16 included."""
    return dtype.kind == "f" or dtype.name == "bfloat16"


def mean(arrays: Sequence[Array], shares: Sequence[float], column: str) -> Array:
    """Return the mean of each element, weighted by `shares`; of equal shares the plain mean."""
    dtype = arrays[0].dtype
    if not is_floating(dtype):
        raise StepFailed(f"output '{column}' is {dtype}, and a mean of labels is no label; vote over it")
    return np.asarray(weighted(arrays, shares, _wide(dtype))).astype(dtype, copy=False)


def weighted(arrays: Sequence[Array], shares: Sequence[float], wide: np.dtype[Any]) -> Any:
    """Return the weighted mean of each element, computed in the dtype `wide`."""
    # A member of weight 0 is left out: its NaN would make the sum one.
    terms = [(array, share) for array, share in zip(arrays, shares, strict=True) if share]
    even = all(share == terms[0][1] for _, share in terms)
    total: Any = None
    for array, share in terms:
        term = array.astype(wide, copy=False)
        if not even:
            term = term * wide.type(share)
        total = term if total is None else total + term
    return total / wide.type(len(terms)) if even and len(terms) > 1 else total


def median(arrays: Sequence[Array], shares: Sequence[float], column: str) -> Array:
    """Return the middle value of each element; of an even number of members the mean of the two in the middle."""
    return _narrowed(np.median(_stacked(arrays, column), axis=0), arrays[0])


def trimmed_mean(arrays: Sequence[Array], shares: Sequence[float], column: str, *, trim: float = 0.0) -> Array:
    """Return the mean of each element without the share `trim` of its smallest and of its largest values, rounded down.

    Not-a-number where a member gave that, as a median is: left out as though it were the largest
    value it would take a good one from the other end along.
    """
    ordered = np.sort(_stacked(arrays, column), axis=0)  # not-a-number is at its end
    cut = int(trim * len(arrays) + 1e-9)  # 0.2 of 5 is one, whatever floats say
    means = ordered[cut : len(arrays) - cut].mean(axis=0)
    return _narrowed(np.where(np.isnan(ordered[-1]), ordered[-1], means), arrays[0])


def maximum(arrays: Sequence[Array], shares: Sequence[float], column: str) -> Array:
    """Return the largest value of each element; not-a-number, where a member gave that."""
    return _narrowed(_stacked(arrays, column).max(axis=0), arrays[0])


def _wide(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Numbers of 16 bits are computed in 32: their sum may overflow where their mean does not."""
    return np.dtype(np.float32) if dtype.itemsize == 2 else dtype


def _stacked(arrays: Sequence[Array], column: str) -> Array:
    dtype = arrays[0].dtype
    if not is_floating(dtype):
        raise StepFailed(f"output '{column}' is {dtype}, and labels have no order that means anything; vote over it")
    return np.stack(arrays).astype(_wide(dtype), copy=False)


def _narrowed(result: Array, like: Array) -> Array:
    return np.asarray(result).astype(like.dtype, copy=False)
