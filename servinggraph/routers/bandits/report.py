"""What a bandit tells of itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from servinggraph.routers.bandits.arms import Arm
from servinggraph.routers.bandits.window import Answers

__all__ = ["report_of"]


def report_of(arms: Mapping[str, Arm], decisions: Mapping[str, int], answers: Answers, clipped: int) -> dict[str, Any]:
    """Return decisions, rewards and what feedback there was, as plain values.

    `decisions` and `feedback` are of this process since its start. The rest is what was learned, which may be
    older, and other workers', too. `regret` is what has been lost so far against the arm whose mean is the
    highest of those seen: the sum over all rewards of how far their arm's mean is below it.
    """
    every = list(arms.values())
    decided = sum(arm.decided for arm in every)
    means = {arm.name: arm.mean for arm in every if arm.mean is not None}
    best = max(means, key=means.__getitem__, default=None)
    top = 0.0 if best is None else means[best]
    return {
        "decisions": dict(decisions),
        "shares": {arm.name: arm.decided / decided if decided else 0.0 for arm in every},
        "rewards": {arm.name: {"requests": int(arm.decided), **arm.plain()} for arm in every},
        "best": best,
        "regret": sum(arm.count * (top - means[arm.name]) for arm in every if arm.name in means),
        "feedback": {
            "duplicates": answers.duplicates,
            "unknown": answers.unknown,
            "clipped": clipped,
            "remembered": len(answers),
            "remembered_bytes": answers.bytes,
        },
    }
