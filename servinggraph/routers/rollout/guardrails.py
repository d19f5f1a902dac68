"""Guardrails as they are declared: what of the challenger is watched, and how much worse than the baseline it may be."""

from __future__ import annotations

from math import isfinite
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator

from servinggraph.routers.rollout.schedule import Share
from servinggraph.settings import Options

__all__ = ["ErrorRateGuardrail", "GuardrailOptions", "LatencyGuardrail", "MetricGuardrail"]


def _quantile(given: Any) -> float:
    try:
        part = float(given[1:]) / 100 if isinstance(given, str) and given.startswith("p") else float("nan")
    except ValueError:
        part = float("nan")
    if not 0.01 <= part <= 0.999:
        raise ValueError(f"a quantile is p1 to p99.9, got {given!r}")
    return part


Quantile = Annotated[float, BeforeValidator(_quantile), WithJsonSchema({"type": "string", "pattern": r"^p\d{1,2}(\.\d+)?$"})]


class _Bounded(Options):
    """What all guardrails have: exactly one bound, and how many samples it asks for."""

    bounds: ClassVar[tuple[str, ...]]

    min_samples: int | None = Field(
        None, ge=1, description="Samples of each branch without which no step ends; by default the router's `min_samples`."
    )

    @model_validator(mode="after")
    def _one_bound(self) -> Self:
        given = [name for name in self.bounds if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"a guardrail has exactly one of {', '.join(self.bounds)}, got {', '.join(given) or 'none'}")
        return self


class ErrorRateGuardrail(_Bounded):
    """The share of requests that fail by the branch's fault, not by the caller's."""

    bounds = ("margin", "ratio", "limit")

    watch: Literal["error_rate"] = Field(description="What is watched.")
    margin: Share | None = Field(None, description="How far the challenger's rate may be above the baseline's: 1%.")
    ratio: float | None = Field(
        None,
        ge=1,
        description="How many times the baseline's rate it may be; `margin` is calmer where the baseline hardly ever fails.",
    )
    limit: Share | None = Field(None, description="How high it may be, whatever the baseline's is.")


class LatencyGuardrail(_Bounded):
    """A quantile of how long requests take, answered or failed."""

    bounds = ("ratio", "margin_ms", "limit_ms")

    watch: Literal["latency"] = Field(description="What is watched.")
    quantile: Quantile = Field("p99", validate_default=True, description="Which quantile: p50 to p99.9.")
    ratio: float | None = Field(None, ge=1, description="How many times the baseline's quantile the challenger's may be.")
    margin_ms: float | None = Field(None, ge=0, description="How far it may be above the baseline's.")
    limit_ms: float | None = Field(None, gt=0, description="How high it may be, whatever the baseline's is.")


class MetricGuardrail(_Bounded):
    """The mean of a metric: what a step observes (`context.observe`), or what feedback says of a request."""

    bounds = ("margin", "limit")

    watch: Literal["metric"] = Field(description="What is watched.")
    metric: str = Field("reward", min_length=1, description="Its name; feedback without one is called reward.")
    better: Literal["higher", "lower"] = Field("higher", description="Which direction is better.")
    range: tuple[float, float] = Field(
        (0.0, 1.0), strict=False, description="Least and largest value; what is outside counts as the nearer end."
    )
    margin: float | None = Field(None, ge=0, description="How far the challenger's mean may be worse than the baseline's.")
    limit: float | None = Field(None, description="The worst mean it may have, whatever the baseline's is.")

    @model_validator(mode="after")
    def _check_range(self) -> Self:
        low, high = self.range
        if not (isfinite(low) and isfinite(high) and low < high):
            raise ValueError(f"range is two numbers, the lower first, got {list(self.range)}")
        if self.limit is not None and not low <= self.limit <= high:
            raise ValueError(f"limit {self.limit:g} is outside of range {list(self.range)}")
        return self


GuardrailOptions = Annotated[ErrorRateGuardrail | LatencyGuardrail | MetricGuardrail, Field(discriminator="watch")]
