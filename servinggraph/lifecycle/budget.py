"""How many graphs may be in memory, and which has to make room: the least recently used."""

from __future__ import annotations

from collections import OrderedDict

from servinggraph.lifecycle.records import Record

__all__ = ["Budget"]


class Budget:
    """Orders what is in memory by last use. Decides only; whoever asks does the unloading.

    Args:
        max_loaded: most versions in memory; 0 for no limit.
        max_bytes: most bytes together, by `Built.size_bytes`; 0 for no limit.
    """

    def __init__(self, max_loaded: int = 0, max_bytes: int = 0) -> None:
        self.max_loaded = max_loaded
        self.max_bytes = max_bytes
        self._order: OrderedDict[tuple[str, str], Record] = OrderedDict()

    @property
    def limits(self) -> bool:
        """True when there is a limit at all."""
        return bool(self.max_loaded or self.max_bytes)

    def add(self, record: Record) -> None:
        """Note that a version came into memory."""
        self._order[record.key] = record
        self._order.move_to_end(record.key)

    def remove(self, record: Record) -> None:
        """Note that it is to go, or has gone."""
        if self._order.get(record.key) is record:
            del self._order[record.key]

    def used(self, record: Record) -> None:
        """Note that a request came for it."""
        if record.key in self._order:
            self._order.move_to_end(record.key)

    def next_to_go(self, room_for: int = 0, room_bytes: int = 0, keep: Record | None = None) -> Record | None:
        """Return what has to leave memory; None when the limits hold.

        Versions that answer nobody go first, the one that was not used for longest before others.

        Args:
            room_for: how many versions are about to come.
            room_bytes: size of their files, the least that they will take.
            keep: must stay.
        """
        count = len(self._order) + room_for
        total = room_bytes + sum(record.built.size_bytes for record in self._order.values() if record.built is not None)
        if not (self.max_loaded and count > self.max_loaded) and not (self.max_bytes and total > self.max_bytes):
            return None
        rest = [record for record in self._order.values() if record is not keep]
        idle = (record for record in rest if record.graph is not None and record.graph.idle)
        return next(idle, rest[0] if rest else None)
