"""Writes what comes one by one, later and all at once, in a thread; bounded, so that a slow disk cannot fill the memory."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Final, Generic, TypeVar

__all__ = ["LaterWriter"]

logger = logging.getLogger("servinggraph.lifecycle")

FLUSH_S: Final = 0.5
"""Longest time that something waits to be written."""

T = TypeVar("T")


class LaterWriter(Generic[T]):
    """Collects items on the event loop and has them written in a thread, in their order.

    Args:
        write: writes items, in a thread; the second argument is how many were dropped before them.
        most: items that wait; more are dropped.
        what: what they are called in the log.
    """

    def __init__(self, write: Callable[[list[T], int], None], most: int, what: str) -> None:
        self._write_all = write
        self._most = most
        self._what = what
        self._loop = asyncio.get_running_loop()
        self._waiting: list[T] = []
        self._dropped = 0
        self._timer: asyncio.TimerHandle | None = None
        self._writing: asyncio.Future[None] | None = None

    def add(self, item: T) -> None:
        """Take an item."""
        if len(self._waiting) >= self._most:
            self._dropped += 1
            return
        self._waiting.append(item)
        if self._timer is None and self._writing is None:
            self._timer = self._loop.call_later(FLUSH_S, self._write)

    @property
    def full(self) -> bool:
        """True when another item would be dropped."""
        return len(self._waiting) >= self._most

    async def flush(self) -> None:
        """Return once all that was added is written."""
        while self._waiting or self._writing is not None:
            if self._writing is None:
                self._write()
            if self._writing is not None:
                await asyncio.wait([self._writing])

    def _write(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        waiting, self._waiting = self._waiting, []
        dropped, self._dropped = self._dropped, 0
        if waiting:
            self._writing = self._loop.run_in_executor(None, self._write_all, waiting, dropped)
            self._writing.add_done_callback(self._written)

    def _written(self, writing: asyncio.Future[None]) -> None:
        self._writing = None
        if not writing.cancelled() and (error := writing.exception()) is not None:
            logger.error("%s could not be written: %s", self._what, error)
        if self._waiting and self._timer is None:
            self._timer = self._loop.call_later(FLUSH_S, self._write)
