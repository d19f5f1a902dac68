"""Remembers what was decided for a request, for the feedback that comes later: bounded in number and age."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from hashlib import blake2b
from typing import Final, Generic, TypeVar

__all__ = ["Decisions"]

T = TypeVar("T")

_LONGEST: Final = 128
"""Longer ids, which a caller makes as long as a request may be, are remembered by a hash."""


class Decisions(Generic[T]):
    """Request ids with what was decided for each, the oldest forgotten first.

    Args:
        size: most ids that are remembered, 1 or more.
        age_s: seconds after which an id is forgotten.
        forgotten: told of each decision that is forgotten; not of one that another takes the place of.

    Attributes:
        duplicates: claims of a decision that had been claimed before for the same use.
        unknown: claims of an id that was never noted, or is forgotten.
    """

    __slots__ = ("_age_s", "_forgotten", "_noted", "_size", "duplicates", "unknown")

    def __init__(self, size: int = 100_000, age_s: float = 3600, forgotten: Callable[[T], None] | None = None) -> None:
        self._size = size
        self._age_s = age_s
        self._forgotten = forgotten
        # In order of time: an id that comes again is moved to the end. An OrderedDict, since the first of a plain dict
        # is found by a walk over all that were removed before it. The set of uses is made by the first claim, since
        # most requests never get one.
        self._noted: OrderedDict[str | bytes, tuple[float, T, set[str] | None]] = OrderedDict()
        self.duplicates = 0
        self.unknown = 0

    def __len__(self) -> int:
        return len(self._noted)

    def note(self, id: str, decision: T, now: float) -> None:
        """Remember a decision; of several for one id the last counts, and can be claimed anew.

        Args:
            id: the request's; one that is empty cannot be asked for and is not kept.
            decision: what was decided.
            now: seconds, on any clock that does not go back.
        """
        if not id:
            return
        key, noted = _key(id), self._noted
        noted[key] = (now, decision, None)
        noted.move_to_end(key)
        if len(noted) > self._size:
            self._drop_first()

    def claim(self, id: str, use: str, now: float) -> T | None:
        """Return the decision for an id, once for each use.

        Args:
            id: the request's.
            use: what it is wanted for, the name of a metric say.
            now: seconds, on the clock of `note`.

        Returns:
            The decision; None where it is unknown or was claimed before, which is counted.
        """
        self.forget(now)
        key = _key(id)
        found = self._noted.get(key)
        if found is None:
            self.unknown += 1
            return None
        time, decision, uses = found
        if uses is None:
            self._noted[key] = (time, decision, {use})
            return decision
        if use in uses:
            self.duplicates += 1
            return None
        uses.add(use)
        return decision

    def find(self, id: str, now: float) -> T | None:
        """Return the decision for an id and claim nothing; None where it is unknown."""
        self.forget(now)
        found = self._noted.get(_key(id))
        return None if found is None else found[1]

    def forget(self, now: float) -> None:
        """Forget what is too old; asked for by `claim` and `find`, too."""
        noted, oldest = self._noted, now - self._age_s
        while noted:
            if noted[next(iter(noted))][0] >= oldest:
                return
            self._drop_first()

    def _drop_first(self) -> None:
        _, (_, decision, _) = self._noted.popitem(last=False)
        if self._forgotten is not None:
            self._forgotten(decision)


def _key(id: str) -> str | bytes:
    """Return what an id is remembered by; a hash is of another type, so that no id is one."""
    return id if len(id) <= _LONGEST else blake2b(id.encode("utf-8", "surrogateescape"), digest_size=32).digest()
