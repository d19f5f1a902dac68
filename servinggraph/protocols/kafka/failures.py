"""Why a session ended: what to say of it, and which record is to be given up so that it does not end the next one, too."""

from __future__ import annotations

from typing import Final

from aiokafka.errors import (
    InvalidTopicError,
    KafkaConnectionError,
    KafkaError,
    KafkaTimeoutError,
    MessageSizeTooLargeError,
    NoBrokersAvailable,
    NodeNotReadyError,
    RequestTimedOutError,
    TopicAuthorizationFailedError,
    UnknownTopicOrPartitionError,
)

from servinggraph.errors import InvalidRequest, RequestTooLarge
from servinggraph.kafka import headers as names
from servinggraph.protocols.kafka.addressing import size_of
from servinggraph.protocols.kafka.clients import Clients
from servinggraph.protocols.kafka.delivery import NotWritten
from servinggraph.protocols.kafka.pulse import Fenced
from servinggraph.protocols.kafka.quiet import last_words
from servinggraph.protocols.kafka.records import LeftOut, Outgoing, Verdict

__all__ = ["TopicMissing", "is_expected", "verdict_on", "words_for"]

_UNREACHABLE: Final = (KafkaConnectionError, KafkaTimeoutError, NoBrokersAvailable, NodeNotReadyError, RequestTimedOutError)
_UNWRITABLE: Final = (AssertionError, InvalidTopicError, TopicAuthorizationFailedError, UnknownTopicOrPartitionError)
"""What is wrong with a topic, not with the brokers; an assertion of aiokafka: no such partition."""


class TopicMissing(Exception):
    """A topic that is needed is not there."""


def is_expected(error: Exception) -> bool:
    """Tell whether it is a trouble of the brokers or the network, for which nobody needs a traceback."""
    return isinstance(error, KafkaError | TopicMissing | NotWritten | Fenced | OSError)


def words_for(error: Exception, brokers: str) -> str:
    """Say why a session ended."""
    if isinstance(error, _UNREACHABLE):
        return f"not connected to {brokers}: {last_words() or error}"
    if not isinstance(error, NotWritten):
        return str(error) or type(error).__name__
    missing = isinstance(error.__cause__, UnknownTopicOrPartitionError)
    text = f"there is no topic '{error.outgoing.topic}'" if missing else str(error)
    return f"stopped, because dead letters cannot be written and none may be lost: {text}" if error.outgoing.dead else text


def verdict_on(error: Exception, clients: Clients) -> Verdict | None:
    """Return why the record on which a session ended is to be given up when it is read again; None when it is not at fault."""
    if not isinstance(error, NotWritten):
        return None
    topic, cause = error.outgoing.topic, error.__cause__
    if isinstance(cause, MessageSizeTooLargeError):
        size = size_of(error.outgoing)
        if clients.smaller_batches(size):
            return None
        text = f"topic '{topic}' takes no record of {size} bytes (its 'max.message.bytes')"
        return Verdict(RequestTooLarge(text), _left_out(error.outgoing))
    if names.REPLY_TOPIC in error.work.headers and not error.outgoing.dead and isinstance(cause, _UNWRITABLE):
        return Verdict(InvalidRequest(f"reply topic '{topic}' does not take the answer: {cause}"), no_reply=True)
    return None


def _left_out(refused: Outgoing) -> LeftOut:
    """Return what to leave out of what is written instead of a record that was too large."""
    if not refused.error:
        return LeftOut.NOTHING  # an answer: its error is short
    without_value = any(name == names.DEAD_LEFT_OUT for name, _ in refused.headers)
    return LeftOut.VALUE if refused.dead and not without_value else LeftOut.ALL
