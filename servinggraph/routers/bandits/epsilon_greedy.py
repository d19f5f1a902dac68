"""Epsilon-greedy: mostly the arm with the highest mean, now and then any.

Source: Auer, Cesa-Bianchi and Fischer, Finite-time Analysis of the Multiarmed Bandit Problem
(2002), section 3. With a `decay` the chance to explore falls as one over the number of rewards, and
regret grows as its logarithm; without, it is constant, and so is what exploring costs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import inf
from typing import ClassVar

from servinggraph.routers.bandits.arms import NEVER, Arm, Number, Policy, highest
from servinggraph.tensors import Array

__all__ = ["EpsilonGreedy"]


class EpsilonGreedy(Policy):
    """Explores with probability `epsilon / (1 + decay * t)` after t rewards."""

    kind = "epsilon_greedy"
    numbers: ClassVar[Mapping[str, Number]] = {"epsilon": Number(0.1, 0, 1), "decay": Number(0.0)}

    def choose(self, arms: Sequence[Arm], features: Array | None) -> Arm:
        random, values = self.random.random, self.values
        epsilon = values["epsilon"]
        if decay := values["decay"]:
            epsilon /= 1 + decay * sum([arm.count for arm in arms])
        if random() < epsilon:
            return arms[int(random() * len(arms))]
        # An arm that was tried and has no reward yet is not tried again by this: one that never gets any would get all.
        means = [arm.total / arm.count if arm.count else NEVER if arm.decided else inf for arm in arms]
        return highest(arms, means)
