"""Brings versions of graphs into memory and out of it, within a budget.

A version that had to make room stays in the catalog: a request for it waits at its door
until it is in memory again. What is being answered is finished first, always.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, Final

from servinggraph.context import Context
from servinggraph.errors import DeadlineExceeded, LoadFailed, ServingGraphError, StepFailed, Unavailable
from servinggraph.lifecycle.budget import Budget
from servinggraph.lifecycle.catalog import Catalog, ServedGraph, takes_the_same
from servinggraph.lifecycle.memory import resident_bytes
from servinggraph.lifecycle.records import Built, Record
from servinggraph.scopes import ModuleScope

__all__ = ["Residence"]

logger = logging.getLogger("servinggraph.repository")

LOADS_AT_ONCE: Final = 4
"""Versions that are compiled and loaded side by side, where no budget wants them one by one."""
RETRY_S: Final = 1.0
"""After a load on demand failed, requests get the same failure for this time, before the next try."""
MADE_ROOM: Final = "out of memory to make room for others; the next request brings it back"


class _Replaced(Exception):
    """What requests waited for was unloaded or loaded anew meanwhile."""


class Residence:
    """What is in memory.

    Args:
        catalog: where loaded versions are served.
        budget: how many, and how large.
    """

    def __init__(self, catalog: Catalog, budget: Budget) -> None:
        self.catalog = catalog
        self.budget = budget
        self._loop = asyncio.get_running_loop()
        # Under a budget loads go one by one: what one takes can be told, and two cannot both take the last room.
        self._lock = asyncio.Lock()
        self._slots = asyncio.Semaphore(LOADS_AT_ONCE)
        self._tasks: set[asyncio.Task[Any]] = set()

    @asynccontextmanager
    async def loading(self) -> AsyncIterator[None]:
        """Surround the building of versions and their installation."""
        if not self.budget.limits:
            yield
            return
        async with self._lock:
            yield

    def spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Run something that no caller's leaving ends; `settled` waits for it."""
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # told to whoever waits for it; nobody may

    async def settled(self, *, cancel: bool = False) -> None:
        """Wait for everything that was spawned, after cancelling it if asked."""
        while self._tasks:
            tasks = list(self._tasks)
            for task in tasks if cancel else ():
                task.cancel()
            await asyncio.wait(tasks)

    async def build(self, records: Sequence[Record]) -> list[Built | BaseException]:
        """Compile and load versions beside what is served; return each one or why it failed. Call within `loading`."""
        if not self.budget.limits:
            return await asyncio.gather(*(self._in_slot(record) for record in records), return_exceptions=True)
        results: list[Built | BaseException] = []
        for at, record in enumerate(records):
            await self._make_room(at + 1, record.file_bytes)
            try:
                results.append(self._within(record, await self._build(record)))
            except Exception as error:
                results.append(error)
        return results

    def install(self, built: Sequence[tuple[Record, Built]], remove: Sequence[Record]) -> None:
        """Serve what was built in place of other versions, in one step; those are let go once they are drained."""
        gone = [record.graph for record in remove if record.graph is not None]
        for record, new in built:
            record.graph, record.built = new.graph, new
            record.state, record.reason = "READY", ""
        self.catalog.swap([new.graph for _, new in built], gone)
        for record in remove:
            self.budget.remove(record)
            self._let_go(record)
        for record, _ in built:
            self.budget.add(record)

    async def trim(self, keep: Record | None = None) -> None:
        """Bring memory back within the budget. Call within `loading`."""
        await self._make_room(0, 0, keep)

    async def discard(self, built: Built) -> None:
        """Unload what nobody is served by."""
        built.graph.closed = True
        try:
            await built.graph.stop()
        except Exception:
            logger.exception("graph '%s' did not stop cleanly", built.graph.plan.name)
        built.scope.drop()

    def _let_go(self, record: Record) -> None:
        """Drop a version that the catalog has no more: at once where it is not in memory, else when it is drained."""
        built, record.built = record.built, None
        if built is None:
            self._forgotten(record)
            return
        record.state, record.reason = "UNLOADING", ""
        self.spawn(self._drain(record, built))

    async def _drain(self, record: Record, built: Built) -> None:
        await built.graph.drained()
        await self.discard(built)
        self._forgotten(record)

    def _forgotten(self, record: Record) -> None:
        record.state, record.reason = "UNAVAILABLE", "unloaded"
        record.graph = None
        if record.folder is not None:
            record.folder.leave()

    async def _in_slot(self, record: Record) -> Built:
        async with self._slots:
            return await self._build(record)

    async def _build(self, record: Record) -> Built:
        scope = ModuleScope(f"{record.name}.{record.version}")
        before = resident_bytes()
        try:
            with scope():
                plan = await asyncio.to_thread(record.compile)
                graph = self.catalog.made(plan)
                await graph.executor.start()
        except BaseException:
            scope.drop()
            raise
        if self.budget.limits:
            graph.door = partial(self._enter, record)
        graph.size_bytes = max(record.file_bytes, resident_bytes() - before)
        return Built(graph, scope, graph.size_bytes)

    def _within(self, record: Record, built: Built) -> Built:
        limit = self.budget.max_bytes
        if limit and built.size_bytes > limit:
            self.spawn(self.discard(built))
            raise LoadFailed(f"it takes about {built.size_bytes} bytes, more than 'memory_budget' = {limit}")
        return built

    async def _make_room(self, room_for: int, room_bytes: int, keep: Record | None = None) -> None:
        while (record := self.budget.next_to_go(room_for, room_bytes, keep)) is not None:
            self.budget.remove(record)
            built, record.built = record.built, None
            if built is None:
                continue
            record.state, record.reason = "UNAVAILABLE", MADE_ROOM
            logger.info("graph '%s' version %s makes room", record.name, record.version)
            await built.graph.drained()
            await self.discard(built)

    async def _enter(self, record: Record, graph: ServedGraph, context: Context) -> ServedGraph:
        """Let a request into a version under the budget, which may have to be brought back for it."""
        built = record.built
        if built is not None:
            self.budget.used(record)
            entered = built.graph
            entered.requests += 1
        else:
            try:
                entered = await self._wait(record, context)
            except _Replaced:
                assert graph.door is not None  # now the way to what took its place
                return await graph.door(graph, context)
        if not takes_the_same(graph.plan, entered.plan):
            entered.leave()
            raise Unavailable(f"model '{record.name}' has other tensors since it was loaded again")
        return entered

    async def _wait(self, record: Record, context: Context) -> ServedGraph:
        """Wait until a version is in memory; all that wait share one load."""
        if record.failure is not None:
            moment, error = record.failure
            if self._loop.time() - moment < RETRY_S:
                raise error.copy()
        waiter: asyncio.Future[ServedGraph] = self._loop.create_future()
        record.waiters.append(waiter)
        if record.waking is None:
            record.waking = self.spawn(self._wake(record))
        try:
            async with asyncio.timeout_at(context.deadline):
                return await waiter
        except BaseException as error:
            if waiter.done() and not waiter.cancelled() and waiter.exception() is None:
                waiter.result().leave()  # it was counted in, and does not come
            if isinstance(error, TimeoutError):
                raise DeadlineExceeded("Request timeout expired while the model was loaded") from None
            raise

    async def _wake(self, record: Record) -> None:
        """Bring a version back, and let those in who wait for it."""
        try:
            async with self._lock:
                await self._bring_back(record)
                assert record.graph is not None
                for waiter in _taken(record):
                    if not waiter.done():  # its request may have gone
                        record.graph.requests += 1
                        waiter.set_result(record.graph)
                record.waking = None
                await self.trim(record)
        except BaseException as error:
            record.waking = None
            for waiter in _taken(record):
                if not waiter.done():
                    waiter.set_exception(error.copy() if isinstance(error, ServingGraphError) else _shared(error))
            if not isinstance(error, ServingGraphError | _Replaced):
                raise

    async def _bring_back(self, record: Record) -> None:
        old = record.graph
        if old is None or not old.ready:
            raise _Replaced
        if record.built is not None:
            return
        record.state, record.reason = "LOADING", ""
        try:
            await self._make_room(1, record.file_bytes, record)
            built = self._within(record, await self._build(record))
        except Exception as error:
            record.state, record.reason = "UNAVAILABLE", str(error)
            failure = LoadFailed(f"failed to load '{record.name}' version {record.version}: {error}")
            record.failure = self._loop.time(), failure
            raise failure from error
        if not old.ready:
            await self.discard(built)
            raise _Replaced
        record.failure = None
        for name, seat in built.graph.seats.items():
            if name in old.seats:
                seat.take_over(old.seats[name])
        record.graph, record.built = built.graph, built
        record.state = "READY"
        self.budget.add(record)
        self.catalog.swap([built.graph], [old])


def _taken(record: Record) -> list[asyncio.Future[ServedGraph]]:
    waiters, record.waiters = record.waiters, []
    return waiters


def _shared(error: BaseException) -> Exception:
    """Return what waiters are told of an error that is not made for them."""
    if isinstance(error, _Replaced):
        return _Replaced()
    if isinstance(error, asyncio.CancelledError):
        return Unavailable("the server is shutting down")
    return StepFailed.because_of(error)
