"""The audit log: who changed what of a running graph, when, from what to what, and why."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import orjson

__all__ = ["AuditLog", "Change"]

logger = logging.getLogger("servinggraph.audit")

_REMEMBERED: Final = 1000


@dataclass(frozen=True, slots=True)
class Change:
    """One change of a router's settings.

    Attributes:
        time: when, ISO 8601 in UTC.
        graph: the graph.
        version: its version.
        node: the router.
        who: who asked for it; the router's kind where it acted by itself.
        why: the reason given.
        before: the settings that changed, as they were.
        after: the same, as they are.
        revision: number of the router's change.
    """

    time: str
    graph: str
    version: str
    node: str
    who: str
    why: str
    before: Mapping[str, Any]
    after: Mapping[str, Any]
    revision: int


class AuditLog:
    """Keeps the last changes in memory, and all of them in a file that is only ever appended to.

    Args:
        path: the file, a JSON object a line; None for memory alone.

    Raises:
        OSError: the file cannot be opened for appending.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._last: deque[Change] = deque(maxlen=_REMEMBERED)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.open("ab").close()

    def record(
        self,
        place: tuple[str, str, str],
        who: str,
        why: str,
        before: Mapping[str, Any],
        after: Mapping[str, Any],
        revision: int,
    ) -> Change:
        """Add a change; `place` is graph, version and node."""
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        change = Change(now, *place, who, why, before, after, revision)
        self._last.append(change)
        logger.info("%s/%s node '%s': %s -> %s by %s: %s", *place, dict(before), dict(after), who, why or "no reason given")
        if self._path is not None:
            # Changes are rare and lines short: not worth a thread, and in order.
            try:
                with self._path.open("ab") as file:
                    file.write(orjson.dumps(asdict(change)) + b"\n")
            except OSError as error:  # the change has happened, perhaps a rollback: it must hold all the same
                text = "cannot write the audit log '%s': %s; revision %d of %s/%s node '%s' is missing there"
                logger.error(text, self._path, error.strerror or error, revision, *place)
        return change

    def last(self, graph: str = "", node: str = "", limit: int = 100) -> list[Change]:
        """Return the latest changes, newest first, of one graph or node or of all."""
        found = [c for c in reversed(self._last) if graph in ("", c.graph) and node in ("", c.node)]
        return found[:limit]
