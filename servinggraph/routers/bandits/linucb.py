"""LinUCB: the arm whose reward may, with confidence, be the highest for a request with these features.

Source: Li, Chu, Langford and Schapire, A Contextual-Bandit Approach to Personalized News Article
Recommendation (2010), algorithm 1 (disjoint linear models), with a constant 1 behind the features.
The inverse is kept by the formula of Sherman and Morrison, and made anew from the sums now and
then, since rounding adds up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import sqrt
from typing import Any, ClassVar, Final

import numpy as np

from servinggraph.routers.bandits.arms import Arm, Number, Policy, highest
from servinggraph.tensors import Array

__all__ = ["MAX_FEATURES", "LinUcb", "features_of"]

MAX_FEATURES: Final = 128
"""Most features: an arm holds the square of them, and workers exchange as much."""

_LARGEST: Final = 1e6
"""Largest feature: beside its square, 1 still counts in a float."""

_RESOLUTION: Final = 1e-13
"""Smallest share of the largest sum of products that means anything; 1 beside the square of the largest feature does."""

_REFRESH: Final = 1000
"""Rewards after which the inverse is made anew."""


def features_of(given: Any, size: int | None) -> Array:
    """Return a request's features with a constant 1 behind them.

    Args:
        given: an array, or what a JSON body has; of one row.
        size: their number, the constant included; None for any.

    Raises:
        ValueError: it holds no such features; the text is the end of a sentence about it.
    """
    try:
        row = np.asarray(given)
    except ValueError:
        raise ValueError("is ragged") from None
    if row.dtype.kind not in "iufb" and row.dtype.name != "bfloat16":
        raise ValueError("holds no numbers")
    if row.ndim > 1 and row.shape[0] != 1:
        raise ValueError(f"has {row.shape[0]} rows, and one decision is for a whole request: send one row")
    if size is not None and row.size != size - 1:
        raise ValueError(f"has {row.size} values, those before it had {size - 1}")
    if not 1 <= row.size <= MAX_FEATURES:
        raise ValueError(f"has {row.size} values; features are 1 to {MAX_FEATURES}")
    features = np.empty(row.size + 1)
    features[:-1] = row.reshape(-1)
    features[-1] = 1.0
    if not (np.abs(features) <= _LARGEST).all():
        raise ValueError(f"has a value that is not finite, or beyond {_LARGEST:g}: scale it")
    return features


class _LinearArm(Arm):
    """An arm with a ridge regression from features to rewards.

    Attributes:
        inverse: (ridge * I + sum of x x')^-1; None until the first features say its size.
        theta: the coefficients.
    """

    def __init__(self, name: str, ridge: float) -> None:
        super().__init__(name)
        self._ridge = ridge
        self.clear()

    def clear(self) -> None:
        super().clear()
        self.inverse: Array | None = None
        self.theta: Array = np.zeros(0)
        self._squared: Array = np.zeros((0, 0))
        self._weighted: Array = np.zeros(0)
        self._since = 0

    def sized(self, size: int) -> None:
        """Make room for features of this size, the constant included, unless it has learned from others."""
        if self.inverse is None or (self.theta.size != size and not self.count):
            self._squared, self._weighted = np.zeros((size, size)), np.zeros(size)
            self._refresh()

    def observe(self, reward: float, features: Array | None) -> None:
        assert features is not None  # a contextual policy
        super().observe(reward, features)
        self.sized(features.size)
        assert self.inverse is not None
        self._squared += np.outer(features, features)
        self._weighted += reward * features
        self._since += 1
        if self._since >= _REFRESH:
            self._refresh()
            return
        moved = self.inverse @ features
        quadratic = features @ moved
        if quadratic < 0:  # which it cannot be: rounding has got the better of the inverse
            self._refresh()
            return
        self.inverse -= np.outer(moved, moved) / (1 + quadratic)
        self.theta = self.inverse @ self._weighted

    def sums(self) -> Array:
        return np.concatenate((super().sums(), self._weighted, self._squared[np.triu_indices(self._weighted.size)]))

    def take(self, sums: Array) -> None:
        super().take(sums)
        size = _size(sums)
        self._weighted = sums[4 : 4 + size].copy()
        upper = np.zeros((size, size))
        upper[np.triu_indices(size)] = sums[4 + size :]
        self._squared = upper + np.triu(upper, 1).T
        self.inverse, self.theta = None, np.zeros(0)
        if size:
            self._refresh()

    def _refresh(self) -> None:
        self._since = 0
        self.inverse = _inverse(self._squared, self._ridge)
        self.theta = self.inverse @ self._weighted


def _inverse(squared: Array, ridge: float) -> Array:
    """Return (ridge * I + squared)^-1, symmetric and positive.

    Large features that depend on each other leave nothing of the ridge in a float. In directions of
    which floats then know nothing the value is what they can tell: less would make rounding large.
    """
    values, vectors = np.linalg.eigh(squared)
    least = values[-1] * _RESOLUTION
    half = vectors / np.sqrt(np.maximum(values + ridge, least))
    return np.asarray(half @ half.T)


def _size(sums: Array) -> int:
    """Return how many features sums are of: n have n products with the reward, and n (n + 1) / 2 with each other."""
    return round((sqrt(8 * (len(sums) - 4) + 9) - 3) / 2)


class LinUcb(Policy):
    """Chooses by theta' x + alpha * sqrt(x' A^-1 x)."""

    kind = "linucb"
    numbers: ClassVar[Mapping[str, Number]] = {"alpha": Number(1.0), "ridge": Number(1.0, 1e-9, fixed=True)}
    contextual = True

    def arm(self, name: str) -> Arm:
        return _LinearArm(name, self.values["ridge"])

    def size_of(self, sums: Array) -> int | None:
        return _size(sums) or None

    def choose(self, arms: Sequence[Arm], features: Array | None) -> Arm:
        assert features is not None
        alpha = self.values["alpha"]
        bounds: list[float] = []
        for arm in arms:
            assert isinstance(arm, _LinearArm)
            arm.sized(features.size)
            assert arm.inverse is not None
            # The quadratic form may be a rounding below 0.
            spread = sqrt(max(0.0, float(features @ arm.inverse @ features)))
            bounds.append(float(arm.theta @ features) + alpha * spread)
        return highest(arms, bounds)
