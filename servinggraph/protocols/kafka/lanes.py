"""Which record may run now, and which waits for another of its lane. Decides only, without I/O."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from typing import Generic, TypeVar

__all__ = ["Lanes"]

ItemT = TypeVar("ItemT")


class Lanes(Generic[ItemT]):
    """Lanes in which one item runs at a time, in the order in which they came.

    A lane is there only while something is in it, so there may be as many keys as one likes.
    """

    __slots__ = ("_lanes",)

    def __init__(self) -> None:
        # None stands for a lane in which nobody waits, which is most of them.
        self._lanes: dict[Hashable, deque[ItemT] | None] = {}

    def enter(self, lane: Hashable, item: ItemT) -> bool:
        """Put an item in a lane; True when it may run at once."""
        if lane not in self._lanes:
            self._lanes[lane] = None
            return True
        waiting = self._lanes[lane]
        if waiting is None:
            waiting = self._lanes[lane] = deque()
        waiting.append(item)
        return False

    def leave(self, lane: Hashable) -> ItemT | None:
        """Note that the item that ran has ended; return the next one of its lane, which may run now."""
        waiting = self._lanes.get(lane)
        if not waiting:
            self._lanes.pop(lane, None)
            return None
        return waiting.popleft()

    def clear(self) -> None:
        """Forget everything that waits."""
        self._lanes.clear()
