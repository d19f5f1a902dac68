"""Tensor data as bytes: little-endian and packed; BYTES elements with a length before each.

Numeric tensors are views of the message, both ways where possible.
Source: Triton, extension_binary_data.
"""

from __future__ import annotations

from collections.abc import Sequence
from struct import Struct, unpack_from
from typing import Final

import numpy as np

from servinggraph.errors import InvalidRequest, StepFailed
from servinggraph.tensors import DATATYPES, Array, element_count

__all__ = ["decode_bytes", "encode_bytes"]

_LENGTH: Final = Struct("<I")
_LONGEST: Final = 2**32 - 1
_SMALL: Final = 4096
"""Up to this many bytes, a copy is quicker than a view."""


def decode_bytes(name: str, model: str, datatype: str, shape: Sequence[int], data: memoryview) -> Array:
    """Turn a tensor's part of a body into an array.

    Args:
        name: the input, for error texts.
        model: the graph, for error texts.
        datatype: V2 datatype.
        shape: its shape, sizes 0 and more.
        data: exactly this tensor's bytes.

    Returns:
        A read-only view of `data`; for BYTES an array of `bytes` objects.

    Raises:
        InvalidRequest: the number of bytes or of BYTES elements does not fit the shape.
    """
    count = element_count(shape)
    try:
        if datatype == "BYTES":
            return _split(name, model, count, data).reshape(shape)
        dtype = DATATYPES[datatype]
        if count * dtype.itemsize != len(data):
            raise InvalidRequest(
                f"input byte size mismatch for input '{name}' for model '{model}'. "
                f"Expected {count * dtype.itemsize}, got {len(data)}"
            )
        if datatype == "BOOL" and count and np.frombuffer(data, np.uint8).max() > 1:
            raise InvalidRequest(f"input '{name}' is BOOL, and a byte of it is neither 0 nor 1")
        return np.frombuffer(data, dtype).reshape(shape)
    except (ValueError, OverflowError) as error:
        raise InvalidRequest(f"input '{name}' has an impossible shape {list(shape)[:8]}: {error}") from None


def encode_bytes(name: str, datatype: str, array: Array) -> memoryview | bytes:
    """Return an output's elements as packed little-endian bytes.

    Raises:
        StepFailed: a BYTES element is neither bytes nor text, or over 4 GiB.
    """
    if datatype != "BYTES":
        if array.nbytes <= _SMALL:
            return array.tobytes()
        return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data if array.size else b""
    parts: list[bytes] = []
    for item in array.ravel().tolist():
        if isinstance(item, str):
            try:
                item = item.encode()
            except UnicodeEncodeError:
                text = f"output '{name}' has a text with half of a surrogate pair, which UTF-8 cannot carry"
                raise StepFailed(text) from None
        if not isinstance(item, bytes):
            raise StepFailed(f"output '{name}' is BYTES, but an element is a {type(item).__name__}; expected bytes or str")
        if len(item) > _LONGEST:
            raise StepFailed(f"output '{name}' has an element of {len(item)} bytes; BYTES elements have at most {_LONGEST}")
        parts.append(_LENGTH.pack(len(item)))
        parts.append(item)
    return b"".join(parts)


def _split(name: str, model: str, count: int, data: memoryview) -> Array:
    """Return the elements of a BYTES tensor, copied out: they outlive the message as hashable objects."""
    elements: list[bytes] = []
    at, end = 0, len(data)
    while at < end:
        if len(elements) == count:
            raise InvalidRequest(
                f"unexpected number of string elements {count + 1} for inference input '{name}' "
                f"for model '{model}', expecting {count}"
            )
        if end - at < 4:
            raise InvalidRequest(f"incomplete string length indicator for inference input '{name}' for model '{model}'")
        (length,) = unpack_from("<I", data, at)
        at += 4
        if end - at < length:
            raise InvalidRequest(
                f"incomplete string data for inference input '{name}' for model '{model}': "
                f"expecting {length} bytes, got {end - at}"
            )
        elements.append(bytes(data[at : at + length]))
        at += length
    if len(elements) != count:
        raise InvalidRequest(
            f"expected {count} string elements for inference input '{name}' for model '{model}', got {len(elements)}"
        )
    array = np.empty(count, dtype=np.object_)
    array[:] = elements
    return array
