"""What two branches did lately: counts over a sliding window, and latencies in buckets."""

from __future__ import annotations

from collections import deque
from math import ceil, log
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

__all__ = ["BUCKETS", "SlidingCounts", "bucket_counts", "quantile_s", "share_above"]

Floats = NDArray[np.float64]

_PARTS: Final = 8
"""A window is this many parts: what is older leaves it part by part."""

_SHORTEST_S: Final = 1e-6
_GROWTH: Final = 1.04
"""Each bucket ends this much above where it begins, so a quantile read from the middle is right within 2 %."""

_ROUNDING: Final = 1e-9
"""Of a bucket's edge that was computed by another way."""

BUCKETS: Final = 530
"""From a microsecond to a quarter of an hour. Source: Masson, Rim and Lee, DDSketch (VLDB 2019)."""


class SlidingCounts:
    """Sums of arrays over a window of time, or over more where the window alone has too few.

    Args:
        shape: of the arrays; the first axis is the branch, and column 0 counts its samples.
        window_s: length of the window, seconds.
        at_least: samples of each branch that are kept, however old.
        now: when it begins, seconds.
    """

    def __init__(self, shape: tuple[int, int], window_s: float, at_least: float, now: float) -> None:
        self._shape = shape
        self._window_s = window_s
        self._at_least = at_least
        self._parts: deque[tuple[float, Floats]] = deque([(now, np.zeros(shape))])
        self.total: Floats = np.zeros(shape)

    @property
    def parts(self) -> int:
        """How many parts are kept."""
        return len(self._parts)

    def add(self, counts: Floats, now: float) -> None:
        """Add to the sums; `now` does not go back."""
        began, part = self._parts[-1]
        if now - began >= self._window_s / _PARTS:
            part = np.zeros(self._shape)
            self._parts.append((now, part))
            self._leave(now)
        part += counts
        self.total += counts

    def _leave(self, now: float) -> None:
        """Let go of parts that ended before the window, unless too few samples would be left; so there are never many parts."""
        while len(self._parts) > 2:
            _, first = self._parts[0]
            old = now - self._parts[1][0] >= self._window_s
            if old and ((self.total - first)[:, 0] >= self._at_least).all():
                self._parts.popleft()
                self.total = np.sum([part for _, part in self._parts], axis=0)
            elif len(self._parts) > 2 * _PARTS:  # too few samples for long: the oldest two become one
                self._parts.popleft()
                self._parts[0] = (self._parts[0][0], self._parts[0][1] + first)
            else:
                return


def bucket_counts(seconds: Any) -> Floats:
    """Return how many durations are in each bucket; shape [BUCKETS]."""
    index = np.log(np.maximum(seconds, _SHORTEST_S) / _SHORTEST_S) / np.log(_GROWTH)
    return np.bincount(np.minimum(index.astype(np.intp), BUCKETS - 1), minlength=BUCKETS).astype(np.float64)


def quantile_s(buckets: Floats, quantile: float, *, upper: bool = False) -> float:
    """Return a quantile of durations from their buckets, in seconds; nan when there are none.

    Args:
        buckets: how many are in each; shape [BUCKETS].
        quantile: from 0 to 1.
        upper: return where its bucket ends, so that at most the part 1 - quantile is above; else its middle.
    """
    upto = np.cumsum(buckets)
    if upto[-1] == 0:
        return float("nan")
    index = int(np.searchsorted(upto, quantile * upto[-1], side="left"))
    return float(_SHORTEST_S * _GROWTH ** (index + (1.0 if upper else 0.5)))


def share_above(buckets: Floats, seconds: float) -> float:
    """Return the share of durations in buckets that begin at `seconds` or above; nan when there are none."""
    total = buckets.sum()
    if total == 0:
        return float("nan")
    first = ceil(log(max(seconds, _SHORTEST_S) / _SHORTEST_S) / log(_GROWTH) - _ROUNDING)
    return float(buckets[first:].sum() / total)
