"""Guards around nodes: retries, circuit breakers, rate limits, at most so many calls at once."""

from __future__ import annotations

import asyncio
import threading

import numpy as np
import pytest

from servinggraph import Context, Graph, InvalidRequest, routers, steps
from servinggraph.errors import DeadlineExceeded, GraphInvalid, LimitExceeded, StepFailed, Unavailable

X = np.array([1.0], np.float32)


def a_graph(work, **guards):
    graph = Graph("g", {"x": ("FP32", [-1])})
    return graph.to(work, "n", **guards).respond()


class Flaky:
    """Fails as often as told."""

    def __init__(self, failures, error=None):
        self.left, self.error, self.calls = failures, error or ConnectionError("down"), 0

    async def __call__(self, value):
        self.calls += 1
        if self.left > 0:
            self.left -= 1
            raise self.error
        return {"y": value["x"]}


def serve(run, clock, graph, check):
    async def main():
        async with graph.mock() as server:
            await check(server)
            assert 0 == server.in_flight

    run(main())


async def outcome(request):
    try:
        return (await request).outputs["y"].tolist()
    except Exception as error:
        return type(error)


def test_a_failed_node_runs_again_after_a_pause(run, manual_clock):
    work = Flaky(2)

    async def check(server):
        request = asyncio.ensure_future(server.infer(x=X))
        await manual_clock.advance(0.099)
        assert 1 == work.calls
        await manual_clock.advance(0.002)
        assert 2 == work.calls
        await manual_clock.advance(0.2)
        assert [1.0] == (await request).outputs["y"].tolist()

    serve(run, manual_clock, a_graph(work, retry={"attempts": 3, "backoff_ms": 100, "jitter": False}), check)


@pytest.mark.parametrize(
    ("error", "options", "calls", "expected"),
    [
        (ConnectionError("down"), {"attempts": 3}, 3, StepFailed),
        (InvalidRequest("bad"), {"attempts": 3}, 1, InvalidRequest),
        (Unavailable("busy"), {"attempts": 3}, 3, Unavailable),
        (ConnectionError("down"), {"attempts": 3, "on": ["unavailable"]}, 1, StepFailed),
        (DeadlineExceeded("late"), {"attempts": 3}, 1, DeadlineExceeded),
        (DeadlineExceeded("late"), {"attempts": 3, "on": ["deadline_exceeded"]}, 3, DeadlineExceeded),
    ],
)
def test_only_errors_that_are_named_run_again_and_the_last_one_is_told(run, manual_clock, error, options, calls, expected):
    work = Flaky(100, error)

    async def check(server):
        assert expected is await outcome(server.infer(x=X))
        assert calls == work.calls

    serve(run, manual_clock, a_graph(work, retry={"backoff_ms": 0, **options}), check)


def test_a_storm_of_failures_is_not_multiplied_beyond_the_budget(run, manual_clock):
    work = Flaky(10**9)

    async def check(server):
        for _ in range(100):
            await outcome(server.infer(x=X))
        assert 100 < work.calls <= 100 + 5 + 0.1 * 100

    serve(run, manual_clock, a_graph(work, retry={"attempts": 10, "backoff_ms": 0, "budget": 0.1, "burst": 5}), check)


def test_no_retry_begins_that_would_come_too_late(run, manual_clock):
    work = Flaky(100)

    async def check(server):
        assert StepFailed is await outcome(server.infer(x=X, timeout_s=0.05))
        assert 1 == work.calls

    serve(run, manual_clock, a_graph(work, retry={"attempts": 5, "backoff_ms": 100, "jitter": False}), check)


def test_a_caller_that_leaves_during_the_pause_ends_its_retries(run, manual_clock):
    work = Flaky(100)

    async def check(server):
        request = asyncio.ensure_future(server.infer(x=X))
        await manual_clock.advance(0.01)
        request.cancel()
        await asyncio.wait([request])
        await manual_clock.advance(10)
        assert 1 == work.calls

    serve(run, manual_clock, a_graph(work, retry={"attempts": 5, "backoff_ms": 100, "jitter": False}), check)


def test_plain_and_batched_and_threaded_nodes_run_again_too(run, manual_clock):
    lock = threading.Lock()
    for work, options in (("plain", {}), ("batched", {"batch": True}), ("thread", {"run": "thread"})):
        calls = []

        def flaky(value, calls=calls):
            with lock:
                calls.append(1)
            if len(calls) == 1:
                raise ConnectionError
            return {"y": value["x"]}

        async def check(server, work=work, calls=calls):
            assert [1.0] == (await server.infer(x=X)).outputs["y"].tolist(), work
            assert 2 == len(calls)

        graph = Graph("g", {"x": ("FP32", [-1])})
        graph.to(steps.Python(flaky, **options, retry={"backoff_ms": 0}), "n").respond()
        serve(run, manual_clock, graph, check)


