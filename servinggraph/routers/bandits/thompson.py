"""Thompson sampling: each arm with the probability that it is the best one, as far as is known.

Sources: Thompson, On the likelihood that one unknown probability exceeds another (1933);
Chapelle and Li, An Empirical Evaluation of Thompson Sampling (2011), for delayed rewards, which
it bears well because it does not choose the same arm until the next one comes.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt

from servinggraph.routers.bandits.arms import Arm, Policy, highest
from servinggraph.tensors import Array

__all__ = ["BetaThompson", "GaussianThompson"]


class BetaThompson(Policy):
    """For rewards between two values, scaled to 0..1: the mean of each arm is Beta(1, 1) before anything is known.

    A reward between 0 and 1 counts as that part of a success. The mean of the posterior is then
    right, and its width is that of rewards which are 0 or 1, the widest that there are.
    """

    kind = "thompson"

    def choose(self, arms: Sequence[Arm], features: Array | None) -> Arm:
        beta = self.random.beta
        low, high = self.rewards
        scale = 1 / (high - low)
        draws: list[float] = []
        for arm in arms:
            count = arm.count
            # Not below 0, nor above the count: a sum of many rewards is rounded.
            successes = min(max((arm.total - low * count) * scale, 0.0), count)
            draws.append(beta(1 + successes, 1 + count - successes))
        return highest(arms, draws)


class GaussianThompson(Policy):
    """For rewards without bounds: mean and variance of each arm are unknown (normal-inverse-gamma).

    The prior is what all arms gave together, with the weight of one reward: so the scale of the
    rewards does not matter, an arm without rewards is drawn from a wide distribution, and a few
    rewards that happen to be alike do not make an arm certain. Source: Murphy, Conjugate Bayesian
    analysis of the Gaussian distribution (2007), section 6.
    """

    kind = "thompson"

    def choose(self, arms: Sequence[Arm], features: Array | None) -> Arm:
        student = self.random.standard_t
        count = total = squares = 0.0
        for arm in arms:
            count += arm.count
            total += arm.total
            squares += arm.squares
        center = total / count if count else 0.0
        variance = max(0.0, squares / count - center * center) if count > 1 else 0.0
        variance = variance or 1.0
        draws: list[float] = []
        for arm in arms:
            n = arm.count
            weight = 1 + n
            mean = arm.total / n if n else center
            within = max(0.0, arm.squares - n * mean * mean)
            between = n / weight * (mean - center) ** 2
            shape = 1 + n / 2
            rate = variance + (within + between) / 2
            draws.append((center + arm.total) / weight + student(2 * shape) * sqrt(rate / (shape * weight)))
        return highest(arms, draws)
