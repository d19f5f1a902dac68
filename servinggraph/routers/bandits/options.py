"""What a graph says of a bandit, and the policy that it means."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, Literal

from numpy.random import default_rng
from pydantic import Field

from servinggraph.errors import Problem
from servinggraph.interfaces import RouterOptions
from servinggraph.routers.bandits.arms import Policy, RewardRange
from servinggraph.routers.bandits.epsilon_greedy import EpsilonGreedy
from servinggraph.routers.bandits.linucb import LinUcb
from servinggraph.routers.bandits.thompson import BetaThompson, GaussianThompson
from servinggraph.routers.bandits.ucb1 import Ucb1
from servinggraph.routers.bandits.window import Window

__all__ = ["BanditOptions", "policy_of"]

_POLICIES: Final[Mapping[str, type[Policy]]] = {policy.kind: policy for policy in (EpsilonGreedy, Ucb1, BetaThompson, LinUcb)}


class BanditOptions(RouterOptions):
    """One of several variants answers, the better the more often; feedback says which is better."""

    policy: Literal["epsilon_greedy", "ucb1", "thompson", "linucb"] = Field(
        description="How a variant is chosen: the best so far and now and then any (`epsilon_greedy`), the one that may be "
        "the best (`ucb1`), each as often as it is likely to be the best (`thompson`), or the one that may be the best for "
        "a request with these features (`linucb`)."
    )
    reward_range: list[float] | Literal["real"] = Field(
        [0.0, 1.0],
        description="The lowest and the highest reward; one outside is refused. `real` is any number, which `ucb1` cannot "
        "have; `thompson` is Beta with bounds, Gaussian without.",
    )
    epsilon: float | None = Field(None, description="`epsilon_greedy`: share of the requests that explore, 0.1 by default.")
    decay: float | None = Field(
        None, description="`epsilon_greedy`: after t rewards the share is epsilon / (1 + decay * t); 0 by default."
    )
    alpha: float | None = Field(
        None,
        description="How much is explored: `ucb1` chooses by mean + sqrt(alpha * ln(t) / n), 2 by default; `linucb` by "
        "prediction + alpha * its deviation, 1 by default.",
    )
    features: str | None = Field(
        None,
        description="`linucb`: the tensor (or field of a body) with a request's features, one row of numbers, at most 128.",
    )
    ridge: float | None = Field(None, description="`linucb`: weight that pulls coefficients to 0, 1 by default.")
    key: str | None = Field(
        None,
        description="Where the key is that keeps a caller with a variant for `window.age_s`: header:NAME, parameter:NAME, "
        "tensor:NAME, field:PATH or id. By default every request is decided by itself.",
    )
    metric: str = Field(
        "reward", min_length=1, description="Name of the feedback that it learns from, where a graph gets several kinds."
    )
    scorer: str | Callable[..., Any] | None = Field(
        None,
        description="Makes a reward of an answer and its truth: accuracy (share of equal elements), absolute_error or "
        "squared_error (mean, negative), or 'package.module:function' of (answer, truth). Answers are kept for it. A reward "
        "beyond `reward_range` counts as the nearest one in it, an answer that is no number as the lowest.",
    )
    failure_reward: float | None = Field(
        None,
        description="Reward of a variant that fails by its own fault or takes too long; by default a failure teaches nothing.",
    )
    missing_reward: float | None = Field(
        None,
        description="Reward of a request with an id that gets no feedback within `window.age_s`: 0 where users say something "
        "only when they are pleased. By default such a request teaches nothing.",
    )
    window: Window = Field(default_factory=Window, description="How long feedback for a request is waited for.")
    seed: int | None = Field(None, ge=0, description="Start of the random numbers, to have the same decisions again in a test.")


def policy_of(options: BanditOptions, problems: list[Problem]) -> Policy:
    """Return the policy that options describe; reports those that do not go together."""
    kind = _POLICIES[options.policy]
    rewards = _range(options, problems)
    if not rewards.bounded and kind is BetaThompson:
        kind = GaussianThompson
    if kind.needs_range and not rewards.bounded:
        text = f"{options.policy} needs a lowest and a highest reward: {kind.needs_range}"
        problems.append(Problem(text, node="reward_range"))
    if kind.contextual and options.features is None:
        problems.append(Problem(f"{options.policy} decides by features of a request: name their tensor", node="features"))
    if not kind.contextual and options.features is not None:
        problems.append(Problem(f"belongs to policy linucb; {options.policy} does not look at features", node="features"))
    values: dict[str, float] = {}
    for name in ("epsilon", "decay", "alpha", "ridge"):
        value = getattr(options, name)
        if value is None:
            continue
        if name not in kind.numbers:
            of = " and ".join(other.kind for other in _POLICIES.values() if name in other.numbers)
            problems.append(Problem(f"belongs to policy {of}, not to {options.policy}", node=name))
        elif reason := kind.numbers[name].problem(name, value):
            problems.append(Problem(reason, node=name))
        else:
            values[name] = value
    return kind(rewards, default_rng(options.seed), values)


def _range(options: BanditOptions, problems: list[Problem]) -> RewardRange:
    given = options.reward_range
    if isinstance(given, str):
        return RewardRange()
    if len(given) == 2 and RewardRange(*given).bounded and given[0] < given[1]:
        return RewardRange(float(given[0]), float(given[1]))
    text = f"expected the lowest and the highest reward, as [0, 1], or 'real'; got {given}"
    problems.append(Problem(text, node="reward_range"))
    return RewardRange(0.0, 1.0)
