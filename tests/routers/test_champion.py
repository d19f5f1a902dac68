"""Champion and challengers: the champion answers, copies run beside it and are compared, and cost it nothing."""

from __future__ import annotations

import asyncio
import mmap
import threading
import time
from collections import Counter
from contextlib import suppress
from math import sqrt
from uuid import uuid4

import numpy as np
import orjson
import pytest

from servinggraph import Context, Graph, routers, signature, steps
from servinggraph.context import current_context
from servinggraph.errors import DeadlineExceeded, GraphInvalid, InvalidRequest, LimitExceeded, StepFailed
from servinggraph.testing import FakeModel

X = np.array([1.0, 2.0], np.float32)


@signature(outputs={"y": ("FP32", [-1])})
def same(value):
    return {"y": value["x"]}


def a_graph(challenger=same, champion=same, name="g", inputs=None, **options):
    branches = {"old": champion, "new": challenger}
    # A machine that is busy with something else must not look like a challenger that holds the event loop.
    options["shadow"] = {"max_loop_share": 1.0, **options.get("shadow", {})}
    graph = Graph(name, inputs or {"x": ("FP32", [-1])})
    return graph.to(routers.Champion(branches, "old", **options), "test").respond()


def report(server, challenger="new"):
    return server.router("test").report()["challengers"][challenger]


def seen(server, challenger="new"):
    """Return how many copies there were, and how many ended how."""
    found = report(server, challenger)
    ends = {"answered": found["answered"], **found["dropped"], **found["errors_by_code"]}
    now = found["now"]
    assert 0 <= found["sampled"] - now["waiting"] - sum(ends.values()) <= now["running"]
    return {name: count for name, count in ends.items() if count}


async def counted(server, clock, number, challenger="new"):
    """Wait until so many copies have ended; some end in threads."""
    await until(clock, lambda: sum(seen(server, challenger).values()) >= number, lambda: seen(server, challenger))


async def until(clock, condition, state):
    """Wait for something that ends in a thread, while the clock stands still."""
    end = time.monotonic() + 60
    await clock.settle()
    while not condition():
        assert time.monotonic() < end, state()
        await asyncio.to_thread(lambda: None)
        await clock.settle()


# ---- what callers see


def test_the_champion_answers_and_the_challenger_is_compared_to_it(run, manual_clock):
    def twice(value):
        return {"y": value["x"] * 2}

    async def check():
        async with a_graph(twice).mock() as server:
            reply = await server.infer(x=X, id="r1")
            assert [1.0, 2.0] == reply.outputs["y"].tolist()
            assert {"test.variant": "old"} == reply.parameters
            await counted(server, manual_clock, 1)
            found = report(server)
            assert {"of": 1, "agreed": 0, "rate": 0.0} == {k: found["agreement"][k] for k in ("of", "agreed", "rate")}
            assert {"of": 2, "agreed": 0, "rate": 0.0} == found["rows"]
            assert {"values of 'y'": 1} == found["disagreements"]
            assert 2.0 == found["differences"]["y"]["max"]
            (example,) = found["examples"]
            assert ("r1", [1.0, 2.0]) == (example["id"], example["inputs"]["x"]["first"])
            assert ([1.0, 2.0], [2.0, 4.0]) == (example["champion"]["y"]["first"], example["challenger"]["y"]["first"])
            assert 1 == found["latency_ms"]["champion"]["count"] == found["latency_ms"]["challenger"]["count"]
            assert {"old": 1, "new": 0} == server.router("test").report()["decisions"]

    run(check())


def test_a_copy_begins_only_when_its_request_was_answered(run, manual_clock):
    order = []

    async def challenger(value):
        order.append("challenger")
        return value

    async def last(value):
        await asyncio.sleep(1)
        order.append("answer")
        return value

    async def check():
        graph = Graph("g", {"x": ("FP32", [-1])}).to(routers.Champion({"old": same, "new": challenger}, "old"), "test")
        async with graph.to(last).respond().mock() as server:
            asking = asyncio.ensure_future(server.infer(x=X))
            await manual_clock.advance(1.5)
            await asking
            await counted(server, manual_clock, 1)
            assert ["answer", "challenger"] == order

    run(check())


def test_a_copy_has_a_context_of_its_own(run, manual_clock):
    contexts = []

    def challenger(value, context: Context):
        contexts.append(context)
        context.response_parameters["leaked"] = True
        return {"y": value["x"]}

    async def check():
        async with a_graph(challenger, shadow={"timeout_ms": 200}).mock() as server:
            reply = await server.infer(x=X, id="r", headers={"x-user": "ann"}, parameters={"p": 1}, timeout_s=5)
            await counted(server, manual_clock, 1)
            assert {"test.variant": "old"} == reply.parameters
            (context,) = contexts
            assert ("r", "ann", 1) == (context.id, context.headers["x-user"], context.parameters["p"])
            assert context.shadow
            assert pytest.approx(manual_clock.time() + 0.2) == context.deadline

    run(check())


