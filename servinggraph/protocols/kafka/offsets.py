"""Up to where the records of a partition are done, though they end in any order. Decides only, without I/O."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection

__all__ = ["Offsets"]


class Offsets:
    """The records of one partition that were begun.

    An offset may be committed only when every record before it is done: what is behind an unfinished
    one would be lost with a crash. Offsets may have gaps: a compacted topic, markers of transactions.

    Attributes:
        position: the next offset to read after a crash; None before the first record.
        committed: the last position that was committed, None before.
    """

    __slots__ = ("_finished", "_open", "committed", "position")

    def __init__(self) -> None:
        self._open: deque[int] = deque()
        self._finished: set[int] = set()
        self.position: int | None = None
        self.committed: int | None = None

    def __len__(self) -> int:
        """Return how many offsets are begun and not passed by `position`: unfinished ones, and finished ones behind them."""
        return len(self._open)

    @property
    def beyond(self) -> Collection[int]:
        """Which offsets are done although one before them is not."""
        return self._finished

    @property
    def unfinished(self) -> int:
        """How many records are begun and not done."""
        return len(self._open) - len(self._finished)

    def begin(self, offset: int) -> None:
        """Note a record that was read; offsets come in order."""
        if self.position is None:
            self.position = offset
        self._open.append(offset)

    def finish(self, offset: int) -> list[int]:
        """Note a record that is done, and return the offsets that `position` passed because of it, in order."""
        waiting = self._open
        if waiting[0] != offset:
            self._finished.add(offset)
            return []
        finished = self._finished
        passed = [waiting.popleft()]
        while waiting and waiting[0] in finished:
            passed.append(waiting.popleft())
            finished.remove(passed[-1])
        self.position = passed[-1] + 1
        return passed

    @property
    def to_commit(self) -> int | None:
        """The position, where it is not committed yet."""
        return None if self.position == self.committed else self.position
