"""JSON of requests and answers: values into documents, parts of documents into tensors. Nothing is rounded or cut off."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import orjson

from servinggraph.errors import InvalidRequest
from servinggraph.messages import Body
from servinggraph.tensors import DATATYPES, Array

__all__ = ["NoTensor", "decoded", "encoded", "tensor_of"]


class NoTensor(Exception):
    """A part of a document is no tensor of the datatype that is declared; says why."""


def encoded(value: Any) -> bytes:
    """Return a value as JSON: tensors as nested lists, bytes as text.

    Raises:
        InvalidRequest: JSON cannot hold it.
    """
    try:
        return orjson.dumps(_plain(value))
    except TypeError as error:
        raise InvalidRequest(f"the value cannot be sent as JSON: {error}") from error


def _plain(value: Any) -> Any:
    if isinstance(value, Body):
        return _plain(value.value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.ndarray | np.generic):
        if value.dtype.kind in "fV" and not np.isfinite(value.astype("f8")).all():
            raise InvalidRequest("a tensor holds NaN or infinity, which JSON has not")
        return _plain(value.tolist()) if value.dtype == object else value.tolist()
    if isinstance(value, float) and not math.isfinite(value):
        raise InvalidRequest(f"the value holds {value}, which JSON has not")
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            raise InvalidRequest("the value holds bytes that are not UTF-8, which JSON cannot hold") from None
    return value


def decoded(body: bytes) -> Any:
    """Return the document in a body; None for an empty one.

    Raises:
        ValueError: it is no JSON.
    """
    return orjson.loads(body) if body.strip() else None


def tensor_of(data: Any, datatype: str | None) -> Array:
    """Return nested lists, or a single value, as a tensor.

    Args:
        data: the part of a document.
        datatype: V2 datatype; None for the one that its values have.

    Raises:
        NoTensor: it is ragged, or has values that the datatype does not.
    """
    if datatype == "BYTES":
        return _text_tensor(data)
    try:
        array = np.asarray(data)
    except ValueError as error:
        raise NoTensor(f"it is no nested list of equal lengths: {error}") from error
    if datatype is None:
        if array.dtype.kind in "US":
            return _text_tensor(data)
        if array.dtype.kind in "biuf":
            return array
        raise NoTensor(f"it is {type(data).__name__} and no tensor")
    target = DATATYPES[datatype]
    kinds = "b" if datatype == "BOOL" else "iu" if datatype.startswith(("INT", "UINT")) else "iuf"
    if array.dtype.kind not in kinds and array.size:
        raise NoTensor(f"{datatype} was declared, and its values are {_kind(array)}")
    with np.errstate(all="ignore"):
        made = array.astype(target)
    if kinds == "iu" and not (made == array).all():
        raise NoTensor(f"a value does not fit {datatype}")
    if kinds == "iuf" and not np.isfinite(made.astype("f8")).all():
        raise NoTensor(f"a value is beyond the range of {datatype}")
    return made


def _kind(array: Array) -> str:
    return {"b": "booleans", "f": "fractions", "U": "texts", "i": "integers", "u": "integers"}.get(
        array.dtype.kind, "mixed, null or objects"
    )


def _text_tensor(data: Any) -> Array:
    shape: list[int] = []
    inner = data
    while isinstance(inner, list):
        shape.append(len(inner))
        inner = inner[0] if inner else None
    flat = [data]
    for size in shape:
        if not all(isinstance(item, list) and len(item) == size for item in flat):
            raise NoTensor("it is no nested list of equal lengths")
        flat = [element for item in flat for element in item]
    if not all(isinstance(item, str) for item in flat):
        raise NoTensor("BYTES was declared, and its values are not all texts")
    array = np.empty(len(flat), dtype=object)
    array[:] = [item.encode() for item in flat]
    return array.reshape(shape)
