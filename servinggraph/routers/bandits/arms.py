"""Arms with the sums that policies learn from, and what a policy is.

Everything that is learned is a sum over rewards. That is why what several workers have learned
can be added up, and why a policy never sees a single reward again.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from math import inf, isfinite
from typing import Any, ClassVar, Final, NamedTuple

import numpy as np
from numpy.random import Generator

from servinggraph.routers.selection import Rewards
from servinggraph.tensors import Array

__all__ = ["NEVER", "Arm", "Number", "Policy", "RewardRange", "added", "highest"]


_LARGEST: Final = 1e100
"""Largest reward: the sum of the squares of as many as there will ever be is still a number."""


class RewardRange(NamedTuple):
    """What a reward can be."""

    low: float = -inf
    """The worst reward."""
    high: float = inf
    """The best reward."""

    def __contains__(self, reward: object) -> bool:
        return isinstance(reward, float) and abs(reward) <= _LARGEST and self.low <= reward <= self.high

    @property
    def bounded(self) -> bool:
        """True where there is a worst and a best reward."""
        return abs(self.low) <= _LARGEST and abs(self.high) <= _LARGEST


class Arm(Rewards):
    """One variant, and what is known of its rewards.

    Attributes:
        name: the branch.
        enabled: False while no request is to go to it.
        decided: requests that were sent to it.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.enabled = True
        self.decided = 0.0

    def clear(self) -> None:
        """Forget everything."""
        self.decided = self.count = self.total = self.squares = 0.0

    def observe(self, reward: float, features: Array | None) -> None:
        """Learn a reward, of a request with these features where the policy looks at them."""
        self.add(reward)

    def sums(self) -> Array:
        """Return what is known, as FP64 numbers that add up over workers: decided, count, total, squares, and more."""
        return np.array([self.decided, self.count, self.total, self.squares])

    def take(self, sums: Array) -> None:
        """Know what `sums` says, in place of what was known."""
        self.decided, self.count, self.total, self.squares = sums[:4].tolist()


class Number(NamedTuple):
    """A number that tunes a policy."""

    default: float
    """What it is unless the graph says otherwise."""
    low: float = 0.0
    """The smallest that it can be."""
    high: float = inf
    """The largest that it can be."""
    fixed: bool = False
    """True when it cannot be changed while it serves."""

    def problem(self, name: str, value: Any) -> str | None:
        """Say why a value cannot be this number; None when it can."""
        if (
            not isinstance(value, bool)
            and isinstance(value, int | float)
            and isfinite(value)
            and self.low <= value <= self.high
        ):
            return None
        wanted = f"from {self.low:g} on" if self.high == inf else f"from {self.low:g} to {self.high:g}"
        return f"'{name}' is a number {wanted}, got {value!r}"


class Policy(ABC):
    """Chooses an arm.

    Attributes:
        kind: its name in a graph.
        numbers: the numbers that tune it, by name.
        values: what they are now.
        needs_range: why rewards need a smallest and a largest value; None where they do not.
        contextual: True when it looks at features of the request.

    Args:
        rewards: what a reward can be.
        random: source of chance.
        values: numbers that the graph gives; the others have their defaults.
    """

    kind: ClassVar[str]
    numbers: ClassVar[Mapping[str, Number]] = {}
    needs_range: ClassVar[str | None] = None
    contextual: ClassVar[bool] = False

    def __init__(self, rewards: RewardRange, random: Generator, values: Mapping[str, float]) -> None:
        self.rewards = rewards
        self.random = random
        self.values: dict[str, float] = {name: float(values.get(name, n.default)) for name, n in self.numbers.items()}

    def arm(self, name: str) -> Arm:
        """Return a new arm that knows nothing."""
        return Arm(name)

    def size_of(self, sums: Array) -> int | None:
        """Return how many features an arm's sums are of, the constant included; None where there are none."""
        return None

    @abstractmethod
    def choose(self, arms: Sequence[Arm], features: Array | None) -> Arm:
        """Return the arm for a request.

        Args:
            arms: the arms that may be chosen, at least one.
            features: the request's features, for a contextual policy.
        """


def added(one: Array, other: Array, sign: float = 1.0) -> Array:
    """Return the sum of two arrays, the shorter one filled up with 0; `other` times `sign`."""
    result = np.zeros(max(len(one), len(other)))
    result[: len(one)] = one
    result[: len(other)] += sign * other
    return result


NEVER: Final = -inf


def highest(arms: Sequence[Arm], values: Sequence[float]) -> Arm:
    """Return the arm with the highest value; of several that with the fewest decisions, so that none waits for another."""
    best, highest_value = arms[0], values[0]
    for arm, value in zip(arms, values, strict=True):
        if value > highest_value or (value == highest_value and arm.decided < best.decided):
            best, highest_value = arm, value
    return best
