"""How much was read and is not done yet. Decides only, without I/O."""

from __future__ import annotations

from typing import Final

__all__ = ["Budget"]

_RESUME: Final = 0.75
"""Reading goes on once this share of both limits is not exceeded any more: not for each single record."""


class Budget:
    """Counts records and bytes in memory against their limits.

    A single record may be larger than all bytes: it is read alone.

    Args:
        records: most records.
        size: most bytes.
    """

    __slots__ = ("_full", "max_bytes", "max_records", "records", "size")

    def __init__(self, records: int, size: int) -> None:
        self.max_records, self.max_bytes = records, size
        self.records = self.size = 0
        self._full = False

    def take(self, size: int) -> None:
        """Note a record that was read."""
        self.records += 1
        self.size += size
        if self.records >= self.max_records or self.size >= self.max_bytes:
            self._full = True

    def give(self, size: int) -> bool:
        """Note a record that is done; True when reading may go on because of it."""
        self.records -= 1
        self.size -= size
        if not self._full:
            return False
        if self.records > self.max_records * _RESUME or self.size > self.max_bytes * _RESUME:
            return False
        self._full = False
        return True

    def reset(self) -> None:
        """Forget everything: the partitions belong to others."""
        self.records = self.size = 0
        self._full = False

    @property
    def full(self) -> bool:
        """True from when a limit is reached until there is room again that is worth it."""
        return self._full

    @property
    def room(self) -> int:
        """How many records may be read now, by their number alone."""
        return 0 if self._full else self.max_records - self.records
