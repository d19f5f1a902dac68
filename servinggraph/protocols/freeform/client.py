"""The client's side: a Python value into a body."""

from __future__ import annotations

from typing import Any

import numpy as np

from servinggraph.protocols.freeform.documents import encode_json
from servinggraph.protocols.freeform.media import JSON, MSGPACK, OCTETS, TEXT, kind_of, parse_media
from servinggraph.protocols.freeform.packing import encode_msgpack

__all__ = ["encode_body"]


def encode_body(value: Any, content_type: str | None = None) -> tuple[bytes, str]:
    """Return a body and its content type.

    Bytes and text go as they are; anything else is encoded: as msgpack when the type says so, or
    when there is no type and the value holds arrays, else as JSON.

    Raises:
        StepFailed: the format cannot carry the value.
    """
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value), OCTETS if content_type is None else content_type
    media = None if content_type is None else parse_media(content_type)
    kind = None if media is None else kind_of(media.name)
    if isinstance(value, str) and kind != "json" and kind != "msgpack":
        charset = "utf-8" if media is None else media.parameters.get("charset", "utf-8")
        return value.encode(charset), f"{TEXT}; charset=utf-8" if content_type is None else content_type
    if kind == "msgpack" or (kind is None and _holds_arrays(value)):
        return encode_msgpack(value), content_type or MSGPACK[0]
    return encode_json(value), content_type or JSON


def _holds_arrays(value: Any) -> bool:
    if isinstance(value, dict):
        return any(_holds_arrays(item) for item in value.values())
    if isinstance(value, list | tuple):
        return any(_holds_arrays(item) for item in value)
    return isinstance(value, np.ndarray)
