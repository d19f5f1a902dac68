"""Simulates rollouts on a clock of their own: how soon a bad challenger is rolled back, how often a good one is.

`python tests/routers/canary_simulation.py` prints what is recorded in CANARY_SIMULATION.md.
"""

from __future__ import annotations

import platform
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from time import perf_counter

import numpy as np

from servinggraph.routers.rollout.guardrails import ErrorRateGuardrail, LatencyGuardrail, MetricGuardrail
from servinggraph.routers.rollout.schedule import stages
from servinggraph.routers.rollout.trial import Plan, Trial

GUARDRAILS = {
    "failures": ErrorRateGuardrail(watch="error_rate", margin="2%"),
    "slow": LatencyGuardrail(watch="latency", quantile="p95", ratio=1.25),
    "score": MetricGuardrail(watch="metric", metric="score", margin=0.03),
}
PLAN = Plan("new", "stable", stages([0.01, 0.10, 0.50, 1.0], 180.0), GUARDRAILS, 60.0, 100, 0.05)
LONGEST_S = 1800
PROMISED, PROMISED_HIT = 50_000, 1_200


@dataclass
class World:
    """What branches do at some time of the day.

    Attributes:
        failures: error rate.
        slower: factor of the durations.
        score: mean of the metric.
    """

    failures: float = 0.0
    slower: float = 1.0
    score: float = 0.0


GOOD = {
    "the same": World(),
    "a little better": World(-0.002, 0.95, 0.01),
    "at the edge of what is allowed: errors": World(failures=0.02),
    "at the edge of what is allowed: latency": World(slower=1.25),
    "at the edge of what is allowed: metric": World(score=-0.03),
}
BAD = {
    "error rate 5 points above what is allowed": World(failures=0.07),
    "p95 twice what is allowed": World(slower=2.5),
    "metric 0.07 below what is allowed": World(score=-0.10),
}


@dataclass
class Ending:
    """How a rollout went.

    Attributes:
        status: the trial's at the end.
        requests: requests from when the challenger was worse to the end.
        hit: those of them that the challenger got.
        why: the last reason.
    """

    status: str
    requests: int
    hit: int
    why: str


def simulate(challenger: World, seed: int, *, turns_bad_s: float = 0.0, plan: Plan = PLAN) -> Ending:
    """Run one rollout; the challenger is like the baseline until `turns_bad_s`.

    Everything else is drawn: traffic of 20 to 200 requests a second, base error rate up to 3 %, median and spread of
    the durations, level of the metric, and how all of them swing over the rollout for both branches alike.
    """
    rng = np.random.default_rng(seed)
    per_s = rng.uniform(20, 200)
    failures, median, sigma, score = (
        rng.uniform(0.001, 0.03),
        rng.uniform(0.005, 0.05),
        rng.uniform(0.2, 0.6),
        rng.uniform(0.5, 0.85),
    )
    swing, period, lag = rng.uniform(0, 0.8), rng.uniform(60, 1200), rng.uniform(0, 2 * np.pi)
    trial = Trial(plan, 0.0)
    requests = hit = 0
    for second in range(1, LONGEST_S):
        tide = 1 + swing * np.sin(lag + 2 * np.pi * second / period)
        worse = challenger if second >= turns_bad_s else World()
        count = rng.poisson(per_s * tide)
        mine = rng.binomial(count, trial.share)
        for outcomes, many, world in (
            (trial.phase.challenger, mine, worse),
            (trial.phase.baseline, count - mine, World()),
        ):
            outcomes.failures += rng.binomial(many, np.clip(failures * tide + world.failures, 0, 1))
            slow = median * (0.5 + 0.5 * tide) * world.slower
            outcomes.durations.extend((slow * rng.lognormal(0, sigma, many)).tolist())
            mean = score - 0.1 * (tide - 1) + world.score
            outcomes.values["score"].extend(rng.beta(8 * mean, 8 * (1 - mean), many).tolist())
        if second >= turns_bad_s:
            requests, hit = requests + count, hit + mine
        trial.advance(float(second))
        if trial.status in ("rolled_back", "promoted"):
            break
    return Ending(trial.status, int(requests), int(hit), trial.history[-1]["why"])


