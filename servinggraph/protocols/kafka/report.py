"""What a graph's topics look like from here: counts for metrics, and a state in words."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

__all__ = ["Counts"]


@dataclass(slots=True)
class Counts:
    """What happened since the start. Numbers only grow.

    Attributes:
        consumed: records that were read.
        produced: answers that the broker has.
        errors: records given up, by error code; told to the caller or written to the dead letters.
        dead_letters: of these, dead letters that the broker has.
        duplicates: records that were not run, because a request of their id was answered or runs.
        retries: further attempts.
        commits: commits, or with `exactly_once` transactions.
        rebalances: how often the partitions were given out anew.
        reconnects: how often the connection was made anew after a failure.
        abandoned: records that ran when their partition went to another member, and were not written.
        pauses: how often reading paused because too much was in memory.
        paused_s: for how long, seconds.
        seconds: from a record's timestamp to its answer in the broker, summed over all.
    """

    consumed: int = 0
    produced: int = 0
    errors: dict[str, int] = field(default_factory=dict)
    dead_letters: int = 0
    duplicates: int = 0
    retries: int = 0
    commits: int = 0
    rebalances: int = 0
    reconnects: int = 0
    abandoned: int = 0
    pauses: int = 0
    paused_s: float = 0.0
    seconds: float = 0.0

    def failed(self, code: str, *, dead: bool) -> None:
        """Note a record that was given up."""
        self.errors[code] = self.errors.get(code, 0) + 1
        self.dead_letters += dead

    def plain(self) -> dict[str, Any]:
        """Return them as plain values."""
        return {name: getattr(self, name) for name in self.__slots__}
