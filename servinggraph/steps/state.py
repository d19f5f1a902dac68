"""Gives a Python step what it has kept for its sequences, and keeps what it makes of it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Generator, Mapping
from contextlib import aclosing
from typing import Any

from servinggraph.context import Context
from servinggraph.errors import InvalidRequest, StepFailed
from servinggraph.sequence import Turn
from servinggraph.tensors import Array

__all__ = ["check_one_row", "with_state"]


def with_state(
    function: Callable[..., Any],
    arguments: Callable[[Any, Context], dict[str, Any]],
    node: str,
    *,
    batched: bool,
    is_async: bool,
    streams: bool = False,
) -> Callable[[Any, Context], Any]:
    """Return a step's function as a callable of (value, context) that gets its `state`.

    Args:
        function: the step's function; it changes what it gets as `state` in place.
        arguments: makes its other arguments of a value and a context.
        node: the node that the state belongs to.
        batched: True for a list of states, one for each row of a batch; padding has some as well.
        is_async: True when what the function returns has to be awaited.
        streams: True for a generator function, whose state is kept when it has come to its end.
    """
    begin: Callable[[str, Any, Context], tuple[tuple[Turn, ...], Any]] = _rows_begin if batched else _begin
    keep: Callable[[str, tuple[Turn, ...], Any], None] = _rows_keep if batched else _keep

    def call(value: Any, context: Context) -> Any:
        turns, state = begin(node, value, context)
        result = function(**arguments(value, context), state=state)
        keep(node, turns, state)
        return result

    async def wait(value: Any, context: Context) -> Any:
        turns, state = begin(node, value, context)
        result = await function(**arguments(value, context), state=state)
        keep(node, turns, state)
        return result

    def each(value: Any, context: Context) -> Generator[Any, None, None]:
        turns, state = begin(node, value, context)
        yield from function(**arguments(value, context), state=state)
        keep(node, turns, state)

    async def each_later(value: Any, context: Context) -> AsyncGenerator[Any, None]:
        turns, state = begin(node, value, context)
        async with aclosing(function(**arguments(value, context), state=state)) as items:
            async for item in items:
                yield item
        keep(node, turns, state)

    if streams:
        return each_later if is_async else each
    return wait if is_async else call


def _begin(node: str, value: Any, context: Context) -> tuple[tuple[Turn, ...], dict[str, Any]]:
    (turn,) = context.sequences
    return (turn,), turn.state(node)


def _keep(node: str, turns: tuple[Turn, ...], state: dict[str, Any]) -> None:
    turns[0].keep(node, state)


def _rows_begin(node: str, value: Any, context: Context) -> tuple[tuple[Turn, ...], list[dict[str, Any]]]:
    turns = context.sequences
    states = [turn.state(node) for turn in turns]
    rows = len(next(iter(value.values())))
    states.extend(turns[-1].state(node) for _ in range(rows - len(turns)))
    return turns, states


def _rows_keep(node: str, turns: tuple[Turn, ...], states: list[dict[str, Any]]) -> None:
    if len(states) < len(turns) or not all(isinstance(state, dict) for state in states):
        raise StepFailed(f"left a list of {len(states)} states that are not {len(turns)} dicts: change each where it stands")
    for turn, state in zip(turns, states, strict=False):  # what is left over belongs to padding
        turn.keep(node, state)


def check_one_row(tensors: Mapping[str, Array], node: str) -> None:
    """Insist on one row: each row of a batch has the state of another sequence.

    Raises:
        InvalidRequest: in Triton's words.
    """
    for name, array in tensors.items():
        if array.ndim == 0 or array.shape[0] != 1:
            text = f"inference request to model '{node}' must specify batch-size 1 due to requirements of sequence batcher"
            raise InvalidRequest(f"{text}: '{name}' has shape {list(array.shape)}")
