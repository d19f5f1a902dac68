"""Workers that learn together through Redis: nothing is lost, nothing counts twice."""

from __future__ import annotations

import asyncio
import logging
import random
import subprocess
import sys
from uuid import uuid4

import numpy as np
import pytest
import redis

from servinggraph import Graph, routers
from servinggraph.errors import InvalidRequest, RequestNotFound, StepFailed
from servinggraph.interfaces import Feedback, Learned
from servinggraph.lifecycle import Control
from servinggraph.lifecycle.catalog import Catalog
from servinggraph.lifecycle.feedback import give_feedback
from servinggraph.state import RedisStore, StateFailed, open_store

X = np.array([1.0], np.float32)


def a(value):
    return {"y": value["x"]}


def a_graph(state, name, policy="ucb1", **options):
    branches = {"a": a, "b": a}
    return Graph(name, {"x": ("FP32", [-1])}).to(routers.Bandit(branches, policy, state=state, **options), "score").respond()


@pytest.fixture
def name():
    """Return a graph name that no other test has in the same Redis."""
    return f"g{uuid4().hex[:8]}"


def counts(server):
    return {name: rewards["count"] for name, rewards in server.router("score").report()["rewards"].items()}


async def exchanged(clock):
    """Have every worker hand out, and then take in what the others handed out."""
    for _ in range(2):
        await clock.advance(1)
        await settled(clock)


async def settled(clock):
    """Wait for what runs in threads."""
    await clock.settle()
    while running := [task for task in asyncio.all_tasks() if task.get_coro().__qualname__ in _IN_THREADS]:
        await asyncio.wait(running)
        await clock.settle()


_IN_THREADS = ("Sharing._round", "RouterSeat._save")


def test_what_one_worker_learns_all_know(run, manual_clock, redis_url, name):
    async def check():
        async with a_graph(redis_url, name).mock() as one, a_graph(redis_url, name).mock() as other:
            for number in range(10):
                await one.feedback(variant="a", reward=number / 10)
                await other.feedback(variant="b", reward=1.0)
                await other.infer(x=X)
            await exchanged(manual_clock)
            assert {"a": 10, "b": 10} == counts(one) == counts(other)
            report = one.router("score").report()
            assert (0, 10) == (sum(report["decisions"].values()), sum(r["requests"] for r in report["rewards"].values()))
            assert one.router("score").report()["rewards"] == other.router("score").report()["rewards"]
            await exchanged(manual_clock)
            assert {"a": 10, "b": 10} == counts(one)  # and nothing is added again
            await one.feedback(variant="a", reward=1.0)
        async with a_graph(redis_url, name).mock() as later:  # what was left was handed out at the end
            assert {"a": 11, "b": 10} == counts(later)

    run(check())


def test_linear_models_add_up_as_well(run, manual_clock, redis_url, name):
    chance = np.random.default_rng(3)
    rows = [(chance.normal(size=2), float(chance.random())) for _ in range(40)]

    def graph(state, name):
        inputs = {"x": ("FP64", [-1, 2])}
        router = routers.Bandit({"a": a}, "linucb", features="x", state=state)
        return Graph(name, inputs).to(router, "score").respond()

    async def learn(server, rows):
        for number, (features, reward) in enumerate(rows):
            await server.infer(x=features[None], id=str(number))
            await server.feedback(str(number), reward=reward)

    async def check():
        async with graph(None, name).mock() as alone:
            await learn(alone, rows)
            wanted = alone.router("score").remember()["learned"]["a"]
        async with graph(redis_url, name).mock() as one, graph(redis_url, name).mock() as other:
            await learn(one, rows[:15])
            await exchanged(manual_clock)
            await learn(other, rows[15:])
            await exchanged(manual_clock)
            for server in (one, other):
                assert pytest.approx(wanted, abs=1e-12) == server.router("score").remember()["learned"]["a"]

    run(check())


