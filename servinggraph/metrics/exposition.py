"""Metrics as text for Prometheus. The only module that knows its client library."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import accumulate
from math import inf
from typing import Any

from prometheus_client import GCCollector, PlatformCollector, ProcessCollector
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric

from servinggraph.metrics.families import ALL, Family
from servinggraph.metrics.readings import Buckets, Readings

__all__ = ["write"]

_KNOWN = frozenset(ALL)


def write(readings: Readings, accept: str) -> tuple[bytes, str]:
    """Return the text of readings and of the process itself, and its content type.

    Args:
        readings: the values.
        accept: the Accept header: OpenMetrics where it is wanted, else Prometheus' own form.
    """
    encode, content_type = choose_encoder(accept)
    return encode(_Page(readings)), content_type


class _Page:
    """What the library takes for a registry."""

    def __init__(self, readings: Readings) -> None:
        self._readings = readings

    def collect(self) -> Iterator[Metric]:
        values = self._readings.values
        for family in (*(family for family in ALL if family in values), *(family for family in values if family not in _KNOWN)):
            yield _metric(family, values[family])
        for collector in _of_the_process():
            yield from collector.collect()


@cache
def _of_the_process() -> tuple[Any, ...]:
    """Return what reads memory, processor time, files and garbage collections, under the names that all Python services use."""
    nowhere: Any = None  # they would join the library's global registry
    return ProcessCollector(registry=nowhere), PlatformCollector(registry=nowhere), GCCollector(registry=_Unused())  # type: ignore[arg-type]


class _Unused:
    def register(self, collector: Any) -> None:
        """Keep nothing."""


def _metric(family: Family, values: dict[tuple[str, ...], float | Buckets]) -> Metric:
    # The library names a counter without its ending, and one that has none of that, as Triton's, is of unknown kind to it.
    counts = family.name.endswith("_total")
    kind = family.kind if counts or family.kind != "counter" else "unknown"
    metric = Metric(family.name.removesuffix("_total") if counts else family.name, family.help, kind)
    for texts, value in values.items():
        labels = dict(zip(family.labels, texts, strict=True))
        if isinstance(value, Buckets):
            total = 0
            for bound, total in zip((*value.bounds, inf), accumulate(value.counts), strict=True):
                metric.add_sample(
                    f"{family.name}_bucket", labels | {"le": "+Inf" if bound == inf else repr(float(bound))}, total
                )
            metric.add_sample(f"{family.name}_count", labels, total)
            metric.add_sample(f"{family.name}_sum", labels, value.sum)
        else:
            metric.add_sample(family.name, labels, value)
    return metric
