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

    def begin(value: Any, context: Context) -> tuple[tuple[Turn, ...], Any]:
        turns = context.sequences
        if not batched:
            (turn,) = turns
            return turns, turn.state(node)
        states = [turn.state(node) for turn in turns]
        rows = len(next(iter(value.values())))
        states.extend(turns[-1].state(node) for _ in range(rows - len(turns)))
        return turns, states

    def keep(turns: tuple[Turn, ...], states: Any) -> None:
        if not batched:
            turns[0].keep(node, states)
            return
        if len(states) < len(turns) or not all(isinstance(state, dict) for state in states):
            raise StepFailed(
                f"left a list of {len(states)} states that are not {len(turns)} dicts: change each where it stands"
            )
        for turn, state in zip(turns, states, strict=False):  # what is left over belongs to padding
            turn.keep(node, state)

    if streams and is_async:

        async def each_later(value: Any, context: Context) -> AsyncGenerator[Any, None]:
            turns, state = begin(value, context)
            async with aclosing(function(**arguments(value, context), state=state)) as items:
                async for item in items:
                    yield item
            keep(turns, state)

        return each_later

    if streams:

        def each(value: Any, context: Context) -> Generator[Any, None, None]:
            turns, state = begin(value, context)
            yield from function(**arguments(value, context), state=state)
            keep(turns, state)

        return each

    if is_async:

        async def wait(value: Any, context: Context) -> Any:
            turns, state = begin(value, context)
            result = await function(**arguments(value, context), state=state)
            keep(turns, state)
            return result

        return wait

    def call(value: Any, context: Context) -> Any:
        turns, state = begin(value, context)
        result = function(**arguments(value, context), state=state)
        keep(turns, state)
        return result

    return call


def check_one_row(tensors: Mapping[str, Array], node: str) -> None:
    """Insist on one row: each row of a batch has the state of another sequence.

    Raises:
        InvalidRequest: in Triton's words.
    """
    for name, array in tensors.items():
        if array.ndim == 0 or array.shape[0] != 1:
            text = f"inference request to model '{node}' must specify batch-size 1 due to requirements of sequence batcher"
            raise InvalidRequest(f"{text}: '{name}' has shape {list(array.shape)}")
