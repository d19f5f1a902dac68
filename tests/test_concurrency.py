"""Awaiting several things, time limits, and threads."""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from servinggraph.concurrency import WorkerThreads, cancel_all, run_all, run_until, started
from servinggraph.context import Context
from servinggraph.errors import DeadlineExceeded, Unavailable
from servinggraph.testing import ManualClock


@pytest.fixture
def threads() -> Any:
    made = WorkerThreads(2, "test")
    made.start()
    yield made
    made.stop()


async def give(value: Any) -> Any:
    await asyncio.sleep(0)
    return value


async def fail(error: BaseException) -> None:
    await asyncio.sleep(0)
    raise error


def test_results_come_in_order_and_futures_get_no_task() -> None:
    async def check() -> None:
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        loop.call_soon(future.set_result, 2)
        assert [1, 2, 3] == await run_all([give(1), future, give(3)])
        done = loop.create_future()
        done.set_result(4)
        assert started([done])[0] is done
        assert [4, 4] == await run_all([done, done])
        assert [] == await run_all([])

    asyncio.run(check())


def test_the_first_failure_ends_the_others_and_waits_for_their_end() -> None:
    ended: list[str] = []

    async def hang() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            ended.append("hang")

    async def check() -> None:
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        with pytest.raises(ValueError, match="v"):
            await run_all([hang(), fail(ValueError("v")), future])
        assert ["hang"] == ended
        assert future.cancelled()
        failed, good = loop.create_future(), loop.create_future()
        failed.set_exception(KeyError("k"))
        good.set_result(1)
        with pytest.raises(KeyError):
            await run_all([good, failed])

    asyncio.run(check())


def test_cancelled_futures_that_fail_late_are_seen_even_if_nobody_waits_any_more(manual_clock: ManualClock) -> None:
    unhandled: list[Any] = []

    async def stubborn() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            await asyncio.sleep(1)
            raise ValueError("late") from None

    async def check() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda loop, what: unhandled.append(what))
        task = asyncio.ensure_future(stubborn())
        await asyncio.sleep(0)
        waiting = asyncio.ensure_future(cancel_all([task]))
        await asyncio.sleep(0)
        waiting.cancel()
        await manual_clock.advance(2)
        assert task.done()
        del task

    manual_clock.run(check())
    assert [] == unhandled


def test_run_until_passes_results_and_errors_on(manual_clock: ManualClock) -> None:
    async def check() -> None:
        loop = asyncio.get_running_loop()
        end = loop.time() + 1
        context = Context()
        seen: list[Any] = []

        async def call(value: Any, context: Context) -> Any:
            seen.append((value, context))
            return await give("result")

        assert "result" == await run_until(end, loop, call, "value", context, "late")
        assert [("value", context)] == seen
        for error in (ValueError("v"), TimeoutError("its own"), DeadlineExceeded("its own")):
            with pytest.raises(type(error)) as caught:
                await run_until(end, loop, lambda value, context, error=error: fail(error), None, context, "late")
            assert caught.value is error
        await manual_clock.advance(5)  # no timer is left behind

    manual_clock.run(check())


def test_run_until_ends_the_call_in_time_and_leaves_the_task_as_it_was(manual_clock: ManualClock) -> None:
    async def check() -> None:
        loop = asyncio.get_running_loop()

        async def limited() -> None:
            with pytest.raises(DeadlineExceeded, match="late"):
                await run_until(loop.time() + 1, loop, lambda value, context: give_after(10), None, Context(), "late")
            task = asyncio.current_task()
            assert task is not None
            assert 0 == task.cancelling()
            await asyncio.sleep(0)

        async def give_after(seconds: float) -> None:
            await asyncio.sleep(seconds)

        running = asyncio.ensure_future(limited())
        await manual_clock.advance(1)
        running.result()

    manual_clock.run(check())


