"""Canary: the schedule on a manual clock, guardrails, what counts as a failure, settings by hand, restarts."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress

import numpy as np
import pytest

from servinggraph import Context, Graph, InvalidRequest, routers, steps
from servinggraph.errors import DeadlineExceeded, GraphInvalid, RequestNotFound, ServingGraphError, StepFailed, Unavailable
from servinggraph.testing import ManualClock

X = np.array([1.0], np.float32)
FAILURES = {"failures": {"watch": "error_rate", "margin": "1%"}}


def stable(value):
    return {"y": value["x"]}


def new(value):
    return {"y": -value["x"]}


def broken(value):
    raise ValueError("no such file")


def a_graph(challenger=new, baseline=stable, steps=("10%", "50%", "100%"), **options):
    given = {"hold": "10m", "min_samples": 20, "guardrails": FAILURES, **options}
    branches = {"stable": baseline, "new": challenger}
    return Graph("g", {"x": ("FP32", [-1])}).to(routers.Canary(branches, "stable", "new", steps, **given), "test").respond()


async def ask(server, count, **how):
    """Send requests one after the other; return how many failed."""
    failed = 0
    for _ in range(count):
        try:
            await server.infer(x=X, **how)
        except ServingGraphError:
            failed += 1
    return failed


def test_a_good_challenger_goes_through_all_steps_and_each_change_is_in_the_audit_log(run, manual_clock):
    async def check():
        async with a_graph().mock() as server:
            router = server.router("test")
            for stage, after in (("10%", "50%"), ("50%", "100%")):
                assert stage == router.settings()["stage"]
                await ask(server, 300)
                await manual_clock.advance(599)
                assert stage == router.settings()["stage"]
                assert "its hold: 599 of 600 s" == router.report()["waits_for"]
                await manual_clock.advance(1)
                assert after == router.settings()["stage"]
            assert {"stable": 0.0, "new": 1.0} == router.settings()["weights"]
            assert "promoted" == router.report()["status"]
            assert 0 == await ask(server, 20)
            last, first = server.serving.control.audit.last()
            assert ("canary", "test", {"stage": "10%", "weights": {"stable": 0.9, "new": 0.1}}) == (
                first.who,
                first.node,
                first.before,
            )
            assert {"stage": "100%", "weights": {"stable": 0.0, "new": 1.0}} == last.after
            assert "held 600 s: 'failures' is fine (error_rate 0.00% of" in last.why

    run(check())


def test_a_broken_challenger_is_rolled_back_after_a_few_requests_and_the_log_has_the_numbers(run):
    async def check():
        async with a_graph(broken).mock() as server:
            failed = await ask(server, 1000)
            router = server.router("test")
            report = router.report()
            assert 1 <= failed <= 12
            assert {"stable": 1.0, "new": 0.0} == router.settings()["weights"]
            assert ("rolled_back", "rolled_back") == (report["stage"], report["status"])
            assert "hurt" == report["guardrails"]["failures"]["verdict"]
            assert {"new": 1.0, "stable": 0.0} == report["guardrails"]["failures"]["error_rate"]
            (change,) = server.serving.control.audit.last()
            assert "guardrail 'failures': error_rate 100.00% of" in change.why
            assert "allowed +1%; evidence" in change.why
            assert change.why == report["history"][-1]["why"]

    run(check())


def test_a_baseline_that_fails_as_often_is_no_reason_to_roll_back(run):
    async def check():
        async with a_graph(broken, broken).mock() as server:
            assert 500 == await ask(server, 500)
            assert "10%" == server.router("test").settings()["stage"]

    run(check())


@pytest.mark.parametrize("options", [{}, {"guardrails": {}}])
def test_without_enough_samples_a_step_does_not_end(run, manual_clock, options):
    async def check():
        async with a_graph(**options).mock() as server:
            router = server.router("test")
            await ask(server, 20)
            await manual_clock.advance(3000)
            report = router.report()
            assert ("10%", "rolling") == (report["stage"], report["status"])
            assert "of 20" in report["waits_for"]
            await ask(server, 500)
            await manual_clock.advance(1)
            assert "50%" == router.settings()["stage"]

    run(check())


def test_a_guardrail_that_looks_bad_but_is_not_sure_keeps_the_step(run, manual_clock):
    calls = []

    def shaky(value):
        calls.append(1)
        if len(calls) % 25 == 0:
            raise ValueError("now and then")
        return stable(value)

    async def check():
        async with a_graph(shaky).mock() as server:
            await ask(server, 700)
            await manual_clock.advance(700)
            report = server.router("test").report()
            assert "10%" == report["stage"]
            assert "undecided" == report["guardrails"]["failures"]["verdict"]
            assert "guardrail 'failures' is undecided: error_rate" in report["waits_for"]

    run(check())


def test_callers_mistakes_and_callers_who_leave_are_not_the_challengers_failures(run):
    release = asyncio.Event()

    async def picky(value):
        if value["x"][0] < 0:
            raise InvalidRequest("x must not be negative")
        if value["x"][0] > 5:
            await release.wait()
        return stable(value)

    async def check():
        async with a_graph(picky).mock() as server:
            for _ in range(200):
                with suppress(InvalidRequest):
                    await server.infer(x=np.array([-1.0], np.float32))
            leaving = [asyncio.ensure_future(server.infer(x=np.array([9.0], np.float32))) for _ in range(200)]
            await asyncio.sleep(0)
            for task in leaving:
                task.cancel()
            await asyncio.gather(*leaving, return_exceptions=True)
            report = server.router("test").report()
            assert "10%" == report["stage"]
            assert 0 == report["guardrails"]["failures"]["samples"]["new"]
            assert 0 < report["decisions"]["new"]

    run(check())


def test_a_challenger_that_hangs_until_the_deadline_is_at_fault(run, manual_clock):
    async def hangs(value):
        await asyncio.Event().wait()

    async def check():
        async with a_graph(hangs).mock() as server:
            waiting = [asyncio.ensure_future(server.infer(x=X, timeout_s=2.0)) for _ in range(200)]
            await manual_clock.advance(3)
            outcomes = await asyncio.gather(*waiting, return_exceptions=True)
            assert any(isinstance(outcome, DeadlineExceeded) for outcome in outcomes)
            assert "rolled_back" == server.router("test").settings()["stage"]

    run(check())


def test_a_slow_challenger_is_rolled_back_by_the_latency_guardrail(run, manual_clock):
    async def quick(value):
        await asyncio.sleep(0.010)
        return stable(value)

    async def slow(value):
        await asyncio.sleep(0.030)
        return stable(value)

    async def check():
        guardrails = {"slow": {"watch": "latency", "quantile": "p90", "ratio": 1.5}}
        async with a_graph(slow, quick, guardrails=guardrails).mock() as server:
            for _ in range(30):
                waiting = [asyncio.ensure_future(server.infer(x=X)) for _ in range(20)]
                await manual_clock.advance(0.05)
                await asyncio.gather(*waiting)
            await manual_clock.advance(1)
            report = server.router("test").report()
            assert "rolled_back" == report["stage"]
            seen = report["guardrails"]["slow"]["latency_p90_ms"]
            assert {"new": pytest.approx(30, rel=0.05), "stable": pytest.approx(10, rel=0.05)} == seen
            assert "allowed x1.5" in report["history"][-1]["why"]

    run(check())


def test_durations_are_those_of_a_tests_clock_whatever_time_it_shows():
    clock = ManualClock(start=time.monotonic())  # as near to the machine's own as it can be

    async def slow(value):
        await asyncio.sleep(600)
        return stable(value)

    async def check():
        guardrails = {"slow": {"watch": "latency", "limit_ms": 1e6}}
        async with a_graph(slow, slow, guardrails=guardrails, hold="1d").mock() as server:  # no step ends, and samples stay
            waiting = [asyncio.ensure_future(server.infer(x=X)) for _ in range(300)]
            await clock.advance(601)
            await asyncio.gather(*waiting)
            await clock.advance(1)
            seen = server.router("test").report()["guardrails"]["slow"]["latency_p99_ms"]
            assert pytest.approx(600_000, rel=0.05) == seen["stable"]

    clock.run(check())


@pytest.mark.parametrize(
    ("guardrail", "stage"),
    [
        ({"watch": "latency", "quantile": "p90", "margin_ms": 30}, "10%"),
        ({"watch": "latency", "quantile": "p90", "margin_ms": 5}, "rolled_back"),
        ({"watch": "latency", "quantile": "p90", "limit_ms": 40}, "10%"),
        ({"watch": "latency", "quantile": "p90", "limit_ms": 20}, "rolled_back"),
    ],
)
def test_latency_has_a_margin_or_a_limit_too(run, manual_clock, guardrail, stage):
    async def quick(value):
        await asyncio.sleep(0.010)
        return stable(value)

    async def slower(value):
        await asyncio.sleep(0.030)
        return stable(value)

    async def check():
        async with a_graph(slower, quick, guardrails={"slow": guardrail}).mock() as server:
            for _ in range(30):
                waiting = [asyncio.ensure_future(server.infer(x=X)) for _ in range(20)]
                await manual_clock.advance(0.05)
                await asyncio.gather(*waiting)
            await manual_clock.advance(1)
            assert stage == server.router("test").settings()["stage"]

    run(check())


@pytest.mark.parametrize(
    ("better", "score", "stage"), [("higher", 0.2, "rolled_back"), ("lower", 0.2, "10%"), ("lower", 1.0, "rolled_back")]
)
def test_a_metric_that_steps_observe_is_a_guardrail(run, better, score, stage):
    def observing(value, context: Context):
        context.observe("confidence", score)
        context.observe("something_else", 1.0)
        return stable(value)

    def usual(value, context: Context):
        context.observe("confidence", 0.8)
        return stable(value)

    async def check():
        guardrails = {"sure": {"watch": "metric", "metric": "confidence", "better": better, "margin": 0.05}}
        async with a_graph(observing, usual, guardrails=guardrails).mock() as server:
            await ask(server, 1000)
            report = server.router("test").report()
            assert stage == report["stage"]
            assert {"new": pytest.approx(score), "stable": pytest.approx(0.8)} == report["guardrails"]["sure"]["confidence"]

    run(check())


def test_a_metric_that_comes_as_feedback_is_counted_once_and_for_the_branch_that_answered(run):
    async def check():
        guardrails = {"bought": {"watch": "metric", "metric": "bought", "margin": 0.05}}
        async with a_graph(guardrails=guardrails, min_samples=10).mock() as server:
            router = server.router("test")
            await server.infer(x=X, id="first")
            assert [True, False] == [router.knows(request) for request in ("first", "never")]
            assert {"test": "taken"} == await server.feedback("first", metric="bought", reward=1.0)
            assert {"test": "duplicate"} == await server.feedback("first", metric="bought", reward=1.0)
            with pytest.raises(RequestNotFound):
                await server.feedback("never", metric="bought", reward=1.0)
            assert {"duplicates": 1, "unknown": 1} == router.report()["feedback"]
            for said in (
                {"id": "first", "metric": "liked", "reward": 1.0},
                {"variant": "new", "metric": "bought", "reward": 1.0},
            ):
                with pytest.raises(InvalidRequest):
                    await server.feedback(**said)
            for number in range(600):
                reply = await server.infer(x=X, id=f"r{number}")
                bought = 0.0 if reply.parameters["test.variant"] == "new" else 1.0
                await server.feedback(f"r{number}", metric="bought", reward=bought)
            report = router.report()
            assert "rolled_back" == report["stage"]
            assert {"new": pytest.approx(0, abs=0.2), "stable": 1.0} == report["guardrails"]["bought"]["bought"]

    run(check())


def test_a_metric_may_be_observed_in_a_thread(run):
    def observing(value, context: Context):
        context.observe("confidence", 0.2)
        return stable(value)

    async def check():
        guardrails = {"sure": {"watch": "metric", "metric": "confidence", "margin": 0.05}}
        step = steps.Python(observing, run="thread")
        async with a_graph(step, step, guardrails=guardrails).mock() as server:
            await asyncio.gather(*(server.infer(x=X) for _ in range(200)))
            seen = server.router("test").report()["guardrails"]["sure"]["samples"]
            assert 200 == seen["new"] + seen["stable"]

    run(check())


class Noting:
    """A meter that keeps what it gets."""

    def __init__(self):
        self.noted = []

    def count(self, name, amount):
        self.noted.append(("count", name, amount))

    def observe(self, name, value):
        self.noted.append(("observe", name, value))


def test_what_steps_count_and_observe_goes_on_to_the_meter_around(run):
    noting = Noting()

    def observing(value, context: Context):
        context.observe("confidence", 0.5)
        context.count("words", 3)
        return stable(value)

    async def check():
        guardrails = {"sure": {"watch": "metric", "metric": "confidence", "margin": 0.05}}
        async with a_graph(observing, observing, guardrails=guardrails).mock() as server:
            context = Context()
            context.meter = noting
            branch, inner, begun = server.router("test").begin({"x": X}, context)
            observing({"x": X}, inner)
            server.router("test").end(begun, None)
            assert branch in ("new", "stable")

    run(check())
    assert [("observe", "confidence", 0.5), ("count", "words", 3)] == noting.noted


@pytest.mark.parametrize(
    ("guardrail", "allowed", "stage"),
    [
        ({"watch": "error_rate", "margin": "60%"}, "+60%", "rolled_back"),
        ({"watch": "error_rate", "ratio": 3}, "x3", "rolled_back"),
        ({"watch": "error_rate", "limit": "20%"}, "20%", "rolled_back"),
        ({"watch": "error_rate", "limit": "100%"}, "100%", "10%"),
        ({"watch": "metric", "metric": "confidence", "limit": 0.5}, "at least 0.5", "rolled_back"),
        ({"watch": "metric", "metric": "confidence", "limit": 0.1}, "at least 0.1", "10%"),
        ({"watch": "metric", "metric": "confidence", "better": "lower", "limit": 0.1}, "at most 0.1", "rolled_back"),
        ({"watch": "metric", "metric": "confidence", "better": "lower", "margin": 0.1}, "+0.1", "10%"),
    ],
)
def test_each_bound_is_kept_and_said(run, guardrail, allowed, stage):
    def bad(value, context: Context):
        context.observe("confidence", 0.2)
        raise ValueError("no")

    def usual(value, context: Context):
        context.observe("confidence", 0.9)
        return stable(value)

    async def check():
        async with a_graph(bad, usual, guardrails={"it": guardrail}).mock() as server:
            await ask(server, 500)
            report = server.router("test").report()
            assert stage == report["stage"]
            assert allowed == report["guardrails"]["it"]["allowed"]
            assert f"allowed {allowed}" in str(report["history"]) or stage == "10%"

    run(check())


def test_values_that_are_no_numbers_or_out_of_range_are_counted_and_do_no_harm(run):
    values = [float("nan"), 7.0, 0.5]

    def observing(value, context: Context):
        for observed in values:
            context.observe("confidence", observed)
        return stable(value)

    async def check():
        guardrails = {"sure": {"watch": "metric", "metric": "confidence", "margin": 0.05}}
        async with a_graph(observing, observing, guardrails=guardrails).mock() as server:
            await ask(server, 100)
            sure = server.router("test").report()["guardrails"]["sure"]
            assert (100, 100) == (sure["unusable"], sure["outside_range"])
            assert {"new": 0.75, "stable": 0.75} == sure["confidence"]

    run(check())


def test_a_key_stays_with_the_challenger_once_it_has_it(run, manual_clock):
    async def check():
        async with a_graph(key="header:x-user", guardrails={}, min_samples=1).mock() as server:
            users = [f"user-{number}" for number in range(200)]

            async def with_new():
                replies = [await server.infer(x=X, headers={"x-user": user}) for user in users]
                return {u for u, r in zip(users, replies, strict=True) if r.parameters["test.variant"] == "new"}

            before = await with_new()
            assert before == await with_new()
            await manual_clock.advance(600)
            after = await with_new()
            assert "50%" == server.router("test").settings()["stage"]
            assert before < after

    run(check())


def test_by_hand_it_is_paused_promoted_rolled_back_and_weighted(run, manual_clock):
    async def check():
        async with a_graph(guardrails={}, min_samples=1).mock() as server:
            router = server.router("test")
            await ask(server, 100)
            await server.adjust("test", {"paused": True})
            await manual_clock.advance(3000)
            assert ("10%", "paused") == (router.settings()["stage"], router.report()["status"])
            await server.adjust("test", {"paused": False})
            await manual_clock.advance(599)
            assert "10%" == router.settings()["stage"]
            await server.adjust("test", {"promote": True}, "ann", "looks fine")
            assert "50%" == router.settings()["stage"]
            settings = await server.adjust("test", {"weights": {"stable": 3, "new": 1}})
            assert ({"stable": 0.75, "new": 0.25}, True) == (settings["weights"], settings["paused"])
            assert {"stable": 0.5, "new": 0.5} == (await server.adjust("test", {"paused": False}))["weights"]
            await server.adjust("test", {"rollback": True})
            assert {"stable": 1.0, "new": 0.0} == router.settings()["weights"]
            await manual_clock.advance(3000)
            assert "rolled_back" == router.settings()["stage"]
            settings = await server.adjust("test", {"stage": "100%"})
            assert {"stable": 0.0, "new": 1.0} == settings["weights"]
            assert ["", "10%", "50%", "rolled_back"] == [entry["from"] for entry in router.report()["history"]]
            changes = server.serving.control.audit.last()
            assert ("ann", "looks fine") in [(change.who, change.why) for change in changes]

    run(check())


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"stage": "20%"}, "one of 10%, 50%, 100% or rolled_back, got '20%'"),
        ({"paused": 1}, "'paused' is true or false"),
        ({"promote": True, "rollback": True}, "cannot both"),
        ({"promote": True, "stage": "50%"}, "cannot both"),
        ({"weights": {"other": 1}}, "no branch"),
        ({"weights": {"stable": 1, "new": 1}, "rollback": True}, "rolled back"),
        ({"weights": 3}, "mapping"),
        ({"weights": {"stable": 1}, "paused": False}, "pause the schedule"),
        ({"hold": "1s"}, "no setting 'hold'"),
    ],
)
def test_what_cannot_be_set_is_refused_and_changes_nothing(changes, text):
    with a_graph().mock() as server:
        before = server.router("test").settings()
        with pytest.raises(InvalidRequest, match=text):
            server.adjust("test", changes)
        assert before == server.router("test").settings()


def test_promote_needs_a_step_to_go_to():
    with a_graph().mock() as server:
        server.adjust("test", {"stage": "100%"})
        with pytest.raises(InvalidRequest, match="last step"):
            server.adjust("test", {"promote": True})
        server.adjust("test", {"rollback": True})
        with pytest.raises(InvalidRequest, match="name the 'stage'"):
            server.adjust("test", {"promote": True})


def test_after_a_rollback_a_stage_by_hand_begins_a_trial_of_its_own(run):
    healthy = []

    def repaired(value):
        return stable(value) if healthy else broken(value)

    async def check():
        async with a_graph(repaired).mock() as server:
            await ask(server, 300)
            assert "rolled_back" == server.router("test").settings()["stage"]
            healthy.append(1)
            await server.adjust("test", {"stage": "10%"})
            assert 0 == await ask(server, 300)
            report = server.router("test").report()
            assert "10%" == report["stage"]
            assert report["guardrails"]["failures"]["evidence"] < 2

    run(check())


def test_what_comes_late_from_a_trial_that_is_over_does_not_count(run):
    release = asyncio.Event()

    async def late(value):
        await release.wait()
        raise ValueError("late")

    async def check():
        async with a_graph(late).mock() as server:
            waiting = [asyncio.ensure_future(server.infer(x=X)) for _ in range(200)]
            await asyncio.sleep(0)
            await server.adjust("test", {"promote": True})
            await server.adjust("test", {"rollback": True})
            await server.adjust("test", {"stage": "10%"})
            release.set()
            await asyncio.gather(*waiting, return_exceptions=True)
            report = server.router("test").report()
            assert "10%" == report["stage"]
            assert 0 == report["guardrails"]["failures"]["samples"]["new"]

    run(check())


def test_a_challenger_that_one_caller_never_meets_is_not_rolled_back_for_it(run):
    def slower(value):
        return stable(value)

    async def check():
        rails = {
            "failures": {"watch": "error_rate", "margin": "1%"},
            "slow": {"watch": "latency", "quantile": "p90", "ratio": 1.5},
        }
        async with a_graph(slower, guardrails=rails, key="parameter:user").mock() as server:
            seen = {}
            for user in range(20):  # whom the key keeps with the baseline
                await server.infer(x=X, parameters={"user": str(user)})
                report = server.router("test").report()
                seen[user] = report["decisions"]["stable"]
            alone = next(user for user in range(1, 20) if seen[user] > seen[user - 1])
            for _ in range(6_000):
                await server.infer(x=X, parameters={"user": str(alone)})
            report = server.router("test").report()
            assert "10%" == report["stage"], report["history"]
            assert report["decisions"]["stable"] >= 6_000

    run(check())


def test_what_comes_late_from_an_earlier_step_counts_by_the_share_it_was_decided_with(run):
    release = asyncio.Event()

    async def late(value):
        await release.wait()
        raise ValueError("late")

    async def check():
        async with a_graph(late).mock() as server:
            waiting = [asyncio.ensure_future(server.infer(x=X)) for _ in range(200)]
            await asyncio.sleep(0)
            await server.adjust("test", {"promote": True})
            release.set()
            await asyncio.gather(*waiting, return_exceptions=True)
            assert "rolled_back" == server.router("test").settings()["stage"]

    run(check())


def test_stage_hold_and_evidence_survive_a_restart(run, manual_clock, tmp_path):
    options = {"state": str(tmp_path / "rollout.json")}

    async def check():
        async with a_graph(**options).mock() as server:
            await ask(server, 300)
            await manual_clock.advance(600)
            await ask(server, 100)
            await manual_clock.advance(200)
            before = server.router("test").report()
            assert "50%" == before["stage"]
        await manual_clock.advance(100_000)  # down: this does not count
        async with a_graph(**options).mock() as server:
            after = server.router("test").report()
            assert ("50%", 200) == (after["stage"], after["held_s"])
            assert before["history"] == after["history"]
            same = [report["guardrails"]["failures"]["evidence"] for report in (before, after)]
            assert same[0] == same[1] < 1
            assert 0 == after["guardrails"]["failures"]["samples"]["new"]
        changed = {"guardrails": {"failures": {"watch": "error_rate", "margin": "5%"}}}
        async with a_graph(**options, **changed).mock() as server:
            assert 1 == server.router("test").report()["guardrails"]["failures"]["evidence"]
        with pytest.raises(StepFailed, match="its stage '50%' is none of 1%, 100%"):
            async with a_graph(**options, steps=("1%", "100%")).mock():
                pass

    run(check())


def test_what_one_worker_decides_others_follow_through_redis(run, manual_clock, redis_url):
    async def exchanged():
        for _ in range(3):
            await manual_clock.advance(1)
            while running := [t for t in asyncio.all_tasks() if t.get_coro().__qualname__ in in_threads]:
                await asyncio.wait(running)
                await manual_clock.settle()

    in_threads = ("Sharing._round", "RouterSeat._save")

    async def check():
        async with a_graph(broken, state=redis_url).mock() as one, a_graph(broken, state=redis_url).mock() as other:
            routers_of = one.router("test"), other.router("test")
            await one.adjust("test", {"promote": True})
            await exchanged()
            assert ["50%", "50%"] == [router.settings()["stage"] for router in routers_of]
            await other.adjust("test", {"weights": {"stable": 4, "new": 1}})
            await exchanged()
            assert [{"stable": 0.8, "new": 0.2}] * 2 == [router.settings()["weights"] for router in routers_of]
            assert [True, True] == [router.settings()["paused"] for router in routers_of]
            await other.adjust("test", {"paused": False})
            await exchanged()
            assert ["rolling", "rolling"] == [router.report()["status"] for router in routers_of]
            assert {"stable": 0.5, "new": 0.5} == one.router("test").settings()["weights"]
            assert 0 < await ask(one, 200)
            await exchanged()
            assert ["rolled_back", "rolled_back"] == [router.settings()["stage"] for router in routers_of]

    run(check())


def test_a_rollback_survives_a_restart(run, tmp_path):
    options = {"state": str(tmp_path / "rollout.json")}

    async def check():
        async with a_graph(broken, **options).mock() as server:
            await ask(server, 300)
        async with a_graph(broken, **options).mock() as server:
            assert 0 == await ask(server, 100)
            assert "rolled_back" == server.router("test").report()["stage"]

    run(check())


def test_a_sequence_stays_with_the_branch_that_has_its_state(run):
    class Sum:
        def __call__(self, value, context: Context):
            state = context.sequence.state("sum")
            total = state.get("total", 0) + value["x"]
            context.sequence.keep("sum", {"total": total})
            return {"y": total}

    async def check():
        graph = Graph("g", {"x": ("FP32", [-1])}, sequences={})
        branches = {"stable": steps.Python(Sum), "new": steps.Python(Sum)}
        canary = routers.Canary(branches, "stable", "new", ["50%", "90%"], guardrails=FAILURES, hold="10m")
        async with graph.to(canary, "test").respond().mock() as server:

            async def step(number, **flags):
                return (await server.infer(x=X, parameters={"sequence_id": number, **flags})).parameters["test.variant"]

            ids = range(1, 101)
            first = [await step(number, sequence_start=True) for number in ids]
            assert {"stable", "new"} == set(first)
            assert first == [await step(number) for number in ids]
            assert 200 == sum(server.router("test").report()["guardrails"]["failures"]["samples"].values())
            await server.adjust("test", {"promote": True})
            assert first == [await step(number) for number in ids]
            # They were decided with the share of the step before, and say nothing of this one.
            assert 0 == sum(server.router("test").report()["guardrails"]["failures"]["samples"].values())
            await server.adjust("test", {"rollback": True})
            for number, branch in zip(ids, first, strict=True):
                if branch == "stable":
                    assert "stable" == await step(number)
                else:
                    with pytest.raises(Unavailable, match=f"answered sequence {number}, was rolled back: begin"):
                        await step(number)
            assert {"stable"} == {await step(number, sequence_start=True) for number in ids}

    run(check())


def test_a_rollout_of_another_challenger_begins_anew(run, manual_clock, tmp_path):
    async def check():
        given = {"hold": "1s", "min_samples": 1, "state": str(tmp_path / "rollout.json")}
        for baseline, challenger in (("one", "two"), ("two", "three")):
            canary = routers.Canary({baseline: stable, challenger: stable}, baseline, challenger, ["50%", "100%"], **given)
            async with Graph("g", {"x": ("FP32", [-1])}).to(canary, "test").respond().mock() as server:
                assert "50%" == server.router("test").settings()["stage"]
                await ask(server, 20)
                await manual_clock.advance(2)
                assert "100%" == server.router("test").settings()["stage"]

    run(check())


def test_a_change_that_cannot_be_noted_is_no_failure_of_the_request_that_set_it_off(run, caplog):
    class Full:
        def now(self):
            return 0.0

        def changed(self, who, why, before, after):
            raise OSError("no space left on device")

        def keep(self):
            pass

    async def check():
        async with a_graph(broken).mock() as server:
            router = server.router("test")
            router.host = Full()
            with pytest.raises(StepFailed, match="no such file"):
                for _ in range(1000):
                    await server.infer(x=X)
            await ask(server, 300)
            assert "rolled_back" == router.settings()["stage"]
            assert 0 == await ask(server, 50)
        assert "no space left on device" in caplog.text

    run(check())


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"steps": ["50%", "10%"]}, "10% comes after 50%"),
        ({"steps": []}, "at least one share"),
        ({"steps": [1, 10]}, "a share is text such as 10%"),
        ({"hold": 600}, "a duration is a number with its unit"),
        ({"guardrails": {"a": {"watch": "error_rate"}}}, "exactly one of margin, ratio, limit, got none"),
        ({"guardrails": {"a": {"watch": "latency", "ratio": 1.5, "limit_ms": 3}}}, "exactly one of ratio, margin_ms, limit_ms"),
        ({"guardrails": {"a": {"watch": "latency", "ratio": 1.5, "quantile": 99}}}, "a quantile is p1 to p99.9"),
        ({"guardrails": {"a": {"watch": "latency", "ratio": 1.5, "quantile": "pX"}}}, "a quantile is p1 to p99.9"),
        ({"guardrails": {"a": {"watch": "metric", "margin": 1.0, "range": [1, 0]}}}, "the lower first"),
        ({"guardrails": {"a": {"watch": "metric", "limit": 2.0}}}, "outside of range"),
        ({"guardrails": {"a": {"watch": "errors"}}}, "error_rate"),
        ({"key": "cookie:x"}, "no place of a key"),
    ],
)
def test_definitions_that_cannot_work_are_refused(options, text):
    with pytest.raises(GraphInvalid, match=text):
        a_graph(**options).compile()


@pytest.mark.parametrize(
    ("baseline", "challenger", "text"),
    [("old", "new", "baseline 'old' is no branch"), ("new", "new", "the same branch"), ("stable", "new", "'third'")],
)
def test_it_has_two_branches_of_these_names(baseline, challenger, text):
    branches = {"stable": stable, "new": new, "third": new}
    with pytest.raises(GraphInvalid, match=text):
        Graph("g", {"x": ("FP32", [-1])}).to(routers.Canary(branches, baseline, challenger, ["1%"])).respond().compile()


def test_a_graph_file_has_the_same_words_and_gives_them_back(tmp_path):
    (tmp_path / "graph.yaml").write_text(
        """
graph: g
inputs: {x: {datatype: FP32, shape: [-1]}}
nodes:
  test:
    router: canary
    baseline: stable
    challenger: new
    steps: [{share: 1%, hold: 1h}, 50%]
    hold: 500ms
    guardrails:
      slow: {watch: latency, quantile: p95, ratio: 1.5}
      failures: {watch: error_rate, ratio: 2}
      score: {watch: metric, metric: score, better: lower, range: [0, 10], margin: 1}
    branches:
      stable: {step: python, call: "numpy:sin"}
      new: {step: python, call: "numpy:cos"}
answer: test
"""
    )
    graph = Graph.load(tmp_path / "graph.yaml")
    graph.save(tmp_path / "again.yaml")
    assert graph == Graph.load(tmp_path / "again.yaml")
    (node,) = graph.compile().nodes
    assert "canary (new beside stable: 1%, 50%, watching slow, failures, score)" == node.work.describe()
