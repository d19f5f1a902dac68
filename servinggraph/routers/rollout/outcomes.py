"""What the requests of a rollout brought, as the hot path notes it: plain lists that are evaluated together."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Final

from servinggraph.context import Meter
from servinggraph.errors import ErrorCode, ServingGraphError

__all__ = ["NO_LIFE", "Metering", "Outcomes", "Phase"]

_CALLERS: Final = frozenset(
    {
        ErrorCode.INVALID_REQUEST,
        ErrorCode.NOT_FOUND,
        ErrorCode.CONFLICT,
        ErrorCode.TOO_LARGE,
        ErrorCode.UNSUPPORTED,
        ErrorCode.UNSUPPORTED_TYPE,
        ErrorCode.NOT_ACCEPTABLE,
        ErrorCode.CANCELLED,
    }
)
"""Failures that the caller made: they say nothing of the branch."""

NO_LIFE: Final = -1
"""The life of a phase whose outcomes are not looked at."""

_EARLY_S: Final = 0.002
"""A timer of the event loop may be this early."""


class Outcomes:
    """What one branch brought since it was evaluated last.

    Attributes:
        phase: the phase that its requests were decided in.
        challenger: True for the challenger.
        durations: of requests that were answered or failed by the branch's fault, seconds.
        failures: how many of them failed.
        gone: how long requests had taken whose callers left, seconds.
        most: durations, or values of a metric, with which it is time to evaluate them.
        values: what was observed, by metric; steps add to it from any thread.
        observed: what of it is being evaluated.
    """

    __slots__ = ("challenger", "durations", "failures", "gone", "most", "observed", "phase", "values")

    def __init__(self, phase: Phase, challenger: bool, metrics: Iterable[str]) -> None:
        self.phase = phase
        self.challenger = challenger
        self.most = 1
        self.values: dict[str, list[float]] = {metric: [] for metric in metrics}
        self.observed: dict[str, list[float]] = {}
        self.clear()

    def settle(self) -> None:
        """Set apart what was observed until now: it is evaluated, and what is observed meanwhile is not lost."""
        for metric, values in self.values.items():
            count = len(values)
            self.observed[metric] = values[:count]
            del values[:count]

    def clear(self) -> None:
        """Forget what has been evaluated."""
        self.durations: list[float] = []
        self.gone: list[float] = []
        self.failures = 0
        self.observed = {}

    def failed(self, error: BaseException, seconds: float, deadline: float | None, now: float) -> None:
        """Note a request that was not answered.

        Args:
            error: why.
            seconds: how long it took.
            deadline: the request's deadline, on the clock of `now`.
            now: the time.
        """
        if isinstance(error, ServingGraphError):
            if error.code in _CALLERS:
                return
        elif isinstance(error, asyncio.CancelledError):
            # At its deadline a request is cancelled from outside: the branch was too slow. Otherwise the caller left.
            if deadline is None or now < deadline - _EARLY_S:
                self.gone.append(seconds)
                return
        elif not isinstance(error, Exception):
            return
        self.failures += 1
        self.durations.append(seconds)


class Phase:
    """A time in which the challenger's share stays the same.

    Attributes:
        share: the challenger's share of the requests.
        challenger: outcomes of the challenger.
        baseline: outcomes of the baseline.
        life: the trial it belongs to; once that is over, what still comes from it is not looked at.
    """

    __slots__ = ("baseline", "challenger", "life", "share")

    def __init__(self, share: float, metrics: Iterable[str], life: int) -> None:
        self.share = share
        metrics = tuple(metrics)
        self.challenger = Outcomes(self, True, metrics)
        self.baseline = Outcomes(self, False, metrics)
        self.life = life


class Metering:
    """A meter that notes the metrics that guardrails watch, and hands everything on.

    Args:
        outcomes: where they are noted.
        outer: the meter that everything is handed on to.
    """

    __slots__ = ("_outcomes", "_outer")

    def __init__(self, outcomes: Outcomes, outer: Meter | None) -> None:
        self._outcomes = outcomes
        self._outer = outer

    def count(self, name: str, amount: float) -> None:
        if self._outer is not None:
            self._outer.count(name, amount)

    def observe(self, name: str, value: float) -> None:
        values = self._outcomes.values.get(name)
        if values is not None:
            values.append(float(value))
        if self._outer is not None:
            self._outer.observe(name, value)
