"""LinUCB: the arm whose reward may, with confidence, be the highest for a request with these features.

Source: Li, Chu, Langford and Schapire, A Contextual-Bandit Approach to Personalized News Article
Recommendation (2010), algorithm 1 (disjoint linear models), with a constant 1 behind the features.
The inverse is kept by the formula of Sherman and Morrison, and made anew from the sums now and
then, since rounding adds up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import sqrt
from typing import ClassVar, Final

import numpy as np

from servinggraph.routers.bandits.arms import Arm, Number, Policy, highest
from servinggraph.tensors import Array

__all__ = ["MAX_FEATURES", "LinUcb"]

MAX_FEATURES: Final = 128
"""Most features: an arm holds the square of them, and workers exchange as much."""

_REFRESH: Final = 1000
"""Rewards after which the inverse is made anew."""


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
        """Make room for features of this size, the constant included."""
        if self.inverse is None:
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
        self.inverse -= np.outer(moved, moved) / (1 + features @ moved)
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
        self.inverse = np.linalg.inv(self._squared + self._ridge * np.eye(self._weighted.size))
        self.theta = self.inverse @ self._weighted


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
