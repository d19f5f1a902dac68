"""What both ways to a V2 server have in common."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Protocol

import numpy as np

from servinggraph.context import ParameterValue
from servinggraph.errors import InvalidRequest
from servinggraph.tensors import Array, datatype_of

__all__ = ["Call", "Transport", "close_on", "plain_bytes", "sendable"]

_CLOSE_S: Final = 10
"""Longest time to close connections."""


@dataclass(frozen=True, slots=True)
class Call:
    """One inference request.

    Attributes:
        inputs: tensors by name.
        outputs: names of the outputs that are wanted; all by default.
        id: the request's id.
        left_s: seconds that there are left for it; None without a limit.
        headers: headers, or metadata.
        parameters: V2 parameters.
    """

    inputs: Mapping[str, Array]
    outputs: Sequence[str]
    id: str
    left_s: float | None
    headers: Mapping[str, str]
    parameters: Mapping[str, ParameterValue]

    def within(self, left_s: float) -> Call:
        """Return the same with so many seconds left."""
        return replace(self, left_s=left_s)


class Transport(Protocol):
    """A way to one server. Made, used and closed on the event loop."""

    async def infer(self, call: Call) -> dict[str, Array]:
        """Run one request; cancelled, it is cancelled over there as well.

        Raises:
            CallFailed: there is no answer.
        """
        ...

    async def ready(self) -> bool:
        """Ask whether the server is ready.

        Raises:
            CallFailed: there is no answer.
        """
        ...

    async def close(self) -> None:
        """Close the connections."""
        ...


def sendable(name: str, value: Any) -> tuple[Array, str]:
    """Return a tensor as it is sent, and its V2 datatype.

    Raises:
        InvalidRequest: it is no array, or has a dtype that V2 has no datatype for.
    """
    if not isinstance(value, np.ndarray | np.generic):
        raise InvalidRequest(f"sends tensors, and '{name}' is no array but {type(value).__name__}")
    array = np.asarray(value)
    datatype = datatype_of(array)
    if datatype is None:
        raise InvalidRequest(f"tensor '{name}' has dtype {array.dtype}, which no V2 datatype stands for")
    return (array.astype(object) if array.dtype.kind in "UT" else array), datatype


def plain_bytes(array: Array) -> Array:
    """Return a BYTES tensor with elements of bytes: from JSON they come as text."""
    if array.dtype != object or all(type(item) is bytes for item in array.flat):
        return array
    elements = [item if isinstance(item, bytes) else str(item).encode() for item in array.flat]
    made = np.empty(len(elements), dtype=object)
    made[:] = elements
    return made.reshape(array.shape)


def close_on(loop: asyncio.AbstractEventLoop, closing: Coroutine[Any, Any, None]) -> None:
    """Run on the event loop what closes connections that were made there, and wait for it; called in a thread."""
    asyncio.run_coroutine_threadsafe(closing, loop).result(_CLOSE_S)
