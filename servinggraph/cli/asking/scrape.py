"""Reads a server's metrics, and what changed between two looks."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

from servinggraph.cli.params import opener

__all__ = ["Look", "quantile", "scrape"]

Labels = frozenset[tuple[str, str]]


@dataclass(frozen=True)
class Look:
    """The metrics at one moment.

    Attributes:
        at: the moment, seconds.
        values: name of the sample to labels to value.
    """

    at: float
    values: Mapping[str, Mapping[Labels, float]]

    def select(self, name: str, **labels: str) -> dict[Labels, float]:
        """Return the samples of a name that have some labels."""
        wanted = frozenset(labels.items())
        return {found: value for found, value in self.values.get(name, {}).items() if wanted <= found}

    def total(self, name: str, **labels: str) -> float:
        """Return their sum."""
        return sum(self.select(name, **labels).values())

    def label(self, name: str, label: str, **labels: str) -> list[str]:
        """Return the values that a label has in the samples of a name, in order."""
        return list(dict.fromkeys(dict(found)[label] for found in self.select(name, **labels) if label in dict(found)))


def scrape(url: str) -> Look:
    """Look at a server's metrics.

    Raises:
        OSError: it does not answer.
        ValueError: it answers something else.
    """
    from prometheus_client.parser import text_string_to_metric_families

    with opener().open(f"{url.rstrip('/')}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    values: dict[str, dict[Labels, float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            values.setdefault(sample.name, {})[frozenset(sample.labels.items())] = sample.value
    if "servinggraph_ready" not in values:
        raise ValueError("these are not the metrics of a servinggraph server")
    return Look(time.monotonic(), values)


def quantile(before: Look, now: Look, name: str, share: float, **labels: str) -> float | None:
    """Return the bound of the histogram's bucket that a share of what came between two looks lies under; None for nothing."""
    counts: dict[float, float] = {}
    for found, value in now.select(f"{name}_bucket", **labels).items():
        bound = float(dict(found)["le"])
        earlier = before.values.get(f"{name}_bucket", {}).get(found, 0.0)
        counts[bound] = counts.get(bound, 0.0) + value - earlier
    total = counts.get(float("inf"), 0.0)
    if total <= 0:
        return None
    return next(bound for bound in sorted(counts) if counts[bound] >= share * total)
