"""Keeps a few of many disagreements, each in bounded size: a fair sample of all of them."""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite
from random import randrange
from typing import Any, Final

import numpy as np

from servinggraph.messages import Body
from servinggraph.tensors import datatype_of

__all__ = ["Reservoir", "readable", "summary"]

_TENSORS: Final = 16
_ELEMENTS: Final = 16
_TEXT: Final = 64


class Reservoir:
    """A uniform sample of what is offered. Source: Vitter, Random Sampling with a Reservoir (1985), algorithm R.

    Args:
        size: most that are kept; 0 for none.
    """

    __slots__ = ("_kept", "_offered", "_size")

    def __init__(self, size: int) -> None:
        self._size = size
        self._offered = 0
        self._kept: list[dict[str, Any]] = []

    def place(self) -> int | None:
        """Return where the next one is to be put, None where it is not kept: most are not, and need not be made."""
        self._offered += 1
        if len(self._kept) < self._size:
            return len(self._kept)
        place = randrange(self._offered)  # noqa: S311  (chance, not a secret)
        return place if place < self._size else None

    def put(self, place: int, example: dict[str, Any]) -> None:
        """Keep one at the place that `place` has given."""
        self._kept[place : place + 1] = [example]

    def all(self) -> list[dict[str, Any]]:
        """Return what is kept, oldest first."""
        return sorted(self._kept, key=lambda example: str(example.get("time", "")))


def readable(text: str, length: int) -> str:
    """Return the beginning of a text, as JSON can hold it: a step's own may have halves of characters."""
    return text[:length].encode("utf-8", "replace").decode()


def summary(value: Any) -> Any:
    """Return a value as plain JSON values of bounded size: of each tensor datatype, shape and first elements."""
    if isinstance(value, Body):
        value = value.value
    if isinstance(value, Mapping):
        shown = {readable(str(name), _TEXT): _one(item) for name, item in list(value.items())[:_TENSORS]}
        if len(value) > _TENSORS:
            shown["..."] = f"{len(value) - _TENSORS} more"
        return shown
    return _one(value)


def _one(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        array = np.asarray(value)
        some = array.flat[:_ELEMENTS]
        first = [_plain(item) for item in (some.astype(float) if array.dtype.name == "bfloat16" else some).tolist()]
        return {"datatype": datatype_of(array) or str(array.dtype), "shape": list(array.shape), "first": first}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value[:_ELEMENTS]]
    return _plain(value)


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | int):
        return value if not isinstance(value, int) or abs(value) < 2**63 else str(value)[:_TEXT]
    if isinstance(value, float):
        return float(f"{value:.6g}") if isfinite(value) else str(value)
    if isinstance(value, bytes):
        value = value[: 4 * _TEXT].decode("utf-8", "replace")
    elif not isinstance(value, str):
        # No `repr`, which for a large object is as large, and may run the user's code.
        value = f"<{type(value).__name__}>"
    return readable(value, _TEXT) if len(value) <= _TEXT else readable(value, _TEXT - 1) + "…"
