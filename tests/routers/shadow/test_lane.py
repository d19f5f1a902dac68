"""Copies under any mixture of faults: each ends once, no limit is ever exceeded, nothing is left, callers notice nothing."""

from __future__ import annotations

import asyncio
import mmap
import time

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from servinggraph import Context, Graph, routers
from servinggraph.errors import LimitExceeded, ServingGraphError
from servinggraph.routers.shadow.holding import kept
from servinggraph.testing import ManualClock

X = np.ones(250, np.float32)  # with body and answer about 1,100 bytes a copy

FAULTS = {
    "answers": lambda: None,
    "raises": lambda: ValueError("no"),
    "is full": lambda: LimitExceeded("full"),
    "cancels itself": asyncio.CancelledError,
    "exits": lambda: SystemExit(1),
}

requests = st.tuples(
    st.sampled_from(["asks", "asks", "asks", "leaves", "promotes", "waits"]),
    st.sampled_from(sorted(FAULTS)),
    st.sampled_from([0.0, 0.03, 0.2, 60.0]),  # how long a challenger takes, with a time limit of 0.1
)


@settings(max_examples=40, deadline=None)
@given(st.lists(requests, max_size=40), st.integers(1, 3), st.integers(0, 3), st.integers(1, 6))
def test_whatever_happens_copies_end_once_within_their_limits(script, concurrency, pending, sizes):
    clock = ManualClock()
    limits = {"concurrency": concurrency, "max_pending": pending, "max_bytes": 1200 * sizes}

    async def work(value, context: Context):
        if context.shadow:
            fault, seconds = context.headers["x-fault"], float(context.headers["x-seconds"])
            await asyncio.sleep(seconds)
            error = FAULTS[fault]()
            if error is not None:
                raise error
        else:
            await asyncio.sleep(0.01)
        return {"y": value["x"]}

    async def other(value, context: Context):
        return await work(value, context)

    graph = Graph("g", {"x": ("FP32", [-1])})
    options = {"shadow": {**limits, "timeout_ms": 100, "max_loop_share": 1.0}}
    graph.to(routers.Champion({"a": work, "b": other}, "a", **options), "test").respond()

    async def check():
        async with graph.mock() as server:
            router = server.router("test")
            answers = []

            def look():
                for one in router.report()["challengers"].values():
                    now = one["now"]
                    assert now["running"] <= concurrency
                    assert now["running"] + now["waiting"] <= concurrency + pending
                    assert now["bytes"] <= limits["max_bytes"]
                    assert (now["bytes"] > 0) == (now["running"] + now["waiting"] > 0)

            for act, fault, seconds in script:
                if act == "promotes":
                    champion = router.settings()["champion"]
                    await server.adjust("test", {"champion": "b" if champion == "a" else "a"})
                elif act == "waits":
                    await clock.advance(0.15)
                else:
                    headers = {"x-fault": fault, "x-seconds": str(seconds)}
                    asking = asyncio.ensure_future(server.infer(x=X, headers=headers))
                    answers.append((act, asking))
                    await clock.advance(0.002)
                    if act == "leaves":
                        asking.cancel()
                look()
            await clock.advance(0.05)
            for act, asking in answers:
                assert asking.cancelled() == (act == "leaves")
                assert act == "leaves" or [1.0] * 250 == asking.result().outputs["y"].tolist()
            await clock.advance(1)
            look()
            assert 0 == server.in_flight
            sampled = 0
            for champion in ("a", "b"):
                await server.adjust("test", {"champion": champion})
                (one,) = router.report()["challengers"].values()
                assert {"running": 0, "waiting": 0, "bytes": 0} == one["now"]
                ended = one["answered"] + sum(one["errors_by_code"].values()) + sum(one["dropped"].values())
                assert one["sampled"] == ended
                assert one["answered"] == one["agreement"]["of"] == one["agreement"]["agreed"]
                sampled += one["sampled"]
            assert sampled == sum(act == "asks" for act, _ in answers)
        left = asyncio.all_tasks() - {asyncio.current_task()}
        assert not left

    clock.run(check())


async def reported(clock, server, is_there):
    """Return what is said of challenger `b` once it is there; a comparison in a thread may take a while."""
    end = time.monotonic() + 60
    await clock.settle()
    while not is_there(found := server.router("test").report()["challengers"]["b"]):
        assert time.monotonic() < end, found
        await asyncio.to_thread(lambda: None)
        await clock.settle()
    return found


def test_tensors_in_a_clients_shared_memory_are_copied_and_others_are_not():
    with mmap.mmap(-1, 4096) as memory:
        lent = np.frombuffer(memoryview(memory)[:16].toreadonly(), np.float32).reshape(2, 2)
        owned = np.ones(4)
        copy = kept({"lent": lent, "owned": owned})
        assert copy["owned"] is owned
        memory[:16] = np.full(4, 7, np.float32).tobytes()
        assert [7.0] * 4 == lent.reshape(-1).tolist()
        assert [0.0] * 4 == copy["lent"].reshape(-1).tolist()
        del lent


@pytest.mark.parametrize("error", [ZeroDivisionError, SystemExit, asyncio.CancelledError, KeyboardInterrupt])
def test_a_comparison_that_fails_is_counted_and_harms_nobody(run, manual_clock, error):
    def fails(champion, challenger):
        raise error("nothing to divide")

    def same(value):
        return {"y": value["x"]}

    async def check():
        graph = Graph("g", {"x": ("FP32", [-1])})
        graph.to(routers.Champion({"a": same, "b": same}, "a", compare={"call": fails}), "test").respond()
        async with graph.mock() as server:
            await server.infer(x=X)
            found = await reported(manual_clock, server, lambda found: found["not_compared"])
            assert (1, 1, 0) == (found["answered"], found["not_compared"], found["agreement"]["of"])
            assert 0 == found["errors"]["failed"]
            said = {
                asyncio.CancelledError: "the comparison was cancelled from inside",
                KeyboardInterrupt: "RuntimeError: a step raised KeyboardInterrupt",
            }
            assert said.get(error, f"{error.__name__}: nothing to divide") == found["last_comparison_error"]

    run(check())


def test_large_answers_are_compared_off_the_event_loop(run, manual_clock):
    rows = np.ones((1000, 50), np.float32)

    def same(value):
        return {"y": value["x"]}

    def differs(value):
        return {"y": value["x"] + (np.arange(50_000) == 49_999).reshape(1000, 50)}

    async def check():
        graph = Graph("g", {"x": ("FP32", [-1, 50])})
        graph.to(routers.Champion({"a": same, "b": differs}, "a", shadow={"max_loop_share": 1.0}), "test").respond()
        async with graph.mock() as server:
            await server.infer(x=rows)
            found = await reported(manual_clock, server, lambda found: found["agreement"]["of"])
            assert (0, 1.0) == (found["agreement"]["agreed"], found["differences"]["y"]["max"])

    run(check())


def test_a_router_inside_a_batch_is_refused():
    def same(value):
        return {"y": value["x"]}

    graph = Graph("g", {"x": ("FP32", [-1])})
    graph.to(routers.Champion({"a": same, "b": same}, "a", batch=True), "test").respond()
    with pytest.raises(ServingGraphError, match="decides for each request"):
        graph.compile()
