"""Our policies on made-up arms: regret, with rewards at once, late, or lost."""

from __future__ import annotations

from collections import deque

import numpy as np

from servinggraph.routers.bandits import BanditOptions, policy_of


def regret(policy, means, horizon, seed, *, delay=0, lost=0.0, gaussian=False, **options):
    """Return the regret of one run: how much less than always the best arm, in expectation.

    Args:
        policy: its name.
        means: mean reward of each arm.
        horizon: number of requests.
        seed: of rewards and choices.
        delay: requests between an answer and its reward.
        lost: share of the rewards that never come.
        gaussian: rewards are normal with deviation 1, else 0 or 1.
        options: of the bandit.
    """
    problems: list[object] = []
    chosen = policy_of(BanditOptions(policy=policy, seed=seed, **options), problems)
    assert not problems, problems
    arms = [chosen.arm(str(index)) for index in range(len(means))]
    worth = dict(zip(arms, means, strict=True))
    chance = np.random.default_rng([seed, 1])
    draws = chance.normal(size=horizon) if gaussian else chance.random(horizon)
    comes = chance.random(horizon) >= lost
    waiting = deque()
    for step in range(horizon):
        arm = chosen.choose(arms, None)
        arm.decided += 1
        if comes[step]:
            waiting.append((step + delay, arm, worth[arm] + draws[step] if gaussian else float(draws[step] < worth[arm])))
        while waiting and waiting[0][0] <= step:
            _, rewarded, reward = waiting.popleft()
            rewarded.observe(reward, None)
    return sum(arm.decided * (max(means) - worth[arm]) for arm in arms)


def regrets(policy, means, horizon, runs, **options):
    """Return the regret of each of several runs."""
    return np.array([regret(policy, means, horizon, seed, **options) for seed in range(runs)])
