"""Values as serializers of a schema registry write them: a zero, four bytes of schema id, then the value.

Before a protobuf value stand the indexes of its message type in the schema's file. The registry is not asked: what
a graph takes it declares itself.

Source: Confluent Platform, "Formats, Serializers, and Deserializers: wire format".
"""

from __future__ import annotations

from typing import Final

from servinggraph.errors import InvalidRequest

__all__ = ["unframed"]

_HEAD: Final = 5


def unframed(value: bytes, *, protobuf: bool) -> bytes:
    """Return a value without its frame.

    Args:
        value: the record's value.
        protobuf: True when message indexes stand before it.

    Raises:
        InvalidRequest: there is no such frame.
    """
    if len(value) < _HEAD or value[0] != 0:
        raise InvalidRequest("'framing: confluent' expects a zero and four bytes of schema id before the value; there are none")
    at = _HEAD
    if protobuf:
        count, at = _number(value, at)  # a single zero stands for the first message of the file
        for _ in range(count):
            _, at = _number(value, at)
    return value[at:]


def _number(value: bytes, at: int) -> tuple[int, int]:
    """Return the zigzag varint at an offset, and where it ends."""
    number = 0
    for shift in range(0, 35, 7):
        if at >= len(value):
            break
        byte = value[at]
        at += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            decoded = number >> 1 ^ -(number & 1)
            if decoded < 0:
                break
            return decoded, at
    raise InvalidRequest("the message indexes between schema id and protobuf value are cut off, or no numbers")
