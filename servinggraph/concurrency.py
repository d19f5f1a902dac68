"""Running several awaitables side by side, and blocking calls in threads of their own.

What asyncio lacks for the hot path: futures that exist already are not wrapped in tasks, and
a call in a thread costs one queue and one wake-up instead of two futures.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Sequence
from queue import SimpleQueue
from typing import Any

from servinggraph.context import Context

__all__ = ["WorkerThreads", "cancel_all", "run_all"]


async def run_all(awaitables: Sequence[Awaitable[Any]]) -> list[Any]:
    """Await all; the first failure cancels the others, waits for them to end, and is raised.

    Returns:
        The results, in order.
    """
    futures = [asyncio.ensure_future(awaitable) for awaitable in awaitables]
    try:
        return await asyncio.gather(*futures)
    except BaseException:
        await cancel_all(futures)
        raise


async def cancel_all(futures: Sequence[asyncio.Future[Any]]) -> None:
    """Cancel what is pending, wait until it has ended, and mark all outcomes as seen."""
    pending = [future for future in futures if not future.done()]
    for future in pending:
        future.cancel()
    if pending:
        await asyncio.wait(pending)
    for future in futures:
        if not future.cancelled():
            future.exception()


class WorkerThreads:
    """A fixed number of daemon threads that run blocking calls for the event loop.

    Args:
        count: number of threads, that is of calls at the same time.
        name: thread name, for profilers and debuggers.
    """

    def __init__(self, count: int, name: str) -> None:
        self._count = count
        self._name = name
        self._calls: SimpleQueue[tuple[Any, ...] | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self) -> None:
        """Start the threads."""
        for number in range(self._count):
            thread = threading.Thread(target=self._work, name=f"{self._name}-{number}", daemon=True)
            thread.start()
            self._threads.append(thread)

    def stop(self) -> None:
        """Let the threads end after the calls that are queued; does not wait for them."""
        for _ in self._threads:
            self._calls.put(None)
        self._threads.clear()

    def call(self, function: Callable[[Any, Context], Any], value: Any, context: Context) -> asyncio.Future[Any]:
        """Run `function(value, context)` in a thread.

        A cancelled call that has not begun is never run. One that has begun goes on, and the
        context's slot is held until it ends.
        """
        loop = self._loop
        if loop is None:  # asked for once: in Python 3.11 it costs a system call
            loop = self._loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()
        context.begin_work()
        self._calls.put((loop, future, context, function, value))
        return future

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            loop, future, context, function, value = call
            result: Any = None
            error: BaseException | None = None
            if not future.cancelled():
                try:
                    result = function(value, context)
                except BaseException as raised:  # a thread must outlive whatever a step raises
                    error = raised
            try:
                loop.call_soon_threadsafe(_settle, future, context, result, error)
            except RuntimeError:
                return  # the loop is closed: nobody waits any more
            # A worker that waits for its next call must not keep the last one's tensors alive.
            del call, loop, future, context, function, value, result, error


def _settle(future: asyncio.Future[Any], context: Context, result: Any, error: BaseException | None) -> None:
    context.end_work()
    if future.cancelled():
        return
    if error is None:
        future.set_result(result)
    elif isinstance(error, StopIteration):
        wrapped = RuntimeError("a step raised StopIteration")  # a future refuses to hold one
        wrapped.__cause__ = error
        future.set_exception(wrapped)
    else:
        future.set_exception(error)
