"""Logs failures of graphs: the first of a kind with its traceback, then how many more there were.

A model that is broken fails every request; a traceback for each would fill disks and hide
everything else.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final

from servinggraph.errors import ServingGraphError

__all__ = ["FailureLog"]

logger = logging.getLogger("servinggraph.graphs")

QUIET_S: Final = 1.0
"""After a failure of a node was logged, others of that node are only counted for this time."""


class FailureLog:
    """Logs failures, each node's at most once in `QUIET_S` seconds.

    Args:
        clock: the time, seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        # Graphs and nodes are few: this does not grow with requests.
        self._last: dict[tuple[str, str | None], tuple[float, int]] = {}

    def report(self, graph: str, request_id: str, error: ServingGraphError) -> None:
        """Log a failure, or count it."""
        key = graph, error.node
        now = self._clock()
        moment, more = self._last.get(key, (now - QUIET_S, 0))
        if now - moment < QUIET_S:
            self._last[key] = moment, more + 1
            return
        self._last[key] = now, 0
        others = f" (and {more} more since the last line)" if more else ""
        logger.error("graph '%s' request '%s': %s%s", graph, request_id, error, others, exc_info=error.__cause__)
