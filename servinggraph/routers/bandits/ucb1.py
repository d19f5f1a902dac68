"""UCB1: the arm whose mean may, with confidence, be the highest.

Source: Auer, Cesa-Bianchi and Fischer, Finite-time Analysis of the Multiarmed Bandit Problem
(2002), section 2. For rewards from 0 to 1 its regret after n requests is at most
`8 * sum(ln(n) / gap) + (1 + pi**2 / 3) * sum(gap)` over the arms that are not best.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import inf, log, sqrt
from typing import ClassVar

from servinggraph.routers.bandits.arms import Arm, Number, Policy, highest
from servinggraph.tensors import Array

__all__ = ["Ucb1"]


class Ucb1(Policy):
    """Chooses by mean + sqrt(alpha * ln(t) / n) with t rewards of all arms and n of the arm, rewards scaled to 0..1."""

    kind = "ucb1"
    numbers: ClassVar[Mapping[str, Number]] = {"alpha": Number(2.0)}
    needs_range = "its confidence bounds are for rewards between two known values"

    def choose(self, arms: Sequence[Arm], features: Array | None) -> Arm:
        low, high = self.rewards
        rewards = sum([arm.count for arm in arms])
        spread = self.values["alpha"] * log(rewards) if rewards > 1 else 0.0
        values: list[float] = []
        for arm in arms:
            count = arm.count
            if count:
                values.append((arm.total / count - low) / (high - low) + sqrt(spread / count))
            elif arm.decided:
                # Rewards are on their way, or never come: as though each had been the lowest, so that it cannot get all.
                values.append(sqrt(spread / arm.decided))
            else:
                values.append(inf)
        return highest(arms, values)
