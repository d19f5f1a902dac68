"""Stand-ins for steps: a model that answers as told, at once or late, or fails; and one that streams."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from typing import Any

import numpy as np

from servinggraph.context import Context
from servinggraph.tensors import row_count

__all__ = ["FakeModel", "FakeStream", "constant"]


class FakeModel:
    """A step that gives fixed tensors and remembers what it was asked.

    Args:
        outputs: tensor name to array. An array without a first axis of the batch's size is
            given once for each row of the input, so `{"label": np.array([1])}` answers any
            number of rows.
        delay_s: seconds on the event loop's clock before it answers.
        error: raised instead of an answer.

    Attributes:
        calls: the values it was called with, in order.
    """

    def __init__(
        self, outputs: Mapping[str, Any] | None = None, *, delay_s: float = 0, error: BaseException | None = None
    ) -> None:
        self._outputs = {name: np.asarray(array) for name, array in (outputs or {}).items()}
        self._delay_s = delay_s
        self._error = error
        self.calls: list[Any] = []

    async def __call__(self, value: Any, context: Context) -> dict[str, Any]:
        self.calls.append(value)
        if self._delay_s:
            await asyncio.sleep(self._delay_s)
        if self._error is not None:
            raise self._error
        return {name: _for_rows(array, value) for name, array in self._outputs.items()}


class FakeStream:
    """A generator step that gives fixed items, one after the other, and remembers how it ended.

    Args:
        items: what it gives, each a mapping of tensor name to array.
        delay_s: seconds on the event loop's clock before each.
        error: raised behind the last item.

    Attributes:
        calls: the values it was called with, in order.
        given: items that were given, over all calls.
        closed: calls that were closed before their end, because the reader left or something failed.
    """

    def __init__(self, items: Sequence[Mapping[str, Any]], *, delay_s: float = 0, error: BaseException | None = None) -> None:
        self._items = [{name: np.asarray(array) for name, array in item.items()} for item in items]
        self._delay_s = delay_s
        self._error = error
        self.calls: list[Any] = []
        self.given = 0
        self.closed = 0

    async def __call__(self, value: Any, context: Context) -> AsyncGenerator[dict[str, Any], None]:
        self.calls.append(value)
        try:
            for item in self._items:
                if self._delay_s:
                    await asyncio.sleep(self._delay_s)
                self.given += 1
                yield dict(item)
        except BaseException:
            self.closed += 1
            raise
        if self._error is not None:
            raise self._error


def constant(tensors: Mapping[str, Any]) -> Callable[[Any], dict[str, Any]]:
    """Return a step that gives the same tensors whatever it gets."""
    arrays = {name: np.asarray(array) for name, array in tensors.items()}

    def give(value: Any) -> dict[str, Any]:
        return dict(arrays)

    return give


def _for_rows(array: Any, value: Any) -> Any:
    try:
        rows = row_count(value)
    except (ValueError, AttributeError):
        return array
    if array.ndim and array.shape[0] == rows:
        return array
    row = array[0] if array.ndim and array.shape[0] == 1 else array
    return np.repeat(np.asarray(row)[np.newaxis], rows, axis=0)