def test_nobody_can_write_into_what_copies_share(run, manual_clock):
    def spoils(value):
        value["x"][0] = 7
        return {"y": value["x"]}

    def behind(value):
        value["y"][0] = 7
        return value

    async def check():
        async with a_graph(spoils).mock() as server:
            assert [1.0, 2.0] == (await server.infer(x=X)).outputs["y"].tolist()
            await counted(server, manual_clock, 1)
            assert "read-only" in report(server)["last_error"]
        # Whether a request is copied or not: what fails behind the champion fails always.
        graph = Graph("g", {"x": ("FP32", [-1])}).to(routers.Champion({"old": same, "new": same}, "old", rate=0), "test")
        async with graph.to(behind).respond().mock() as server:
            with pytest.raises(StepFailed, match="read-only"):
                await server.infer(x=X)

    run(check())


def test_a_step_behind_may_change_the_mapping_that_it_gets_and_not_the_one_that_is_compared(run, manual_clock):
    def behind(value):
        value["more"] = value["y"] + 1
        value["y"] = value["y"] * 5
        return {"y": value["y"]}

    async def check():
        graph = Graph("g", {"x": ("FP32", [-1])}).to(routers.Champion({"old": same, "new": same}, "old"), "test")
        async with graph.to(behind).respond().mock() as server:
            assert [5.0, 10.0] == (await server.infer(x=X)).outputs["y"].tolist()
            await counted(server, manual_clock, 1)
            assert {} == report(server)["disagreements"]
            assert 1.0 == report(server)["agreement"]["rate"]

    run(check())


def test_an_answer_in_a_clients_memory_is_compared_as_it_was_given(run, manual_clock):
    memory = mmap.mmap(-1, 4096)
    lent = np.frombuffer(memoryview(memory)[:8].toreadonly(), np.float32)
    begun = asyncio.Event()

    def champion(value):
        return {"y": lent}

    async def challenger(value):
        begun.set()
        await asyncio.sleep(0.1)
        return {"y": np.zeros(2, np.float32)}

    async def check():
        async with a_graph(challenger, champion).mock() as server:
            assert [0.0, 0.0] == (await server.infer(x=X)).outputs["y"].tolist()
            await begun.wait()
            memory[:8] = b"\1" * 8  # the client has its answer, and uses its memory for something else
            await manual_clock.advance(0.2)
            await counted(server, manual_clock, 1)
            assert 1.0 == report(server)["agreement"]["rate"]

    run(check())


def test_what_a_copy_logs_is_said_to_be_of_its_own_request(run, manual_clock):
    found = []

    async def challenger(value, context: Context):
        await asyncio.sleep(0.1)
        current = current_context.get()
        found.append((context.id, current is not None and (current.id, current.shadow)))
        return {"y": value["x"]}

    async def check():
        async with a_graph(challenger, shadow={"concurrency": 1}).mock() as server:
            for name in "abc":  # each copy but the first is begun at the end of another one
                await server.infer(x=X, id=name)
            await manual_clock.advance(1)
            await counted(server, manual_clock, 3)
            assert [("a", ("a", True)), ("b", ("b", True)), ("c", ("c", True))] == found

    run(check())


# ---- challengers that misbehave


class Leaves(BaseException):
    """Nothing that anybody expects."""


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ValueError("no"), "internal"),
        (InvalidRequest("no"), "invalid_request"),
        (asyncio.CancelledError(), "internal"),
        (SystemExit(3), "internal"),
        (GeneratorExit(), "internal"),
        (StopIteration(), "internal"),
        (Leaves(), "internal"),
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("kind", ["plain", "async", "batched", "thread"])
def test_whatever_a_challenger_raises_ends_with_it(run, manual_clock, error, code, kind):
    def plain(value):
        raise error

    async def later(value):
        await asyncio.sleep(0)
        raise error

    options = {"batched": {"batch": True}, "thread": {"run": "thread"}}.get(kind, {})

    async def check():
        challenger = steps.Python(later if kind in ("async", "batched") else plain, **options)
        async with a_graph(challenger).mock() as server:
            for _ in range(3):
                assert [1.0, 2.0] == (await server.infer(x=X)).outputs["y"].tolist()
            await counted(server, manual_clock, 3)
            assert {code: 3} == seen(server)
            assert 1.0 == report(server)["errors"]["rate"]
            assert 0 == server.in_flight

    run(check())


