"""Values of metrics at one moment, collected on the event loop and shown elsewhere."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from servinggraph.measures import BOUNDS_NS, Durations
from servinggraph.metrics.families import Family

__all__ = ["Buckets", "Readings"]

Labels = tuple[str, ...]


class Buckets(NamedTuple):
    """A histogram."""

    bounds: tuple[float, ...]
    """Upper bounds, without that of the last, which has none."""
    counts: list[int]
    """How many values there were in each, one more than bounds."""
    sum: float
    """The sum of all values."""


BOUNDS_S = tuple(bound / 1e9 for bound in BOUNDS_NS)


class Readings:
    """Values by metric and labels.

    What is counted twice under the same labels adds up: a version of a graph goes on where the
    one that it replaced had stopped.

    Attributes:
        values: numbers, or `Buckets`, by metric and by values of its labels.
    """

    def __init__(self) -> None:
        self.values: dict[Family, dict[Labels, float | Buckets]] = {}

    def set(self, family: Family, labels: Labels, value: float) -> None:
        """Note what something is now."""
        self.values.setdefault(family, {})[labels] = value

    def count(self, family: Family, labels: Labels, value: float) -> None:
        """Add to what something was counted."""
        values = self.values.setdefault(family, {})
        before = values.get(labels, 0)
        assert not isinstance(before, Buckets)
        values[labels] = before + value

    def durations(self, family: Family, labels: Labels, durations: Durations) -> None:
        """Add durations, in seconds."""
        self.buckets(family, labels, Buckets(BOUNDS_S, durations.counts.copy(), durations.ns / 1e9))

    def sizes(
        self, family: Family, labels: Labels, bounds: Sequence[float], sizes: Mapping[int, int] | Mapping[float, int]
    ) -> None:
        """Add values that are known with how often each occurred."""
        buckets = Buckets(tuple(bounds), [0] * (len(bounds) + 1), sum(size * times for size, times in sizes.items()))
        for size, times in sizes.items():
            buckets.counts[bisect_left(bounds, size)] += times
        self.buckets(family, labels, buckets)

    def add(self, other: Readings) -> None:
        """Add everything that others were counted."""
        for family, values in other.values.items():
            for labels, value in values.items():
                if isinstance(value, Buckets):
                    self.buckets(family, labels, value)
                else:
                    self.count(family, labels, value)

    def buckets(self, family: Family, labels: Labels, buckets: Buckets) -> None:
        """Add a histogram."""
        values = self.values.setdefault(family, {})
        before = values.get(labels)
        if isinstance(before, Buckets) and before.bounds == buckets.bounds:
            counts = [one + other for one, other in zip(before.counts, buckets.counts, strict=True)]
            buckets = Buckets(buckets.bounds, counts, before.sum + buckets.sum)
        values[labels] = buckets
