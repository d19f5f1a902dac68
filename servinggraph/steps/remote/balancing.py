"""Which of several addresses a call goes to, and which are left alone for a while. Decisions only: no clock, no await.

Sources: Mitzenmacher, The Power of Two Choices in Randomized Load Balancing (2001); outlier ejection as in Envoy.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from random import Random
from typing import Generic, TypeVar

from pydantic import Field

from servinggraph.interfaces import Options

__all__ = ["Balancer", "Ejection", "Member"]

T = TypeVar("T")


class Ejection(Options):
    """When an address that fails is left alone. A node with one address calls it all the same: see `circuit_breaker`."""

    failures: int = Field(3, ge=1, description="Failed calls in a row after which an address is left alone.")
    pause_ms: float = Field(1000, gt=0, description="How long, before it is asked whether it is ready; doubled each time.")
    max_pause_ms: float = Field(30_000, gt=0, description="Longest such pause.")
    probe_timeout_ms: float = Field(1000, gt=0, description="How long an address has to say that it is ready.")


class Member(Generic[T]):
    """One address.

    Attributes:
        value: what there is to call.
        outstanding: calls under way.
        ejected: True while it is left alone.
    """

    __slots__ = ("_failures", "_pauses", "ejected", "outstanding", "value")

    def __init__(self, value: T) -> None:
        self.value = value
        self.outstanding = 0
        self.ejected = False
        self._failures = 0
        self._pauses = 0

    def worked(self) -> None:
        """Note an answer: whatever was wrong is over."""
        self.ejected = False
        self._failures = self._pauses = 0

    def failed(self, policy: Ejection) -> float | None:
        """Note a failure; return for how many seconds the address is left alone from now on, None where it is not."""
        self._failures += 1
        return self.eject(policy) if self._failures >= policy.failures and not self.ejected else None

    def eject(self, policy: Ejection) -> float:
        """Leave the address alone, longer each time; return for how many seconds."""
        self.ejected = True
        pause = min(policy.max_pause_ms, policy.pause_ms * 2.0 ** min(self._pauses, 60))
        self._pauses += 1
        return pause / 1e3

    def admit(self) -> None:
        """Let the address be called again. One more failure and it is left alone for longer."""
        self.ejected = False
        self._failures = max(0, self._failures - 1)


class Balancer(Generic[T]):
    """Chooses between addresses: of two taken by chance, the one with fewer calls under way.

    Args:
        values: what there is to call, one for each address.
        random: where chance comes from.
    """

    def __init__(self, values: Sequence[T], random: Random | None = None) -> None:
        self.members = [Member(value) for value in values]
        self._random = random or Random()  # noqa: S311  (spreads load, hides nothing)

    def choose(self, tried: Collection[Member[T]] = ()) -> Member[T] | None:
        """Return an address for a call; None when each was tried.

        With all of them ejected any is chosen: a call that may fail is better than one that does.
        """
        untried = [member for member in self.members if member not in tried]
        candidates = [member for member in untried if not member.ejected] or untried
        if len(candidates) < 2:
            return candidates[0] if candidates else None
        one, other = self._random.sample(candidates, 2)
        return one if one.outstanding <= other.outstanding else other
