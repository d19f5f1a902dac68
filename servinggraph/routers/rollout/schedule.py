"""The steps of a rollout: what share of the requests the challenger gets, and for how long."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Annotated, Any, Final

from pydantic import BeforeValidator, Field, WithJsonSchema

from servinggraph.settings import Options

__all__ = ["Duration", "RolloutStep", "Share", "Stage", "duration_s", "percent", "share", "stages"]

_UNITS: Final = {"ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_DURATION: Final = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|s|m|h|d)")
_PERCENT: Final = re.compile(r"(\d+(?:\.\d+)?)\s*%")


def duration_s(given: Any) -> float:
    """Return a duration in seconds: text such as 500ms, 30s, 10m, 2h or 1d.

    Raises:
        ValueError: it is none, or not above 0.
    """
    found = _DURATION.fullmatch(given.strip()) if isinstance(given, str) else None
    if found is None:
        raise ValueError(f"a duration is a number with its unit, 500ms, 30s, 10m, 2h or 1d, got {given!r}")
    seconds = float(found[1]) * _UNITS[found[2]]
    if seconds <= 0:
        raise ValueError(f"a duration is above 0, got {given!r}")
    return seconds


def share(given: Any) -> float:
    """Return a share from 0 to 1: text such as 10%, or a number with a decimal point such as 0.1.

    Raises:
        ValueError: it is none. A whole number is refused, since 1 may mean 1 % or all.
    """
    found = _PERCENT.fullmatch(given.strip()) if isinstance(given, str) else None
    part = float(found[1]) / 100 if found else given
    if not isinstance(part, float) or not isfinite(part) or not 0 <= part <= 1:
        raise ValueError(f"a share is text such as 10%, or a decimal such as 0.1, from 0 to 1, got {given!r}")
    return part


def percent(part: float) -> str:
    """Return a share as `share` reads it: 10%."""
    return f"{part * 100:.6g}%"


Duration = Annotated[
    float, BeforeValidator(duration_s), WithJsonSchema({"type": "string", "pattern": rf"^\s*{_DURATION.pattern}\s*$"})
]
Share = Annotated[
    float,
    BeforeValidator(share),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "pattern": rf"^\s*{_PERCENT.pattern}\s*$"},
                {"type": "number", "minimum": 0, "maximum": 1},
            ]
        }
    ),
]


class RolloutStep(Options):
    """One step of a schedule."""

    share: Share = Field(description="Share of the requests that the challenger gets: 10%, or 0.1.")
    hold: Duration | None = Field(
        None, description="How long the step lasts at least: 500ms, 30s, 10m, 2h, 1d; by default the router's `hold`."
    )


@dataclass(frozen=True, slots=True)
class Stage:
    """A step of a schedule as it runs.

    Attributes:
        name: its share as text, which names it.
        share: share of the requests that the challenger gets, above 0 up to 1.
        hold_s: how long it lasts at least, seconds.
    """

    name: str
    share: float
    hold_s: float


def stages(steps: Sequence[float | RolloutStep], hold_s: float) -> tuple[Stage, ...]:
    """Return the stages of a schedule.

    Args:
        steps: a share each, or a share with its own hold.
        hold_s: hold of those that have none, seconds.

    Raises:
        ValueError: there is none, or the shares do not rise.
    """
    given = [step if isinstance(step, RolloutStep) else RolloutStep.model_construct(share=step, hold=None) for step in steps]
    made = tuple(Stage(percent(step.share), step.share, hold_s if step.hold is None else step.hold) for step in given)
    if not made:
        raise ValueError("steps are at least one share, such as [1%, 10%, 50%, 100%]")
    last = 0.0
    for stage in made:
        if stage.share <= last:
            raise ValueError(f"steps rise from above 0% on, but {stage.name} comes after {percent(last)}")
        last = stage.share
    return made
