"""The `map` router: its branch runs for each item of a list, or each row of the tensors."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from pydantic import Field, model_validator

from servinggraph.concurrency import cancel_all
from servinggraph.context import Context
from servinggraph.errors import GraphInvalid, InvalidRequest, Problem, ServingGraphError, StepFailed
from servinggraph.interfaces import Handler, Router, RouterOptions
from servinggraph.tensors import Array, Signature, row_count

__all__ = ["Map", "MapOptions"]


class MapOptions(RouterOptions):
    """A branch that runs for each item."""

    concurrency: int = Field(8, ge=1, le=1024, description="Items of a request that run at once.")
    max_items: int = Field(10_000, ge=1, description="Most items of a request; more is refused.")
    tolerate: float = Field(0, ge=0, description="Failed items that are borne: a share below 1, or a number from 1 on.")
    on_failure: Literal["drop", "null"] = Field(
        "drop", description="What stands for a failed item that is borne: nothing, or null (for lists only)."
    )

    @model_validator(mode="after")
    def _check(self) -> MapOptions:
        if self.tolerate > 1 and not self.tolerate.is_integer():  # nor is what has no end
            raise ValueError(f"tolerate is a share below 1 or a whole number, got {self.tolerate}")
        return self


class _TooManyFailed(Exception):
    """More items of a request have failed than are borne."""


class Map(Router[MapOptions]):
    """Runs its one branch for each item of a list, or each row of the tensors, and joins the results in order.

    Items that failed and were borne are counted in `<node>.failed`.
    """

    options_type = MapOptions
    repeats = True

    def signature(self, branches: Mapping[str, Signature]) -> Signature:
        if len(branches) != 1:
            raise GraphInvalid(
                [Problem(f"takes one branch, what runs for each item; got {', '.join(branches)}", node="branches")]
            )
        (signature,) = branches.values()
        return signature

    def impurity(self) -> str | None:
        return None if not self.options.tolerate else "leaves out items that fail"

    async def route(self, value: Any, context: Context, branches: Mapping[str, Handler]) -> Any:
        (branch,) = branches.values()
        items, by_row = self._items(value)
        if len(items) > self.options.max_items:
            raise InvalidRequest(f"has {len(items)} items (limit 'max_items' = {self.options.max_items})")
        if not items:
            # Only the branch knows what tensors of no rows look like.
            return await branch(value, context) if by_row else []
        results: list[Any] = [None] * len(items)
        try:
            await self._run_all(items, context, branch, results)
            if failed := sum(isinstance(result, BaseException) for result in results):
                self._bear(results, failed)
                context.response_parameters[f"{self.name}.failed"] = failed
            if not by_row:
                return [None if isinstance(r, BaseException) else r for r in results if self._stays(r)]
            return self._joined([result for result in results if not isinstance(result, BaseException)])
        finally:
            results.clear()  # by its traceback an error holds who ran the items, who has them all

    def describe(self) -> str:
        return f"map ({self.options.concurrency} at once)"

    def _items(self, value: Any) -> tuple[Sequence[Any], bool]:
        if isinstance(value, list | tuple):
            return value, False
        if not isinstance(value, Mapping):
            raise InvalidRequest(f"maps over a list or over rows of tensors, got a {type(value).__name__}")
        for name, array in value.items():
            if not isinstance(array, np.ndarray):
                raise InvalidRequest(f"maps over a list or over rows of tensors, and '{name}' of what it got is no tensor")
        try:
            rows = row_count(value)
        except ValueError as error:
            raise InvalidRequest(f"cannot map over rows: {error}") from None
        return [{name: array[row : row + 1] for name, array in value.items()} for row in range(rows)], True

    async def _run_all(self, items: Sequence[Any], context: Context, branch: Handler, results: list[Any]) -> None:
        """Note each item's result, or error; once more have failed than are borne the others are cancelled."""
        todo = iter(range(len(items)))
        limit, failed = self._borne(len(items)), 0

        async def work() -> None:
            nonlocal failed
            for index in todo:
                view = context.for_piece()
                try:
                    results[index] = await branch(items[index], view)
                except ServingGraphError as error:
                    failed += 1
                    results[index] = error
                    if failed > limit:
                        raise _TooManyFailed from None

        workers = [asyncio.ensure_future(work()) for _ in range(min(self.options.concurrency, len(items)))]
        try:
            await asyncio.gather(*workers)
        except _TooManyFailed:
            await cancel_all(workers)
        except BaseException:
            await cancel_all(workers)
            raise
        finally:
            del workers

    def _borne(self, items: int) -> int:
        tolerate = self.options.tolerate
        return int(tolerate * items) if tolerate < 1 else int(tolerate)

    def _bear(self, results: Sequence[Any], failed: int) -> None:
        """Raise the first failure when there are more than are borne, or nothing is left."""
        items = len(results)
        borne = self._borne(items)
        if failed <= borne and failed < items:
            return
        first = next(result for result in results if isinstance(result, BaseException))
        if isinstance(first, ServingGraphError) and borne:
            first.message = f"{failed} items failed, {borne} of {items} are borne; the first: {first.message}"
        try:
            raise first
        finally:
            del first

    def _stays(self, result: Any) -> bool:
        return self.options.on_failure == "null" or not isinstance(result, BaseException)

    @staticmethod
    def _joined(results: Sequence[Any]) -> dict[str, Any]:
        first = results[0]
        for result in results:
            if not isinstance(result, Mapping):
                text = f"its branch gave a {type(result).__name__} for a row, expected a mapping of tensor name to array"
                raise StepFailed(text)
            if result.keys() != first.keys():
                raise StepFailed("its branch gave different tensors for different rows")
            for name, array in result.items():
                if not isinstance(array, np.ndarray) or not array.ndim:
                    raise StepFailed(f"its branch gave '{name}' for a row as {_shown(array)}, which has no rows to join")
                if not _same_datatype(array, first[name]) or array.shape[1:] != first[name].shape[1:]:
                    one, other = _shown(first[name]), _shown(array)
                    text = f"its branch gave '{name}' in different datatypes or shapes for different rows: {one} and {other}"
                    raise StepFailed(text)
        return {
            # The longest of numpy's texts decides how long all may be.
            name: np.concatenate([result[name] for result in results], dtype=None if _is_text(array) else array.dtype)
            for name, array in first.items()
        }


def _shown(array: Any) -> str:
    return f"{array.dtype} {list(array.shape)}" if isinstance(array, np.ndarray | np.generic) else type(array).__name__


def _same_datatype(one: Array, other: Array) -> bool:
    return one.dtype == other.dtype or (_is_text(one) and one.dtype.kind == other.dtype.kind)


def _is_text(array: Array) -> bool:
    """Tell whether an array is numpy's own text, of which each length is a dtype of its own."""
    return array.dtype.kind in "US"