def simulate_users(seed: int, users: int, requests_per_user: float) -> str:
    """Run one rollout with sticky keys: users who fail in ways of their own, however they are answered; return its status."""
    rng = np.random.default_rng(seed)
    trial = Trial(PLAN, 0.0)
    place, failing = rng.random(users), rng.beta(0.5, 25, users)  # where each is on the line of shares; 2 % on average
    per_s = users * requests_per_user / (3 * 180)
    for second in range(1, LONGEST_S):
        asked = rng.integers(0, users, rng.poisson(per_s))
        for outcomes, mine in ((trial.phase.challenger, True), (trial.phase.baseline, False)):
            whose = asked[(place[asked] < trial.share) == mine]
            outcomes.failures += int((rng.random(len(whose)) < failing[whose]).sum())
            outcomes.durations.extend((0.02 * rng.lognormal(0, 0.4, len(whose))).tolist())
            outcomes.values["score"].extend(rng.beta(6, 2, len(whose)).tolist())
        trial.advance(float(second))
        if trial.status in ("rolled_back", "promoted"):
            break
    return trial.status


def main(scenarios: int) -> None:
    """Print the figures."""
    began = perf_counter()
    print("| challenger | when | scenarios | rolled back | requests until then: median / 95 % | of them the challenger's |")
    print("|---|---|---|---|---|---|")
    in_time = []
    for when in ("from the start", "after 1 to 4 minutes"):
        everyone = []
        for number, (name, world) in enumerate(BAD.items()):
            for seed in range(number, scenarios, len(BAD)):
                turns = 0.0 if when == "from the start" else np.random.default_rng(seed).uniform(60, 240)
                everyone.append((name, simulate(world, 10_000 + seed, turns_bad_s=turns)))
        in_time += [e.status == "rolled_back" and e.requests <= PROMISED and e.hit <= PROMISED_HIT for _, e in everyone]
        for name in [*BAD, "all of them"]:
            row(name, when, [ending for other, ending in everyone if name in (other, "all of them")])
    everyone = []
    for number, (name, world) in enumerate(GOOD.items()):
        everyone += [(name, simulate(world, seed)) for seed in range(number, scenarios, len(GOOD))]
    for name in [*GOOD, "all of them"]:
        row(name, "always", [ending for other, ending in everyone if name in (other, "all of them")])
    print("\n| users | requests of each | scenarios | rolled back |\n|---|---|---|---|")
    for users, each in ((20_000, 3), (5_000, 12), (500, 120)):
        some = min(scenarios, 40)
        back = sum(simulate_users(seed, users, each) == "rolled_back" for seed in range(some))
        print(f"| {users:,} | {each} | {some} | {back} ({back / some:.1%}) |")
    print(f"\nIn time: {np.mean(in_time):.1%} of {len(in_time)} bad ones.")
    versions = f"Python {platform.python_version()}, numpy {np.__version__}"
    print(f"\n{datetime.now(UTC):%Y-%m-%d}, {versions}, {perf_counter() - began:.0f} s.")


def row(name: str, when: str, endings: list[Ending]) -> None:
    back = [ending for ending in endings if ending.status == "rolled_back"]
    share = f"{len(back)} ({len(back) / len(endings):.1%})"
    numbers = hits = ""
    if back:
        never = [ending.requests if ending.status == "rolled_back" else np.inf for ending in endings]
        mine = [ending.hit if ending.status == "rolled_back" else np.inf for ending in endings]
        numbers, hits = (
            " / ".join("never" if v == np.inf else f"{v:,.0f}" for v in np.quantile(values, [0.5, 0.95], method="higher"))
            for values in (never, mine)
        )
    promoted = sum(ending.status == "promoted" for ending in endings)
    print(f"| {name} | {when} | {len(endings)} | {share}; promoted {promoted} | {numbers} | {hits} |")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 200)