def test_a_challenger_that_hangs_is_ended_by_its_own_deadline(run, manual_clock):
    async def check():
        async with a_graph(FakeModel({"y": X}, delay_s=3600), shadow={"timeout_ms": 50}).mock() as server:
            await server.infer(x=X)
            await manual_clock.settle()
            assert 0 == server.in_flight  # the copy holds no place of a request
            assert 1 == report(server)["now"]["running"]
            await manual_clock.advance(0.06)
            assert {"deadline_exceeded": 1} == seen(server)
            assert "took longer than 'shadow.timeout_ms' = 50" in report(server)["last_error"]

    run(check())


def test_more_copies_than_fit_are_dropped_and_counted(run, manual_clock):
    async def check():
        limits = {"concurrency": 2, "max_pending": 3, "timeout_ms": 1000}
        async with a_graph(FakeModel({"y": X}, delay_s=3600), shadow=limits).mock() as server:
            for _ in range(20):
                await server.infer(x=X)
            await manual_clock.settle()
            assert (2, 3) == (report(server)["now"]["running"], report(server)["now"]["waiting"])
            assert {"max_pending": 15} == seen(server)
            await manual_clock.advance(1.1)
            assert {"max_pending": 15, "deadline_exceeded": 2, "late": 3} == seen(server)
            assert {"running": 0, "waiting": 0, "bytes": 0} == report(server)["now"]

    run(check())


def test_copies_keep_at_most_so_many_bytes_and_a_body_counts_once(run, manual_clock):
    rows = np.ones((1000, 25), np.float32)  # 100,000 bytes

    async def check():
        limits = {"concurrency": 1, "max_pending": 1000, "max_bytes": 450_000}
        graph = a_graph(FakeModel({"y": X}, delay_s=3600), shadow=limits, inputs={"x": ("FP32", [-1, 25])})
        async with graph.mock() as server:
            for _ in range(50):
                await server.infer(x=rows)
            await manual_clock.settle()
            now = report(server)["now"]
            # The champion gives its input back: input and output are views of one body.
            assert (1, 3) == (now["running"], now["waiting"])
            assert 400_000 <= now["bytes"] <= 450_000
            assert {"max_bytes": 46} == seen(server)

    run(check())


def test_a_thread_that_hangs_keeps_its_place_and_nobody_elses(run, manual_clock):
    go_on, begun = threading.Event(), threading.Semaphore(0)

    def hangs(value):
        begun.release()
        go_on.wait()
        return {"y": value["x"]}

    async def check():
        limits = {"concurrency": 2, "max_pending": 1, "timeout_ms": 10}
        async with a_graph(steps.Python(hangs, run="thread"), shadow=limits).mock() as server:
            try:
                for number in range(10):
                    await server.infer(x=X)
                    await manual_clock.settle()
                    if number < 2:
                        await asyncio.to_thread(begun.acquire)
                    await manual_clock.advance(0.02)
                found = report(server)
                assert 2 == found["now"]["running"]  # its threads are not free before they have really ended
                assert 0 == server.in_flight
                assert {"deadline_exceeded": 2} == found["errors_by_code"]
                assert 7 == sum(found["dropped"].values())
            finally:
                go_on.set()
            await counted(server, manual_clock, 10)
            while report(server)["now"]["running"]:
                await asyncio.to_thread(manual_clock.time)

    run(check())


@pytest.mark.parametrize("kind", ["computes", "waits"])
def test_a_challenger_that_holds_the_event_loop_gets_next_to_none_of_it(run, manual_clock, caplog, kind):
    calls = []

    def holds(value):
        calls.append(1)
        if kind == "waits":
            time.sleep(0.003)
        end = time.thread_time() + 0.003
        while kind == "computes" and time.thread_time() < end:
            pass
        return {"y": value["x"]}

    async def check():
        async with a_graph(holds, shadow={"max_loop_share": 0.001}).mock() as server:
            for _ in range(20):
                await server.infer(x=X)
            await manual_clock.settle()
            assert 1 == len(calls)  # found out by the first; the others waited no longer
            assert {"answered": 1, "max_loop_share": 19} == seen(server)
            assert "challenger" not in caplog.text  # once may be the machine's fault
            asked = 20
            while len(calls) < 2:  # a machine that stood still in the first call makes this last longer
                await server.infer(x=X)
                await manual_clock.advance(0.1)
                asked += 1
            for _ in range(100):
                await server.infer(x=X)
                await manual_clock.advance(0.1)
            assert asked + 100 == report(server)["sampled"]
            assert 2 <= len(calls) <= 1 + 1 + 10 / (0.003 / 0.001)
            assert 1 == caplog.text.count("challenger 'test.new' held the event loop")

    run(check())


