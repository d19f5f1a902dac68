"""aiokafka's log lines: one for each trouble, not one for each of a thousand attempts."""

from __future__ import annotations

import logging
import time
from typing import Final

__all__ = ["quiet_aiokafka"]

_QUIET_S: Final = 30.0
logger = logging.getLogger("servinggraph.kafka")


class _Gate(logging.Handler):
    """Hands on the first warning of a kind, and then only says now and then how many more there were."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        # By where it is logged: a few dozen places, however many messages.
        self._last: dict[tuple[str, int], tuple[float, int]] = {}

    def emit(self, record: logging.LogRecord) -> None:
        key = record.pathname, record.lineno
        moment, more = self._last.get(key, (-_QUIET_S, 0))
        now = time.monotonic()
        if now - moment < _QUIET_S:
            self._last[key] = moment, more + 1
            return
        self._last[key] = now, 0
        others = f" (and {more} more since the last line)" if more else ""
        logger.warning("%s%s", record.getMessage(), others)


def quiet_aiokafka() -> None:
    """Take aiokafka's log lines through the gate; whoever sets its logger's level has all of them from there on."""
    theirs = logging.getLogger("aiokafka")
    if theirs.level == logging.NOTSET and not any(isinstance(handler, _Gate) for handler in theirs.handlers):
        theirs.addHandler(_Gate())
        theirs.setLevel(logging.WARNING)
        theirs.propagate = False
