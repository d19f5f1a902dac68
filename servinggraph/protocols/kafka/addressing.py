"""Where what came of a record is written: the output topic, the caller's reply topic, or the dead letters. Without I/O."""

from __future__ import annotations

from typing import Final

import orjson

from servinggraph.errors import InvalidRequest, RequestTooLarge, ServingGraphError
from servinggraph.kafka import KafkaOptions, headers as names
from servinggraph.protocols.kafka.cloudevents import OWN, event_headers
from servinggraph.protocols.kafka.codec import Answer
from servinggraph.protocols.kafka.deadletters import dead_letter
from servinggraph.protocols.kafka.exchange import Exchange
from servinggraph.protocols.kafka.records import LeftOut, Outgoing, Work

__all__ = ["Addressing", "size_of"]

_NOT_COPIED: Final = names.OWN | OWN
_JSON: Final = (names.CONTENT_TYPE, b"application/json")
_OK: Final = (names.STATUS, names.OK.encode())
_LONGEST: Final = 1000
"""Bytes of an error's text in a header; all of it is in the value."""
_ESSENTIAL: Final = (names.REQUEST_ID, names.CORRELATION_ID, names.TRACEPARENT)
_FRAMING: Final = 100
"""Bytes that the broker needs around a record."""


class Addressing:
    """Every record ends in exactly one record written: an answer, an error to whoever asked, or a dead letter.

    Args:
        options: the `kafka:` block.
        graph: the graph's name.
        exchange: knows versions.
    """

    def __init__(self, options: KafkaOptions, graph: str, exchange: Exchange) -> None:
        self._output = options.output
        self._dead = options.errors.topic
        self._limit = options.max_message_bytes
        self._graph = graph
        self._exchange = exchange

    def reply_to(self, work: Work) -> str | None:
        """Return the topic that a record's answer goes to; None when it has none.

        Raises:
            InvalidRequest: the record names a topic that is not allowed, or there is none for it.
        """
        wanted = work.headers.get(names.REPLY_TOPIC)
        if wanted is None:
            return self._output.topic
        topic = wanted.decode("utf-8", "replace")
        if not self._output.may_reply_to(topic):
            raise InvalidRequest(
                f"header '{names.REPLY_TOPIC}' names topic '{topic[:250]}', which 'reply_topics' does not allow"
            )
        return topic

    def checked(self, work: Work) -> str:
        """Return the topic that a record's answer goes to.

        Raises:
            InvalidRequest: there is none.
        """
        topic = self.reply_to(work)
        if topic is None:
            raise InvalidRequest(f"the record has no header '{names.REPLY_TOPIC}', and there is no output topic")
        return topic

    def answer(self, work: Work, answer: Answer) -> Outgoing:
        """Return the record to write for an answer.

        Raises:
            RequestTooLarge: it is larger than what may be written.
        """
        topic = self.reply_to(work)
        assert topic is not None  # `check` was called
        headers = [*answer.headers, _OK, *event_headers(work, self._graph, "servinggraph.answer"), *self._copied(work)]
        partition = _partition(work) if names.REPLY_TOPIC in work.headers else None
        outgoing = Outgoing(topic, self._key(work), answer.value, headers, partition)
        size = size_of(outgoing)
        if size > self._limit:
            raise RequestTooLarge(
                f"the answer takes {size} bytes, and at most {self._limit} are written (limit 'max_message_bytes')"
            )
        return outgoing

    def failure(self, work: Work, error: ServingGraphError) -> Outgoing:
        """Return the record to write for a record that is given up.

        Whoever named a reply topic is told; all else is a dead letter, or where there is no topic
        for these an error where the answer would have gone.
        """
        try:
            topic = self.reply_to(work)
        except InvalidRequest:
            topic = self._output.topic
            asked = False
        else:
            asked = names.REPLY_TOPIC in work.headers and not work.no_reply
            if work.no_reply:
                topic = self._output.topic
        left_out = LeftOut.NOTHING if work.verdict is None else work.verdict.left_out
        if self._dead is not None and not asked:
            if left_out is LeftOut.NOTHING and len(work.record.value or b"") > self._limit:
                left_out = LeftOut.VALUE
            return dead_letter(work, error, self._dead, self._graph, self._exchange.version_of(work), left_out)
        assert topic is not None  # options with neither are refused
        text = str(error).encode("utf-8", "replace").decode()
        headers: list[tuple[str, bytes | None]] = [
            _JSON,
            (names.STATUS, error.code.value.encode()),
            (names.ERROR, text.encode()[:_LONGEST]),
            (names.ATTEMPTS, str(max(work.attempts, 1)).encode()),
        ]
        if error.node is not None:
            headers.append((names.ERROR_NODE, error.node.encode("utf-8", "replace")))
        body = orjson.dumps({"error": text[: self._limit // 8]})
        key, partition = self._key(work), _partition(work) if asked else None
        if left_out is LeftOut.NOTHING:
            headers += event_headers(work, self._graph, "servinggraph.error")
            headers += self._copied(work)
        else:  # of what the caller sent along something is too large to go back: what leads to the call is short
            headers += [(name, value) for name in _ESSENTIAL if len(value := work.headers.get(name, b"")) in range(1, _LONGEST)]
            key = key if len(key or b"") <= _LONGEST else None
        return Outgoing(topic, key, body, headers, partition, error.code.value)

    def _copied(self, work: Work) -> list[tuple[str, bytes | None]]:
        """Return the headers of a request that its answer has as well: trace context, correlation, the caller's own."""
        copied = [header for header in work.record.headers if header[0] not in _NOT_COPIED and header[0] not in work.trace]
        return [*copied, *((name, value.encode()) for name, value in work.trace.items())]

    def _key(self, work: Work) -> bytes | None:
        if self._output.key == "same":
            return work.record.key
        return work.headers.get(names.REQUEST_ID) if self._output.key == "id" else None


def _partition(work: Work) -> int | None:
    """Return the partition that a request wants its reply in, which was checked; None for the key's."""
    text = work.headers.get(names.REPLY_PARTITION)
    return None if text is None else int(text)


def size_of(outgoing: Outgoing) -> int:
    """Return about how many bytes a record takes."""
    size = _FRAMING + len(outgoing.key or b"") + len(outgoing.value or b"")
    return size + sum(len(name) + len(content or b"") + 4 for name, content in outgoing.headers)
