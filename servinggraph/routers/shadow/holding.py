"""What a copy of a request keeps in memory, and what has to be copied because its owner will not leave it alone."""

from __future__ import annotations

import mmap
import sys
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any, Final

import numpy as np

from servinggraph.messages import Body
from servinggraph.tensors import Array

__all__ = ["held_bytes", "kept"]

_OBJECT: Final = 64
"""Bytes that an object takes which nothing is known of."""
_SAMPLED: Final = 16
"""Parts of a list or mapping that are measured, and stand for the others."""
_WALKED: Final = 1000
"""Most parts of a value that are measured at all."""


def kept(value: Any) -> Any:
    """Return a value to keep beyond its request.

    By reference, but for tensors in a client's shared memory: the client may write there once it
    has its answer, so those are copied. A mapping is one of its own: a step behind may change what it got.
    """
    if not isinstance(value, Mapping):
        return value
    return {name: item.copy() if _is_lent(item) else item for name, item in value.items()}


def held_bytes(*values: Any) -> int:
    """Return how many bytes values keep in memory, what they share counted once.

    A view counts with all that it is a view of, a request's body say. Documents and texts are
    measured by a part of them where they have many parts.
    """
    total = 0.0
    seen: set[int] = set()
    waiting: list[tuple[Any, float]] = [(value, 1.0) for value in values]
    for _ in range(_WALKED):
        if not waiting:
            break
        item, times = waiting.pop()
        size = 0
        if isinstance(item, np.ndarray):
            size = item.nbytes
            item = _owner(item)
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, np.ndarray):
            total += max(size, item.nbytes) * times
            if item.dtype != object:
                continue
        else:
            total += max(size, _size_of(item)) * times
        number, some = _parts(item)
        if number:
            waiting.extend([(part, times * number / len(some)) for part in some])
    return int(total)


def _size_of(item: Any) -> int:
    try:
        return sys.getsizeof(item, _OBJECT)
    except Exception:  # an object may say itself how large it is, and fail to
        return _OBJECT


def _parts(item: Any) -> tuple[int, Sequence[Any]]:
    """Return how many parts a value has, and some of them."""
    if isinstance(item, Mapping):
        return len(item), list(islice(item.values(), _SAMPLED))
    if isinstance(item, list | tuple):
        return len(item), item[:: max(1, len(item) // _SAMPLED)]
    if isinstance(item, Body):
        return 1, (item.value,)
    if isinstance(item, np.ndarray) and item.dtype == object:
        return item.size, item.reshape(-1)[:: max(1, item.size // _SAMPLED)].tolist()
    return 0, ()


def _is_lent(item: Any) -> bool:
    return isinstance(item, np.ndarray) and item.base is not None and isinstance(_owner(item), mmap.mmap)


def _owner(array: Array) -> Any:
    """Return the object whose memory an array is a view of."""
    found: Any = array
    while True:
        under = found.base if isinstance(found, np.ndarray) else found.obj if isinstance(found, memoryview) else None
        if under is None:
            return found
        found = under
