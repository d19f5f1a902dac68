"""msgpack both ways, arrays as an extension type.

The payload of an extension of type `ARRAY` (86, the letter V) is
    1 byte          length d of the datatype's name
    d bytes         V2 datatype, ASCII: FP32, INT64, BYTES, ...
    1 byte          number r of axes
    8 * r bytes     size of each axis, unsigned, little-endian
    the rest        the elements as in V2's binary data: row-major, little-endian, BYTES elements
                    each with its length as 4 bytes before it
A client may use it for any array in its request, and gets one for each array of the answer.
"""

from __future__ import annotations

from struct import Struct, unpack_from
from typing import Any, Final

import msgpack
import numpy as np

from servinggraph.errors import InvalidRequest, ServingGraphError, StepFailed
from servinggraph.protocols.freeform.bounds import MAX_CONTAINERS, check_nesting, too_many
from servinggraph.protocols.freeform.documents import plain
from servinggraph.protocols.v2.binary_data import decode_bytes, encode_bytes
from servinggraph.tensors import DATATYPES, Array, datatype_of, element_count

__all__ = ["ARRAY", "decode_msgpack", "encode_msgpack", "pack_array", "unpack_array"]

ARRAY: Final = 86
"""Number of the extension type for arrays."""

_MAX_AXES: Final = 32
_MAX_ELEMENTS: Final = 2**63 - 1


def decode_msgpack(data: bytes) -> Any:
    """Parse one msgpack object: text as `str`, binary as `bytes`, timestamps as `datetime`, arrays as numpy arrays.

    Raises:
        InvalidRequest: not msgpack, cut off, bytes behind the end, a key that is no text, nested
            too deep, an unknown extension type.
        RequestTooLarge: more arrays and maps than `MAX_CONTAINERS`.
    """
    try:
        # Once over the structure without making anything: a list that claims more elements than there
        # are bytes would be allocated first and found out afterwards.
        scout = msgpack.Unpacker(max_buffer_size=max(len(data), 1))
        scout.feed(data)
        scout.skip()
        end = scout.tell()
        if end != len(data):
            raise InvalidRequest(f"the body is no msgpack: {len(data) - end} bytes follow the object")
        document = msgpack.unpackb(data, raw=False, timestamp=3, ext_hook=_extension, **_counters(len(data)))
    except ServingGraphError:
        raise
    except msgpack.OutOfData:
        raise InvalidRequest(f"the body is no msgpack: it is cut off after {len(data)} bytes") from None
    except (msgpack.StackError, RecursionError):
        raise InvalidRequest("the body is no msgpack that can be read: it is nested too deep") from None
    except (msgpack.UnpackException, ValueError, OverflowError, TypeError) as error:
        raise InvalidRequest(f"the body is no msgpack: {str(error)[:200] or type(error).__name__}") from None
    check_nesting(document)
    return document


def encode_msgpack(value: Any) -> bytes:
    """Write a value as msgpack.

    Raises:
        StepFailed: it holds something that msgpack cannot carry.
    """
    try:
        packed: bytes = msgpack.packb(value, default=_plain, use_bin_type=True)
    except ServingGraphError:
        raise
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise StepFailed(f"gave an answer that msgpack cannot carry: {error}") from error
    return packed


def pack_array(array: Array) -> msgpack.ExtType:
    """Return an array as the extension type.

    Raises:
        StepFailed: no V2 datatype stands for its dtype, or an element of BYTES is neither text nor bytes.
    """
    datatype = datatype_of(array)
    if datatype is None:
        raise StepFailed(f"gave an array of dtype {array.dtype}, which no V2 datatype stands for; convert it in the graph")
    if array.ndim > _MAX_AXES:
        raise StepFailed(f"gave an array with {array.ndim} axes; msgpack arrays have at most {_MAX_AXES}")
    name = datatype.encode()
    head = bytes((len(name),)) + name + bytes((array.ndim,)) + Struct(f"<{array.ndim}Q").pack(*array.shape)
    return msgpack.ExtType(ARRAY, b"".join((head, encode_bytes("", datatype, array))))


def unpack_array(payload: bytes) -> Array:
    """Return the array in an extension's payload: a read-only view of it, for BYTES an array of `bytes` objects.

    Raises:
        InvalidRequest: an unknown datatype, or sizes that do not fit the payload.
    """
    if not payload or len(payload) < 2 + payload[0]:
        raise InvalidRequest("an array of the body is cut off before its shape")
    at = 1 + payload[0]
    name = payload[1:at].decode("latin-1")
    if name not in DATATYPES:
        raise InvalidRequest(f"an array of the body has datatype {name[:40]!r}; expected one of {', '.join(DATATYPES)}")
    axes = payload[at]
    at += 1
    if axes > _MAX_AXES:
        raise InvalidRequest(f"an array of the body has {axes} axes, at most {_MAX_AXES} are possible")
    if len(payload) < at + 8 * axes:
        raise InvalidRequest("an array of the body is cut off within its shape")
    shape = unpack_from(f"<{axes}Q", payload, at)
    count = element_count(shape)
    if count > _MAX_ELEMENTS:
        raise InvalidRequest(f"an array of the body has an impossible shape {list(shape)}")
    data = memoryview(payload)[at + 8 * axes :]
    size = count * DATATYPES[name].itemsize
    if name != "BYTES" and size != len(data):
        raise InvalidRequest(
            f"an array of the body has datatype {name} and shape {list(shape)}, that is {size} bytes, but {len(data)} came"
        )
    return decode_bytes("array", "body", name, shape, data)


def _extension(code: int, payload: bytes) -> Array:
    if code != ARRAY:
        raise InvalidRequest(f"the body holds msgpack extension type {code}; known are {ARRAY} (arrays) and timestamps")
    return unpack_array(payload)


def _counters(size: int) -> dict[str, Any]:
    """Return hooks that count containers, for bodies that can hold too many of them."""
    if size <= MAX_CONTAINERS:
        return {}
    left = MAX_CONTAINERS

    def count(container: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise too_many()
        return container

    return {"list_hook": count, "object_hook": count}


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return pack_array(value)
    return plain(value)
