"""Rules of ensembles that elect: a label by the members' labels, or a class by their probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from servinggraph.errors import StepFailed
from servinggraph.routers.ensembles.means import is_floating, weighted
from servinggraph.tensors import Array

__all__ = ["elected_class", "elected_label"]

_DECIMALS = 12
"""Votes are compared with so many: sums of equal shares must tie although floating addition differs in the last bit."""


def elected_label(
    arrays: Sequence[Array], shares: Sequence[float], column: str, *, ties: Literal["smallest", "first"] = "smallest"
) -> Array:
    """Elect each element's label: the one for which the most weight was given.

    Args:
        arrays: labels of each member, alike in shape: integers, booleans or text.
        shares: weight of each member.
        column: name of the output, for errors.
        ties: of labels with equal votes the smallest, or that of the member that comes first.
    """
    if is_floating(arrays[0].dtype):
        raise StepFailed(f"output '{column}' is {arrays[0].dtype}: vote over labels, or take the mean of scores")
    labels, codes = np.unique(np.stack(_comparable(arrays)), return_inverse=True)
    codes = codes.reshape(len(arrays), *arrays[0].shape)
    # Each member's label is held against every member's: the memory does not grow with the number of labels.
    sums = [sum(share * (other == own) for other, share in zip(codes, shares, strict=True)) for own in codes]
    votes = [np.round(given, _DECIMALS) for given in sums]
    most = np.max(votes, axis=0)
    winning = [np.where(vote == most, own, len(labels)) for vote, own in zip(votes, codes, strict=True)]
    if ties == "smallest":
        elected = np.min(winning, axis=0)
    else:
        elected = winning[-1]
        for own in reversed(winning[:-1]):
            elected = np.where(own < len(labels), own, elected)
    if all(array.dtype == arrays[0].dtype for array in arrays):
        labels = labels.astype(arrays[0].dtype, copy=False)
    elected_labels: Array = labels[elected.reshape(-1)].reshape(arrays[0].shape)
    return elected_labels


def elected_class(arrays: Sequence[Array], shares: Sequence[float], column: str) -> Array:
    """Elect a class, the index on the last axis whose mean probability is the highest; of several the lowest index.

    Args:
        arrays: probabilities of each member, alike in shape.
        shares: weight of each member.
        column: name of the output, for errors.

    Returns:
        Indices, INT64, without the last axis.
    """
    if not arrays[0].ndim or not arrays[0].shape[-1]:
        raise StepFailed(f"output '{column}' has shape {list(arrays[0].shape)}: its last axis should be the classes")
    # In 64 bits, and rounded: a tie is one whatever the order of the members.
    means = np.round(weighted(arrays, shares, np.dtype(np.float64)), _DECIMALS)
    if np.isnan(means).any():
        raise StepFailed(f"output '{column}' is not a number somewhere, which elects no class")
    return np.asarray(means.argmax(axis=-1), np.int64)


def _comparable(arrays: Sequence[Array]) -> Sequence[Array]:
    """Return text in one form when members give it in several: as `bytes` and as `str`, or of several widths."""
    kinds = {type(text) for array in arrays for text in array.flat} if arrays[0].dtype.kind in "OUS" else set()
    if len(kinds) < 2:
        return arrays
    as_bytes = [[text.encode() if isinstance(text, str) else text for text in array.flat] for array in arrays]
    return [np.array(texts, dtype=object).reshape(array.shape) for texts, array in zip(as_bytes, arrays, strict=True)]
