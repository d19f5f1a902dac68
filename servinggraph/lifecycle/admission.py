"""How many requests may be in flight at once, over all graphs and front ends."""

from __future__ import annotations

import asyncio

from servinggraph.errors import LimitExceeded

__all__ = ["Admission"]


class Admission:
    """Counts requests in flight, over all graphs and front ends, and refuses more than the limit.

    A slot is given back when the request's work has really ended, which for a call in a
    thread or a batch that runs can be later than its answer.
    """

    __slots__ = ("_idle", "in_flight", "limit")

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.in_flight = 0
        self._idle: asyncio.Event | None = None

    def enter(self) -> None:
        """Take a slot.

        Raises:
            LimitExceeded: all are taken; names the limit.
        """
        if self.in_flight >= self.limit:
            raise LimitExceeded(
                f"the server is full: {self.in_flight} requests are in flight (limit 'max_in_flight' = {self.limit})"
            )
        self.in_flight += 1

    def leave(self) -> None:
        """Give a slot back."""
        self.in_flight -= 1
        if self.in_flight == 0 and self._idle is not None:
            self._idle.set()

    async def wait_until_idle(self) -> None:
        """Return once no request is in flight."""
        self._idle = asyncio.Event()
        while self.in_flight:
            self._idle.clear()
            await self._idle.wait()