def test_an_addition_that_may_have_arrived_is_sent_again_and_counts_once(run, manual_clock, redis_url, name, monkeypatch):
    async def check():
        async with a_graph(redis_url, name).mock() as one:
            really = RedisStore.add

            def lost_answer(*arguments):
                really(*arguments)
                raise StateFailed("the connection broke before the answer")

            monkeypatch.setattr(RedisStore, "add", lost_answer)
            await one.feedback(variant="a", reward=1.0)
            await exchanged(manual_clock)
            await one.feedback(variant="a", reward=1.0)
            assert {"a": 2, "b": 0} == counts(one)  # known here all the time
            monkeypatch.setattr(RedisStore, "add", really)
            await exchanged(manual_clock)
            assert {"a": 2, "b": 0} == counts(one)
        async with a_graph(redis_url, name).mock() as later:
            assert {"a": 2, "b": 0} == counts(later)

    run(check())


def test_what_was_not_sent_is_sent_at_the_end(run, manual_clock, redis_url, name, monkeypatch, caplog):
    async def check():
        async with a_graph(redis_url, name).mock() as one:
            with monkeypatch.context() as broken:

                def unreachable(*arguments):
                    raise StateFailed("nobody there")

                broken.setattr(RedisStore, "add", unreachable)
                await one.feedback(variant="a", reward=1.0)
                await exchanged(manual_clock)
                await exchanged(manual_clock)
            await one.feedback(variant="b", reward=1.0)
        async with a_graph(redis_url, name).mock() as later:
            assert {"a": 1, "b": 1} == counts(later)

    run(check())
    texts = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    assert 1 == sum("learns alone until it can exchange again: nobody there" in text for text in texts)  # once
    assert 1 == sum("exchanges again" in text for text in texts)


def test_settings_changed_in_one_worker_hold_in_all_and_forgetting_too(run, manual_clock, redis_url, name):
    async def check():
        async with a_graph(redis_url, name).mock() as one, a_graph(redis_url, name).mock() as other:
            await one.adjust("score", {"alpha": 0.5, "enabled": {"a": False}})
            await settled(manual_clock)
            await manual_clock.advance(0.1)  # it is saved
            await settled(manual_clock)
            await other.feedback(variant="b", reward=1.0)
            await exchanged(manual_clock)
            assert one.router("score").settings() == other.router("score").settings()
            assert {"b"} == {(await other.infer(x=X)).parameters["score.variant"] for _ in range(5)}

            await one.adjust("score", {"resets": 1})
            await other.feedback(variant="b", reward=1.0)  # of before, as the other one knows only later
            await exchanged(manual_clock)
            await exchanged(manual_clock)
            assert {"a": 0, "b": 0} == counts(one) == counts(other)
            await other.feedback(variant="a", reward=1.0)
            await exchanged(manual_clock)
            assert {"a": 1, "b": 0} == counts(one) == counts(other)

    run(check())


def test_a_graph_that_is_loaded_anew_knows_what_the_one_before_has_not_sent_yet(run, manual_clock, redis_url, name, caplog):
    async def check():
        control = Control()
        old, new = Catalog(control), Catalog(control)
        plan = a_graph(redis_url, name).compile()
        await old.load([plan])
        for _ in range(3):
            give_feedback(old.get(name).seats, Feedback(variant="a", reward=1.0), name)
        await new.load([a_graph(redis_url, name).compile()])
        known = lambda: new.get(name).seats["score"].router.report()["rewards"]["a"]["count"]  # noqa: E731
        assert 3 == known()
        give_feedback(old.get(name).seats, Feedback(variant="a", reward=1.0), name)
        await old.stop()
        await exchanged(manual_clock)
        assert 4 == known()
        await new.stop()

    run(check())
    assert [] == [record.message for record in caplog.records if record.levelname == "WARNING"]


