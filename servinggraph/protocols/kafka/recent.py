"""Which requests were answered lately, or run now, so that none is answered twice."""

from __future__ import annotations

from collections import OrderedDict

__all__ = ["Recent"]


class Recent:
    """Ids of requests.

    What runs now is forgotten with the session: had it failed, the record has to run again.

    Args:
        most: how many answered ones are remembered; the oldest are forgotten first.
    """

    __slots__ = ("_answered", "_most", "_running")

    def __init__(self, most: int) -> None:
        self._most = most
        self._answered: OrderedDict[bytes, None] = OrderedDict()
        self._running: set[bytes] = set()

    def begin(self, id: bytes) -> bool:
        """Note a request that was read; False when it is there already."""
        if id in self._answered or id in self._running:
            return False
        self._running.add(id)
        return True

    def add(self, id: bytes) -> None:
        """Note a request that has its answer."""
        self._running.discard(id)
        self._answered[id] = None
        if len(self._answered) > self._most:
            self._answered.popitem(last=False)

    def forget(self, id: bytes) -> None:
        """Note a request that was given up: it is a new one when it is sent again, a dead letter that is sent back say."""
        self._running.discard(id)

    def forget_running(self) -> None:
        """Forget what runs: it is read again."""
        self._running.clear()
