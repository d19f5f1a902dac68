"""What a router remembers of the requests that it answered, until their feedback comes: bounded in number, age and bytes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from pydantic import Field

from servinggraph.interfaces import Options
from servinggraph.routers.selection import Decisions
from servinggraph.tensors import Array

__all__ = ["Answered", "Answers", "Window"]


class Window(Options):
    """How long feedback for a request is waited for."""

    size: int = Field(100_000, ge=1, description="Most requests that are remembered; the oldest is forgotten first.")
    age_s: float = Field(3600, gt=0, description="Seconds after which a request is forgotten: its feedback is too late then.")
    max_bytes: int = Field(
        100_000_000,
        ge=0,
        description="Most bytes of features, and of answers that are kept to be compared with a `truth`; the oldest is "
        "forgotten first.",
    )


class Answered:
    """A request that was answered.

    Attributes:
        variant: who answered.
        features: what a contextual policy decided by; None where it looks at none, or not any more.
        answer: the answer, where a truth may come; None where it is not kept, or not any more.
        size: bytes of both.
        learned: True once its reward has come.
        unseen: True where the caller got another answer, in the shadow of a champion: a reward is not for this one.
    """

    __slots__ = ("answer", "features", "learned", "size", "unseen", "variant")

    def __init__(self, variant: str, features: Array | None, *, unseen: bool = False) -> None:
        self.variant = variant
        self.features = features
        self.answer: Any = None
        self.size = 0
        self.learned = False
        self.unseen = unseen


class Answers:
    """Requests by id.

    Args:
        window: bounds.
        keep: True to keep answers.
        missed: told of each request that is forgotten before its feedback has come; None where nobody asks.

    Attributes:
        missed: as given; the router that takes over the requests takes over this.
        duplicates: feedback for a request that had its feedback already.
        unknown: feedback for a request that was never answered here, or is forgotten.
    """

    def __init__(self, window: Window, *, keep: bool, missed: Callable[[Answered], None] | None = None) -> None:
        self.missed = missed
        self._noted: Decisions[Answered] = Decisions(window.size, window.age_s, self._forgotten if missed else None)
        self._max_bytes = window.max_bytes
        self._keep = keep
        self._kept: deque[Answered] = deque()
        self._bytes = 0
        self.duplicates = 0
        self.unknown = 0

    def __len__(self) -> int:
        return len(self._noted)

    @property
    def bytes(self) -> int:
        """Bytes of the answers and features that are kept."""
        return self._bytes

    def note(self, id: str, variant: str, features: Array | None, answer: Any, now: float, *, unseen: bool = False) -> None:
        """Remember a request that has an id; of several with the same id the last."""
        if not id:
            return
        entry = Answered(variant, features, unseen=unseen)
        if self._keep:
            entry.answer = _own(answer)
        if self._keep or features is not None:
            self._hold(entry)
        self._noted.note(id, entry, now)

    def find(self, id: str, now: float) -> Answered | None:
        """Return what is remembered of a request; None where nothing is."""
        return self._noted.find(id, now)

    def expire(self, now: float) -> None:
        """Forget what is too old."""
        self._noted.forget(now)

    def _forgotten(self, entry: Answered) -> None:
        if self.missed is not None and not entry.learned and not entry.unseen:
            self.missed(entry)

    def learned(self, entry: Answered) -> None:
        """Note that a request has its reward, and let go of what it was learned from."""
        entry.learned = True
        self._release(entry)

    def _hold(self, entry: Answered) -> None:
        entry.size = _size_of(entry.answer) + _size_of(entry.features)
        self._bytes += entry.size
        self._kept.append(entry)
        # Also those that have let go of theirs: so this is never longer than what is remembered, and a little.
        while self._kept and (self._bytes > self._max_bytes or self._kept[0].size == 0 or len(self._kept) > self._most):
            self._release(self._kept.popleft())

    @property
    def _most(self) -> int:
        return 2 * len(self._noted) + 16

    def _release(self, entry: Answered) -> None:
        self._bytes -= entry.size
        entry.answer, entry.features, entry.size = None, None, 0


def _own(answer: Any) -> Any:
    """Return an answer whose tensors nobody writes into, and that hold no memory but their own: some are rows of a batch."""
    if not isinstance(answer, Mapping):
        return answer
    return {name: array.copy() if isinstance(array, np.ndarray) else array for name, array in answer.items()}


def _size_of(answer: Any) -> int:
    """Return the bytes of an answer, about."""
    if isinstance(answer, Mapping):
        return 200 + sum(_size_of(value) for value in answer.values())
    if isinstance(answer, np.ndarray):
        held = sum(len(item) if isinstance(item, bytes | str) else 32 for item in answer.flat) if answer.dtype == object else 0
        return 100 + answer.nbytes + held
    if isinstance(answer, bytes | str):
        return 60 + len(answer)
    if isinstance(answer, list | tuple):
        return 60 + sum(_size_of(value) for value in answer)
    return 60