def test_settings_that_could_not_be_saved_are_saved_once_they_can_be(run, manual_clock, redis_url, name, monkeypatch, caplog):
    async def check():
        async with a_graph(redis_url, name).mock() as one, a_graph(redis_url, name).mock() as other:
            with monkeypatch.context() as broken:

                def unreachable(*arguments):
                    raise StateFailed("nobody there")

                broken.setattr(RedisStore, "save", unreachable)
                await one.adjust("score", {"alpha": 0.5})
                for _ in range(3):
                    await exchanged(manual_clock)
                assert 2.0 == other.router("score").settings()["alpha"]
            await exchanged(manual_clock)
            await exchanged(manual_clock)
            assert 0.5 == other.router("score").settings()["alpha"]
        async with a_graph(redis_url, name).mock() as later:
            assert 0.5 == later.router("score").settings()["alpha"]

    run(check())
    texts = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    assert ["router 'score': nobody there; it is tried again until it can be", "router 'score' is saved again"] == texts


def test_settings_that_the_store_has_lost_are_saved_again(run, manual_clock, redis_url, name):
    async def check():
        async with a_graph(redis_url, name).mock() as one, a_graph(redis_url, name).mock():
            await one.adjust("score", {"alpha": 0.5})
            await exchanged(manual_clock)
            with redis.Redis.from_url(redis_url) as client:
                assert 1 == client.delete(*client.keys(f"*state:{name}/*"))
            for _ in range(3):
                await exchanged(manual_clock)
            async with a_graph(redis_url, name).mock() as later:
                assert 0.5 == later.router("score").settings()["alpha"]

    run(check())


def test_of_settings_that_are_changed_in_two_workers_at_once_all_have_the_same_in_the_end(
    run, manual_clock, redis_url, name, caplog
):
    async def check():
        async with a_graph(redis_url, name).mock() as one, a_graph(redis_url, name).mock() as other:
            await one.adjust("score", {"alpha": 0.5, "resets": 1})
            await other.adjust("score", {"alpha": 0.6})
            for _ in range(4):
                await exchanged(manual_clock)
            settings = [server.router("score").settings() for server in (one, other)]
            assert settings[0] == settings[1]
            assert settings[0]["alpha"] in (0.5, 0.6)
            assert 1 == settings[0]["resets"]

    run(check())
    assert any("was changed in two workers at once" in text for text in caplog.messages)
    assert not any("cannot take up" in text for text in caplog.messages)


@pytest.mark.parametrize("sums", [b"12345678", b"x"])
@pytest.mark.parametrize("policy", ["ucb1", "linucb"])
def test_shared_state_that_is_none_is_said_and_harms_nobody(run, manual_clock, redis_url, name, caplog, sums, policy):
    options = {"features": "x"} if policy == "linucb" else {}

    async def check():
        async with a_graph(redis_url, name, policy, **options).mock() as server:
            with redis.Redis.from_url(redis_url) as client:
                client.hset(f"servinggraph:sums:{{{name}/1/score}}", "a", sums)
            await exchanged(manual_clock)
            await server.infer(x=X, id="r")
            assert {"score": "taken"} == await server.feedback("r", reward=1.0)
            with redis.Redis.from_url(redis_url) as client:
                client.delete(f"servinggraph:sums:{{{name}/1/score}}")
            await exchanged(manual_clock)
            assert 1 == sum(counts(server).values())

    run(check())
    assert 1 == sum("learns alone until it can exchange again: " in text for text in caplog.messages)


def test_a_stop_asks_a_store_that_does_not_answer_once_and_no_more(run, manual_clock, redis_url, name, monkeypatch):
    asked = []

    async def check():
        async with a_graph(redis_url, name).mock() as server:

            def unreachable(*arguments):
                asked.append(arguments)
                raise StateFailed("nobody there")

            monkeypatch.setattr(RedisStore, "load", unreachable)
            await server.feedback(variant="a", reward=1.0)
            await exchanged(manual_clock)
            asked.clear()
        assert 1 == len(asked)

    run(check())


def test_a_store_that_cannot_be_reached_is_said_at_the_load(tmp_path):
    with pytest.raises(StepFailed, match="node 'score': cannot read state"):
        a_graph(f"unix://{tmp_path}/nobody", "g").mock().__enter__()


