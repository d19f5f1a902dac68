"""Has a router learn together with the same router of other workers, through the store that keeps their state.

Each worker hands out what it has learned since the last time, as numbers that add up, and takes in
the sum of all. A worker that dies loses what it had not handed out, at most one interval. What was
sent without an answer is sent again under the same number, so that it counts once.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import Any, Final
from uuid import uuid4

from servinggraph.errors import InvalidRequest
from servinggraph.interfaces import Learned, Router
from servinggraph.state import StateFailed, StateStore

__all__ = ["SHARE_EVERY_S", "Sharing"]

logger = logging.getLogger("servinggraph.control")

SHARE_EVERY_S: Final = 1.0
"""How often workers exchange what they have learned."""


class Sharing:
    """One router's exchange with other workers.

    Args:
        router: a router that hands out.
        store: where the sums are; it adds up.
        key: name of the router's state.
    """

    def __init__(self, router: Router[Any], store: StateStore, key: str) -> None:
        self._router = router
        self._store = store
        self._key = key
        self._worker = uuid4().hex
        self._number = 0
        self._unsent: Learned | None = None
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._running: asyncio.Task[None] | None = None
        self._failing = False

    async def start(self) -> None:
        """Exchange for the first time, and then again and again.

        Raises:
            StateFailed: the store cannot be reached.
        """
        await self.exchange()
        self._timer = self._loop.call_later(SHARE_EVERY_S, self._tick)

    async def stop(self) -> None:
        """Hand out what is left."""
        if self._timer is not None:
            self._timer.cancel()
        if self._running is not None:
            await asyncio.wait({self._running})
            assert self._timer is not None
            self._timer.cancel()
        again = self._unsent is not None
        await self._try()
        if again:
            await self._try()  # the first one sent what had been handed out before

    async def exchange(self) -> None:
        """Hand out and take in once.

        Raises:
            StateFailed: the store cannot be reached; what was handed out is sent again the next time.
        """
        if self._unsent is None:
            self._unsent = self._router.hand_out()
            self._number += 1
        assert self._unsent is not None  # as it has from the start
        saved, everyone = await asyncio.to_thread(self._ask, self._unsent)
        self._unsent = None
        if saved is not None:
            self._follow(saved)
        self._router.take_in(everyone)

    def _ask(self, learned: Learned) -> tuple[dict[str, Any] | None, Learned]:
        return self._store.load(self._key), self._store.add(self._key, self._worker, self._number, learned)

    def _follow(self, saved: Mapping[str, Any]) -> None:
        """Take up settings that were changed in another worker."""
        router = self._router
        revision = int(saved.get("revision", 0))
        if revision <= router.revision:
            return
        settings = router.settings()
        try:
            router.adjust({name: saved[name] for name in settings if name in saved and saved[name] != settings[name]})
        except InvalidRequest as error:
            logger.error("router '%s' cannot take up settings that were changed in another worker: %s", router.name, error)
        router.revision = revision

    def _tick(self) -> None:
        self._running = self._loop.create_task(self._round())

    async def _round(self) -> None:
        try:
            await self._try()
        finally:
            self._timer = self._loop.call_later(SHARE_EVERY_S, self._tick)

    async def _try(self) -> None:
        try:
            await self.exchange()
        except (StateFailed, InvalidRequest) as error:
            if not self._failing:
                logger.error("router '%s' learns alone until it can exchange again: %s", self._router.name, error)
            self._failing = True
        else:
            if self._failing:
                logger.warning("router '%s' exchanges again what it learns", self._router.name)
            self._failing = False
