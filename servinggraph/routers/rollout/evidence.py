"""Evidence that a challenger is worse than a baseline, valid however often it is looked at.

Requests come one after the other, each is given to the challenger with a known probability p, and what it brings is a
number y from 0 to 1, where more is worse: 1 for a failure, say. The null hypothesis is that the challenger is good
enough: at every request its expected y is at most `ratio` times the baseline's, plus `margin`. Of each request make

    z = (y - c) / p              + c (1 - ratio) - margin       when the challenger answered it,
    z = (y - c) / (1 - p) * -ratio + c (1 - ratio) - margin       when the baseline did,

with any number c that was fixed before the request. Its expectation is what the challenger is worse than allowed,
whatever happens to both alike over the day and however p changes between steps. A bettor who puts the part
lambda of its wealth on z > 0 has after each request 1 + lambda z times what it had, and expects no gain while the null
holds, so its wealth is a test martingale: by Ville's inequality the chance that it ever reaches 1/alpha times its
start is at most alpha, over any number of looks. No normal approximation is involved.

The wealth starts spread over bettors with different lambda, since the best one is not known, and over times: half of
it plays from the beginning, and each time that the most daring bettor has lost most of its money, a part of the rest
joins, the j-th about 1/(j log(j)^2). Money that joins late has lost nothing in the good time before, which makes the
test notice a challenger that turns bad after days nearly as soon as one that was bad from the start.

What it rests on is that chance gives each request to the challenger. With a sticky key it gives callers: where a few of
them are most of the load and fail in ways of their own, their one draw is counted as many.

Sources: Waudby-Smith and Ramdas, Estimating means of bounded random variables by betting (JRSS B 2024);
Waudby-Smith, Wu, Ramdas, Karampatziakis and Mineiro, Anytime-valid off-policy inference for contextual bandits
(2022), for the weighting by 1/p; Shin, Ramdas and Rinaldo, E-detectors (2022), for wealth that joins later. The
interval: Waudby-Smith, Arbour, Sinha, Kennedy and Ramdas, Time-uniform central limit theory and asymptotic
confidence sequences (Annals of Statistics 2024), Theorem 2.2.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import exp, inf, log, sqrt
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

__all__ = ["Evidence", "Tally", "confidence_sequence"]

Floats = NDArray[np.float64]

_BETTORS: Final = 12
"""Bettors, each with half the lambda of the one before: the best lambda is met within a factor of 1.4 over a range of 2000."""

_LOST: Final = 2.0
"""Logarithm of what the most daring bettor has lost when more money joins."""

_ALL_PARTS: Final = 1.07
"""The sum of 1 / (k log(k)^2) over k from 3 on, rounded up."""

_DARING: Final = 0.99
"""Part of the largest lambda that could never lose everything."""


@dataclass(frozen=True, slots=True)
class Tally:
    """Values of one branch with how often each came.

    Attributes:
        values: numbers from 0 to 1, more is worse; shape [n].
        counts: how often each came; shape [n].
    """

    values: Floats
    counts: Floats

    @classmethod
    def of_events(cls, total: int, bad: int) -> Tally:
        """Return the tally of requests of which some had the value 1, and the others 0."""
        return cls(np.array([0.0, 1.0]), np.array([total - bad, bad], np.float64))

    @classmethod
    def of_values(cls, values: Floats) -> Tally:
        """Return the tally of values that came once each."""
        return cls(values, np.ones(len(values)))

    @property
    def total(self) -> float:
        """How many there were."""
        return float(self.counts.sum())

    @property
    def sum(self) -> float:
        """The sum of all values."""
        return float(self.values @ self.counts)


class Evidence:
    """The wealth of those who bet that the challenger is worse than allowed.

    Args:
        ratio: times the baseline's mean that the challenger's may be; 0 when it is held against `margin` alone.
        margin: what it may be above that.

    Attributes:
        samples: requests that were bet on.
        total: sum of z + margin over them.
        squares: sum of its squares.
    """

    def __init__(self, ratio: float, margin: float) -> None:
        self._ratio = ratio
        self._margin = margin
        self._parts = 2.0 ** -np.arange(_BETTORS)
        self._log_wealth: Floats = np.full(_BETTORS, -inf)
        self._aside = 1.0
        self._joined = 0
        self._join()
        self.restart_estimate()

    @property
    def value(self) -> float:
        """Wealth as a multiple of its start; 1/alpha or more is evidence at the level alpha."""
        return exp(min(self.log_value, 700.0))

    @property
    def log_value(self) -> float:
        """The natural logarithm of the wealth."""
        return float(np.logaddexp.reduce(self._log_wealth, initial=log(self._aside) if self._aside > 0 else -inf))

    def _join(self) -> None:
        """Let more of the wealth play from here on."""
        self._joined += 1
        k = self._joined + 1
        part = 0.5 if k == 2 else 0.5 / (_ALL_PARTS * k * log(k) ** 2)
        self._aside = max(self._aside - part, 0.0)
        self._log_wealth = np.logaddexp(self._log_wealth, log(part / _BETTORS))
        self._poor = log(part / _BETTORS) - _LOST

    def restart_estimate(self) -> None:
        """Begin the estimate anew, at a new step; the wealth is kept."""
        self.samples = self.total = self.squares = self._worst = 0.0

    def add(self, share: float, centre: float, challenger: Tally, baseline: Tally | None) -> None:
        """Bet on requests.

        Args:
            share: the chance with which each of them was given to the challenger, above 0; below 1 with a baseline.
            centre: about what y is expected to be, 0 to 1; found without these requests. The nearer, the stronger the test.
            challenger: what the challenger brought.
            baseline: what the baseline brought; None when it is not compared to (with `ratio` 0).
        """
        if self._log_wealth[0] < self._poor:
            self._join()
        scales = [1 / share] if baseline is None else [1 / share, -self._ratio / (1 - share)]
        offset = centre * (1 - self._ratio) - self._margin
        worst = min(scale * (y - centre) + offset for scale in scales for y in (0.0, 1.0))
        most = _DARING / -worst if worst < 0 else 1.0
        self._worst = max(self._worst, 1 / share)
        for scale, tally in zip(scales, (challenger, baseline), strict=False):
            assert tally is not None
            z = scale * (tally.values - centre) + offset
            self._log_wealth = self._log_wealth + np.log1p(np.outer(most * self._parts, z)) @ tally.counts
            gain = z + self._margin
            self.samples += tally.total
            self.total += float(gain @ tally.counts)
            self.squares += float((gain * gain) @ tally.counts)

    def interval(self, alpha: float, tuned_for: float) -> tuple[float, float]:
        """Return where the challenger's mean less `ratio` times the baseline's lies, since the estimate began.

        Args:
            alpha: chance that it lies elsewhere at any of all looks; approximate, unlike the wealth.
            tuned_for: number of samples at which the interval is to be narrowest.
        """
        # As if one of them had been the worst that there can be: without a failure so far the interval is not a point.
        return confidence_sequence(self.samples, self.total, self.squares + self._worst**2, alpha, tuned_for)

    def remember(self) -> dict[str, Any]:
        """Return the wealth as plain values."""
        return {"log_wealth": self._log_wealth.tolist(), "aside": self._aside, "joined": self._joined, "poor": self._poor}

    def recall(self, remembered: Mapping[str, Any]) -> None:
        """Take up what `remember` gave.

        Raises:
            ValueError: it is not that.
        """
        wealth = np.asarray(remembered["log_wealth"], np.float64)
        if wealth.shape != (_BETTORS,) or not np.isfinite(wealth).all():
            raise ValueError(f"log_wealth holds {_BETTORS} numbers")
        self._log_wealth = wealth
        self._aside, self._joined, self._poor = (
            float(remembered["aside"]),
            int(remembered["joined"]),
            float(remembered["poor"]),
        )


def confidence_sequence(n: float, total: float, squares: float, alpha: float, tuned_for: float) -> tuple[float, float]:
    """Return an asymptotic confidence sequence for the running mean of what was expected.

    Args:
        n: number of observations.
        total: their sum.
        squares: the sum of their squares.
        alpha: chance that the mean is outside at any of all looks, for many observations.
        tuned_for: number of observations at which it is to be narrowest.

    Returns:
        Lower and upper end; infinite without observations.
    """
    if n < 1:
        return -inf, inf
    mean = total / n
    deviation = sqrt(max(squares / n - mean * mean, 0.0))
    rho2 = (-2 * log(alpha) + log(-2 * log(alpha) + 1)) / max(tuned_for, 1.0)
    half = deviation * sqrt(2 * (n * rho2 + 1) / (n * n * rho2) * log(sqrt(n * rho2 + 1) / alpha))
    return mean - half, mean + half
