"""Runs a request that is too large for one batch in pieces, and joins its results."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from servinggraph.batching.rows import Unjoinable, join_results, slice_rows
from servinggraph.context import Context, ParameterValue
from servinggraph.errors import StepFailed
from servinggraph.interfaces import BatchPolicy
from servinggraph.tensors import Array

__all__ = ["run_in_pieces"]


async def run_in_pieces(
    value: Mapping[str, Array],
    rows: int,
    context: Context,
    put: Callable[[Mapping[str, Array], int, Context], asyncio.Future[Any]],
    policy: BatchPolicy,
    name: str,
) -> dict[str, Array]:
    """Run a request in pieces of at most `max_rows` rows, and return its joined results.

    Only as many pieces are queued as keep every instance busy: others get their turn in
    between, and the queue stays short. A response parameter on which the pieces differ
    tells all its values: which members of an ensemble answered, say.

    Args:
        value: the request's tensors.
        rows: how many rows they have.
        context: the request's context.
        put: queues a piece, which begins at a row of the request and has a context of its own.
        policy: the batcher's.
        name: the node, for error texts.

    Raises:
        StepFailed: the results do not fit each other.
        ServingGraphError: what a piece failed with.
    """
    queued: deque[asyncio.Future[Any]] = deque()
    contexts: deque[Context] = deque()
    results: list[Any] = []
    added: dict[str, list[ParameterValue]] = {}

    async def collect() -> None:
        results.append(await queued.popleft())
        for key, parameter in contexts.popleft().response_parameters.items():
            if parameter not in added.setdefault(key, []):
                added[key].append(parameter)

    try:
        for start in range(0, rows, policy.max_rows):
            if len(queued) > policy.instances:
                await collect()
            contexts.append(context.for_piece())
            queued.append(put(slice_rows(value, start, min(start + policy.max_rows, rows)), start, contexts[-1]))
        while queued:
            await collect()
    finally:
        for piece in queued:
            if not piece.cancel() and not piece.cancelled():
                piece.exception()  # looked at: its failure is reported by the first one's
    for key, values in added.items():
        context.response_parameters[key] = values[0] if len(values) == 1 else "; ".join(map(str, values))
    try:
        return join_results(results)
    except Unjoinable as error:
        text = f"ran in {len(results)} pieces of at most {policy.max_rows} rows, and {error}"
        raise StepFailed(text).at(name) from None
