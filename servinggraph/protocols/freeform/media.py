"""Media types: what a Content-Type says, and which of several types an Accept header prefers.

Source: RFC 9110 §8.3, §12.4.2, §12.5.1; RFC 6838 §4.2.8 for the suffix `+json`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Final, Literal, NamedTuple

from servinggraph.errors import UnsupportedType

__all__ = [
    "CSV",
    "JSON",
    "MSGPACK",
    "NDJSON",
    "OCTETS",
    "SERVER_SENT",
    "TEXT",
    "Kind",
    "Media",
    "kind_of",
    "parse_media",
    "preferred",
]

Kind = Literal["json", "msgpack", "csv", "text", "bytes"]

JSON: Final = "application/json"
MSGPACK: Final = ("application/msgpack", "application/x-msgpack", "application/vnd.msgpack")
NDJSON: Final = ("application/x-ndjson", "application/ndjson", "application/jsonl")
SERVER_SENT: Final = "text/event-stream"
CSV: Final = "text/csv"
TEXT: Final = "text/plain"
OCTETS: Final = "application/octet-stream"

_WORD: Final = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_MEDIA: Final = re.compile(rf"\s*({_WORD}/{_WORD})\s*(?:;|$)")
_PARAMETER: Final = re.compile(rf';\s*({_WORD})=(?:"((?:[^"\\]|\\.)*)"|([^;\s"]*))')
_LONGEST: Final = 1024
_QUALITY: Final = re.compile(r"[01](\.[0-9]{0,3})?")


class Media(NamedTuple):
    """A media type."""

    name: str
    """Type and subtype, in lower case."""
    parameters: Mapping[str, str]
    """Parameters by lower-case name."""


@lru_cache(maxsize=256)
def parse_media(header: str) -> Media:
    """Parse the value of a Content-Type header.

    Raises:
        UnsupportedType: it is no media type.
    """
    match = _MEDIA.match(header) if len(header) <= _LONGEST else None
    if match is None:
        raise UnsupportedType(f"Content-Type {header[:80]!r} is no media type: expected one such as {JSON}")
    found = _PARAMETER.findall(header)
    return Media(match[1].lower(), {name.lower(): re.sub(r"\\(.)", r"\1", quoted) or plain for name, quoted, plain in found})


def kind_of(name: str) -> Kind:
    """Return how a body of a media type is read."""
    if name == JSON or name.endswith("+json") or name == "text/json":
        return "json"
    if name in MSGPACK or name.endswith("+msgpack"):
        return "msgpack"
    if name == CSV:
        return "csv"
    return "text" if name.startswith("text/") else "bytes"


def preferred(accept: str, offers: Sequence[str]) -> str | None:
    """Return the offer that an Accept header wants most, the first of equals; None when it wants none.

    Args:
        accept: value of the header; empty means anything.
        offers: media types without parameters, in the server's order.
    """
    ranges = _ranges(accept[: 4 * _LONGEST])
    if not ranges:
        return offers[0] if offers else None
    best: str | None = None
    best_quality = 0.0
    for offer in offers:
        quality = _quality(offer, ranges)
        if quality > best_quality:
            best, best_quality = offer, quality
    return best


@lru_cache(maxsize=256)
def _ranges(accept: str) -> tuple[tuple[str, float], ...]:
    """Return (media range, quality) pairs; what is not well formed counts for nothing."""
    found: list[tuple[str, float]] = []
    for item in accept.lower().split(","):
        name, _, parameters = item.partition(";")
        name = name.strip()
        if not name:
            continue
        quality = 1.0
        for parameter in parameters.split(";"):
            key, _, text = parameter.partition("=")
            if key.strip() == "q":
                quality = float(text.strip()) if _QUALITY.fullmatch(text.strip()) else 0.0
        found.append((name, min(quality, 1.0)))
    return tuple(found)


def _quality(offer: str, ranges: tuple[tuple[str, float], ...]) -> float:
    """Return the quality of the most specific range that an offer is in."""
    group = offer.partition("/")[0] + "/*"
    for wanted in (offer, group, "*/*"):
        qualities = [quality for name, quality in ranges if name == wanted]
        if qualities:
            return max(qualities)
    return 0.0
