"""Names of the record headers that are read and written. Kafka's header names are case-sensitive; these are lower-case.

docs/kafka.md has the table for users.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

__all__ = [
    "ACCEPT",
    "ATTEMPTS",
    "CONTENT_ENCODING",
    "CONTENT_TYPE",
    "CORRELATION_ID",
    "DEADLINE",
    "DEAD_AT",
    "DEAD_ATTEMPTS",
    "DEAD_ERROR",
    "DEAD_GRAPH",
    "DEAD_LEFT_OUT",
    "DEAD_MESSAGE",
    "DEAD_NODE",
    "DEAD_OFFSET",
    "DEAD_PARTITION",
    "DEAD_PREFIX",
    "DEAD_STACK",
    "DEAD_TIMESTAMP",
    "DEAD_TOPIC",
    "DEAD_VERSION",
    "ERROR",
    "ERROR_NODE",
    "GRAPH",
    "HEADER_LENGTH",
    "OK",
    "OWN",
    "REPLAYED",
    "REPLY_PARTITION",
    "REPLY_TOPIC",
    "REQUEST_ID",
    "RESPONSE_PARAMETERS",
    "STATUS",
    "TRACEPARENT",
    "TRACESTATE",
    "VERSION",
    "RawHeaders",
    "headers_of",
]

RawHeaders = Iterable[tuple[str, bytes | None]]

CONTENT_TYPE: Final = "content-type"
CONTENT_ENCODING: Final = "content-encoding"
ACCEPT: Final = "accept"
HEADER_LENGTH: Final = "inference-header-content-length"
"""Bytes of JSON before binary tensors, as over HTTP."""

REQUEST_ID: Final = "x-request-id"
CORRELATION_ID: Final = "x-correlation-id"
"""Any bytes; they come back as they were."""
REPLY_TOPIC: Final = "x-reply-topic"
REPLY_PARTITION: Final = "x-reply-partition"
"""A number as text: the partition of the reply topic that the caller reads."""
DEADLINE: Final = "x-deadline"
"""Milliseconds since 1970 (UTC), as text, after which nobody wants the answer."""
GRAPH: Final = "x-graph"
VERSION: Final = "x-graph-version"
TRACEPARENT: Final = "traceparent"
TRACESTATE: Final = "tracestate"

STATUS: Final = "x-status"
"""Of every answer: `ok`, or the error code of an error."""
OK: Final = "ok"
ERROR: Final = "x-error"
ERROR_NODE: Final = "x-error-node"
ATTEMPTS: Final = "x-attempts"
RESPONSE_PARAMETERS: Final = "x-response-parameters"
"""Of a free-form answer: what steps have set, as JSON."""

DEAD_PREFIX: Final = "x-dead-"
DEAD_TOPIC: Final = "x-dead-topic"
DEAD_PARTITION: Final = "x-dead-partition"
DEAD_OFFSET: Final = "x-dead-offset"
DEAD_TIMESTAMP: Final = "x-dead-timestamp"
"""Timestamp of the original record, milliseconds since 1970."""
DEAD_ERROR: Final = "x-dead-error"
"""Error code: a value of `ErrorCode`."""
DEAD_MESSAGE: Final = "x-dead-message"
DEAD_NODE: Final = "x-dead-node"
DEAD_ATTEMPTS: Final = "x-dead-attempts"
DEAD_AT: Final = "x-dead-at"
"""When it was given up, milliseconds since 1970."""
DEAD_GRAPH: Final = "x-dead-graph"
DEAD_VERSION: Final = "x-dead-graph-version"
DEAD_STACK: Final = "x-dead-stack"
"""Where a step raised: file:line function, innermost first; at most a few frames."""
DEAD_LEFT_OUT: Final = "x-dead-left-out"
"""Bytes of the value that were left out because the topic does not take a record of that size."""
REPLAYED: Final = "x-replayed"
"""How often a dead letter was sent back."""

OWN: Final = frozenset({
    CONTENT_TYPE, CONTENT_ENCODING, ACCEPT, HEADER_LENGTH, REPLY_TOPIC, REPLY_PARTITION, DEADLINE, STATUS, ERROR, ERROR_NODE,
    ATTEMPTS, RESPONSE_PARAMETERS, GRAPH, VERSION,
})  # fmt: skip
"""Headers that an answer has of its own, or not at all; all others of the request are copied to it."""


def headers_of(raw: RawHeaders) -> Mapping[str, bytes]:
    """Return headers by name, the last of several equal ones; a header without a value is empty."""
    return {name: value or b"" for name, value in raw}
