"""A node's value as the body of a record."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from servinggraph.errors import InvalidRequest
from servinggraph.kafka import headers as names
from servinggraph.messages import Body
from servinggraph.protocols.freeform.client import encode_body
from servinggraph.protocols.v2.client import encode_request
from servinggraph.protocols.v2.json_data import encode_data
from servinggraph.protocols.v2.response import dump_json, known_datatype

__all__ = ["Format", "encode"]

Format = Literal["auto", "v2-binary", "v2-json", "json", "msgpack"]

_OCTETS = b"application/octet-stream"
_JSON = b"application/json"


def encode(value: Any, format: Format, id: str) -> tuple[bytes, dict[str, bytes]]:
    """Return the body of a record and the headers that say what it is.

    Args:
        value: tensors by name, or anything that the free-form formats carry.
        format: how to write it; `auto` writes tensors as V2's binary request, anything else as JSON.
        id: the request's id; V2 bodies hold it.

    Raises:
        InvalidRequest: a V2 format for what are no tensors.
        StepFailed: the format cannot carry the value.
    """
    if isinstance(value, Body):
        value = value.value
    tensors = _is_tensors(value)
    chosen = ("v2-binary" if tensors else "json") if format == "auto" else format
    if chosen in ("json", "msgpack"):
        body, media = encode_body(value, f"application/{chosen}")
        return body, {names.CONTENT_TYPE: media.encode()}
    if not tensors:
        raise InvalidRequest(f"'format: {chosen}' is for tensors by name, got {type(value).__name__}; 'json' takes any value")
    if chosen == "v2-binary":
        body, length = encode_request(value, id)
        return body, {names.CONTENT_TYPE: _OCTETS, names.HEADER_LENGTH: str(length).encode()}
    entries = []
    for name, array in value.items():
        datatype = known_datatype(name, array)
        entries.append({"name": name, "datatype": datatype, "shape": array.shape, "data": encode_data(name, datatype, array)})
    return dump_json({**({"id": id} if id else {}), "inputs": entries}), {names.CONTENT_TYPE: _JSON}


def _is_tensors(value: Any) -> bool:
    return isinstance(value, Mapping) and bool(value) and all(isinstance(item, np.ndarray) for item in value.values())
