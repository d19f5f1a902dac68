"""The kinds of guardrails at work: error rate, latency, metric."""

from __future__ import annotations

from math import isnan, nan
from typing import Any, Final

import numpy as np

from servinggraph.routers.rollout.evidence import Floats, Tally
from servinggraph.routers.rollout.guardrails import ErrorRateGuardrail, GuardrailOptions, LatencyGuardrail, MetricGuardrail
from servinggraph.routers.rollout.outcomes import Outcomes
from servinggraph.routers.rollout.schedule import percent
from servinggraph.routers.rollout.watch import BASELINE, CHALLENGER, Limits, Watch
from servinggraph.routers.rollout.windows import BUCKETS, bucket_counts, quantile_s, share_above

__all__ = ["ErrorRateWatch", "LatencyWatch", "MetricWatch", "watch_of"]

_ENOUGH: Final = 50
"""Samples of the baseline from which its quantile or mean is a reference: the test is valid with any; better ones see more."""


class ErrorRateWatch(Watch):
    """Watches the share of requests that fail; y is 1 for a failure."""

    def __init__(self, name: str, options: ErrorRateGuardrail, limits: Limits, now: float) -> None:
        self._options = options
        ratio = None if options.limit is not None else options.ratio or 1.0
        margin = options.margin if options.limit is None else options.limit
        self._rate = 0.0
        super().__init__(name, limits, ratio, margin or 0.0, now)

    def _seen(self, outcomes: Outcomes) -> tuple[Tally, Floats]:
        total, failures = len(outcomes.durations), outcomes.failures
        return Tally.of_events(total, failures), np.array([total, failures], np.float64)

    def _centre(self) -> float:
        return self._rate

    def _learn(self, baseline: Floats) -> None:
        if baseline[0] >= _ENOUGH:
            self._rate = float(baseline[1] / baseline[0])

    def _means(self, window: Floats) -> tuple[float, float]:
        return _ratio(window[CHALLENGER]), _ratio(window[BASELINE])

    def _shown(self, window: Floats) -> tuple[float, float]:
        return self._means(window)

    def _text(self, value: float) -> str:
        return f"{value:.2%}"

    def _what(self) -> str:
        return "error_rate"

    def _allowed(self) -> str:
        options = self._options
        if options.limit is not None:
            return f"{percent(options.limit)}"
        return f"+{percent(options.margin or 0)}" if options.ratio is None else f"x{options.ratio:g}"


class LatencyWatch(Watch):
    """Watches a quantile of durations.

    y is 1 for a request that takes longer than a line: the baseline's quantile for the baseline, and what the
    challenger may take at most for the challenger. If no more of the challenger's requests are above its line than of
    the baseline's above theirs, the quantile is within its bound; so shares are compared, and the line only has to be
    fixed before the requests that are held against it.
    """

    columns = 1 + BUCKETS

    def __init__(self, name: str, options: LatencyGuardrail, limits: Limits, now: float) -> None:
        self._options = options
        self._lines: tuple[float, float] | None = None
        if options.limit_ms is None:
            super().__init__(name, limits, 1.0, 0.0, now)
        else:
            self._lines = options.limit_ms / 1e3, nan
            super().__init__(name, limits, None, 1 - options.quantile, now)

    def _seen(self, outcomes: Outcomes) -> tuple[Tally, Floats]:
        durations = np.asarray(outcomes.durations, np.float64)
        line = nan if self._lines is None else self._lines[CHALLENGER if outcomes.challenger else BASELINE]
        # Whoever left after the line has seen a slow answer; of one who left before nobody knows.
        gone = np.asarray([seconds for seconds in outcomes.gone if seconds > line], np.float64)
        slow = int((durations > line).sum()) + len(gone)
        total = len(durations) + len(gone)
        buckets = bucket_counts(np.concatenate([durations, gone])) if total else np.zeros(BUCKETS)
        return Tally.of_events(total, slow), np.concatenate([[total], buckets])

    def _centre(self) -> float | None:
        return None if self._lines is None else 1 - self._options.quantile

    def _learn(self, baseline: Floats) -> None:
        options = self._options
        if options.limit_ms is None and baseline[0] >= _ENOUGH:
            line = quantile_s(baseline[1:], options.quantile, upper=True)
            self._lines = line * (options.ratio or 1) + (options.margin_ms or 0) / 1e3, line

    def _means(self, window: Floats) -> tuple[float, float]:
        if self._lines is None:
            return nan, nan
        mine, other = self._lines
        # Without a line for the baseline (`limit_ms`) there is nothing to be above.
        return share_above(window[CHALLENGER][1:], mine), nan if isnan(other) else share_above(window[BASELINE][1:], other)

    def _shown(self, window: Floats) -> tuple[float, float]:
        quantile = self._options.quantile
        return quantile_s(window[CHALLENGER][1:], quantile) * 1e3, quantile_s(window[BASELINE][1:], quantile) * 1e3

    def _text(self, value: float) -> str:
        return f"{value:.3g} ms"

    def _what(self) -> str:
        return f"latency_p{self._options.quantile * 100:g}_ms"

    def _allowed(self) -> str:
        options = self._options
        if options.limit_ms is not None:
            return f"{options.limit_ms:g} ms"
        return f"+{options.margin_ms:g} ms" if options.ratio is None else f"x{options.ratio:g}"


