"""The weight that each member has in an answer, and how a response tells of it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from servinggraph.errors import Problem, Unavailable

__all__ = ["Shares", "shares_of", "weight_problems"]


class Shares(NamedTuple):
    """The weights of the members of one answer."""

    shares: tuple[float, ...]
    """Share of each member, in order; they sum up to 1."""
    text: str
    """The same for response parameters: `gbm=0.6667,mlp=0.3333`."""


def shares_of(weights: Mapping[str, float], members: Collection[str]) -> Shares:
    """Return the shares of members, their weights normalised anew.

    Raises:
        Unavailable: none of them has a weight above 0.
    """
    total = sum(weights[name] for name in members)
    if total == 0:
        raise Unavailable(f"only members of weight 0 answered: {', '.join(members)}")
    shares = tuple(weights[name] / total for name in members)
    return Shares(shares, ",".join(f"{name}={share:.4g}" for name, share in zip(members, shares, strict=True)))


def weight_problems(weights: Mapping[str, float], names: Sequence[str]) -> list[Problem]:
    """Return what is wrong with the weights of members."""
    problems = []
    unknown, missing = sorted(set(weights) - set(names)), sorted(set(names) - set(weights))
    if unknown:
        problems.append(
            Problem(f"'weights' names {', '.join(unknown)}, but the branches are {', '.join(names)}", node="weights")
        )
    if missing:
        problems.append(
            Problem(f"'weights' has none for {', '.join(missing)}; 0 leaves a member out of the sum", node="weights")
        )
    if any(weight < 0 or not np.isfinite(weight) for weight in weights.values()) or not any(weights.values()):
        problems.append(Problem(f"'weights' must be 0 or more and not all 0, got {dict(weights)}", node="weights"))
    elif not np.isfinite(sum(weights.values())):
        problems.append(Problem(f"'weights' are too large to be added up: {dict(weights)}", node="weights"))
    return problems
