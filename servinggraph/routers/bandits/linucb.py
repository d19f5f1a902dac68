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

    def sums(self) -> dict[str, float]:
        found = super().sums()
        found |= {f"b{index}": value for index, value in enumerate(self._weighted.tolist()) if value}
        upper = self._squared[np.triu_indices(self._weighted.size)].tolist()
        return found | {f"A{index}": value for index, value in enumerate(upper) if value}

    def take(self, sums: Mapping[str, float]) -> None:
        super().take(sums)
        # The element of the constant is the last of A's, and there as soon as there is any reward.
        last = max((int(name[1:]) for name in sums if name[0] == "A"), default=-1)
        size = self._weighted.size if last < 0 else int((sqrt(8 * last + 9) - 1) / 2 + 0.5)
        self._squared, self._weighted = np.zeros((size, size)), np.zeros(size)
        rows, columns = np.triu_indices(size)
        for name, value in sums.items():
            if name[0] == "b":
                self._weighted[int(name[1:])] = value
            elif name[0] == "A":
                at = int(name[1:])
                self._squared[rows[at], columns[at]] = self._squared[columns[at], rows[at]] = value
        if size:
            self._refresh()

    def _refresh(self) -> None:
        self._since = 0
        self.inverse = np.linalg.inv(self._squared + self._ridge * np.eye(self._weighted.size))
        self.theta = self.inverse @ self._weighted


class LinUcb(Policy):
    """Chooses by theta' x + alpha * sqrt(x' A^-1 x)."""

    kind = "linucb"
    numbers: ClassVar[Mapping[str, Number]] = {"alpha": Number(1.0), "ridge": Number(1.0, 1e-9, fixed=True)}
    contextual = True

    def arm(self, name: str) -> Arm:
        return _LinearArm(name, self.values["ridge"])

    def size_of(self, arm: Arm) -> int | None:
        assert isinstance(arm, _LinearArm)
        return arm.theta.size or None

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