def test_response_parameters_of_a_retried_router_are_those_of_the_run_that_worked(run, manual_clock):
    work = Flaky(1)
    graph = Graph("g", {"x": ("FP32", [-1])})
    graph.to(routers.Ab({"a": work}, {"a": 1}, retry={"backoff_ms": 0}), "n").respond()

    async def check(server):
        assert {"n.variant": "a"} == (await server.infer(x=X)).parameters

    serve(run, manual_clock, graph, check)


def test_what_a_run_that_failed_has_told_is_not_in_the_answer(run, manual_clock):
    flaky = Flaky(1)

    async def tell(value, context: Context):
        context.response_parameters[f"calls.{flaky.calls}"] = True
        return await flaky(value)

    async def check(server):
        request = asyncio.ensure_future(server.infer(x=X))
        await manual_clock.advance(1)
        assert {"calls.1": True} == (await request).parameters

    serve(run, manual_clock, a_graph(tell, retry={"attempts": 2, "backoff_ms": 10}), check)


def test_a_breaker_refuses_at_once_and_closes_when_the_node_works_again(run, manual_clock):
    work = Flaky(3)

    async def check(server):
        for _ in range(3):
            assert StepFailed is await outcome(server.infer(x=X))
        with pytest.raises(
            Unavailable, match="node 'n': its circuit breaker is open after 3 failures: it is tried again in 1.0 s"
        ):
            await server.infer(x=X)
        assert 3 == work.calls
        await manual_clock.advance(1.0)
        assert [1.0] == await outcome(server.infer(x=X))
        assert [1.0] == await outcome(server.infer(x=X))

    serve(run, manual_clock, a_graph(work, circuit_breaker={"failures": 3, "open_ms": 1000}), check)


def test_a_callers_mistakes_and_departures_open_no_breaker(run, manual_clock):
    async def work(value):
        if value["x"][0] < 0:
            raise InvalidRequest("negative")
        await asyncio.sleep(1)
        return {"y": value["x"]}

    async def check(server):
        for _ in range(5):
            assert InvalidRequest is await outcome(server.infer(x=-X))
        for _ in range(5):
            request = asyncio.ensure_future(server.infer(x=X))
            await manual_clock.advance(0.1)
            request.cancel()
            await asyncio.wait([request])
        request = asyncio.ensure_future(server.infer(x=X))
        await manual_clock.advance(1)
        assert [1.0] == await outcome(request)

    serve(run, manual_clock, a_graph(work, circuit_breaker={"failures": 1}), check)


@pytest.mark.parametrize("limit", ["node", "request"])
def test_a_node_that_hangs_until_the_time_is_up_opens_its_breaker(run, manual_clock, limit):
    calls = []

    async def hang(value):
        calls.append(1)
        await asyncio.Event().wait()

    async def check(server):
        for _ in range(2):
            request = asyncio.ensure_future(server.infer(x=X, timeout_s=1 if limit == "request" else None))
            await manual_clock.advance(1)
            assert DeadlineExceeded is await outcome(request)
        assert Unavailable is await outcome(server.infer(x=X))
        assert 2 == len(calls)

    guards = {"circuit_breaker": {"failures": 2}} | ({"timeout_ms": 1000} if limit == "node" else {})
    serve(run, manual_clock, a_graph(hang, **guards), check)


@pytest.mark.parametrize(
    "limit",
    [{"rate_limit": {"per_s": 1, "burst": 1}}, {"max_concurrency": {"limit": 1, "max_queue": 0}}],
    ids=["rate", "places"],
)
def test_what_a_nodes_own_limit_refuses_does_not_open_its_breaker(run, manual_clock, limit):
    async def work(value):
        await asyncio.sleep(0.5)
        return {"y": value["x"]}

    async def check(server):
        requests = [asyncio.ensure_future(server.infer(x=X)) for _ in range(5)]
        await manual_clock.advance(0.5)
        assert [[1.0]] + 4 * [LimitExceeded] == [await outcome(request) for request in requests]
        await manual_clock.advance(1)
        request = asyncio.ensure_future(server.infer(x=X))
        await manual_clock.advance(0.5)
        assert [1.0] == await outcome(request)

    serve(run, manual_clock, a_graph(work, circuit_breaker={"failures": 1}, **limit), check)


def test_a_call_that_began_before_its_breaker_opened_is_no_probe(run, manual_clock):
    gates, running = {}, []

    async def work(value):
        (x,) = value["x"].tolist()
        running.append(x)
        try:
            await gates.setdefault(x, asyncio.Event()).wait()
        finally:
            running.remove(x)
        if x < 0:
            raise ConnectionError("down")
        return {"y": value["x"]}

    async def check(server):
        def ask(x):
            return asyncio.ensure_future(server.infer(x=[x]))

        slow, broken, leaver = ask(1), ask(-1), ask(2)
        await manual_clock.settle()
        gates[-1.0].set()
        assert StepFailed is await outcome(broken)
        await manual_clock.advance(1)
        probe = ask(3)
        await manual_clock.settle()
        leaver.cancel()
        await asyncio.wait([leaver])
        assert Unavailable is await outcome(ask(4)), "the probe runs still, whoever else left"
        gates[1.0].set()
        assert [1.0] == await outcome(slow)
        assert Unavailable is await outcome(ask(5)), "nor is what worked before it opened a probe"
        assert [3.0] == running
        gates[3.0].set()
        assert [3.0] == await outcome(probe)

    serve(run, manual_clock, a_graph(work, circuit_breaker={"failures": 1, "open_ms": 1000}), check)


