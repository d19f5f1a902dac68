"""Where finished traces go: a file in Triton's form, or the log."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any, Final

import orjson

__all__ = ["TraceSink"]

logger = logging.getLogger("servinggraph.trace")

FLUSH_S: Final = 0.5
"""Longest time that a finished trace waits to be written."""

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
        self._loop = asyncio.get_running_loop()
        self._waiting: list[tuple[Path | None, Entries]] = []
        self._dropped = 0
        self._timer: asyncio.Handle | None = None
        self._writing: asyncio.Future[None] | None = None
        self._begun: set[Path] = set()
        self._index = 0
        self._in_file = 0

    def add(self, entries: Entries, frequency: int) -> None:
        """Take a finished trace; `frequency` is how many go into one file, 0 for all."""
        if len(self._waiting) >= MOST_WAITING:
            self._dropped += 1
            return
        self._waiting.append((self._file(frequency), entries))
        if self._timer is None and self._writing is None:
            self._timer = self._loop.call_later(FLUSH_S, self._write)

    async def flush(self) -> None:
        """Return once all that was added is written."""
        while self._waiting or self._writing is not None:
            if self._writing is None:
                self._write()
            if self._writing is not None:
                await asyncio.wait([self._writing])

    def _file(self, frequency: int) -> Path | None:
        if not self.path or not frequency:
            return Path(self.path) if self.path else None
        if self._in_file >= frequency:
            self._index, self._in_file = self._index + 1, 0
        self._in_file += 1
        return Path(f"{self.path}.{self._index}")

    def _write(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        waiting, self._waiting = self._waiting, []
        dropped, self._dropped = self._dropped, 0
        if waiting:
            self._writing = self._loop.run_in_executor(None, self._write_all, waiting, dropped)
            self._writing.add_done_callback(self._written)

    def _written(self, writing: asyncio.Future[None]) -> None:
        self._writing = None
        if not writing.cancelled() and (error := writing.exception()) is not None:
            logger.error("traces could not be written: %s", error)
        if self._waiting and self._timer is None:
            self._timer = self._loop.call_later(FLUSH_S, self._write)

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
