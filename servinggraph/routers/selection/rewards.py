"""Sums over rewards, and what they say."""

from __future__ import annotations

from math import sqrt
from typing import Any

__all__ = ["Rewards"]


class Rewards:
    """Rewards of one variant, as sums: what several have seen can be added up.

    Attributes:
        count: rewards that came.
        total: their sum.
        squares: the sum of their squares.
    """

    def __init__(self) -> None:
        self.count = 0.0
        self.total = 0.0
        self.squares = 0.0

    def add(self, reward: float) -> None:
        """Count a reward."""
        self.count += 1.0
        self.total += reward
        self.squares += reward * reward

    @property
    def mean(self) -> float | None:
        """Mean reward; None before the first."""
        return self.total / self.count if self.count else None

    @property
    def deviation(self) -> float | None:
        """Standard deviation of the rewards (n - 1); None before the second."""
        if self.count < 2:
            return None
        return sqrt(max(0.0, self.squares - self.total * self.total / self.count) / (self.count - 1))

    def plain(self) -> dict[str, Any]:
        """Return number, mean and deviation as plain values, for a report."""
        return {"count": int(self.count), "mean": self.mean, "deviation": self.deviation}