def test_a_rate_is_kept_and_more_is_refused_with_its_name(run, manual_clock):
    async def check(server):
        got = [await outcome(server.infer(x=X)) for _ in range(4)]
        assert [[1.0], [1.0], LimitExceeded, LimitExceeded] == got
        await manual_clock.advance(0.1)
        assert [[1.0], LimitExceeded] == [await outcome(server.infer(x=X)) for _ in range(2)]
        with pytest.raises(LimitExceeded, match="limit 'rate_limit.per_s'"):
            await server.infer(x=X)

    serve(run, manual_clock, a_graph(lambda value: {"y": value["x"]}, rate_limit={"per_s": 10, "burst": 2}), check)


def test_at_most_so_many_calls_run_and_wait(run, manual_clock):
    running, most = [], []

    async def work(value):
        running.append(1)
        most.append(len(running))
        try:
            await asyncio.sleep(1)
        finally:
            running.pop()
        return {"y": value["x"]}

    async def check(server):
        requests = [asyncio.ensure_future(server.infer(x=X)) for _ in range(6)]
        await manual_clock.advance(0.5)
        assert [LimitExceeded] == [await outcome(r) for r in requests if r.done()]
        requests[2].cancel()  # it waits
        requests[0].cancel()  # it runs
        await manual_clock.advance(10)
        done = [r for r in requests if not r.cancelled() and r.exception() is None]
        assert (3, 2) == (len(done), max(most))

    serve(run, manual_clock, a_graph(work, max_concurrency={"limit": 2, "max_queue": 3}), check)


def test_callers_who_leave_in_the_moment_in_which_a_place_is_free_are_passed_over(run, manual_clock):
    ended = asyncio.Event()

    async def work(value):
        await ended.wait()
        return {"y": value["x"]}

    async def check(server):
        runs, *leaving, last = [asyncio.ensure_future(server.infer(x=X)) for _ in range(4)]
        await manual_clock.settle()
        ended.set()
        await asyncio.sleep(0)
        for request in leaving:
            request.cancel()
        await asyncio.wait([runs, *leaving, last])
        assert [True, True] == [request.cancelled() for request in leaving]
        assert [1.0] == await outcome(runs) == await outcome(last)

    serve(run, manual_clock, a_graph(work, max_concurrency={"limit": 1, "max_queue": 3}), check)


def test_a_place_is_free_again_only_when_the_thread_has_ended(run, manual_clock):
    begun, release = threading.Semaphore(0), threading.Event()

    def work(value):
        begun.release()
        release.wait(20)
        return {"y": value["x"]}

    graph = Graph("g", {"x": ("FP32", [-1])})
    graph.to(steps.Python(work, run="thread", max_concurrency={"limit": 1, "max_queue": 0}), "n").respond()

    async def check(server):
        first = asyncio.ensure_future(server.infer(x=X))
        await asyncio.to_thread(begun.acquire)
        first.cancel()
        await asyncio.wait([first])
        assert LimitExceeded is await outcome(server.infer(x=X))
        release.set()
        while server.in_flight:
            await asyncio.sleep(0)
            await asyncio.to_thread(lambda: None)
        assert [1.0] == await outcome(server.infer(x=X))

    serve(run, manual_clock, graph, check)


def test_guards_work_inside_each_other(run, manual_clock):
    work = Flaky(2)
    guards = {
        "retry": {"attempts": 4, "backoff_ms": 600, "jitter": False},
        "circuit_breaker": {"failures": 2, "open_ms": 1000},
        "rate_limit": {"per_s": 100},
        "max_concurrency": 1,
        "timeout_ms": 5000,
    }

    async def check(server):
        request = asyncio.ensure_future(server.infer(x=X))
        await manual_clock.advance(0.61)  # the second failure opens the breaker
        assert 2 == work.calls
        await manual_clock.advance(1.21)
        assert [1.0] == await outcome(request)
        assert 3 == work.calls

    serve(run, manual_clock, a_graph(work, **guards), check)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"retry": {"attempts": 1}}, "attempts"),
        ({"retry": {"on": ["invalid_request"]}}, "'retry.on.0'"),
        ({"retry": {"atempts": 3}}, "did you mean 'attempts'"),
        ({"circuit_breaker": {"failures": 5, "window": 2}}, "must hold failures"),
        ({"rate_limit": {}}, "per_s"),
        ({"max_concurrency": 0}, "max_concurrency"),
    ],
)
def test_guards_that_cannot_be_are_refused(options, text):
    with pytest.raises(GraphInvalid, match=text):
        a_graph(lambda value: value, **options).compile()


def test_guards_on_a_generator_are_refused():
    def items(value, context: Context):
        yield value

    with pytest.raises(GraphInvalid, match="this one is a generator"):
        a_graph(items, retry={"attempts": 2}).compile()
