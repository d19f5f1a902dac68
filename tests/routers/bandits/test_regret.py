"""Regret on Bernoulli arms, beside the textbook's bounds and beside a plain implementation; figures in BANDIT_REGRET.md."""

from __future__ import annotations

import numpy as np
import pytest
from bandit_reference import LinUcb, epsilon_greedy, lai_robbins, thompson, ucb1, ucb1_bound
from bandit_simulation import regrets

from servinggraph.routers.bandits import BanditOptions, policy_of

MEANS = [0.9, 0.6, 0.6]
HORIZON = 1000
RUNS = 40


def alike(ours, theirs):
    """Tell whether two samples have the same mean, as far as they can tell (four standard errors)."""
    error = np.sqrt(ours.var(ddof=1) / ours.size + theirs.var(ddof=1) / theirs.size)
    return abs(ours.mean() - theirs.mean()) <= 4 * error


@pytest.mark.parametrize(
    ("policy", "options", "reference"),
    [
        ("ucb1", {}, ucb1),
        ("thompson", {}, thompson),
        ("epsilon_greedy", {"epsilon": 1.0, "decay": 0.03}, lambda *run: epsilon_greedy(*run, epsilon=1.0, decay=0.03)),
        ("epsilon_greedy", {}, lambda *run: epsilon_greedy(*run, epsilon=0.1, decay=0.0)),
    ],
)
def test_regret_is_that_of_a_plain_implementation(policy, options, reference):
    ours = regrets(policy, MEANS, HORIZON, RUNS, **options)
    assert alike(ours, reference(MEANS, HORIZON, 400, 9)), ours.mean()


def test_ucb1_stays_below_its_bound_at_every_horizon():
    for horizon in (10, 100, 1000):
        assert regrets("ucb1", MEANS, horizon, 20).mean() < ucb1_bound(MEANS, horizon)


def test_thompson_is_near_what_no_policy_can_beat():
    for horizon in (300, 3000):
        assert regrets("thompson", MEANS, horizon, 10).mean() < 2 * lai_robbins(MEANS, horizon) + 5


def test_thompson_finds_the_best_of_normal_arms_whatever_their_scale():
    here = regrets("thompson", [0.0, 1.0], HORIZON, 20, gaussian=True, reward_range="real")
    assert here.mean() < 30  # always the wrong one: 1000; at random: 500


@pytest.mark.parametrize("policy", ["ucb1", "thompson"])
def test_late_rewards_cost_what_is_decided_while_they_are_on_their_way(policy):
    # Joulani, Gyoergy and Szepesvari (2013), theorem 6: at most the sum of the gaps for each reward on its way.
    delay = 50
    at_once, late = (regrets(policy, MEANS, HORIZON, 20, delay=d) for d in (0, delay))
    assert late.mean() <= at_once.mean() + delay * sum(max(MEANS) - mean for mean in MEANS)


@pytest.mark.parametrize("policy", ["ucb1", "thompson", "epsilon_greedy"])
def test_lost_rewards_make_learning_slower_and_no_worse(policy):
    half = regrets(policy, MEANS, 2 * HORIZON, 20, lost=0.5)
    # Half of the rewards are those of a run of half the length, of which each decision counts twice.
    whole = regrets(policy, MEANS, HORIZON, 20)
    assert half.mean() < 2 * whole.mean() + 4 * np.sqrt(half.var() / 20 + 4 * whole.var() / 20)


@pytest.mark.parametrize(("ridge", "number"), [(1e-9, 2500), (1.0, 12_000)])
def test_linucb_learns_from_large_features_that_depend_on_each_other(ridge, number):
    policy = policy_of(BanditOptions(policy="linucb", features="x", ridge=ridge, reward_range="real"), [])
    arm = policy.arm("a")
    features = np.array([1e6, 1e6, 1.0])  # their products leave nothing of the ridge in a float
    for _ in range(number):
        arm.observe(3.0, features)
    assert policy.choose([arm], features) is arm
    assert arm.theta @ features == pytest.approx(3.0, rel=0.01 if ridge == 1 else 0.5)
    restarted = policy.arm("a")
    restarted.take(arm.sums())
    assert restarted.theta @ features == pytest.approx(3.0, rel=0.01)
    assert np.isfinite(arm.inverse).all()
    assert features @ restarted.inverse @ features >= 0
    rows = np.random.default_rng(1).normal(size=(50, 3))
    other = policy.arm("b")
    for row in rows:
        other.observe(1.0, row)
    other.take(other.sums())
    np.testing.assert_allclose(other.inverse, np.linalg.inv(rows.T @ rows + ridge * np.eye(3)), rtol=1e-9)


def test_linucb_chooses_as_the_algorithm_of_the_paper_at_every_step():
    chance = np.random.default_rng(6)
    size, arms, alpha = 4, 3, 0.7
    plain = LinUcb(arms, size, alpha)
    policy = policy_of(BanditOptions(policy="linucb", features="x", alpha=alpha), [])
    ours = [policy.arm(str(index)) for index in range(arms)]
    truth = chance.normal(size=(arms, size))
    near = 0
    for _ in range(2500):  # beyond the step at which the inverse is made anew
        features = chance.normal(size=size)
        chosen = int(policy.choose(ours, np.append(features, 1.0)).name)
        bounds = plain.bounds(features)
        assert bounds[chosen] == pytest.approx(bounds.max(), rel=1e-6, abs=1e-8)
        reward = float(truth[chosen] @ features + chance.normal(scale=0.1))
        ours[chosen].observe(reward, np.append(features, 1.0))
        ours[chosen].decided += 1
        plain.learn(chosen, features, reward)
        near += truth[chosen] @ features >= (truth @ features).max() - 0.1
    assert near > 2300
