"""What a test gives, as what is sent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from servinggraph.errors import InvalidRequest
from servinggraph.protocols.freeform.client import encode_body

__all__ = ["free_form", "unnested"]


def free_form(
    body: Any, content_type: str | None, accept: str, headers: Mapping[str, str] | None, timeout_s: float | None
) -> tuple[bytes, list[tuple[bytes, bytes]]]:
    """Return a free-form request's body and headers."""
    data, media = encode_body(body, content_type)
    sent = dict(headers or {})
    if media:
        sent["content-type"] = media
    if accept:
        sent["accept"] = accept
    if timeout_s is not None:
        sent["x-request-timeout-ms"] = repr(timeout_s * 1e3)
    return data, [(name.lower().encode("latin-1"), text.encode("latin-1")) for name, text in sent.items()]


def unnested(name: str, given: Any) -> tuple[tuple[int, ...], list[Any]]:
    """Return the shape and the elements of nested sequences.

    Raises:
        InvalidRequest: they are ragged.
    """
    if isinstance(given, np.ndarray | np.generic):
        given = given.tolist()
    if not isinstance(given, list | tuple):
        return (), [given]
    parts = [unnested(name, item) for item in given]
    shapes = {shape for shape, _ in parts}
    if len(shapes) > 1:
        raise InvalidRequest(f"input '{name}' is ragged: its parts have shapes {sorted(map(list, shapes))}")
    return (len(given), *next(iter(shapes), ())), [item for _, flat in parts for item in flat]
