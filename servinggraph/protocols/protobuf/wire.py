"""Bytes of protobuf messages where tensors are: taken apart and put together without copying a tensor.

protobuf's own classes copy every `bytes` field when it is read, and once more when a message is
written. Source of the encoding: protobuf, "Encoding".
"""

from __future__ import annotations

from typing import Final

from google.protobuf.message import DecodeError

from servinggraph.errors import InvalidRequest
from servinggraph.protocols.protobuf.generated import grpc_service_pb2 as pb

__all__ = ["Data", "field", "split_request", "varint"]

Data = bytes | memoryview

_RAW_TAG: Final = 7 << 3 | 2  # ModelInferRequest.raw_input_contents
_SMALL: Final = 32 * 1024
"""Below this, the copy is cheaper than to look for the fields from Python."""


def split_request(data: bytes) -> tuple[pb.ModelInferRequest, list[Data]]:
    """Return an inference request's message and its raw contents; of a large one, these are views of `data`.

    Raises:
        InvalidRequest: these bytes are no such message.
    """
    rest: bytes = data
    views: list[memoryview] = []
    if len(data) > _SMALL:
        rest, views = _cut(data)
    try:
        message = pb.ModelInferRequest.FromString(rest)
    except DecodeError as error:
        raise InvalidRequest(f"failed to parse the request as inference.ModelInferRequest: {error}") from None
    return message, views or message.raw_input_contents[:]  # type: ignore[return-value]  # a slice is a list


def _cut(data: bytes) -> tuple[bytes, list[memoryview]]:
    """Return a message without its raw contents, and these; nothing is cut out where the message is malformed."""
    views: list[memoryview] = []
    kept: list[Data] = []
    whole = memoryview(data)
    at = keep_from = 0
    end = len(data)
    while at < end:
        start = at
        tag, at = _read(data, at)
        kind = tag & 7
        if kind == 2:
            length, at = _read(data, at)
            if length > end - at:
                return data, []
            at += length
            if tag == _RAW_TAG:
                views.append(whole[at - length : at])
                kept.append(whole[keep_from:start])
                keep_from = at
        elif kind == 0:
            _, at = _read(data, at)
        elif kind in {1, 5}:
            at += 8 if kind == 1 else 4
        else:
            return data, []  # groups, which the message does not have: for protobuf to judge
    if at > end or not views:
        return data, []
    kept.append(whole[keep_from:])
    return b"".join(kept), views


def _read(data: bytes, at: int) -> tuple[int, int]:
    """Return the varint at an offset, and where it ends; an end beyond the data when there is none."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            break
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    return 0, len(data) + 1


def varint(number: int) -> bytes:
    """Return a number from 0 on as protobuf writes it."""
    if number < 0x80:
        return bytes((number,))
    digits = bytearray()
    while number >= 0x80:
        digits.append(number & 0x7F | 0x80)
        number >>= 7
    digits.append(number)
    return bytes(digits)


def field(number: int, data: bytes) -> bytes:
    """Return a field that holds text, bytes or a message, number 1 to 15."""
    return b"%c%b%b" % (number << 3 | 2, varint(len(data)), data)
