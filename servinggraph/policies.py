"""What a definition may ask of any node: retries, a circuit breaker, a rate limit, places."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from servinggraph.interfaces import Options

__all__ = ["BreakerPolicy", "ConcurrencyPolicy", "Guards", "RateLimit", "RetryPolicy"]


class RetryPolicy(Options):
    """When a failed node runs again for the same request."""

    attempts: int = Field(2, ge=2, le=100, description="Most runs for a request, the first included.")
    backoff_ms: float = Field(20, ge=0, description="Longest pause before the second run; doubled for each further one.")
    max_backoff_ms: float = Field(1000, ge=0, description="Longest pause at all.")
    jitter: bool = Field(True, description="Pause any part of that, by chance, so that many callers do not come at once.")
    on: list[Literal["unavailable", "limit_exceeded", "deadline_exceeded", "internal"]] = Field(
        ["unavailable", "limit_exceeded", "internal"],
        min_length=1,
        description="Codes of errors after which it runs again; none of them is the caller's mistake.",
    )
    budget: float = Field(0.2, ge=0, le=10, description="Retries for each request, in the long run: a storm cannot multiply.")
    burst: int = Field(10, ge=1, description="Retries beyond that, at once.")


class BreakerPolicy(Options):
    """When a node that fails is not called any more for a while."""

    failures: int = Field(
        5,
        ge=1,
        description="Failed calls, of the last `window`, that open it: those that ran out of time count, callers' mistakes and "
        "refusals by the node's own limits do not.",
    )
    window: int | None = Field(None, ge=1, description="Calls that are looked at; by default as many as `failures`.")
    open_ms: float = Field(5000, gt=0, description="How long no call goes through.")
    probes: int = Field(1, ge=1, description="Calls at a time that then try whether it works again.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.window is not None and self.window < self.failures:
            raise ValueError(f"window {self.window} must hold failures {self.failures}")
        return self


class RateLimit(Options):
    """How often a node may be called."""

    per_s: float = Field(gt=0, description="Calls a second.")
    burst: float | None = Field(None, ge=1, description="Calls at once after a pause; by default those of a second.")


class ConcurrencyPolicy(Options):
    """How many calls of a node run at once."""

    limit: int = Field(ge=1, description="Calls at once.")
    max_queue: int = Field(1024, ge=0, description="Calls that wait for a place; one more is refused with 503.")


class Guards(Options):
    """What stands guard over a node."""

    retry: RetryPolicy | None = Field(None, description="Run again for a request when it fails.")
    circuit_breaker: BreakerPolicy | None = Field(
        None, description="Stop calling it for a while when it fails; `{}` for the defaults."
    )
    rate_limit: RateLimit | None = Field(None, description="How often it may be called.")
    max_concurrency: ConcurrencyPolicy | None = Field(
        None, description="How many calls run at once; a number, or limit and queue."
    )

    @field_validator("max_concurrency", mode="before")
    @classmethod
    def _limit_alone(cls, value: object) -> object:
        return {"limit": value} if isinstance(value, int) and not isinstance(value, bool) else value

    @property
    def is_needed(self) -> bool:
        """True when there is any."""
        return any(guard is not None for guard in (self.retry, self.circuit_breaker, self.rate_limit, self.max_concurrency))