@pytest.mark.parametrize(
    "queue", [{"max_concurrency": {"limit": 1, "max_queue": 1}}, {"batch": {"max_rows": 2, "max_queue": 1}}]
)
def test_a_challenger_with_a_full_queue_drops(run, manual_clock, queue):
    async def check():
        challenger = FakeModel({"y": X}, delay_s=1)
        graph = Graph("g", {"x": ("FP32", [-1])})
        branches = {"old": same, "new": routers.Chain({"model": challenger}, **queue)}
        champion = routers.Champion(branches, "old", shadow={"max_loop_share": 1.0})
        async with graph.to(champion, "test").respond().mock() as server:
            for _ in range(4):
                await server.infer(x=X)
            await manual_clock.settle()
            assert {"challenger_full": 2} == seen(server)
            await manual_clock.advance(2.5)

    run(check())


def test_challengers_form_batches_of_copies(run, manual_clock):
    sizes = []

    async def batched(value):
        sizes.append(len(value["x"]))
        await asyncio.sleep(0.1)
        return {"y": value["x"]}

    async def check():
        async with a_graph(steps.Python(batched, batch={"max_rows": 64})).mock() as server:
            await asyncio.gather(*(server.infer(x=X) for _ in range(8)))
            await manual_clock.advance(0.5)
            assert {"answered": 8} == seen(server)
            assert 16 == sum(sizes)
            assert len(sizes) < 8
            assert 1.0 == report(server)["agreement"]["rate"]

    run(check())


@pytest.mark.parametrize("what", ["error", "text", "name", "comparison"])
def test_a_text_that_no_json_can_hold_does_not_spoil_the_report(run, manual_clock, tmp_path, what):
    half = "\udcff"

    def champion(value):
        return {"y": np.array(["a"], object)}

    def challenger(value):
        if what == "error":
            raise ValueError(f"no file {half}")
        return {"y" + half: X} if what == "name" else {"y": np.array([half], object)}

    def compares(one, other):
        return False, {half * 1000: 1.0}

    async def check():
        compare = {"call": compares} if what == "comparison" else {}
        graph = a_graph(challenger, champion, compare=compare, state=str(tmp_path / "state.json"))
        async with graph.mock() as server:
            with suppress(StepFailed):  # what the champion gives is no tensor
                await server.infer(x=X, id="r")
            await counted(server, manual_clock, 1)

            def compared():  # by a function in a thread
                return report(server)["agreement"]["of"] or report(server)["errors"]["failed"]

            await until(manual_clock, compared, lambda: report(server))
            found = report(server)
            assert 1 == found["agreement"]["of"] + found["errors"]["failed"]
            assert b"?" in orjson.dumps(found)
            orjson.dumps(server.router("test").remember())

    run(check())


# ---- cancellation, failure, the end


@pytest.mark.parametrize("when", ["before", "during", "after"])
def test_a_caller_that_leaves_before_the_champion_has_answered_is_not_copied(run, manual_clock, when):
    ran = []

    async def champion(value):
        await asyncio.sleep(1)
        return {"y": value["x"]}

    async def challenger(value):
        ran.append("begun")
        await asyncio.sleep(0.5)
        ran.append("ended")
        return {"y": value["x"]}

    async def last(value):
        await asyncio.sleep(1)
        return value

    async def check():
        graph = Graph("g", {"x": ("FP32", [-1])}).to(routers.Champion({"old": champion, "new": challenger}, "old"), "test")
        async with graph.to(last).respond().mock() as server:
            asking = asyncio.ensure_future(server.infer(x=X))
            # Before the champion's answer, while the graph goes on after it, and while the copy runs.
            await manual_clock.advance({"before": 0.5, "during": 1.5, "after": 2.5}[when])
            asking.cancel()
            await manual_clock.settle()
            await manual_clock.advance(0.9)
            await manual_clock.advance(3)
            expected = {"before": [], "during": ["begun", "ended"], "after": ["begun", "ended"]}
            assert expected[when] == ran
            assert 0 == server.in_flight

    run(check())


def test_a_request_that_the_champion_fails_is_not_copied(run, manual_clock):
    def fails(value):
        raise LimitExceeded("busy")

    async def check():
        async with a_graph(same, fails).mock() as server:
            with pytest.raises(LimitExceeded):
                await server.infer(x=X)
            await manual_clock.settle()
            assert {} == seen(server)
            assert {"old": 1, "new": 0} == server.router("test").report()["failures"]

    run(check())


def test_an_answer_that_comes_too_late_is_the_champions_failure_and_a_caller_who_leaves_is_none(run, manual_clock):
    async def slow(value):
        await asyncio.sleep(10)

    async def check():
        async with a_graph(same, slow).mock() as server:
            failures = lambda: server.router("test").report()["failures"]["old"]  # noqa: E731
            asking = asyncio.ensure_future(server.infer(x=X, timeout_s=1))
            await manual_clock.advance(2)
            assert isinstance(asking.exception(), DeadlineExceeded)
            assert 1 == failures()
            asking = asyncio.ensure_future(server.infer(x=X, timeout_s=1))
            await manual_clock.settle()
            asking.cancel()
            await asyncio.wait([asking])
            assert 1 == failures()

    run(check())


