"""A file that lines are appended to: whole lines only, and replaced by a new one when it is large. Blocks; for a thread."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["LineFile"]


class LineFile:
    """Appends lines to a file.

    Args:
        path: the file; its folder is made.
        max_bytes: size from which on the file is set aside as `.1`, the one before as `.2`, and so on; 0 for never.
        kept: how many are kept aside; the oldest is removed.
        sync: whether lines are on the disk, and not only with the operating system, when `write` returns.
    """

    def __init__(self, path: Path, max_bytes: int = 0, kept: int = 0, *, sync: bool = False) -> None:
        self._path = path
        self._max_bytes, self._kept, self._sync = max_bytes, kept, sync
        self._file = -1
        self._size = 0
        self._torn = False

    def open(self) -> None:
        """Open the file.

        Raises:
            OSError: it cannot be written.
        """
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self._size = os.fstat(self._file).st_size
        # A process that was killed may have left half a line.
        self._torn = self._size > 0 and os.pread(self._file, 1, self._size - 1) != b"\n"

    def write(self, lines: bytes) -> None:
        """Append lines, each with its end; after a failure none or a part of them is there, which a next line does not join.

        Raises:
            OSError: they were not written.
        """
        if self._file < 0:  # there was no new one after the last was set aside
            self.open()
        if self._max_bytes and self._size and self._size + len(lines) > self._max_bytes:
            self._set_aside()
        data = b"\n" + lines if self._torn else lines
        self._torn = True
        while data:
            written = os.write(self._file, data)
            self._size += written
            data = data[written:]
        self._torn = False
        if self._sync:
            os.fsync(self._file)

    def _set_aside(self) -> None:
        for number in range(self._kept, 0, -1):
            older = self._path if number == 1 else self._aside(number - 1)
            if older.exists():
                older.replace(self._aside(number))
        if not self._kept:
            self._path.unlink()
        self.close()
        self.open()

    def _aside(self, number: int) -> Path:
        return self._path.with_name(f"{self._path.name}.{number}")

    def close(self) -> None:
        """Close the file."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
