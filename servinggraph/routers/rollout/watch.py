"""A guardrail at work: counts what both branches bring, and weighs the evidence that the challenger is worse than it may be."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite, isnan, log
from typing import Any, Final

import numpy as np

from servinggraph.routers.rollout.evidence import Evidence, Floats, Tally
from servinggraph.routers.rollout.outcomes import Outcomes, Phase
from servinggraph.routers.rollout.windows import SlidingCounts

__all__ = ["BASELINE", "CHALLENGER", "Limits", "Watch", "plain"]

CHALLENGER: Final = 0
BASELINE: Final = 1


@dataclass(frozen=True, slots=True)
class Limits:
    """What a rollout says to a guardrail.

    Attributes:
        window_s: length of the sliding window, seconds.
        min_samples: samples of each branch without which no step ends.
        alpha: chance of a false alarm of this guardrail over the whole rollout.
        challenger: the challenger's name.
        baseline: the baseline's name.
    """

    window_s: float
    min_samples: int
    alpha: float
    challenger: str
    baseline: str


_FEWEST: Final = 5
"""Samples of the challenger in the window without which it is not rolled back, however much speaks against it."""


class Watch(ABC):
    """Watches one quantity of both branches, as numbers y from 0 to 1 where more is worse.

    Args:
        name: the guardrail's name in the graph's file.
        limits: what the rollout says.
        ratio: times the baseline's mean y that the challenger's may be; None when it is held against `margin` alone.
        margin: what it may be above that.
        now: when it begins, seconds.

    Attributes:
        name: the guardrail's name.
        compared: True when the challenger is held against the baseline.
        evidence: how much there is against the challenger.
    """

    columns = 2
    unit = ""

    def __init__(self, name: str, limits: Limits, ratio: float | None, margin: float, now: float) -> None:
        self.name = name
        self.compared = ratio is not None
        self._limits = limits
        self._ratio = ratio or 0.0
        self._margin = margin
        self.evidence = Evidence(self._ratio, margin)
        self.begin_step(now)

    def begin_step(self, now: float) -> None:
        """Count samples anew: the challenger's share has changed. The evidence is kept."""
        limits = self._limits
        self._window = SlidingCounts((2, self.columns), limits.window_s, limits.min_samples, now)
        self.evidence.restart_estimate()

    def take(self, phase: Phase, now: float) -> None:
        """Evaluate what a phase has brought since the last time."""
        centre = self._centre()
        mine, counts = self._seen(phase.challenger)
        other, others = self._seen(phase.baseline)
        if centre is not None and not self.compared:
            self.evidence.add(1.0, centre, mine, None)
        elif centre is not None and 0 < phase.share < 1:
            self.evidence.add(phase.share, centre, mine, other)
        self._window.add(np.stack([counts, others]), now)
        self._learn(self._window.total[BASELINE])

    @property
    def hurt(self) -> bool:
        """True when there is evidence that the challenger is worse than it may be, and it is seen to be.

        Evidence rests on chance. Where a sticky key has one caller make most of the requests, chance had one draw, and
        the branch that got him has nearly all samples: then the other one must at least look worse by itself.
        """
        if self.evidence.log_value < -log(self._limits.alpha):
            return False
        # Where the window has nothing of the baseline to compare with, the evidence stands alone.
        return self.samples[0] >= _FEWEST and (isnan(excess := self._excess()) or excess > 0)

    @property
    def samples(self) -> tuple[int, int]:
        """Samples of challenger and baseline in the window."""
        counted = self._window.total[:, 0]
        return int(counted[CHALLENGER]), int(counted[BASELINE])

    def waits_for(self, *, alone: bool) -> str | None:
        """Say why the step cannot end yet; None when this guardrail lets it.

        Args:
            alone: True when the baseline gets no requests, so that nothing can be compared.
        """
        limits = self._limits
        mine, other = self.samples
        if mine < limits.min_samples:
            return f"guardrail '{self.name}' has {mine} of {limits.min_samples} samples of '{limits.challenger}'"
        if not self.compared:
            return None if self._excess() <= 0 else f"guardrail '{self.name}' is undecided: {self.figures()}"
        if alone:
            return None
        if other < limits.min_samples or self._centre() is None:
            return f"guardrail '{self.name}' has {other} samples of '{limits.baseline}', too few to compare with"
        return None if self._excess() <= 0 else f"guardrail '{self.name}' is undecided: {self.figures()}"

    def report(self, share: float) -> dict[str, Any]:
        """Return its numbers, as plain values.

        Args:
            share: the challenger's share of the requests.
        """
        limits, evidence = self._limits, self.evidence
        mine, other = self.samples
        low, high = evidence.interval(limits.alpha, 2 * limits.min_samples / (share or 1))
        estimate = evidence.total / evidence.samples if evidence.samples else float("nan")
        values = self._shown(self._window.total)
        return {
            "verdict": "hurt" if self.hurt else "undecided" if self.waits_for(alone=share >= 1) else "fine",
            "samples": {limits.challenger: mine, limits.baseline: other},
            self._what(): {limits.challenger: plain(values[CHALLENGER]), limits.baseline: plain(values[BASELINE])},
            "allowed": self._allowed(),
            "excess": plain(estimate - self._margin),
            "excess_interval": [plain(low - self._margin), plain(high - self._margin)],
            "evidence": plain(evidence.value),
            "rollback_at": plain(1 / limits.alpha),
        }

    def figures(self) -> str:
        """Say in words what was seen."""
        limits = self._limits
        mine, other = self.samples
        values = self._shown(self._window.total)
        text = f"{self._what()} {self._text(values[CHALLENGER])} of {mine:,} samples of '{limits.challenger}'"
        if self.compared:
            text += f" against {self._text(values[BASELINE])} of {other:,} of '{limits.baseline}'"
        return f"{text}, allowed {self._allowed()}"

    def remember(self) -> dict[str, Any]:
        """Return what has to survive a restart: the evidence."""
        return self.evidence.remember()

    def recall(self, remembered: Mapping[str, Any]) -> None:
        """Take up what `remember` gave; ValueError, KeyError or TypeError when it is not that."""
        self.evidence.recall(remembered)

    def _excess(self) -> float:
        """Return how far the challenger's mean y is above what it may be, in the window."""
        mine, other = self._means(self._window.total)
        return mine - self._margin - (self._ratio * other if self.compared else 0)

    @abstractmethod
    def _seen(self, outcomes: Outcomes) -> tuple[Tally, Floats]:
        """Return a branch's y, and what the window counts of it: the number of samples first; shape [columns]."""

    @abstractmethod
    def _centre(self) -> float | None:
        """Return about what y is, learnt from earlier requests; None when too little is known to bet."""

    def _learn(self, baseline: Floats) -> None:
        """Take up what the window has of the baseline, for the requests that come."""
        return

    @abstractmethod
    def _means(self, window: Floats) -> tuple[float, float]:
        """Return the mean y of challenger and baseline."""

    @abstractmethod
    def _shown(self, window: Floats) -> tuple[float, float]:
        """Return the quantity of challenger and baseline in its own unit; nan where there is none."""

    @abstractmethod
    def _text(self, value: float) -> str:
        """Return such a quantity as text."""

    @abstractmethod
    def _what(self) -> str:
        """Name the quantity."""

    @abstractmethod
    def _allowed(self) -> str:
        """Say what the challenger's may be."""


def plain(value: float) -> float | None:
    """Return a number in six digits, as JSON has it: None where there is none."""
    return float(f"{value:.6g}") if isfinite(value) else None