def test_copies_end_with_the_server_and_do_not_hold_it_up(run, manual_clock):
    ended = []

    async def hangs(value):
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(1)

    async def check():
        for challenger in (hangs, steps.Python(hangs, batch=True)):
            ended.clear()
            async with a_graph(challenger, shadow={"concurrency": 2, "timeout_ms": 1e9}).mock() as server:
                router = server.router("test")
                for _ in range(5):
                    await server.infer(x=X)
                await manual_clock.settle()
                before = manual_clock.time()
            assert before == manual_clock.time()
            assert ended
            found = router.report()["challengers"]["new"]
            assert {"stopped": 5} == found["dropped"]
            assert {"running": 0, "waiting": 0, "bytes": 0} == found["now"]

    run(check())


def test_a_batch_of_copies_that_hangs_in_a_thread_does_not_hold_up_the_end(run, manual_clock):
    go_on, begun = threading.Event(), threading.Event()

    def hangs(value):
        begun.set()
        go_on.wait()
        return {"y": value["x"]}

    async def check():
        server = a_graph(steps.Python(hangs, run="thread", batch=True), shadow={"timeout_ms": 1e9}).mock()
        mock = await server.__aenter__()
        await mock.infer(x=X)
        await manual_clock.settle()
        await asyncio.to_thread(begun.wait)
        stopping = asyncio.ensure_future(server.__aexit__(None, None, None))
        try:
            await manual_clock.advance(1.1)
            while not stopping.done():  # its threads are told to end in a thread
                await asyncio.to_thread(lambda: None)
            await stopping
        finally:
            go_on.set()
        while mock.router("test").report()["challengers"]["new"]["now"]["running"]:
            await asyncio.to_thread(lambda: None)

    run(check())


def test_a_copy_that_ignores_its_cancellation_is_left_after_a_second(run, manual_clock, caplog):
    release = asyncio.Event()

    async def stubborn(value):
        while not release.is_set():
            try:
                await release.wait()
            except asyncio.CancelledError:
                continue
        return value

    async def check():
        server = a_graph(stubborn).mock()
        mock = await server.__aenter__()
        await mock.infer(x=X)
        await manual_clock.settle()
        stopping = asyncio.ensure_future(server.__aexit__(None, None, None))
        await manual_clock.advance(1.1)
        await stopping
        assert "1 copies of requests go on although they were cancelled" in caplog.text
        release.set()

    run(check())


# ---- who is copied


def test_the_rate_says_how_many_requests_are_copied(run, manual_clock):
    async def check():
        async with a_graph(rate=0.25, shadow={"max_pending": 10_000}).mock() as server:
            for _ in range(1000):
                await server.infer(x=X)
            await manual_clock.settle()
            assert abs(report(server)["sampled"] - 250) < 5 * sqrt(1000 * 0.25 * 0.75)

    run(check())


def test_with_a_key_a_caller_is_copied_always_or_never_and_a_higher_rate_only_adds_callers(run, manual_clock):
    copied = Counter()

    def notes(value, context: Context):
        copied[context.headers["x-user"]] += 1
        return {"y": value["x"]}

    async def ask(server):
        copied.clear()
        for user in [f"u{number}" for number in range(100)] * 2:
            await server.infer(x=X, headers={"x-user": user})
            await manual_clock.settle()
        assert set(copied.values()) == {2}
        return set(copied)

    async def check():
        async with a_graph(notes, rate=0.3, key="header:X-User").mock() as server:
            few = await ask(server)
            await server.adjust("test", {"rate": {"new": 0.6}})
            many = await ask(server)
            assert few < many
            assert 15 < len(few) < 45 < len(many) < 75

    run(check())


def test_several_challengers_have_rates_of_their_own(run, manual_clock):
    graph = Graph("g", {"x": ("FP32", [-1])})
    branches = {"old": same, "new": same, "other": same}
    graph.to(routers.Champion(branches, "old", rate={"new": 1.0, "other": 0.0}), "test").respond()

    async def check():
        async with graph.mock() as server:
            await server.infer(x=X)
            await manual_clock.settle()
            assert (1, 0) == (report(server)["sampled"], report(server, "other")["sampled"])

    run(check())


# ---- promotion