PROGRAM = """
import sys, os
import numpy as np
from servinggraph import Graph, routers

def a(value):
    return {"y": value["x"]}

name, state, count, how = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
router = routers.Bandit({"a": a, "b": a}, "thompson", state=state)
graph = Graph(name, {"x": ("FP32", [-1])}).to(router, "score").respond()
with graph.mock() as server:
    server.feedback(variant="b", reward=0.25)  # lest chance leaves it out everywhere
    for number in range(count):
        reply = server.infer(x=np.ones(1, "f4"), id=str(number))
        server.feedback(str(number), reward=1.0 if reply.parameters["score.variant"] == "a" else 0.25)
    if how == "killed":
        known = 0
        while known < 3 * (count + 1):  # all of it was handed out, and what the others have
            with graph.mock() as look:
                known = sum(r["count"] for r in look.router("score").report()["rewards"].values())
        server.feedback(variant="a", reward=1.0)
        os._exit(9)
"""


def test_processes_learn_together_and_one_that_is_killed_loses_an_interval_at_most(redis_url, name, tmp_path):
    program = tmp_path / "worker.py"
    program.write_text(PROGRAM)
    command = [sys.executable, str(program), name, redis_url]
    running = [subprocess.Popen([*command, "200", how]) for how in ("stopped", "stopped", "killed")]
    try:
        assert [0, 0, 9] == [process.wait(150) for process in running]
    finally:
        for process in running:
            process.kill()
            process.wait()

    with a_graph(redis_url, name).mock() as server:
        report = server.router("score").report()
    rewards = report["rewards"]
    assert 600 == sum(r["requests"] for r in rewards.values())
    assert 603 <= sum(r["count"] for r in rewards.values()) <= 604  # the last one, in the interval in which it was killed
    assert (1.0, 0.25) == (rewards["a"]["mean"], rewards["b"]["mean"])
    assert report["shares"]["a"] > 0.8


@pytest.mark.parametrize("policy", ["ucb1", "linucb"])
def test_feedback_finds_the_worker_that_answered(run, manual_clock, redis_url, name, policy):
    async def check():
        options = {"features": "x"} if policy == "linucb" else {}

        def graph():
            return a_graph(redis_url, name, policy, **options)

        async with graph().mock() as one, graph().mock() as other, graph().mock() as third:
            variant = (await one.infer(x=X, id="r")).parameters["score.variant"]
            assert {"score": "passed_on"} == await other.feedback("r", reward=1.0)
            reply = await third.request("POST", f"/v2/models/{name}/feedback", b'{"id": "nobody", "reward": 1}')
            assert (202, {"routers": {"score": "passed_on"}}) == (reply.status, reply.json())
            await exchanged(manual_clock)
            await exchanged(manual_clock)
            wanted = {"a": 0, "b": 0} | {variant: 1}
            assert wanted == counts(one) == counts(other) == counts(third)

            await other.feedback("r", reward=0.0)  # a second time
            await third.feedback("r", reward=0.0)
            await exchanged(manual_clock)
            assert {"score": "duplicate"} == await one.feedback("r", reward=0.0)
            assert wanted == counts(one)
            assert (3, 0) == tuple(one.router("score").report()["feedback"][n] for n in ("duplicates", "unknown"))
            with pytest.raises(InvalidRequest, match="from 0 to 1"):  # which nobody would be told later
                await other.feedback("r", reward=2.0)

    run(check())


@pytest.mark.parametrize("truth", [[1.0], {"y": np.array([1.0], np.float32)}])
def test_a_truth_is_passed_on_to_where_the_answer_is(run, manual_clock, redis_url, name, truth):
    async def check():
        def graph():
            return a_graph(redis_url, name, scorer="accuracy")

        async with graph().mock() as one, graph().mock() as other:
            variant = (await one.infer(x=X, id="r")).parameters["score.variant"]
            assert {"score": "passed_on"} == await other.feedback("r", truth=truth)
            await exchanged(manual_clock)
            await exchanged(manual_clock)
            assert 1.0 == other.router("score").report()["rewards"][variant]["mean"]

    run(check())


