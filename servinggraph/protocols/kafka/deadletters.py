"""Dead letters: a record as it came, with what was wrong with it in headers."""

from __future__ import annotations

import time
from traceback import extract_tb
from typing import Final

from servinggraph.errors import ServingGraphError
from servinggraph.kafka import headers as names
from servinggraph.protocols.kafka.records import LeftOut, Outgoing, Work

__all__ = ["dead_letter", "stack_of"]

_LONGEST: Final = 1000
"""Bytes of an error's text: it may quote all of a request."""
_FRAMES: Final = 8
_MOST: Final = 32
"""Headers that are kept where not all of them have room."""


def dead_letter(work: Work, error: ServingGraphError, topic: str, graph: str, version: str, left_out: LeftOut) -> Outgoing:
    """Return the dead letter of a record.

    Args:
        work: the record.
        error: why it was given up.
        topic: topic for dead letters.
        graph: the graph that failed.
        version: its version; empty where none was found.
        left_out: what is left out, because the topic takes none of this size.
    """
    record = work.record
    value = record.value
    key = record.key
    headers = [(name, content) for name, content in record.headers if not name.startswith(names.DEAD_PREFIX)]
    if left_out is LeftOut.ALL:
        headers = [(name, content) for name, content in headers if len(name) + len(content or b"") <= _LONGEST][:_MOST]
        key = key if len(key or b"") <= _LONGEST else None
    told = {
        names.DEAD_TOPIC: record.topic,
        names.DEAD_PARTITION: record.partition,
        names.DEAD_OFFSET: record.offset,
        names.DEAD_TIMESTAMP: record.timestamp,
        names.DEAD_ERROR: error.code.value,
        names.DEAD_MESSAGE: error.message,
        names.DEAD_NODE: error.node,
        names.DEAD_ATTEMPTS: max(work.attempts, 1),
        names.DEAD_AT: int(time.time() * 1e3),
        names.DEAD_GRAPH: graph,
        names.DEAD_VERSION: version,
        names.DEAD_STACK: stack_of(error),
        names.DEAD_LEFT_OUT: len(value or b"") if left_out else None,
    }
    headers += [(name, _text(content)) for name, content in told.items() if content not in (None, "")]
    if value is None and key is None:
        key = b""  # aiokafka writes no record without key and value
    return Outgoing(topic, key, b"" if left_out else value, headers, error=error.code.value, dead=True)


def stack_of(error: ServingGraphError) -> str:
    """Return where a step raised, innermost last; empty when no exception of a step is behind the error."""
    cause = error.__cause__
    if cause is None or cause.__traceback__ is None:
        return ""
    frames = extract_tb(cause.__traceback__)[-_FRAMES:]
    return " < ".join(f"{frame.filename.rpartition('/')[2]}:{frame.lineno} {frame.name}" for frame in reversed(frames))


def _text(content: object) -> bytes:
    return str(content).encode("utf-8", "replace")[:_LONGEST]