def test_limits_nest_and_a_cancellation_from_outside_stays_one(manual_clock: ManualClock) -> None:
    async def check() -> None:
        loop = asyncio.get_running_loop()

        async def inner(value: Any, context: Context) -> Any:
            return await run_until(loop.time() + value, loop, lambda v, c: give_never(), None, context, "inner")

        async def give_never() -> None:
            await asyncio.Event().wait()

        for inner_s, outer_s, text in ((1, 2, "inner"), (2, 1, "outer")):
            running = asyncio.ensure_future(run_until(loop.time() + outer_s, loop, inner, inner_s, Context(), "outer"))
            await manual_clock.advance(1)
            with pytest.raises(DeadlineExceeded, match=text):
                running.result()
        for when in (0.5, 1.0):
            running = asyncio.ensure_future(run_until(loop.time() + 1, loop, inner, 1, Context(), "outer"))
            loop.call_at(loop.time() + when, running.cancel)
            await manual_clock.advance(1)
            assert running.cancelled()

    manual_clock.run(check())


def test_a_thread_returns_and_raises_for_its_caller(threads: WorkerThreads) -> None:
    async def check() -> None:
        assert 3 == await threads.call(lambda value, context: value + 1, 2, Context())
        for error in (ValueError("v"), SystemExit(1)):

            def bad(value: Any, context: Any, error: BaseException = error) -> Any:
                raise error

            with pytest.raises(type(error)):
                await threads.call(bad, None, Context())

    asyncio.run(check())


@pytest.mark.parametrize(
    "error", [StopIteration(), KeyboardInterrupt(), GeneratorExit()], ids=lambda error: type(error).__name__
)
def test_what_a_coroutine_must_not_be_given_comes_as_another_error(threads: WorkerThreads, error: BaseException) -> None:
    def bad(value: Any, context: Any) -> Any:
        raise error

    async def check() -> None:
        with pytest.raises(RuntimeError, match=type(error).__name__) as caught:
            await threads.call(bad, None, Context())
        assert caught.value.__cause__ is error

    asyncio.run(check())


def test_after_stop_queued_calls_run_and_new_ones_are_refused() -> None:
    threads = WorkerThreads(1, "test")
    threads.start()
    begun, release = threading.Event(), threading.Event()

    def block(value: Any, context: Any) -> Any:
        begun.set()
        assert release.wait(30)
        return value

    async def check() -> None:
        running = [threads.call(block, number, Context()) for number in range(3)]
        assert begun.wait(30)
        threads.stop()
        context = Context()
        with pytest.raises(Unavailable):
            threads.call(block, 9, context)
        context.when_idle(lambda: freed.append(1))
        release.set()
        assert [0, 1, 2] == await asyncio.gather(*running)

    freed: list[int] = []
    asyncio.run(check())
    assert [1] == freed  # a refused call holds no slot


def test_idle_threads_keep_nothing_of_their_last_call_alive(threads: WorkerThreads) -> None:
    async def check() -> weakref.ref[Any]:
        big = np.zeros(1000)
        reference = weakref.ref(big)
        await threads.call(lambda value, context: None, big, Context())
        del big
        return reference

    async def main() -> None:
        reference = await check()
        async with asyncio.timeout(60):
            while reference() is not None:  # the thread goes on to wait for its next call after the answer is here
                await asyncio.sleep(0.001)

    asyncio.run(main())


def test_a_thread_that_ends_after_its_event_loop_harms_nobody() -> None:
    threads = WorkerThreads(1, "test")
    threads.start()
    begun, release, ended = threading.Event(), threading.Event(), threading.Event()

    def block(value: Any, context: Any) -> None:
        begun.set()
        assert release.wait(30)
        ended.set()

    async def check() -> None:
        waiting = threads.call(block, None, Context())
        assert begun.wait(30)
        waiting.cancel()

    asyncio.run(check())
    release.set()
    assert ended.wait(30)
    threads.stop()


def test_calls_from_two_sides_of_a_stop_never_hang() -> None:
    """Whatever the interleaving of `call` and `stop`, each call has an end."""

    async def check() -> None:
        for _ in range(200):
            threads = WorkerThreads(1, "test")
            threads.start()
            stopping = threading.Thread(target=threads.stop)
            calls: list[asyncio.Future[Any]] = []
            stopping.start()
            refused = _call_until_refused(threads, calls)
            stopping.join()
            assert refused
            assert [1] * len(calls) == await asyncio.gather(*calls)

    asyncio.run(check())


def _call_until_refused(threads: WorkerThreads, calls: list[asyncio.Future[Any]]) -> bool:
    one: Callable[[Any, Any], int] = lambda value, context: 1  # noqa: E731
    while True:
        try:
            calls.append(threads.call(one, None, Context()))
        except Unavailable:
            return True
