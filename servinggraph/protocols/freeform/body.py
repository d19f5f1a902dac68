"""Turns a body into a value by its content type."""

from __future__ import annotations

import codecs
from typing import Any, Final

from servinggraph.errors import InvalidRequest, UnsupportedType
from servinggraph.protocols.freeform.documents import decode_json
from servinggraph.protocols.freeform.media import JSON, OCTETS, Media, kind_of, parse_media
from servinggraph.protocols.freeform.packing import decode_msgpack
from servinggraph.protocols.freeform.table import columns_of, decode_table

__all__ = ["decode_body", "decode_text", "has_header", "media_of"]

_FORMS: Final = ("application/x-www-form-urlencoded", "multipart/form-data")
_NO_CHARSETS: Final = {"idna", "punycode", "unicode_escape", "raw_unicode_escape", "undefined", "utf-7", "mbcs", "oem"}
"""Codecs of Python that no client means, some of them slow beyond measure."""


def media_of(content_type: str | None) -> Media:
    """Return what a Content-Type header says; without one it is bytes (RFC 9110 §8.3).

    Raises:
        UnsupportedType: no media type, or a form.
    """
    media = parse_media(content_type) if content_type else Media(OCTETS, {})
    if media.name in _FORMS:
        raise UnsupportedType(
            f"Content-Type {media.name} is for forms, and curl's own choice: "
            f"say what the body is, with -H 'Content-Type: {JSON}' for JSON"
        )
    return media


def decode_body(data: bytes, media: Media) -> Any:
    """Return the value in a body.

    JSON and msgpack become Python objects, text becomes `str`, CSV a mapping of column to array,
    all else stays `bytes`.

    Args:
        data: the body, without content coding.
        media: its type, from `media_of`.

    Raises:
        InvalidRequest: it is not what its type says.
        UnsupportedType: an unknown charset.
        RequestTooLarge: it holds more than its bounds.
    """
    kind = kind_of(media.name)
    if kind == "json":
        check_utf8(media)
        return decode_json(data)
    if kind == "msgpack":
        return decode_msgpack(data)
    if kind == "csv":
        return columns_of(decode_table(decode_text(data, media), header=has_header(media)))
    return decode_text(data, media) if kind == "text" else data


def decode_text(data: bytes, media: Media) -> str:
    """Return a text in the charset of its media type, UTF-8 when it names none; a byte order mark is no part of it.

    Raises:
        UnsupportedType: an unknown charset.
        InvalidRequest: bytes that the charset does not have.
    """
    charset = media.parameters.get("charset", "utf-8")
    try:
        name = codecs.lookup(charset).name
        if name in _NO_CHARSETS:
            raise LookupError
        return data.decode("utf-8-sig" if name == "utf-8" else name)
    except UnicodeError as error:
        reason = f"{error.reason} at byte {error.start}" if isinstance(error, UnicodeDecodeError) else str(error)
        raise InvalidRequest(f"the body is no text in {charset[:40]}: {reason}") from None
    except (LookupError, ValueError):  # ValueError: a NUL in the name
        raise UnsupportedType(f"charset {charset[:40]!r} is unknown: use utf-8") from None


def has_header(media: Media) -> bool:
    """Tell whether a table's first line names its columns (RFC 4180: `header=absent` says that it does not).

    Raises:
        UnsupportedType: the parameter is neither present nor absent.
    """
    header = media.parameters.get("header", "present").lower()
    if header not in ("present", "absent"):
        raise UnsupportedType(f"parameter 'header' of text/csv is present or absent, got {header[:40]!r}")
    return header == "present"


def check_utf8(media: Media) -> None:
    """Refuse a charset other than JSON's (RFC 8259 §8.1).

    Raises:
        UnsupportedType: another charset.
    """
    charset = media.parameters.get("charset", "utf-8").lower()
    if charset not in ("utf-8", "utf8", "us-ascii"):
        raise UnsupportedType(f"JSON is UTF-8, got charset {charset[:40]!r}")