def test_promotion_swaps_the_two_between_two_requests_and_stands_in_the_audit_log(run, manual_clock):
    def negative(value):
        return {"y": -value["x"]}

    async def check():
        async with a_graph(negative, rate=0.5).mock() as server:
            assert {"champion": "old", "rate": {"new": 0.5}, "resets": 0} == server.router("test").settings()
            settings = await server.adjust("test", {"champion": "new"}, "ann", "it is better")
            assert {"champion": "new", "rate": {"old": 0.5}, "resets": 0} == settings
            reply = await server.infer(x=X)
            assert ([-1.0, -2.0], "new") == (reply.outputs["y"].tolist(), reply.parameters["test.variant"])
            (change,) = server.serving.control.audit.last("g", "test")
            assert ("ann", "it is better", "old", "new") == (
                change.who, change.why, change.before["champion"], change.after["champion"],
            )  # fmt: skip

    run(check())


def test_promotion_under_load_fails_nobody_and_each_answer_is_of_one_of_the_two(run, manual_clock):
    signs = {"old": 1.0, "new": -1.0}

    def branch(name):
        async def answer(value):
            await asyncio.sleep(0.01)
            return {"y": value["x"] * signs[name]}

        return answer

    async def check():
        async with a_graph(branch("new"), branch("old")).mock() as server:
            asked = []
            for number in range(200):
                asked.append(asyncio.ensure_future(server.infer(x=X)))
                if number % 10 == 0:
                    await server.adjust("test", {"champion": ("new", "old")[number // 10 % 2]})
                await manual_clock.advance(0.001)
            await manual_clock.advance(1)
            for reply in await asyncio.gather(*asked):
                assert signs[reply.parameters["test.variant"]] == reply.outputs["y"][0]
            decisions = server.router("test").report()["decisions"]
            assert 200 == sum(decisions.values())
            assert all(decisions.values())

    run(check())


def test_counts_belong_to_who_was_compared_with_whom(run, manual_clock):
    async def check():
        async with a_graph().mock() as server:
            await server.infer(x=X)
            await counted(server, manual_clock, 1)
            await server.adjust("test", {"champion": "new"})
            assert 0 == report(server, "old")["sampled"]
            await server.adjust("test", {"champion": "old"})
            assert 1 == report(server)["sampled"]

    run(check())


def test_settings_and_counts_survive_a_restart(run, manual_clock, tmp_path):
    def flips(value):
        return {"y": -value["x"]}

    async def check():
        graph = a_graph(flips, state=str(tmp_path / "state.json"))
        async with graph.mock() as server:
            for _ in range(5):
                await server.infer(x=X)
            await counted(server, manual_clock, 5)
            await server.adjust("test", {"rate": 0.5})
            before = report(server)
        async with graph.mock() as server:
            assert {"champion": "old", "rate": {"new": 0.5}, "resets": 0} == server.router("test").settings()
            after = report(server)
            for name in ("sampled", "agreement", "disagreements", "rows", "dropped", "errors"):
                assert before[name] == after[name]
            for name, kept in (("champion", "p50"), ("challenger", "p99")):
                assert pytest.approx(before["latency_ms"][name][kept], rel=0.02) == after["latency_ms"][name][kept]
            assert before["differences"]["y"]["count"] == after["differences"]["y"]["count"]
            assert [] == after["examples"]  # contents of requests are not written to a file
            await server.adjust("test", {"champion": "new"})
        async with graph.mock() as server:
            assert {"champion": "new", "rate": {"old": 0.5}, "resets": 0} == server.router("test").settings()

    run(check())


def test_one_more_reset_forgets_all_counts(run, manual_clock):
    async def check():
        async with a_graph().mock() as server:
            await server.infer(x=X)
            await counted(server, manual_clock, 1)
            await server.adjust("test", {"resets": 1}, why="another model in its place")
            assert 0 == report(server)["sampled"]
            with pytest.raises(InvalidRequest, match="forgotten, 1 times"):
                await server.adjust("test", {"resets": 0})
            await server.infer(x=X)
            await counted(server, manual_clock, 1)

    run(check())


def test_workers_that_share_a_state_have_one_champion_and_count_together(run, manual_clock, redis_url):
    async def exchanged():
        for _ in range(2):
            await manual_clock.advance(1)
            while running := [t for t in asyncio.all_tasks() if t.get_coro().__qualname__ in in_threads]:
                await asyncio.wait(running)
                await manual_clock.settle()

    in_threads = ("Sharing._round", "RouterSeat._save")

    def flips(value):
        return {"y": -value["x"]}

    async def check():
        graph = a_graph(flips, name=f"g{uuid4().hex[:8]}", state=redis_url)
        async with graph.mock() as one, graph.mock() as other:
            for server, number in ((one, 3), (other, 5)):
                for _ in range(number):
                    await server.infer(x=X)
                await counted(server, manual_clock, number)
            await exchanged()
            assert 8 == report(one)["agreement"]["of"] == report(other)["agreement"]["of"]
            assert report(one)["differences"]["y"]["count"] == 8 == report(other)["latency_ms"]["champion"]["count"]
            await one.adjust("test", {"champion": "new", "rate": 0.5})
            await exchanged()
            assert {"champion": "new", "rate": {"old": 0.5}, "resets": 0} == other.router("test").settings()
            assert "new" == (await other.infer(x=X)).parameters["test.variant"]
        async with graph.mock() as later:
            assert "new" == later.router("test").settings()["champion"]
            await later.adjust("test", {"champion": "old"})
            assert 8 == report(later)["agreement"]["of"]

    run(check())


def test_saved_counts_that_are_none_are_refused():
    with a_graph().mock() as server, pytest.raises(InvalidRequest, match="is not what a champion router saves"):
        server.router("test").recall({"learned": {"no list": 1}})


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"champion": "nwe"}, "'nwe', which is no branch; did you mean 'new'"),
        ({"rate": {"old": 0.5}}, "'old', which is the champion"),
        ({"rate": {"new": 1.5}}, "a number from 0 to 1, got 1.5"),
        ({"rate": True}, "a number from 0 to 1, got True"),
        ({"rate": {"x": 1}}, "'x', which is no branch"),
        ({"champion": "new", "rate": {"new": 1.0}}, "'new', which is the champion"),
    ],
)
def test_settings_that_cannot_be_are_refused_and_change_nothing(changes, text):
    with a_graph().mock() as server:
        with pytest.raises(InvalidRequest, match=text):
            server.adjust("test", changes)
        assert {"champion": "old", "rate": {"new": 1.0}, "resets": 0} == server.router("test").settings()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"rate": {"old": 1.0, "new": 1.0}}, "'old', which is the champion"),
        ({"rate": {}}, "none for new"),
        ({"rate": 2.0}, "a number from 0 to 1"),
        ({"key": "cookie"}, "no place of a key"),
        ({"compare": {"call": "nowhere:function"}}, "no module 'nowhere'"),
        ({"compare": {"call": same, "rtol": 1.0}}, "'compare.rtol' says nothing to a function of your own"),
    ],
)
def test_definitions_that_cannot_work_are_refused(options, text):
    with pytest.raises(GraphInvalid, match=text):
        a_graph(**options).compile()


