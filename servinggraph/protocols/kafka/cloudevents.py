"""CloudEvents in records: binary mode, attributes in headers, and structured mode, an event as one JSON document.

Source: CloudEvents 1.0.2, Kafka protocol binding and JSON event format.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from typing import Any, Final

import orjson

from servinggraph.errors import InvalidRequest
from servinggraph.kafka import headers as names
from servinggraph.protocols.freeform.media import JSON
from servinggraph.protocols.kafka.records import Work
from servinggraph.protocols.v2.json_data import parse_json

__all__ = ["ID", "OWN", "PREFIX", "event_headers", "is_structured", "unwrapped"]

PREFIX: Final = "ce_"
ID: Final = "ce_id"
OWN: Final = frozenset({
    "ce_specversion", "ce_id", "ce_source", "ce_type", "ce_time", "ce_subject", "ce_dataschema", "ce_causeid",
})  # fmt: skip
"""Attributes that an answer has of its own; extensions are copied to it."""

_STRUCTURED: Final = b"application/cloudevents+json"


def is_structured(headers: Mapping[str, bytes]) -> bool:
    """Tell whether a record's value is a whole event."""
    return headers.get(names.CONTENT_TYPE, b"").startswith(_STRUCTURED)


def unwrapped(value: bytes, headers: Mapping[str, bytes]) -> tuple[bytes, dict[str, bytes]]:
    """Return an event's data, and headers as it would have in binary mode.

    Raises:
        InvalidRequest: no event, or one without data.
    """
    event = parse_json(value)
    if type(event) is not dict or not isinstance(event.get("specversion"), str) or not isinstance(event.get("id"), str):
        raise InvalidRequest("the record says that it is a CloudEvent, but is no object with 'specversion' and 'id'")
    attributes: dict[str, bytes] = {}
    for name, attribute in event.items():
        if name not in ("data", "data_base64", "datacontenttype") and isinstance(attribute, str | int | bool):
            attributes[PREFIX + name] = str(attribute).encode("utf-8", "replace")
    content_type = event.get("datacontenttype", JSON)
    if not isinstance(content_type, str):
        raise InvalidRequest("'datacontenttype' of the CloudEvent is no text")
    attributes[names.CONTENT_TYPE] = content_type.encode("utf-8", "replace")
    return _data(event), {**headers, **attributes}


def _data(event: dict[str, Any]) -> bytes:
    if "data_base64" in event:
        try:
            return base64.b64decode(event["data_base64"], validate=True)
        except (binascii.Error, TypeError, ValueError):
            raise InvalidRequest("'data_base64' of the CloudEvent is no base64") from None
    if "data" not in event:
        raise InvalidRequest("the CloudEvent has no 'data'")
    data = event["data"]
    return data.encode("utf-8", "replace") if isinstance(data, str) else orjson.dumps(data)


def event_headers(work: Work, graph: str, kind: str) -> list[tuple[str, bytes | None]]:
    """Return the attributes of an answer to an event; none where the request was no event.

    Its id says where the request was: an answer that is written again after a crash has the same.
    """
    if ID not in work.headers:
        return []
    attributes: list[tuple[str, bytes | None]] = [
        ("ce_specversion", b"1.0"),
        (ID, f"{graph}:{work.place}".encode()),
        ("ce_source", f"/servinggraph/{graph}".encode()),
        ("ce_type", kind.encode()),
        ("ce_causeid", work.headers[ID]),
    ]
    if is_structured(names.headers_of(work.record.headers)):  # its extensions are in no header of the record
        attributes += [(n, v) for n, v in work.headers.items() if n.startswith(PREFIX) and n not in OWN]
    return attributes
