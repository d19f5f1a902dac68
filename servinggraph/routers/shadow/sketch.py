"""A distribution in bounded memory: values counted in buckets that grow by a factor, for quantiles.

Source: Masson, Rim and Lee, DDSketch (2019), with bounds on the values in place of collapsing buckets. The
package `ddsketch` is not used: its state leaves it only as protobuf, and the state of a router is plain JSON.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil, isfinite, log
from typing import Any, Final

__all__ = ["Sketch"]

_GROWTH: Final = 1.04
_LOG: Final = log(_GROWTH)
_LEAST, _MOST = 1e-12, 1e15
_LOWEST, _HIGHEST = ceil(log(_LEAST) / _LOG), ceil(log(_MOST) / _LOG)


class Sketch:
    """Counts values from 0 on; a quantile is at most 2 % off.

    At most 1,588 buckets: values below 1e-12 count as 0, those above 1e15 as 1e15, and infinity by itself.

    Attributes:
        count: values, infinite ones included.
        infinite: those that were infinite or no number.
        zero: those that were 0.
        highest: the largest finite value, exactly.
    """

    __slots__ = ("_buckets", "count", "highest", "infinite", "zero")

    def __init__(self) -> None:
        self.count = self.infinite = self.zero = 0
        self.highest = 0.0
        self._buckets: dict[int, int] = {}

    def add(self, value: float) -> None:
        """Count a value, 0 or more."""
        self.count += 1
        if not isfinite(value):
            self.infinite += 1
            return
        self.highest = max(self.highest, value)
        if value < _LEAST:
            self.zero += 1
            return
        bucket = min(ceil(log(value) / _LOG), _HIGHEST)
        self._buckets[bucket] = self._buckets.get(bucket, 0) + 1

    def quantile(self, share: float) -> float:
        """Return the value that a share of the values does not exceed; infinity where infinite ones are among that share."""
        rank = share * (self.count - 1)
        seen = self.zero
        if rank < seen or not self.count:
            return 0.0
        for bucket in sorted(self._buckets):
            seen += self._buckets[bucket]
            if rank < seen:
                # The middle of the bucket in the sense of ratios: both ends are equally far off.
                return min(float(_GROWTH ** (bucket - 0.5)), self.highest)
        return float("inf")

    def report(self) -> dict[str, Any]:
        """Return count, quantiles and the largest value; None where there is no finite one."""
        found: dict[str, Any] = {"count": self.count}
        if self.infinite:
            found["infinite"] = self.infinite
        for name, share in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99)):
            value = self.quantile(share)
            found[name] = value if self.count and isfinite(value) else None
        found["max"] = self.highest if self.count > self.infinite else None
        return found

    def remember(self) -> dict[str, Any]:
        """Return all of it as plain values."""
        return {
            "zero": self.zero,
            "infinite": self.infinite,
            "highest": self.highest,
            "buckets": [list(item) for item in sorted(self._buckets.items())],
        }

    @classmethod
    def recalled(cls, remembered: Mapping[str, Any]) -> Sketch:
        """Return the sketch that `remember` was called on.

        Raises:
            KeyError, TypeError, ValueError: it is none.
        """
        sketch = cls()
        sketch.zero, sketch.infinite = int(remembered["zero"]), int(remembered["infinite"])
        sketch.highest = float(remembered["highest"])
        buckets = {int(bucket): int(number) for bucket, number in remembered["buckets"]}
        if any(not _LOWEST <= bucket <= _HIGHEST for bucket in buckets):
            raise ValueError("a bucket is out of range")
        sketch._buckets = buckets
        sketch.count = sketch.zero + sketch.infinite + sum(buckets.values())
        return sketch
