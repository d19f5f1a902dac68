"""The access log: a line for each request, written in a thread, off unless asked for.

A request pays for a tuple and a list's append; times and lines are made half a second later, all at once.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from time import perf_counter_ns, time_ns
from typing import Final, NamedTuple

import orjson

__all__ = ["AccessLog", "Entry"]

logger = logging.getLogger("servinggraph.access")

FLUSH_S: Final = 0.5
"""Longest time that a line waits to be written."""
MOST_WAITING: Final = 200_000
"""Lines that wait to be written; more are dropped, and counted in the log."""


class Entry(NamedTuple):
    """One request."""

    moment: int
    """When it was answered, by `perf_counter_ns`."""
    protocol: str
    """How it came."""
    graph: str
    """The graph; empty where it was not known."""
    version: str
    """Its version."""
    code: str
    """What became of it: ok, cancelled, or the error's code."""
    ns: int
    """How long it took; 0 where nobody knows."""
    id: str
    """The caller's id."""


class AccessLog:
    """Writes a line for each request.

    Args:
        place: a file, to which lines are appended; `-` for standard output.
        form: "text" or "json".
    """

    def __init__(self, place: str, form: str) -> None:
        self._place = place
        self._line = _as_json if form == "json" else _as_text
        self._loop = asyncio.get_running_loop()
        self._waiting: list[Entry] = []
        self._dropped = 0
        self._timer: asyncio.TimerHandle | None = None
        self._writing: asyncio.Future[None] | None = None
        if place != "-":
            Path(place).open("ab").close()  # found out at the start, not with the first request

    def add(self, entry: Entry) -> None:
        """Take a request."""
        if len(self._waiting) >= MOST_WAITING:
            self._dropped += 1
            return
        self._waiting.append(entry)
        if self._timer is None and self._writing is None:
            self._timer = self._loop.call_later(FLUSH_S, self._write)

    async def close(self) -> None:
        """Write what waits."""
        while self._waiting or self._writing is not None:
            if self._writing is None:
                self._write()
            if self._writing is not None:
                await asyncio.wait([self._writing])

    def _write(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        waiting, self._waiting = self._waiting, []
        dropped, self._dropped = self._dropped, 0
        if waiting:
            self._writing = self._loop.run_in_executor(None, partial(self._write_all, waiting, dropped))
            self._writing.add_done_callback(self._written)

    def _written(self, writing: asyncio.Future[None]) -> None:
        self._writing = None
        if not writing.cancelled() and (error := writing.exception()) is not None:
            logger.error("the access log could not be written: %s", error)
        if self._waiting and self._timer is None:
            self._timer = self._loop.call_later(FLUSH_S, self._write)

    def _write_all(self, entries: list[Entry], dropped: int) -> None:
        if dropped:
            logger.warning("%d lines of the access log were dropped: they come faster than they can be written", dropped)
        since_1970 = time_ns() - perf_counter_ns()
        text = "".join(self._line(entry, since_1970) for entry in entries)
        if self._place == "-":
            sys.stdout.write(text)
            sys.stdout.flush()
            return
        with Path(self._place).open("a", encoding="utf-8", errors="replace") as file:
            file.write(text)


def _time(entry: Entry, since_1970: int) -> str:
    moment = datetime.fromtimestamp((entry.moment + since_1970) / 1e9, UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _as_text(entry: Entry, since_1970: int) -> str:
    # An id is the caller's: a line break in it must not make a line of its own.
    shown = entry.id.encode("unicode_escape").decode().replace(" ", "\\x20") if entry.id else "-"
    graph = f"{entry.graph}/{entry.version}" if entry.graph else "-"
    return f"{_time(entry, since_1970)} {entry.protocol} {graph} {entry.code} {entry.ns / 1e6:.3f} {shown}\n"


def _as_json(entry: Entry, since_1970: int) -> str:
    line = {
        "time": _time(entry, since_1970), "protocol": entry.protocol, "graph": entry.graph, "version": entry.version,
        "code": entry.code, "ms": round(entry.ns / 1e6, 3), "request": entry.id.encode("utf-8", "replace").decode(),
    }  # fmt: skip
    return orjson.dumps(line).decode() + "\n"
