"""A distribution in bounded memory: values counted in buckets that grow by a factor, for quantiles.

Source: Masson, Rim and Lee, DDSketch (2019), with bounds on the values in place of collapsing buckets. The
package `ddsketch` is not used: its state leaves it only as protobuf, and that of a router is numbers that add up.
"""

from __future__ import annotations

from math import ceil, isfinite, log
from typing import Any, Final

import numpy as np

from servinggraph.tensors import Array

__all__ = ["Sketch"]

_GROWTH: Final = 1.04
_LOG: Final = log(_GROWTH)
_LEAST, _MOST = 1e-12, 1e15
_FIRST: Final = ceil(log(_LEAST) / _LOG)
_BUCKETS: Final = ceil(log(_MOST) / _LOG) - _FIRST + 1
_INFINITE: Final = _BUCKETS + 1


class Sketch:
    """Counts values from 0 on; a quantile is at most 2 % off.

    Values below 1e-12 count as 0, those above 1e15 as 1e15, and what is infinite or no number by itself.

    Attributes:
        highest: the largest finite value; 2 % off where it came with `take`.
    """

    __slots__ = ("_counts", "highest")

    def __init__(self) -> None:
        # Zero, the buckets, infinite: 12 kB.
        self._counts = np.zeros(_BUCKETS + 2)
        self.highest = 0.0

    @property
    def count(self) -> int:
        """How many values there were."""
        return int(self._counts.sum())

    def add(self, value: float) -> None:
        """Count a value, 0 or more."""
        if isfinite(value):
            self.highest = max(self.highest, value)
        self._counts[_bucket(value)] += 1

    def quantile(self, share: float) -> float:
        """Return the value that a share of the values does not exceed; infinity where infinite ones are among that share."""
        reached = np.cumsum(self._counts)
        bucket = int(np.searchsorted(reached, share * max(0.0, reached[-1] - 1), side="right"))
        if bucket >= _INFINITE:
            return float("inf") if reached[-1] else 0.0
        return min(_middle(bucket), self.highest)

    def report(self) -> dict[str, Any]:
        """Return count, quantiles and the largest value; None where there is no finite one."""
        count, infinite = self.count, int(self._counts[_INFINITE])
        found: dict[str, Any] = {"count": count}
        if infinite:
            found["infinite"] = infinite
        for name, share in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99)):
            value = self.quantile(share)
            found[name] = value if count and isfinite(value) else None
        found["max"] = self.highest if count > infinite else None
        return found

    def sums(self) -> Array:
        """Return all of it but the largest value, as numbers that add up with those of other sketches."""
        return self._counts.copy()

    def take(self, sums: Array) -> None:
        """Become the sketch of these sums.

        Raises:
            ValueError: they are none.
        """
        if sums.ndim != 1 or len(sums) > len(self._counts) or not np.isfinite(sums).all() or (sums < 0).any():
            raise ValueError("not the counts of a distribution")
        self._counts[:] = 0
        self._counts[: len(sums)] = sums
        filled = np.flatnonzero(self._counts[:_INFINITE])
        last = int(filled[-1]) if len(filled) else 0
        if _bucket(self.highest) != last:
            self.highest = _middle(last)


def _bucket(value: float) -> int:
    if not isfinite(value):
        return _INFINITE
    if value < _LEAST:
        return 0
    return min(ceil(log(value) / _LOG) - _FIRST, _BUCKETS - 1) + 1


def _middle(bucket: int) -> float:
    # In the sense of ratios: both ends are equally far off.
    return float(_GROWTH ** (bucket - 1 + _FIRST - 0.5)) if bucket else 0.0
