"""What is known of a challenger beside a champion: agreement, differences, errors, latencies, examples."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from math import sqrt
from statistics import NormalDist
from typing import Any, Final

import numpy as np

from servinggraph.routers.shadow.comparison import Verdict
from servinggraph.routers.shadow.examples import Reservoir, readable, summary
from servinggraph.routers.shadow.sketch import Sketch
from servinggraph.tensors import Array

__all__ = ["CONFIDENCE", "Record", "share_of", "wilson"]

CONFIDENCE: Final = 0.95
_Z: Final = NormalDist().inv_cdf(0.5 + CONFIDENCE / 2)
_NAMES: Final = 64
"""Most tensors, reasons and codes that are told apart; a user's function may invent any number of them."""


_LONGEST: Final = 500
"""Most characters of a text that is kept: of an error, a reason, the name of a difference."""


def wilson(successes: int, trials: int, z: float = _Z) -> tuple[float, float]:
    """Return the interval that holds a share with the usual confidence.

    Args:
        successes: how often it was so.
        trials: out of how many, each independent of the others.
        z: quantile of the normal distribution; by default that of 95 %.

    Returns:
        Its ends, from 0 to 1; all of it where there was no trial.

    Source: Wilson, Probable Inference (1927).
    """
    if trials == 0:
        return 0.0, 1.0
    share = successes / trials
    middle = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    # Rounding must not leave the share itself, 0 or 1 say, outside.
    return min(share, max(0.0, middle - half)), max(share, min(1.0, middle + half))


def share_of(successes: int, trials: int) -> dict[str, Any]:
    """Return a share with its confidence interval, as a report has it; None without a trial."""
    if not trials:
        return {"rate": None, "low": None, "high": None}
    low, high = wilson(successes, trials)
    return {"rate": successes / trials, "low": low, "high": high}


class Record:
    """Counts what became of the copies of requests that one challenger got beside one champion.

    Every copy ends in exactly one of `dropped`, `errors` and `answered`, and of the answered ones
    each in exactly one of `compared` and `not_compared`.

    Args:
        examples: most disagreements that are kept.
    """

    def __init__(self, examples: int) -> None:
        self.sampled = self.answered = self.compared = self.agreed = self.not_compared = 0
        self.rows = self.agreeing_rows = 0
        self.dropped: dict[str, int] = {}
        self.errors: dict[str, int] = {}
        self.reasons: dict[str, int] = {}
        self.last_error = self.last_comparison_error = ""
        self.differences: dict[str, Sketch] = {}
        self.champion_ms, self.challenger_ms = Sketch(), Sketch()
        self._examples = Reservoir(examples)

    def drop(self, reason: str) -> None:
        """Count a copy that never got an answer, through no fault of the challenger's."""
        _add(self.dropped, reason)

    def failed(self, code: str, text: str) -> None:
        """Count a copy that got an error."""
        _add(self.errors, code)
        self.last_error = readable(text, _LONGEST)

    def answers(self, champion_ms: float, challenger_ms: float) -> None:
        """Count a copy that was answered, and how long both took for the same request."""
        self.answered += 1
        self.champion_ms.add(champion_ms)
        self.challenger_ms.add(challenger_ms)

    def cannot_compare(self, text: str) -> None:
        """Count two answers that could not be compared."""
        self.not_compared += 1
        self.last_comparison_error = readable(text, _LONGEST)

    def compares(self, verdict: Verdict, id: str, value: Any, champion: Any, challenger: Any) -> None:
        """Count a comparison, and perhaps keep the request as an example of a disagreement."""
        place = None if verdict.agrees else self._examples.place()
        if place is not None:
            example = {
                "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
                "id": readable(id, 200),
                "reason": readable(verdict.reason, _LONGEST),
                "inputs": summary(value),
                "champion": summary(champion),
                "challenger": summary(challenger),
            }
            self._examples.put(place, example)
        self.compared += 1
        self.rows += verdict.rows
        self.agreeing_rows += verdict.agreeing_rows
        for given, difference in verdict.differences.items():
            name = readable(given, _LONGEST)
            if name in self.differences or len(self.differences) < _NAMES:
                self.differences.setdefault(name, Sketch()).add(difference)
        if verdict.agrees:
            self.agreed += 1
        else:
            _add(self.reasons, readable(verdict.reason, _LONGEST))

    def report(self) -> dict[str, Any]:
        """Return all of it as plain values."""
        failed = sum(self.errors.values())
        return {
            "sampled": self.sampled,
            "dropped": dict(self.dropped),
            "answered": self.answered,
            "errors": {"of": self.answered + failed, "failed": failed, **share_of(failed, self.answered + failed)},
            "errors_by_code": dict(self.errors),
            "last_error": self.last_error,
            "agreement": {"of": self.compared, "agreed": self.agreed, **share_of(self.agreed, self.compared)},
            "rows": {
                "of": self.rows,
                "agreed": self.agreeing_rows,
                "rate": self.agreeing_rows / self.rows if self.rows else None,
            },
            "confidence": CONFIDENCE,
            "disagreements": dict(self.reasons),
            "not_compared": self.not_compared,
            "last_comparison_error": self.last_comparison_error,
            "differences": {name: sketch.report() for name, sketch in self.differences.items()},
            "latency_ms": {"champion": self.champion_ms.report(), "challenger": self.challenger_ms.report()},
            "examples": self._examples.all(),
        }

    def sums(self) -> dict[tuple[str, ...], Array]:
        """Return all counts, as numbers that add up with those of other workers.

        Not the examples and texts of errors: they hold contents of requests, and are not to leave the process.
        """
        found: dict[tuple[str, ...], Array] = {("numbers",): np.array([float(getattr(self, name)) for name in _NUMBERS])}
        for kind in _COUNTS:
            found |= {(kind, name): np.array([float(count)]) for name, count in getattr(self, kind).items()}
        return found | {place: sketch.sums() for place, sketch in self._sketches()}

    def take(self, sums: Mapping[tuple[str, ...], Array]) -> None:
        """Become the record of these sums.

        Raises:
            ValueError: they are none.
        """
        numbers = np.zeros(len(_NUMBERS))
        given = sums.get(("numbers",), numbers)
        numbers[: len(given)] = given
        for name, number in zip(_NUMBERS, numbers.tolist(), strict=True):
            setattr(self, name, int(number))
        self.dropped, self.errors, self.reasons = (
            {place[1]: int(count[0]) for place, count in sums.items() if place[0] == kind and count.any()} for kind in _COUNTS
        )
        for place in sums:
            if place[0] == "differences" and place[1] not in self.differences:
                self.differences[place[1]] = Sketch()
        for place, sketch in self._sketches():
            sketch.take(sums.get(place, _NOTHING))

    def _sketches(self) -> list[tuple[tuple[str, ...], Sketch]]:
        differences = [(("differences", name), sketch) for name, sketch in self.differences.items()]
        return [(("champion_ms",), self.champion_ms), (("challenger_ms",), self.challenger_ms), *differences]


_NOTHING: Final = np.zeros(0)
_NUMBERS: Final = ("sampled", "answered", "compared", "agreed", "not_compared", "rows", "agreeing_rows")
_COUNTS: Final = ("dropped", "errors", "reasons")


def _add(counts: dict[str, int], name: str) -> None:
    if name not in counts and len(counts) >= _NAMES:
        name = "others"
    counts[name] = counts.get(name, 0) + 1
