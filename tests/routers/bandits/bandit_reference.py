"""Bandits written down plainly, for comparison: numpy over many runs at once, straight from the papers, nothing of ours."""

from __future__ import annotations

import numpy as np


def ucb1(means, horizon, runs, seed):
    """Auer, Cesa-Bianchi and Fischer (2002), figure 1: each arm once, then mean + sqrt(2 ln t / n)."""

    def index(step, counts, totals, chance):
        return np.where(counts == 0, np.inf, totals / np.maximum(counts, 1) + np.sqrt(2 * np.log(step) / np.maximum(counts, 1)))

    return _simulated(index, means, horizon, runs, seed)


def thompson(means, horizon, runs, seed):
    """Beta-Bernoulli: Chapelle and Li (2011), algorithm 2, with Beta(1, 1)."""

    def index(step, counts, totals, chance):
        return chance.beta(1 + totals, 1 + counts - totals)

    return _simulated(index, means, horizon, runs, seed)


def epsilon_greedy(means, horizon, runs, seed, *, epsilon, decay):
    """The best mean, or any arm with probability epsilon / (1 + decay t)."""

    def index(step, counts, totals, chance):
        best = np.where(counts == 0, np.inf, totals / np.maximum(counts, 1))
        any_arm = chance.random(counts.shape)
        explores = chance.random((counts.shape[0], 1)) < epsilon / (1 + decay * (step - 1))
        return np.where(explores, any_arm, best)

    return _simulated(index, means, horizon, runs, seed)


def _simulated(index, means, horizon, runs, seed):
    """Return the regret of each run."""
    chance = np.random.default_rng(seed)
    means = np.asarray(means)
    counts, totals = np.zeros((runs, means.size)), np.zeros((runs, means.size))
    row = np.arange(runs)
    for step in range(1, horizon + 1):
        value = index(step, counts, totals, chance)
        ties = value == value.max(axis=1, keepdims=True)
        arm = np.where(ties, chance.random(value.shape), -1).argmax(axis=1)
        counts[row, arm] += 1
        totals[row, arm] += chance.random(runs) < means[arm]
    return counts @ (means.max() - means)


def ucb1_bound(means, horizon):
    """Upper bound of UCB1's regret: Auer, Cesa-Bianchi and Fischer (2002), theorem 1."""
    gaps = _gaps(means)
    return 8 * (np.log(horizon) / gaps).sum() + (1 + np.pi**2 / 3) * gaps.sum()


def lai_robbins(means, horizon):
    """What no policy that is good everywhere stays below as the horizon grows: Lai and Robbins (1985)."""
    means = np.asarray(means)
    best = means.max()
    worse = means[means < best]
    divergence = worse * np.log(worse / best) + (1 - worse) * np.log((1 - worse) / (1 - best))
    return float(((best - worse) / divergence).sum() * np.log(horizon))


def _gaps(means):
    gaps = max(means) - np.asarray(means)
    return gaps[gaps > 0]


class LinUcb:
    """Li et al. (2010), algorithm 1, with a constant behind the features, solved anew at each step."""

    def __init__(self, arms, size, alpha, ridge=1.0):
        self._alpha = alpha
        self._a = [ridge * np.eye(size + 1) for _ in range(arms)]
        self._b = [np.zeros(size + 1) for _ in range(arms)]

    def bounds(self, features):
        x = np.append(features, 1.0)
        found = []
        for a, b in zip(self._a, self._b, strict=True):
            theta = np.linalg.solve(a, b)
            found.append(theta @ x + self._alpha * np.sqrt(x @ np.linalg.solve(a, x)))
        return np.array(found)

    def learn(self, arm, features, reward):
        x = np.append(features, 1.0)
        self._a[arm] = self._a[arm] + np.outer(x, x)
        self._b[arm] = self._b[arm] + reward * x