class MetricWatch(Watch):
    """Watches the mean of a metric; y is how far a value is from the better end of its range.

    Attributes:
        outside: values beyond the range, which counted as its nearer end.
        unusable: values that were no numbers and did not count.
    """

    def __init__(self, name: str, options: MetricGuardrail, limits: Limits, now: float) -> None:
        self._options = options
        low, high = options.range
        self._span = high - low
        self._mean: float | None = None if options.limit is None else 0.5
        self.outside = self.unusable = 0
        if options.limit is None:
            super().__init__(name, limits, 1.0, (options.margin or 0.0) / self._span, now)
        else:
            super().__init__(name, limits, None, self._badness(options.limit), now)

    def _seen(self, outcomes: Outcomes) -> tuple[Tally, Floats]:
        values = np.asarray(outcomes.observed.get(self._options.metric, ()), np.float64)
        usable = values[~np.isnan(values)]
        self.unusable += len(values) - len(usable)
        low, high = self._options.range
        inside = np.clip(usable, low, high)
        self.outside += int((inside != usable).sum())
        bad = self._badness(inside)
        return Tally.of_values(bad), np.array([len(bad), bad.sum()], np.float64)

    def _badness(self, value: Any) -> Any:
        low, high = self._options.range
        return (high - value if self._options.better == "higher" else value - low) / self._span

    def _centre(self) -> float | None:
        return self._mean

    def _learn(self, baseline: Floats) -> None:
        if self.compared and baseline[0] >= _ENOUGH:
            self._mean = float(baseline[1] / baseline[0])

    def _means(self, window: Floats) -> tuple[float, float]:
        return _ratio(window[CHALLENGER]), _ratio(window[BASELINE])

    def _shown(self, window: Floats) -> tuple[float, float]:
        low, high = self._options.range
        mine, other = (mean * self._span for mean in self._means(window))
        return (high - mine, high - other) if self._options.better == "higher" else (low + mine, low + other)

    def _text(self, value: float) -> str:
        return f"{value:.4g}"

    def _what(self) -> str:
        return self._options.metric

    def _allowed(self) -> str:
        options = self._options
        higher = options.better == "higher"
        if options.limit is not None:
            return f"{'at least' if higher else 'at most'} {options.limit:g}"
        return f"{'-' if higher else '+'}{options.margin:g}"

    def report(self, share: float) -> dict[str, Any]:
        return {**super().report(share), "outside_range": self.outside, "unusable": self.unusable}


def watch_of(name: str, options: GuardrailOptions, limits: Limits, now: float) -> Watch:
    """Return what watches as a guardrail's options say."""
    if isinstance(options, ErrorRateGuardrail):
        return ErrorRateWatch(name, options, limits, now)
    if isinstance(options, LatencyGuardrail):
        return LatencyWatch(name, options, limits, now)
    return MetricWatch(name, options, limits, now)


def _ratio(counted: Floats) -> float:
    return float(counted[1] / counted[0]) if counted[0] else nan