def test_feedback_that_is_of_no_use_to_the_worker_that_answered_is_logged_there(
    run, manual_clock, redis_url, name, caplog, tmp_path
):
    async def check():
        def graph():
            return a_graph(redis_url, name, scorer="accuracy")

        async with graph().mock() as one, graph().mock() as other:
            await one.infer(x=X, id="r")
            assert {"score": "passed_on"} == await other.feedback("r", truth={"z": [1.0]})
            store = open_store(redis_url, tmp_path)
            store.tell(f"{name}/1/score", [b"{", b'{"id": "r", "of_a_later_version": 1}'], "")
            store.close()
            await exchanged(manual_clock)
            await exchanged(manual_clock)
            assert {"score": "taken"} == await one.feedback("r", truth=[1.0])

    run(check())
    said = [text for text in caplog.messages if "could not use feedback that came to another worker" in text]
    assert any("a tensor 'z', which the answer had not" in text for text in said)
    assert 5 == len(said)  # each of the two others by both


def test_what_cannot_be_passed_on_is_unknown(run, manual_clock, redis_url, name):
    async def check():
        async with a_graph(redis_url, name, scorer="accuracy").mock() as server:
            for truth in (["x" * 17_000], {"y": np.array([b"\xff"], object)}):
                with pytest.raises(RequestNotFound):
                    await server.feedback("r", truth=truth)
            for number in range(132):
                await server.feedback(str(number), truth=["x" * 15_000])
            with pytest.raises(RequestNotFound):
                await server.feedback("r", truth=["x" * 15_000])
            await exchanged(manual_clock)
            assert {"score": "passed_on"} == await server.feedback("r", truth=["x" * 15_000])

    run(check())


def test_a_redis_that_forgets_is_noticed(run, manual_clock, redis_url, name, caplog):
    async def check():
        async with a_graph(redis_url, name).mock() as server:
            await server.feedback(variant="a", reward=1.0)
            await exchanged(manual_clock)
            with redis.Redis.from_url(redis_url) as client:
                assert 2 == client.delete(*client.keys(f"*sums:*{name}/*"))
            await exchanged(manual_clock)
            assert {"a": 0, "b": 0} == counts(server)

    run(check())
    assert "router 'score': of 1 rewards of 'a' the store knows 0" in caplog.messages


def learned(era, **sums):
    return Learned(era, {name: np.array(numbers, float) for name, numbers in sums.items()})


def plain(learned):
    return learned.era, {name: numbers.tolist() for name, numbers in learned.sums.items()}


def test_sums_are_exact_whatever_is_repeated_and_in_whatever_order(redis_url, tmp_path, name):
    store = open_store(redis_url, tmp_path)
    chance = random.Random(4)
    wanted = 0.0
    for number in range(1, 41):
        for worker in "xyz":
            reward = chance.random()
            wanted += reward
            for _ in range(chance.randrange(1, 4)):
                found = store.add(name, worker, number, learned(0, a=[1, reward]))
    assert (0, {"a": [120, wanted]}) == plain(found)  # to the last bit: the same additions in the same order

    assert plain(found) == plain(store.add(name, "x", 41, learned(0)))
    assert (0, {"a": [120, wanted], "b": [1, 2, 3]}) == plain(store.add(name, "x", 42, learned(0, b=[1, 2, 3])))
    assert (0, {"a": [120, wanted, 7], "b": [3, 2, 3]}) == plain(store.add(name, "x", 43, learned(0, a=[0, 0, 7], b=[2])))
    assert (2, {}) == plain(store.add(name, "x", 44, learned(2)))
    assert (2, {}) == plain(store.add(name, "y", 41, learned(0, a=[9])))  # of an earlier era
    assert (2, {"a": [1e-300]}) == plain(store.add(name, "y", 42, learned(2, a=[1e-300])))
    store.close()