def test_a_champion_needs_a_challenger_and_has_to_be_a_branch():
    graph = Graph("g", {"x": ("FP32", [-1])}).to(routers.Champion({"old": same}, "odl"), "test").respond()
    with pytest.raises(GraphInvalid, match=r"(?s)at least two branches.*'odl', which is no branch; did you mean 'old'"):
        graph.compile()


def test_generators_and_steps_with_state_are_refused_as_branches():
    def items(value):
        yield value

    def keeps(value, state):
        return {"y": value["x"]}

    with pytest.raises(GraphInvalid, match="is a generator, and a router takes one value of each branch"):
        a_graph(items).compile()
    graph = Graph("g", {"x": ("FP32", [1])}, sequences={})
    graph.to(routers.Champion({"old": same, "new": keeps}, "old"), "test").respond()
    with pytest.raises(GraphInvalid, match="'test.new' keeps state for a sequence, which has gone on by then"):
        graph.compile()


# ---- inside and around other things


def test_documents_are_compared_as_well(run, manual_clock):
    def old(document):
        return {"label": document["text"].upper(), "score": 0.5}

    def new(document):
        return {"label": document["text"].upper(), "score": 0.5001}

    async def check():
        graph = a_graph(new, old, inputs="body", compare={"rtol": 0.01})
        async with graph.mock() as server:
            assert {"label": "HI", "score": 0.5} == await server.invoke({"text": "hi"})
            await counted(server, manual_clock, 1)
            assert 1 == report(server)["agreement"]["agreed"]
            assert 0 == report(server)["now"]["bytes"]

    run(check())


def test_behind_a_generator_each_item_is_copied_when_it_was_given(run, manual_clock):
    def items(value):
        for number in range(3):
            yield {"x": value["x"] + number}

    async def check():
        champion = routers.Champion({"old": same, "new": same}, "old", shadow={"max_loop_share": 1.0})
        graph = Graph("g", {"x": ("FP32", [-1])}).to(items).to(champion, "test").respond()
        async with graph.mock() as server:
            given = [reply.outputs["y"].tolist() async for reply in server.stream(x=X)]
            assert [[1.0, 2.0], [2.0, 3.0], [3.0, 4.0]] == given
            await counted(server, manual_clock, 3)
            assert 3 == report(server)["agreement"]["agreed"]

    run(check())


