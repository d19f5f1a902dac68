"""What steps count and observe themselves, through their context, bounded in names."""

from __future__ import annotations

import logging
import re
from bisect import bisect_left
from math import isfinite
from threading import Lock
from typing import Final

from servinggraph.context import Context, Meter
from servinggraph.interfaces import Operation
from servinggraph.metrics.families import Family
from servinggraph.metrics.readings import Buckets, Readings

__all__ = ["STEP_BOUNDS", "StepMeter", "StepNames", "metered"]

logger = logging.getLogger("servinggraph.metrics")

MOST_NAMES: Final = 200
"""Names that the steps of one server may use; what goes beyond is dropped, and said once."""

STEP_BOUNDS: Final = (*(digit * 10.0**power for power in range(-3, 3) for digit in (1, 2.5, 5)), 1000.0)
"""Upper bounds of observed values: 0.001 to 1000, for what is a share as for what is a length."""

_NAME: Final = re.compile(r"[a-zA-Z][a-zA-Z0-9_]{0,63}")
_LABELS: Final = ("graph", "version", "node")


class StepNames:
    """The names that the steps of one server use, each for one kind of metric."""

    def __init__(self) -> None:
        self._families: dict[str, Family] = {}
        self._complained: set[str] = set()
        self._lock = Lock()

    def family(self, name: str, *, counts: bool) -> Family | None:
        """Return the metric for a name; None for one that cannot be used, which the log says once."""
        family = self._families.get(name)
        if family is not None and (family.kind == "counter") == counts:
            return family
        with self._lock:
            return self._new(name, counts=counts)

    def _new(self, name: str, *, counts: bool) -> Family | None:
        reason = self._why_not(name, counts=counts)
        if reason is not None:
            self._complain(name if len(self._families) < MOST_NAMES else "", reason)
            return None
        full = f"servinggraph_step_{name}" + ("_total" if counts else "")
        text = f"What steps {'count' if counts else 'observe'} as '{name}'."
        family = Family(full, "counter" if counts else "histogram", "steps' own", _LABELS, text)
        return self._families.setdefault(name, family)  # another thread may have been quicker

    def _why_not(self, name: str, *, counts: bool) -> str | None:
        known = self._families.get(name)
        if known is not None:
            return None if (known.kind == "counter") == counts else "it is counted in one place and observed in another"
        if not _NAME.fullmatch(name) or name.endswith(("_total", "_bucket", "_sum", "_count")):
            return "a name is letters, digits and _, and its ending says nothing of the metric's kind"
        return f"there are {MOST_NAMES} names already" if len(self._families) >= MOST_NAMES else None

    def _complain(self, key: str, reason: str) -> None:
        if key not in self._complained and len(self._complained) < MOST_NAMES:
            self._complained.add(key)
            logger.warning("metric %r of a step is dropped: %s (told once)", key[:80], reason)


class StepMeter(Meter):
    """What one node counts; from any thread.

    Args:
        names: the server's names.
    """

    def __init__(self, names: StepNames) -> None:
        self._names = names
        self._lock = Lock()
        self._counted: dict[Family, float] = {}
        self._observed: dict[Family, tuple[list[int], list[float]]] = {}

    def count(self, name: str, amount: float) -> None:
        family = self._names.family(name, counts=True)
        if family is None or not amount >= 0:  # a counter that falls looks like a restart
            return
        with self._lock:
            self._counted[family] = self._counted.get(family, 0) + amount

    def observe(self, name: str, value: float) -> None:
        family = self._names.family(name, counts=False)
        if family is None or not isfinite(value):
            return
        with self._lock:
            counts, total = self._observed.setdefault(family, ([0] * (len(STEP_BOUNDS) + 1), [0.0]))
            counts[bisect_left(STEP_BOUNDS, value)] += 1
            total[0] += value

    def read(self, readings: Readings, labels: tuple[str, str, str]) -> None:
        """Read it all."""
        with self._lock:
            for family, value in self._counted.items():
                readings.count(family, labels, value)
            for family, (counts, total) in self._observed.items():
                readings.buckets(family, labels, Buckets(STEP_BOUNDS, counts.copy(), total[0]))


class _Both(Meter):
    """A node's own meter, and that of a router around it."""

    __slots__ = ("_inner", "_outer")

    def __init__(self, inner: Meter, outer: Meter) -> None:
        self._inner, self._outer = inner, outer

    def count(self, name: str, amount: float) -> None:
        self._inner.count(name, amount)
        self._outer.count(name, amount)

    def observe(self, name: str, value: float) -> None:
        self._inner.observe(name, value)
        self._outer.observe(name, value)


def metered(operation: Operation, meter: Meter) -> Operation:
    """Return an operation whose context counts for this node, and for whoever asked before."""
    call = operation.call

    def run(value: object, context: Context) -> object:
        outer = context.meter
        return call(value, context.metered(meter if outer is None else _Both(meter, outer)))

    return Operation(run, operation.suspends, operation.streams)
