"""The access log: a line for each request, written in a thread, off unless asked for.

A request pays for a tuple and a list's append; times and lines are made half a second later, all at once.
"""

from __future__ import annotations

import logging
import sys
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter_ns, time_ns
from typing import Final, NamedTuple

import orjson

from servinggraph.lifecycle.writing import LaterWriter

__all__ = ["AccessLog", "Entry"]

logger = logging.getLogger("servinggraph.access")

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

    Attributes:
        add: takes a request.

    Args:
        place: a file, to which lines are appended; `-` for standard output.
        form: "text" or "json".
    """

    def __init__(self, place: str, form: str) -> None:
        self._place = place
        self._line = _as_json if form == "json" else _as_text
        self._later = LaterWriter(self._write, MOST_WAITING, "the access log")
        self.add = self._later.add
        if place != "-":
            Path(place).open("ab").close()  # found out at the start, not with the first request

    async def close(self) -> None:
        """Write what waits."""
        await self._later.flush()

    def _write(self, entries: list[Entry], dropped: int) -> None:
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
