"""Side outputs that a request does not wait for: a bounded queue, and a task that empties it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

from servinggraph.context import Context
from servinggraph.errors import ServingGraphError

__all__ = ["Outbox"]

logger = logging.getLogger("servinggraph.steps")

T = TypeVar("T")
_SAY_S = 10.0


class Outbox(Generic[T]):
    """Delivers items in the background; what cannot be delivered is counted and told of. To be made on the event loop.

    Args:
        node: name of the node, for the log.
        begin: takes an item over, in order; returns what waits for its outcome, which raises `ServingGraphError`.
        most: most items that wait or are under way; one more is dropped.
    """

    def __init__(self, node: str, begin: Callable[[T], Awaitable[Awaitable[object]]], most: int) -> None:
        self._node = node
        self._begin = begin
        self._most = most
        self._loop = asyncio.get_running_loop()
        self._items: asyncio.Queue[tuple[T, Context]] = asyncio.Queue()
        self._outcomes: set[asyncio.Task[None]] = set()
        self._open = 0
        self._empty = asyncio.Event()
        self._dropped = 0
        self._told = -_SAY_S
        self._worker: asyncio.Task[None] | None = None

    def put(self, make: Callable[[], T], context: Context) -> None:
        """Have an item delivered; one too many, or one that cannot be made, is dropped."""
        try:
            item = make()
        except ServingGraphError as error:
            self._drop(context, error.message)
            return
        if self._open >= self._most:
            self._drop(context, f"{self._most} wait already (limit 'max_waiting')")
            return
        self._open += 1
        self._empty.clear()
        if self._worker is None:
            self._worker = self._loop.create_task(self._work())
        self._items.put_nowait((item, context))

    async def _work(self) -> None:
        while True:
            item, context = await self._items.get()
            try:
                outcome = await self._begin(item)
            except Exception as error:
                self._drop(context, _reason(error))
                self._done()
                continue
            waiting = self._loop.create_task(self._wait(outcome, context))
            self._outcomes.add(waiting)
            waiting.add_done_callback(self._outcomes.discard)

    async def _wait(self, outcome: Awaitable[object], context: Context) -> None:
        try:
            await outcome
        except Exception as error:
            self._drop(context, _reason(error))
        finally:
            self._done()

    def _done(self) -> None:
        self._open -= 1
        if self._open == 0:
            self._empty.set()

    def _drop(self, context: Context, why: str) -> None:
        """Count what is lost; say so at most every ten seconds."""
        context.count("dropped")
        self._dropped += 1
        now = self._loop.time()
        if now >= self._told + _SAY_S:
            logger.warning("node '%s': %d dropped, the last one because: %s", self._node, self._dropped, why)
            self._told, self._dropped = now, 0

    async def close(self, patience_s: float) -> None:
        """Deliver what waits, for as long as patience lasts; the rest is dropped."""
        if self._open:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._empty.wait(), patience_s)
        left = self._open
        for task in [*self._outcomes, *([self._worker] if self._worker else [])]:
            task.cancel()
        if left:
            logger.warning("node '%s': stopped with %d not delivered", self._node, left)


def _reason(error: Exception) -> str:
    return error.message if isinstance(error, ServingGraphError) else f"{type(error).__name__}: {error}"
