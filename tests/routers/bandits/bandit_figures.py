"""Writes BANDIT_REGRET.md beside this file: `.venv/bin/python tests/routers/bandits/bandit_figures.py` (minutes)."""

from __future__ import annotations

import platform
from datetime import UTC, datetime
from pathlib import Path
from timeit import repeat

import numpy as np
from bandit_reference import epsilon_greedy, lai_robbins, thompson, ucb1, ucb1_bound
from bandit_simulation import regrets

from servinggraph.routers.bandits import BanditOptions, policy_of

PAGE = Path(__file__).with_name("BANDIT_REGRET.md")
RUNS = 100
REFERENCE_RUNS = 1000
# Distributions 1, 11 and 14 of Auer, Cesa-Bianchi and Fischer (2002).
ARMS = {
    "0.9, 0.6": [0.9, 0.6],
    "0.9, nine of 0.6": [0.9] + [0.6] * 9,
    "0.55, nine of 0.45": [0.55] + [0.45] * 9,
}
GREEDY = {"epsilon": 1.0, "decay": 0.01}


def shown(sample):
    return f"{sample.mean():.1f} ± {1.96 * sample.std(ddof=1) / np.sqrt(sample.size):.1f}"


def at_once():
    rows = ["| arms | requests | policy | ours | reference | bound of UCB1 | Lai–Robbins |", "|---|---|---|---|---|---|---|"]
    for name, means in ARMS.items():
        for horizon in (1000, 10_000):
            for policy, options, reference in (
                ("ucb1", {}, ucb1),
                ("thompson", {}, thompson),
                ("epsilon_greedy", GREEDY, lambda *run: epsilon_greedy(*run, **GREEDY)),
            ):
                runs = 4 * RUNS if policy == "epsilon_greedy" else RUNS
                ours = regrets(policy, means, horizon, runs, **options)
                theirs = reference(means, horizon, REFERENCE_RUNS, 7)
                bound = f"{ucb1_bound(means, horizon):.0f}" if policy == "ucb1" else ""
                row = (name, horizon, policy, shown(ours), shown(theirs), bound, f"{lai_robbins(means, horizon):.0f}")
                rows.append("| " + " | ".join(map(str, row)) + " |")
    return rows


def late_and_lost():
    means, horizon = ARMS["0.9, nine of 0.6"], 10_000
    rows = ["| policy | at once | 100 requests late | 1000 requests late | half never come |", "|---|---|---|---|---|"]
    for policy, options in (("ucb1", {}), ("thompson", {}), ("epsilon_greedy", GREEDY)):
        ways = ({}, {"delay": 100}, {"delay": 1000}, {"lost": 0.5})
        cells = [shown(regrets(policy, means, horizon, 40, **options, **way)) for way in ways]
        rows.append(f"| {policy} | " + " | ".join(cells) + " |")
    return rows


def cost():
    rows = ["| policy | 2 arms | 3 arms | 10 arms |", "|---|---|---|---|"]
    for policy, options, features in (
        ("epsilon_greedy", {}, None),
        ("epsilon_greedy", {"decay": 0.01}, None),
        ("ucb1", {}, None),
        ("thompson", {}, None),
        ("thompson", {"reward_range": "real"}, None),
        ("linucb", {"features": "x"}, np.append(np.random.default_rng(1).normal(size=16), 1.0)),
    ):
        cells = []
        for count in (2, 3, 10):
            chosen = policy_of(BanditOptions(policy=policy, seed=1, **options), [])
            arms = [chosen.arm(str(index)) for index in range(count)]
            for arm in arms:
                for reward in (0.0, 1.0, 1.0):
                    arm.decided += 1
                    arm.observe(reward, features)
            best = min(repeat(lambda c=chosen, a=arms: c.choose(a, features), number=20_000, repeat=5)) / 20_000
            cells.append(f"{best * 1e6:.1f}")
        label = policy + "".join(f", {name} {value}" for name, value in options.items() if name != "features")
        rows.append(f"| {label}{', 16 features' if features is not None else ''} | " + " | ".join(cells) + " |")
    return rows


def page():
    return "\n".join(
        [
            "# Regret of the bandits",
            "",
            "Bernoulli arms with these means; regret is how much less reward is expected than with always the best arm.",
            f"Mean of {RUNS} runs (reference: {REFERENCE_RUNS}) with 95 % confidence. The reference is `bandit_reference.py`, plain",
            "numpy from the papers; it shares no code with ours. The bound of UCB1 is an upper one (Auer and others 2002, theorem",
            "1); Lai–Robbins is what no policy stays below in the long run. `epsilon_greedy` explores with 1 / (1 + 0.01 t); a few",
            f"of its runs settle on a wrong arm for long, so its mean is uncertain, and of {4 * RUNS} runs.",
            "",
            *at_once(),
            "",
            "## Late and lost rewards",
            "",
            "Arms 0.9 and nine of 0.6, 10,000 requests, mean of 40 runs. A policy that is told a reward many requests later",
            "decides as many with what it knew; what is never told, it cannot learn from.",
            "",
            *late_and_lost(),
            "",
            "## What a decision costs",
            "",
            "Microseconds for `choose`, best of five series of 20,000. Arms are plain floats, each draw one scalar call: numpy's",
            "call for a whole array of three costs 11 µs.",
            "",
            *cost(),
            "",
            f"Conditions: {datetime.now(UTC):%Y-%m-%d}, Python {platform.python_version()}, numpy {np.__version__}, one process,",
            "on a machine of two cores that was not idle (so the costs are no floor);",
            "seeds 0 and up, so that everything but the costs comes out the same again.",
            "",
        ]
    )


if __name__ == "__main__":
    PAGE.write_text(page())