def test_a_challenger_may_be_any_router_and_a_champion_may_be_inside_one(run, manual_clock):
    async def check():
        options = {"shadow": {"max_loop_share": 1.0}}
        inner = routers.Champion({"a": same, "b": same}, "a", **options)
        fallback = routers.Fallback({"first": same, "second": same})
        outer = routers.Champion({"old": routers.Chain({"one": same, "two": lambda value: {"x": value["y"]}, "in": inner}),
                                  "new": fallback, "deep": inner}, "old", **options)  # fmt: skip
        graph = Graph("g", {"x": ("FP32", [-1])}).to(outer, "test").respond()
        async with graph.mock() as server:
            reply = await server.infer(x=X)
            assert {"test.variant": "old", "test.old.in.variant": "a"} == reply.parameters
            await counted(server, manual_clock, 1, "new")
            await counted(server, manual_clock, 1, "deep")
            await manual_clock.settle()
            assert 1 == report(server, "new")["agreement"]["agreed"] == report(server, "deep")["agreement"]["agreed"]
            for name in ("test.old.in", "test.deep"):  # a challenger that is itself a champion has copies of copies
                assert 1 == server.router(name).report()["challengers"]["b"]["agreement"]["agreed"]

    run(check())


@pytest.mark.parametrize("kind", ["bandit", "ab", "canary"])
def test_a_reward_is_for_the_answer_that_was_seen_and_not_for_a_challengers(run, manual_clock, kind):
    liked = {"watch": "metric", "metric": "reward", "better": "higher", "margin": 0.1}
    challenger = {
        "bandit": lambda: routers.Bandit({"a": same, "b": same}, "ucb1"),
        "ab": lambda: routers.Ab({"a": same, "b": same}, {"a": 1, "b": 1}),
        "canary": lambda: routers.Canary({"a": same, "b": same}, "a", "b", ["50%"], guardrails={"liked": liked}),
    }[kind]()

    async def check():
        async with a_graph(challenger, routers.Bandit({"a": same}, "ucb1")).mock() as server:
            await server.infer(x=X, id="r")
            await counted(server, manual_clock, 1)
            receipts = await server.feedback("r", reward=1.0)
            assert "taken" == receipts.pop("test.old")
            assert set(receipts.values()) <= {"unknown"}
            if kind != "canary":
                rewards = server.router("test.new").report().get("rewards", {})
                assert not any(found.get("count") for found in rewards.values())

    run(check())


def test_a_truth_is_for_every_answer(run, manual_clock):
    def wrong(value):
        return {"y": value["x"] + 1}

    async def check():
        challenger = routers.Bandit({"a": same}, "ucb1", scorer="accuracy", missing_reward=0.5, window={"age_s": 60})
        async with a_graph(challenger, routers.Bandit({"a": wrong}, "ucb1", scorer="accuracy")).mock() as server:
            await server.infer(x=X, id="r")
            await server.infer(x=X, id="s")
            await counted(server, manual_clock, 2)
            assert {"test.old": "taken", "test.new": "taken"} == await server.feedback("r", truth=X)
            await manual_clock.advance(61)
            await server.infer(x=X, id="t")
            await counted(server, manual_clock, 3)
            means = {name: server.router(name).report()["rewards"]["a"] for name in ("test.old", "test.new")}
            assert {"test.old": (1, 0.0), "test.new": (1, 1.0)} == {n: (r["count"], r["mean"]) for n, r in means.items()}

    run(check())


def test_each_item_of_a_map_is_copied(run, manual_clock):
    async def check():
        options = {"shadow": {"max_loop_share": 1.0}}
        each = routers.Champion({"old": same, "new": same}, "old", **options)
        graph = Graph("g", {"x": ("FP32", [-1])}).to(routers.Map(each), "test").respond()
        async with graph.mock() as server:
            await server.infer(x=X)
            await manual_clock.settle()
            assert 2 == server.router("test.each").report()["challengers"]["new"]["agreement"]["of"]

    run(check())


def test_a_reload_leaves_no_copy_behind_and_is_not_held_up(run, manual_clock):
    from servinggraph.lifecycle import Control
    from servinggraph.lifecycle.catalog import Catalog
    from servinggraph.lifecycle.inference import infer
    from servinggraph.messages import InferenceRequest

    async def check():
        graph = a_graph(FakeModel({"y": X}, delay_s=3600), shadow={"timeout_ms": 1e8})
        control = Control()
        catalog = Catalog(control)
        await catalog.load([graph.compile()])
        old = catalog.get("g")
        await infer(old, InferenceRequest({"x": X}), Context())
        await manual_clock.settle()
        assert 1 == old.seats["test"].router.report()["challengers"]["new"]["now"]["running"]
        new = catalog.made(graph.compile())
        await new.executor.start()
        catalog.swap([new], [old])
        await old.drained()  # a copy is no request
        await old.stop()
        assert {"stopped": 1} == old.seats["test"].router.report()["challengers"]["new"]["dropped"]
        await infer(catalog.get("g"), InferenceRequest({"x": X}), Context())
        await catalog.stop()

    run(check())
