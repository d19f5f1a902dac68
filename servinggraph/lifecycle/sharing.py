"""Has a router learn together with the same router of other workers, through the store that keeps their state.

Each worker hands out what it has learned since the last time, as numbers that add up, and takes in
the sum of all. A worker that dies loses what it had not handed out, at most one interval. What was
sent without an answer is sent again under the same number, so that it counts once. Feedback for a
request that another worker answered is told to all, and the one that knows the request takes it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from typing import Any, Final, Protocol
from uuid import uuid4

import numpy as np
import orjson

from servinggraph.errors import InvalidRequest, ServingGraphError
from servinggraph.interfaces import Feedback, Learned, Router
from servinggraph.state import StateFailed, StateStore

__all__ = ["SHARE_EVERY_S", "Sharing"]

logger = logging.getLogger("servinggraph.control")

_LONGEST: Final = 16_384
"""Most bytes of feedback that is passed on."""

_MOST_BYTES: Final = 2_000_000
"""Most bytes of feedback that wait to be passed on; what is over that is not known, and its caller told so."""

SHARE_EVERY_S: Final = 1.0
"""How often workers exchange what they have learned."""


class Saver(Protocol):
    """What saves a router's settings."""

    def follow(self, saved: Mapping[str, Any]) -> None:
        """Take up settings that were changed in another worker."""
        ...

    def save_again(self) -> None:
        """Save what the store has lost."""
        ...


class Sharing:
    """One router's exchange with other workers.

    Args:
        router: a router that hands out.
        store: where the sums are; it adds up.
        key: name of the router's state.
        saver: saves the router's settings there.
    """

    def __init__(self, router: Router[Any], store: StateStore, key: str, saver: Saver) -> None:
        self._router = router
        self._store = store
        self._key = key
        self._saver = saver
        self._behind = False  # the store knows an earlier revision of the settings
        self._one = asyncio.Lock()  # exchanges at a time
        self._worker = uuid4().hex
        self._number = 0
        self._unsent: Learned | None = None
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._running: asyncio.Task[None] | None = None
        self._failing = False
        self._passing_on: list[bytes] = []
        self._bytes = 0
        self._seen = ""

    def pass_on(self, record: Feedback) -> bool:
        """Have the worker take feedback that knows its request; return False where it cannot be passed on."""
        if not record.id:
            return False
        said = {name: getattr(record, name) for name in ("id", "variant", "reward", "metric", "node")}
        try:
            message = orjson.dumps(said | {"truth": _plain(record.truth)})
        except (TypeError, ValueError):  # text that is no UTF-8
            return False
        if len(message) > _LONGEST or self._bytes + len(message) > _MOST_BYTES:
            return False
        self._passing_on.append(message)
        self._bytes += len(message)
        return True

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
        if await self._try() and again:
            await self._try()  # the first one sent what had been handed out before

    async def hand_out(self) -> None:
        """Exchange now; where that fails it is said."""
        await self._try()

    async def exchange(self) -> None:
        """Hand out and take in once.

        Raises:
            StateFailed: the store cannot be reached, and what was handed out is sent again the next time; or what is there
                cannot be taken up.
        """
        async with self._one:
            await self._exchange()

    async def _exchange(self) -> None:
        if self._unsent is None:
            self._unsent = self._router.hand_out()
            self._number += 1
        assert self._unsent is not None  # as it has from the start
        passing_on = tuple(self._passing_on)
        saved, everyone, (self._seen, told) = await asyncio.to_thread(self._ask, self._unsent, passing_on)
        self._unsent = None
        del self._passing_on[: len(passing_on)]
        self._bytes -= sum(map(len, passing_on))
        for message in told:
            self._take(message)
        try:
            self._follow(saved or {})
            self._router.take_in(everyone)
        except (AttributeError, LookupError, TypeError, ValueError) as error:  # of something else, or it was changed by hand
            text = f"state '{self._key}' is not what such a router shares ({type(error).__name__}: {error})"
            raise StateFailed(f"{text}; delete it to begin anew") from error

    def _ask(
        self, learned: Learned, passing_on: Sequence[bytes]
    ) -> tuple[dict[str, Any] | None, Learned, tuple[str, list[bytes]]]:
        saved = self._store.load(self._key)
        everyone = self._store.add(self._key, self._worker, self._number, learned)
        return saved, everyone, self._store.tell(self._key, passing_on, self._seen)

    def _take(self, message: bytes) -> None:
        """Take feedback that came to some worker, if the request is known here."""
        try:
            record = Feedback(**orjson.loads(message))
            if self._router.knows(record.id):
                self._router.feedback(record)
        except (ServingGraphError, TypeError, ValueError) as error:  # the latter of a worker of another version
            logger.warning("router '%s' could not use feedback that came to another worker: %s", self._router.name, error)

    def _follow(self, saved: Mapping[str, Any]) -> None:
        """Take up settings that were changed in another worker, and save those that the store has lost."""
        revision = int(saved.get("revision", 0))
        if revision < self._router.revision:
            if self._behind:  # for the second time: it is not just that a change is on its way
                self._saver.save_again()
            self._behind = not self._behind
            return
        self._behind = False
        if revision:
            self._saver.follow(saved)

    def _tick(self) -> None:
        self._running = self._loop.create_task(self._round())

    async def _round(self) -> None:
        try:
            await self._try()
        finally:
            self._timer = self._loop.call_later(SHARE_EVERY_S, self._tick)

    async def _try(self) -> bool:
        """Exchange, and return whether that worked."""
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
        return not self._failing


def _plain(truth: Any) -> Any:
    """Return a truth as JSON can hold it."""
    if isinstance(truth, np.ndarray):
        return _plain(truth.tolist())
    if isinstance(truth, Mapping):
        return {name: _plain(value) for name, value in truth.items()}
    if isinstance(truth, list):
        return [_plain(value) for value in truth]
    return truth.decode() if isinstance(truth, bytes) else truth
