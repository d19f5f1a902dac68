"""Running several awaitables side by side, calls with a time limit, blocking calls in threads, and ending generators.

What asyncio lacks for the hot path: futures that exist already are not wrapped in tasks, a
time limit asks nobody for the running loop, and a call in a thread costs one queue and one
wake-up instead of two futures.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import threading
from collections.abc import Awaitable, Callable, Generator, Sequence
from operator import methodcaller
from queue import SimpleQueue
from typing import Any, Final

from servinggraph.context import Context, current_context
from servinggraph.errors import DeadlineExceeded, Unavailable

__all__ = [
    "GeneratorInThreads",
    "WorkerThreads",
    "aclose_generator",
    "cancel_all",
    "close_generator",
    "run_all",
    "run_until",
    "started",
]

logger = logging.getLogger("servinggraph.executor")

_CLOSINGS: Final = 3
"""How often a generator is told to end that catches GeneratorExit and goes on."""

_END: Final = object()

_result: Final = methodcaller("result")


async def run_until(
    deadline: float,
    loop: asyncio.AbstractEventLoop,
    call: Callable[[Any, Context], Awaitable[Any]],
    value: Any,
    context: Context,
    late: str,
) -> Any:
    """Await `call(value, context)`, and cancel it at `deadline`, a moment on the loop's clock.

    Raises:
        DeadlineExceeded: with the message `late`, once the cancelled call has ended.
    """
    task = asyncio.current_task(loop)
    assert task is not None
    asked_before = task.cancelling()
    expired = False

    def expire() -> None:
        nonlocal expired
        expired = True
        task.cancel()  # noqa: F821  # it is deleted when the timer cannot come any more

    timer = loop.call_at(deadline, expire)
    try:
        return await call(value, context)
    except asyncio.CancelledError:
        # Somebody else may have cancelled the task as well, and then it is to end.
        if expired and task.cancelling() - 1 <= asked_before:
            raise DeadlineExceeded(late) from None
        raise
    finally:
        timer.cancel()
        if expired:
            task.uncancel()
        del task  # where it ends cancelled, it holds this frame by the traceback of that


def started(awaitables: Sequence[Awaitable[Any]]) -> list[asyncio.Future[Any]]:
    """Return a future of each awaitable; only what is not a future yet becomes a task."""
    if all(isinstance(awaitable, asyncio.Future) for awaitable in awaitables):
        return list(awaitables)  # type: ignore[arg-type]  # futures, as just seen
    loop = asyncio.get_running_loop()
    return [asyncio.ensure_future(awaitable, loop=loop) for awaitable in awaitables]


async def run_all(awaitables: Sequence[Awaitable[Any]]) -> list[Any]:
    """Await all; the first failure cancels the others, waits for them to end, and is raised.

    Returns:
        The results, in order.
    """
    futures = started(awaitables)
    try:
        if all(future.done() for future in futures):
            return list(map(_result, futures))
        return await asyncio.gather(*futures)
    except BaseException:
        await cancel_all(futures)
        raise
    finally:
        del futures, awaitables  # one of them has the error, which holds this frame by its traceback


async def cancel_all(futures: Sequence[asyncio.Future[Any]]) -> None:
    """Cancel what is pending, wait until it has ended, and mark all outcomes as seen."""
    for future in futures:
        future.add_done_callback(_look_at)  # so that it counts as seen even if this wait is cancelled, too
        future.cancel()
    pending = [future for future in futures if not future.done()]
    if pending:
        await asyncio.wait(pending)


def _look_at(future: asyncio.Future[Any]) -> None:
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
        # A call that came after the end marks of `stop` would never run, and `stop` is called in a thread.
        self._lock = threading.Lock()
        self._stopped = False

    def start(self) -> None:
        """Start the threads."""
        for number in range(self._count):
            thread = threading.Thread(target=self._work, name=f"{self._name}-{number}", daemon=True)
            thread.start()
            self._threads.append(thread)

    def stop(self) -> None:
        """Let the threads end after the calls that are queued, and refuse others; does not wait for them."""
        with self._lock:
            self._stopped = True
            for _ in self._threads:
                self._calls.put(None)
            self._threads.clear()

    def call(self, function: Callable[[Any, Context], Any], value: Any, context: Context) -> asyncio.Future[Any]:
        """Run `function(value, context)` in a thread.

        A cancelled call that has not begun is never run. One that has begun goes on, and the
        context's slot is held until it ends.

        Raises:
            Unavailable: the threads were stopped.
        """
        loop = self._loop
        if loop is None:  # asked for once: in Python 3.11 it costs a system call
            loop = self._loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()
        with self._lock:
            if self._stopped:
                raise Unavailable("is shutting down")
            self._calls.put((loop, future, context, function, value))
        context.begin_work()  # before this turn of the loop, and so `end_work`, can come
        return future

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            loop, future, context, function, value = call
            result: Any = None
            error: BaseException | None = None
            if not future.cancelled():
                current_context.set(context)
                try:
                    result = function(value, context)
                except BaseException as raised:  # a thread must outlive whatever a step raises
                    error = raised
            try:
                loop.call_soon_threadsafe(_settle, future, context, result, error)
            except RuntimeError:
                return  # the loop is closed: nobody waits any more
            # A worker that waits for its next call must not keep the last one's tensors alive.
            current_context.set(None)
            del call, loop, future, context, function, value, result, error


def _settle(future: asyncio.Future[Any], context: Context, result: Any, error: BaseException | None) -> None:
    context.end_work()
    if future.cancelled():
        return
    if error is None:
        future.set_result(result)
    elif isinstance(error, StopIteration | KeyboardInterrupt | GeneratorExit):
        # A future refuses to hold the first, and for a coroutine that awaits the others they are the end of everything.
        wrapped = RuntimeError(f"a step raised {type(error).__name__}")
        wrapped.__cause__ = error
        future.set_exception(wrapped)
    else:
        future.set_exception(error)


def close_generator(generator: Any) -> None:
    """End a plain generator; one that catches GeneratorExit and goes on is told a few times.

    Raises:
        RuntimeError: it goes on for all that.
        BaseException: whatever its `finally` blocks raise.
    """
    for left in reversed(range(_CLOSINGS)):
        try:
            generator.close()
            break
        except RuntimeError:
            if not left or getattr(generator, "gi_frame", None) is None:  # ended, by an error of its own
                raise


async def aclose_generator(generator: Any) -> None:
    """End an async generator, as `close_generator` ends a plain one.

    Raises:
        RuntimeError: it goes on for all that.
        BaseException: whatever its `finally` blocks raise.
    """
    if not inspect.isasyncgen(generator):
        await generator.aclose()
        return
    for _ in range(_CLOSINGS):
        if generator.ag_frame is None:
            return
        try:
            await generator.athrow(GeneratorExit)  # not `aclose`, after which nothing more can be thrown
        except (GeneratorExit, StopAsyncIteration):
            return
    raise RuntimeError("async generator ignored GeneratorExit")


class GeneratorInThreads:
    """An async iterator over a plain generator that blocks: each step of it runs in a thread, its end as well.

    Args:
        threads: where.
        generator: the generator, not yet begun.
        context: its request's context; its slot is held while a step runs.
    """

    def __init__(self, threads: WorkerThreads, generator: Generator[Any, None, None], context: Context) -> None:
        self._threads = threads
        self._generator = generator
        self._context = context
        self._lock = threading.Lock()
        self._runs = False
        self._closed = False

    async def __anext__(self) -> Any:
        try:
            item = await self._threads.call(self._step, None, self._context)
        except StopAsyncIteration as error:  # the generator's own mistake, and not its end
            raise RuntimeError("generator raised StopAsyncIteration") from error
        if item is _END:
            raise StopAsyncIteration
        return item

    async def aclose(self) -> None:
        """End the generator; when a step of it runs, the thread does so at the end of the step, and this does not wait."""
        with self._lock:
            self._closed = True
            if self._runs:
                return
        if inspect.getgeneratorstate(self._generator) != inspect.GEN_SUSPENDED:
            self._generator.close()  # not begun, or at its end: nothing of it runs
            return
        try:
            closing: Awaitable[None] = self._threads.call(self._close, None, self._context)
        except Unavailable:  # the step was unloaded meanwhile
            closing = asyncio.to_thread(close_generator, self._generator)
        await asyncio.shield(closing)  # a call that is cancelled before it has begun would never run

    def _step(self, _value: Any, _context: Context) -> Any:
        with self._lock:
            if self._closed:
                return _END
            self._runs = True
        try:
            return next(self._generator, _END)
        finally:
            with self._lock:
                self._runs = False
                closed = self._closed
            if closed:
                try:
                    close_generator(self._generator)
                except BaseException:
                    logger.exception("a generator failed while it was closed")

    def _close(self, _value: Any, _context: Context) -> None:
        close_generator(self._generator)
