"""Notices clients that go away while their request runs, and cancels its task.

ASGI tells it only to who waits in `receive`, and a waiting task for every request would
cost more than most requests. So one sweep looks at what is in flight, and only a request
that is older than a sweep gets a waiting task.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Final

__all__ = ["Departures"]

SWEEP_S: Final = 0.02
"""Time between sweeps: a departure is noticed after two of them at the latest."""

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]


class Departures:
    """Watches the requests of one front end."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._in_flight: dict[asyncio.Task[Any], Receive] = {}
        self._seen: set[asyncio.Task[Any]] = set()
        self._watchers: dict[asyncio.Task[Any], asyncio.Task[None]] = {}
        self._gone: set[asyncio.Task[Any]] = set()
        self._sweep_is_due = False

    def expect(self, task: asyncio.Task[Any], receive: Receive) -> None:
        """Begin to watch a request whose body has been read."""
        self._in_flight[task] = receive
        if not self._sweep_is_due:
            self._sweep_is_due = True
            self._loop.call_later(SWEEP_S, self._sweep)

    def forget(self, task: asyncio.Task[Any]) -> None:
        """End watching."""
        self._in_flight.pop(task, None)
        if self._watchers:
            watcher = self._watchers.pop(task, None)
            if watcher is not None:
                watcher.cancel()
            self._gone.discard(task)

    def gone(self, task: asyncio.Task[Any]) -> bool:
        """Tell whether the request was cancelled because its client went away."""
        return task in self._gone

    def _sweep(self) -> None:
        for task, receive in self._in_flight.items():
            if task in self._seen and task not in self._watchers:
                self._watchers[task] = self._loop.create_task(self._watch(task, receive))
        self._seen = set(self._in_flight)
        self._sweep_is_due = bool(self._in_flight)
        if self._sweep_is_due:
            self._loop.call_later(SWEEP_S, self._sweep)

    async def _watch(self, task: asyncio.Task[Any], receive: Receive) -> None:
        message = await receive()
        if message["type"] == "http.disconnect" and task in self._in_flight:
            self._gone.add(task)
            task.cancel()
