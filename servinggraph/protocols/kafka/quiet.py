"""aiokafka's log lines: its attempts are for whoever looks for them, what it did not expect is for everybody."""

from __future__ import annotations

import logging

__all__ = ["last_words", "quiet_aiokafka"]

logger = logging.getLogger("servinggraph.kafka.client")


class _Gate(logging.Handler):
    """Hands on a warning at level debug, since a stream says itself what is wrong; one with a traceback as it is.

    A broker that is away for a minute is a thousand lines of aiokafka otherwise.
    """

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.last = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.last = record.getMessage()
        level = record.levelno if record.exc_info else logging.DEBUG
        logger.log(level, "%s", record.getMessage(), exc_info=record.exc_info)


_gate = _Gate()


def last_words() -> str:
    """Return what aiokafka logged last: it does not say in its errors why it cannot connect."""
    return _gate.last


def quiet_aiokafka() -> None:
    """Take aiokafka's log lines through the gate; whoever sets its logger's level has all of them from there on."""
    theirs = logging.getLogger("aiokafka")
    if theirs.level == logging.NOTSET:
        theirs.addHandler(_gate)
        theirs.setLevel(logging.WARNING)
        theirs.propagate = False
