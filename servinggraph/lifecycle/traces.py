"""Where finished traces go: a file in Triton's form, or the log."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Final

import orjson

from servinggraph.lifecycle.writing import LaterWriter

__all__ = ["TraceSink"]

logger = logging.getLogger("servinggraph.trace")

MOST_WAITING: Final = 4096
"""Finished traces that wait to be written; more are dropped, and counted in the log."""

Entries = list[dict[str, Any]]


class TraceSink:
    """Writes traces in a thread, in the order in which they end.

    The file is at any moment a JSON array. With `log_frequency` n each n traces go into a
    file of their own, `<file>.0`, `<file>.1`, ...

    Attributes:
        path: the file; empty for the log, where each trace is a line of JSON.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._later: LaterWriter[tuple[Path | None, Entries]] = LaterWriter(self._write_all, MOST_WAITING, "traces")
        self._begun: set[Path] = set()
        self._index = 0
        self._in_file = 0

    def add(self, entries: Entries, frequency: int) -> None:
        """Take a finished trace; `frequency` is how many go into one file, 0 for all."""
        # One that is dropped takes no place in a file.
        self._later.add((None if self._later.full else self._file(frequency), entries))

    async def flush(self) -> None:
        """Return once all that was added is written."""
        await self._later.flush()

    def _file(self, frequency: int) -> Path | None:
        if not self.path or not frequency:
            return Path(self.path) if self.path else None
        if self._in_file >= frequency:
            self._index, self._in_file = self._index + 1, 0
        self._in_file += 1
        return Path(f"{self.path}.{self._index}")

    def _write_all(self, waiting: list[tuple[Path | None, Entries]], dropped: int) -> None:
        if dropped:
            logger.warning("%d traces were dropped: they end faster than they can be written", dropped)
        texts: dict[Path, list[bytes]] = {}
        for path, entries in waiting:
            if path is None:
                logger.info("%s", orjson.dumps(entries).decode())
            else:
                texts.setdefault(path, []).extend(orjson.dumps(entry) for entry in entries)
        for path, lines in texts.items():
            self._append(path, b",\n".join(lines))

    def _append(self, path: Path, text: bytes) -> None:
        if path in self._begun:
            with path.open("r+b") as file:
                file.seek(-2, 2)  # the closing bracket makes room
                file.write(b",\n" + text + b"\n]")
            return
        path.write_bytes(b"[\n" + text + b"\n]")
        self._begun &= {Path(self.path)}  # of files with numbers only the last is written to
        self._begun.add(path)
