"""Turns an answer into bytes of the type that the caller likes best."""

from __future__ import annotations

import re
from typing import Any, Final, NamedTuple

from servinggraph.errors import NotAcceptable, StepFailed
from servinggraph.messages import Body
from servinggraph.protocols.freeform.documents import encode_json
from servinggraph.protocols.freeform.media import CSV, JSON, MSGPACK, NDJSON, OCTETS, SERVER_SENT, TEXT, kind_of, preferred
from servinggraph.protocols.freeform.packing import encode_msgpack
from servinggraph.protocols.freeform.table import encode_table

__all__ = ["Encoded", "encode_answer", "streamed"]

_STREAMS: Final = (*NDJSON, SERVER_SENT)
_HEADER: Final = re.compile(r"[!-~]+/[ -~]+")


class Encoded(NamedTuple):
    """An encoded answer."""

    body: bytes
    """The bytes."""
    content_type: str
    """Their media type, with its charset where it is text."""


def encode_answer(answer: Body, accept: str) -> Encoded:
    """Encode an answer.

    Text is text/plain first, bytes are application/octet-stream first, all else is JSON first; in
    this order they are offered to the Accept header. A type that a step gave is the only one.

    Args:
        answer: the answer.
        accept: value of the Accept header; empty for anything.

    Raises:
        NotAcceptable: the caller takes none of the types that the answer can have; lists them.
        StepFailed: the answer cannot be encoded.
    """
    value = answer.value
    if answer.content_type:
        return _as_given(value, answer.content_type, accept)
    if isinstance(value, bytearray | memoryview):
        value = bytes(value)
    if isinstance(value, str):
        offers = [TEXT, JSON, *MSGPACK]
    elif isinstance(value, bytes):
        offers = [OCTETS, *MSGPACK]
    else:
        offers = [JSON, *MSGPACK, CSV]
    chosen = preferred(accept, offers)
    if chosen == CSV:
        table = encode_table(value)
        if table is not None:
            return Encoded(table, "text/csv; charset=utf-8")
        offers.remove(CSV)
        chosen = preferred(accept, offers)
    if chosen is None:
        raise _none_fits(accept, offers)
    return _encoded(value, chosen)


def streamed(accept: str, *, decoupled: bool) -> str | None:
    """Return in which type answers are streamed; None for one answer.

    Args:
        accept: value of the Accept header.
        decoupled: True for a graph that gives any number of answers. It is streamed in any case,
            by default as lines; any other only where the caller would rather have a stream.

    Raises:
        NotAcceptable: the caller does not take a stream, and the graph gives nothing else.
    """
    if decoupled:
        chosen = preferred(accept, _STREAMS)
        if chosen is None:
            raise NotAcceptable(
                f"the graph gives any number of answers, as {NDJSON[0]} or {SERVER_SENT}; the request accepts {accept[:200]!r}"
            )
        return chosen
    if "ndjson" not in accept and "jsonl" not in accept and SERVER_SENT not in accept:
        return None
    chosen = preferred(accept, (JSON, TEXT, OCTETS, *MSGPACK, CSV, *_STREAMS))
    return chosen if chosen in _STREAMS else None


def _encoded(value: Any, name: str) -> Encoded:
    if name == TEXT:
        return Encoded(_utf8(value), "text/plain; charset=utf-8")
    if name == OCTETS:
        return Encoded(value, OCTETS)
    return Encoded(encode_json(value) if name == JSON else encode_msgpack(value), name)


def _as_given(value: Any, content_type: str, accept: str) -> Encoded:
    """Encode an answer whose type a step has said."""
    if not isinstance(content_type, str) or not _HEADER.fullmatch(content_type):
        raise StepFailed(f"gave a Body with content type {content_type!r}, which is no media type")
    name = content_type.partition(";")[0].strip().lower()
    if preferred(accept, [name]) is None:
        raise _none_fits(accept, [name])
    if isinstance(value, bytes | bytearray | memoryview):
        return Encoded(bytes(value), content_type)
    kind = kind_of(name)
    if isinstance(value, str) and kind != "json" and kind != "msgpack":
        text = name.startswith("text/") and "charset" not in content_type.lower()
        return Encoded(_utf8(value), content_type + "; charset=utf-8" if text else content_type)
    if kind == "json":
        return Encoded(encode_json(value), content_type)
    if kind == "msgpack":
        return Encoded(encode_msgpack(value), content_type)
    raise StepFailed(f"gave a Body of type {content_type} with a {type(value).__name__}, expected bytes or str")


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise StepFailed("gave a text with half of a surrogate pair, which UTF-8 cannot carry") from None


def _none_fits(accept: str, offers: list[str]) -> NotAcceptable:
    return NotAcceptable(f"the answer can be given as {', '.join(offers)}; the request accepts {accept[:200]!r}")
