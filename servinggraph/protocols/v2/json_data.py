"""Tensor data as JSON: numbers, booleans and text in lists, flat or nested.

Every element is checked against the datatype: no truncation, no boolean taken for a number.
`struct` does the conversion, since it refuses what does not fit and is the fastest way from
a list to packed bytes (2.7 times np.array for 784 floats).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import chain
from math import isinf
from struct import Struct, error as StructError  # noqa: N812  (a class with a lower-case name)
from typing import Any, Final

import ml_dtypes
import numpy as np
import orjson

from servinggraph.errors import InvalidRequest, StepFailed
from servinggraph.tensors import DATATYPES, Array, element_count

__all__ = ["MAX_NESTING", "decode_data", "encodable", "encode_data", "parse_json", "parse_unique", "shown"]

MAX_NESTING: Final = 100
"""Deepest nesting of `data`, as in Triton."""

_CODE: Final = {
    "UINT8": "B", "UINT16": "H", "UINT32": "I", "UINT64": "Q",
    "INT8": "b", "INT16": "h", "INT32": "i", "INT64": "q",
    "FP16": "e", "FP32": "f", "FP64": "d", "BF16": "f",
}  # fmt: skip
_FEW: Final = 64
_NOT_STRICT_JSON: Final = re.compile(rb"NaN|Infinity")


def parse_json(text: bytes) -> Any:
    """Parse JSON, the bare tokens NaN, Infinity and -Infinity included.

    Raises:
        InvalidRequest: not JSON; says where.
    """
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError as strict:
        reason: Exception = strict
        if _NOT_STRICT_JSON.search(text):
            try:
                return _parse_tokens(text)
            except (ValueError, RecursionError) as error:
                reason = error
        raise InvalidRequest(f"failed to parse the request JSON buffer: {reason}") from None


def shown(value: Any) -> str:
    """Return a value from a request for an error text: short, and however deep it is nested."""
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "an array"
    text = repr(value[:40] if isinstance(value, str) else value)
    return text if len(text) <= 40 else text[:37] + "..."


def parse_unique(text: bytes) -> Any:
    """Parse JSON as `parse_json` does, and refuse an object that has a key twice.

    Raises:
        InvalidRequest: not JSON, or a key that is there twice.
    """
    document = parse_json(text)
    # Without escapes a key stands in the text as it is; one that stands there once cannot be a duplicate.
    if b"\\" not in text and all(text.count(b'"%b"' % key.encode()) == 1 for key in _keys(document)):
        return document
    try:
        _parse_tokens(text, _unique)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"failed to parse the request JSON buffer: {error}") from None
    return document


def _keys(document: Any) -> list[str]:
    """Return the keys of an object and of the objects in it, one level deep; deeper ones V2 does not have."""
    if type(document) is not dict:
        return []
    return [*document, *(key for value in document.values() if type(value) is dict for key in value)]


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"key {shown(twice)} is there twice")
    return document


def _parse_tokens(text: bytes, make_object: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """Parse JSON with the standard library, as strict as orjson but for the three tokens."""
    document = json.loads(text.decode(), parse_float=_finite, parse_int=_integer, object_pairs_hook=make_object)
    if b"\\u" in text:
        json.dumps(document, ensure_ascii=False).encode()  # raises for half of a surrogate pair
    return document


def _integer(text: str) -> int | float:
    number = int(text)
    return number if -(2**63) <= number < 2**64 else _finite(text)


def _finite(text: str) -> float:
    number = float(text)
    if isinf(number):
        raise ValueError(f"number {text[:40]} is infinity when parsed as double")
    return number


def decode_data(name: str, datatype: str, shape: Sequence[int], data: Any) -> Array:
    """Turn the `data` of an input into an array.

    Args:
        name: the input, for error texts.
        datatype: V2 datatype.
        shape: its shape, sizes 0 and more.
        data: list of elements, flat or nested in any way that is not ragged.

    Returns:
        A read-only array of that shape.

    Raises:
        InvalidRequest: wrong element type, value out of range, ragged nesting, wrong count.
    """
    if type(data) is not list:
        raise InvalidRequest(f"Unable to parse 'data': input '{name}' has {_type(data)}, expected an array")
    count = element_count(shape)
    flat = _flat(name, data) if data and type(data[0]) is list else data
    if len(flat) != count:
        raise InvalidRequest(
            f"Unable to parse 'data': Shape does not match true shape of 'data' field: input '{name}' has shape "
            f"{list(shape)}, that is {count} elements, but 'data' has {len(flat)}"
        )
    code = _CODE.get(datatype)
    try:
        if code is not None:
            packed = _struct(code, count).pack(*flat)
            array: Array = np.frombuffer(packed, DATATYPES[datatype] if datatype != "BF16" else np.float32)
            if _may_hold_booleans(array, count) and bool in set(map(type, flat)):
                raise _bad_element(name, datatype, flat)
            if datatype == "BF16":
                array = _bfloat16(name, flat, array)
        elif datatype == "BOOL":
            if count and set(map(type, flat)) != {bool}:
                raise _bad_element(name, datatype, flat)
            array = np.array(flat, dtype=np.bool_)
        else:
            array = np.empty(count, dtype=np.object_)
            array[:] = [text.encode() for text in flat]
    except (StructError, OverflowError, AttributeError, UnicodeEncodeError):
        raise _bad_element(name, datatype, flat) from None
    try:
        return array.reshape(shape)
    except (ValueError, OverflowError) as error:
        raise InvalidRequest(f"input '{name}' has an impossible shape {list(shape)[:8]}: {error}") from None


def encode_data(name: str, datatype: str, array: Array) -> Any:
    """Return an output's elements, flat and row-major, as something that orjson can write.

    Raises:
        StepFailed: a BYTES element is neither text nor bytes.
        InvalidRequest: it is not UTF-8; the caller has to ask for binary data then.
    """
    if datatype == "BYTES":
        return [_text(name, item) for item in array.ravel().tolist()]
    if datatype == "BF16":
        return array.ravel().astype(np.float32)
    return array.ravel()


def _bfloat16(name: str, flat: list[Any], array: Array) -> Array:
    """Round to bfloat16; what that turns into infinity is out of range, as it is for the other datatypes."""
    with np.errstate(over="ignore", invalid="ignore"):
        rounded = array.astype(ml_dtypes.bfloat16)
    over = np.isinf(rounded) & np.isfinite(array)
    if over.any():
        index = int(over.argmax())
        raise InvalidRequest(
            f"Unable to parse 'data': input '{name}' element {index} is {shown(flat[index])}, out of range for BF16"
        )
    return rounded


@lru_cache(maxsize=1024)
def _struct(code: str, count: int) -> Struct:
    return Struct(f"<{count}{code}")


def _may_hold_booleans(array: Array, count: int) -> bool:
    """Tell whether an element may have been true or false, which `struct` takes for 1 and 0."""
    if count <= _FEW:
        return True
    return np.count_nonzero(array) != count or bool((array == 1).any())


def _flat(name: str, data: list[Any]) -> list[Any]:
    for depth in range(MAX_NESTING):
        kinds = set(map(type, data))
        if list not in kinds:
            return data
        if len(kinds) > 1:
            index = next(i for i, item in enumerate(data) if type(item) is not list)
            raise InvalidRequest(
                f"Unable to parse 'data': input '{name}' is ragged: "
                f"element {index} at depth {depth + 1} is no array, others are"
            )
        length = len(data[0])
        if any(len(item) != length for item in data):
            index = next(i for i, item in enumerate(data) if len(item) != length)
            raise InvalidRequest(
                f"Unable to parse 'data': input '{name}' is ragged: row {index} at depth {depth + 1} has "
                f"{len(data[index])} elements, row 0 has {length}"
            )
        data = list(chain.from_iterable(data))
        if not data:
            return data
    raise InvalidRequest(f"input '{name}': JSON nesting depth exceeds maximum allowed limit ({MAX_NESTING})")


def _bad_element(name: str, datatype: str, flat: list[Any]) -> InvalidRequest:
    """Return the error for the first element that does not fit; only called when there is one."""
    for index, item in enumerate(flat):
        reason = _misfit(datatype, item)
        if reason is not None:
            return InvalidRequest(f"Unable to parse 'data': input '{name}' element {index} {reason}")
    return InvalidRequest(f"Unable to parse 'data': input '{name}' cannot be read as {datatype}")


def _misfit(datatype: str, item: Any) -> str | None:
    if datatype == "BOOL":
        return None if type(item) is bool else f"is {shown(item)}, expected true or false"
    if datatype == "BYTES":
        if type(item) is not str:
            return f"is {shown(item)}, expected text"
        return None if encodable(item) else "holds half of a surrogate pair"
    whole = not datatype.startswith(("FP", "BF"))
    if type(item) is bool or not isinstance(item, int if whole else int | float):
        return f"is {shown(item)}, expected {'an integer' if whole else 'a number'} for {datatype}"
    try:
        _struct(_CODE[datatype], 1).pack(item)
    except (StructError, OverflowError):
        return f"is {shown(item)}, out of range for {datatype}"
    return None


def encodable(text: str) -> bool:
    """Tell whether UTF-8 can carry a text: half of a surrogate pair it cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _text(name: str, item: Any) -> str:
    if isinstance(item, str):
        if not encodable(item):
            raise StepFailed(f"output '{name}' has a text with half of a surrogate pair, which UTF-8 cannot carry")
        return item
    if not isinstance(item, bytes):
        raise StepFailed(f"output '{name}' is BYTES, but an element is a {type(item).__name__}; expected bytes or str")
    try:
        return item.decode()
    except UnicodeDecodeError:
        raise InvalidRequest(
            f"output '{name}' has an element that is not UTF-8, which JSON cannot carry: "
            'ask for it as binary data (parameters: {"binary_data": true})'
        ) from None


def _type(value: Any) -> str:
    names = {dict: "an object", str: "text", bool: "a boolean", int: "a number", float: "a number", type(None): "null"}
    return names.get(type(value), type(value).__name__)
