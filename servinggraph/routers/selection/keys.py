"""Reads a key, a user id say, from a request: its headers, parameters, tensors, or the fields of a free-form body."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from servinggraph.context import Context

__all__ = ["KeyReader", "key_reader", "key_tensors"]

KeyReader = Callable[[Any, Context], str | None]
"""Takes value and context, returns the key as text; None where the request has none."""

_PLACES = "header:NAME, parameter:NAME, tensor:NAME, field:PATH.TO.KEY or id"


def key_reader(place: str) -> KeyReader:
    """Return what reads a key; what is empty is no key.

    Args:
        place: `header:x-user`, `parameter:user`, `tensor:user_id` (its first element),
            `field:user.id` of a JSON body, or `id` for the request's id.

    Raises:
        ValueError: no such place.
    """
    kind, _, name = place.partition(":")
    if place == "id":
        return lambda value, context: context.id or None
    if not name or kind not in ("header", "parameter", "tensor", "field"):
        raise ValueError(f"'{place}' is no place of a key: expected {_PLACES}")
    if kind == "header":
        lower = name.lower()
        return lambda value, context: context.headers.get(lower) or None
    if kind == "parameter":
        return lambda value, context: _text(context.parameters.get(name))
    if kind == "tensor":
        return lambda value, context: _first(value, name)
    path = name.split(".")
    return lambda value, context: _field(value, path)


def key_tensors(place: str | None) -> tuple[str, ...]:
    """Return the tensors, one or none, that a key stands in."""
    kind, _, name = (place or "").partition(":")
    return (name,) if kind == "tensor" and name else ()


def _text(value: Any) -> str | None:
    if value is None:
        return None
    if isinstance(value, bytes):
        return value.decode("utf-8", "surrogateescape") or None
    if isinstance(value, bool | np.bool_):
        return "true" if value else "false"
    return str(value.item() if isinstance(value, np.generic) else value) or None


def _first(value: Any, name: str) -> str | None:
    array = value.get(name) if isinstance(value, Mapping) else None
    if array is None or getattr(array, "size", 0) == 0:
        return None
    return _text(array.reshape(-1)[0])


def _field(value: Any, path: list[str]) -> str | None:
    for part in path:
        if isinstance(value, Mapping):
            value = value.get(part)
        elif isinstance(value, list) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        else:
            return None
    return None if isinstance(value, Mapping | list) else _text(value)
