"""JSON both ways: documents of plain Python objects in; objects, arrays among them, out."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from datetime import date, datetime, time
from enum import Enum
from typing import Any, Final
from uuid import UUID

import numpy as np
import orjson

from servinggraph.errors import NotAcceptable, ServingGraphError, StepFailed
from servinggraph.protocols.freeform.bounds import MAX_CONTAINERS, MAX_NESTING, check_nesting, too_many
from servinggraph.protocols.v2.json_data import parse_json

__all__ = ["decode_json", "encode_json", "plain"]

_OPTIONS: Final = orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_PASSTHROUGH_DATACLASS


def decode_json(data: bytes) -> Any:
    """Parse a JSON document; the bare tokens NaN, Infinity and -Infinity are numbers.

    Raises:
        InvalidRequest: not JSON, or nested too deep.
        RequestTooLarge: more arrays and objects than `MAX_CONTAINERS`.
    """
    # What stands in texts is counted as well; only documents far from any limit are nearer to it by that.
    opened = data.count(b"[") + data.count(b"{")
    if opened > MAX_CONTAINERS:
        raise too_many()
    document = parse_json(data)
    if opened > MAX_NESTING:
        check_nesting(document)
    return document


def encode_json(value: Any) -> bytes:
    """Write a value as JSON: arrays as nested lists, not-a-number and infinities as bare tokens.

    Raises:
        NotAcceptable: it holds bytes that are not UTF-8, which JSON cannot carry.
        StepFailed: it holds something else that JSON cannot carry.
    """
    try:
        text = orjson.dumps(value, default=_plain, option=_OPTIONS)
        # orjson writes null for what is not a number. A hit may be None as well, or text that holds
        # the word, for which the slow way is right, too.
        if b"null" not in text:
            return text
        return json.dumps(value, default=_plain, ensure_ascii=False, separators=(",", ":")).encode()
    except (TypeError, ValueError, RecursionError) as error:
        if isinstance(error.__cause__, ServingGraphError):
            raise error.__cause__ from None
        raise StepFailed(f"gave an answer that JSON cannot carry: {error}") from error


def plain(value: Any) -> Any:
    """Return what stands for an object that no format knows: one step down, what it holds may need another.

    Raises:
        StepFailed: nothing does.
    """
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Enum):
        return value.value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    if isinstance(value, UUID):
        return str(value)
    raise StepFailed(
        f"gave an answer that holds a {type(value).__module__}.{type(value).__qualname__}: "
        "expected numbers, text, bytes, None, lists, mappings and numpy arrays"
    )


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        if value.dtype.kind == "V":  # bfloat16, to numpy a stranger
            return value.astype(np.float32)
        return orjson.loads(orjson.dumps(value, option=_OPTIONS)) if value.dtype.kind == "M" else value.tolist()
    if isinstance(value, bytes | bytearray | memoryview):
        try:
            return bytes(value).decode()
        except UnicodeDecodeError:
            raise NotAcceptable(
                "the answer holds bytes that are not UTF-8, which JSON cannot carry: accept application/msgpack"
            ) from None
    if isinstance(value, tuple):
        return list(value)
    return plain(value)
