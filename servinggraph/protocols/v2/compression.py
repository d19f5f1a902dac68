"""Content codings gzip and deflate, both ways, with a bound on what a body unpacks to.

Source: RFC 9110 §8.4, §12.5.3; RFC 1950, 1952.
"""

from __future__ import annotations

import zlib
from typing import Final

from servinggraph.errors import InvalidRequest, RequestTooLarge, Unsupported

__all__ = ["accepted_coding", "compress", "decompress"]

_WINDOW_BITS: Final = {"gzip": 31, "x-gzip": 31, "deflate": 15}
_LEVEL: Final = 4


def decompress(data: bytes, coding: str, limit: int) -> bytes:
    """Undo a request's content coding.

    Args:
        data: the body.
        coding: value of Content-Encoding, in any case.
        limit: most bytes that it may unpack to.

    Raises:
        Unsupported: an unknown coding, or several.
        InvalidRequest: corrupt or cut off.
        RequestTooLarge: unpacks to more than `limit`.
    """
    coding = coding.strip().lower()
    if coding in ("", "identity"):
        return data
    bits = _WINDOW_BITS.get(coding)
    if bits is None:
        raise Unsupported(f"Unsupported compression type '{coding}': use gzip, deflate or identity")
    parts: list[bytes] = []
    size = 0
    while True:
        unpacker = zlib.decompressobj(bits)
        try:
            part = unpacker.decompress(data, limit - size + 1)
        except zlib.error as error:
            raise InvalidRequest(f"the {coding} body is corrupt: {error}") from None
        size += len(part)
        if size > limit:
            raise RequestTooLarge(f"the body unpacks to more than {limit} bytes (limit 'max_body_bytes')")
        parts.append(part)
        if not unpacker.eof:
            raise InvalidRequest(f"the {coding} body is cut off after {len(data)} bytes")
        data = unpacker.unused_data
        if not data:
            return b"".join(parts)
        if bits != 31:
            raise InvalidRequest("bytes follow the end of the deflate body")
        # Several gzip members one after the other are one file (RFC 1952 §2.2).


def accepted_coding(header: str) -> str:
    """Choose the coding of a response: of identity, deflate and gzip the first with the highest q-value."""
    best, best_q = "identity", 0.0
    for item in header.lower().split(","):
        coding, _, parameters = item.strip().partition(";")
        coding = coding.strip()
        if coding not in ("gzip", "deflate", "identity"):
            continue
        q = 1.0
        name, _, value = parameters.strip().partition("=")
        if name.strip() == "q":
            try:
                q = float(value)
            except ValueError:
                continue
        if q > best_q:
            best, best_q = coding, q
    return best


def compress(data: bytes, coding: str) -> bytes:
    """Apply a coding that `accepted_coding` chose."""
    if coding == "identity":
        return data
    packer = zlib.compressobj(_LEVEL, zlib.DEFLATED, _WINDOW_BITS[coding])
    return packer.compress(data) + packer.flush()
