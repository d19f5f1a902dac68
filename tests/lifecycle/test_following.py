"""Workers that share a state follow each other's changes of settings: none is lost, and none undone by who knew nothing of it."""

from __future__ import annotations

import asyncio
from uuid import uuid4

import numpy as np
import pytest

from servinggraph import Graph, routers
from servinggraph.state import FileStore, RedisStore, StateFailed, open_store

X = np.array([1.0], np.float32)


def a(value):
    return {"y": value["x"]}


def b(value):
    return {"y": -value["x"]}


BRANCHES = {"a": a, "b": b}
ROUTERS = {
    "ab": (lambda state: routers.Ab(BRANCHES, {"a": 1, "b": 1}, state=state), {"weights": {"a": 1, "b": 3}}),
    "model": (lambda state: routers.Model(BRANCHES, by="parameter:m", state=state), {"aliases": {"new": "b"}, "default": "b"}),
    "ensemble": (
        lambda state: routers.Ensemble(BRANCHES, "weighted_mean", weights={"a": 1, "b": 1}, state=state),
        {"weights": {"a": 1, "b": 3}},
    ),
    "canary": (
        lambda state: routers.Canary(BRANCHES, baseline="a", challenger="b", steps=["10%", "50%", "100%"], state=state),
        {"stage": "50%"},
    ),
}


@pytest.fixture
def name():
    """Return a graph name that no other test has in the same Redis."""
    return f"g{uuid4().hex[:8]}"


def a_worker(kind, state, name):
    return Graph(name, {"x": ("FP32", [-1])}).to(ROUTERS[kind][0](state), "score").respond().mock()


def settings_of(server):
    return server.router("score").settings()


async def settled(clock):
    """Wait for what runs in threads."""
    await clock.settle()
    while running := [task for task in asyncio.all_tasks() if task.get_coro().__qualname__ in _IN_THREADS]:
        await asyncio.wait(running)
        await clock.settle()


_IN_THREADS = ("Sharing._round", "RouterSeat._save")


async def exchanged(clock):
    """Have every worker save what was changed, and then take in what the others saved."""
    for _ in range(3):
        await clock.advance(1.1)
        await settled(clock)


@pytest.mark.parametrize("kind", ROUTERS)
def test_what_is_changed_in_one_worker_holds_in_all_and_whoever_stops_undoes_nothing(run, manual_clock, redis_url, name, kind):
    async def check():
        async with a_worker(kind, redis_url, name) as one:
            async with a_worker(kind, redis_url, name) as other, a_worker(kind, redis_url, name):
                await one.adjust("score", ROUTERS[kind][1])
                await exchanged(manual_clock)
                assert settings_of(one) == settings_of(other)
                assert 1 == one.router("score").revision == other.router("score").revision
            changed = settings_of(one)
        async with a_worker(kind, redis_url, name) as again:
            assert changed == settings_of(again)

    run(check())


def test_a_worker_that_stops_before_it_has_followed_undoes_nothing(run, manual_clock, redis_url, name):
    async def check():
        async with a_worker("ab", redis_url, name) as one, a_worker("ab", redis_url, name):
            await one.adjust("score", {"weights": {"a": 1, "b": 3}})
            await manual_clock.advance(0.1)
            await settled(manual_clock)
        async with a_worker("ab", redis_url, name) as again:
            assert {"weights": {"a": 1, "b": 3}} == settings_of(again)

    run(check())


def test_of_two_changes_of_one_setting_at_once_the_same_holds_in_all(run, manual_clock, redis_url, name):
    async def check():
        workers = [a_worker("ab", redis_url, name) for _ in range(4)]
        async with workers[0] as one, workers[1] as two, workers[2] as three, workers[3] as four:
            for number, worker in enumerate((one, two, three)):
                await worker.adjust("score", {"weights": {"a": 1, "b": number + 2}})
            await exchanged(manual_clock)
            await exchanged(manual_clock)
            (weights,) = {settings_of(worker)["weights"]["b"] for worker in (one, two, three, four)}
            assert weights in (2, 3, 4)
            assert 1 == len({worker.router("score").revision for worker in (one, two, three, four)})
        assert weights == open_store(redis_url, None).load(f"{name}/1/score")["weights"]["b"]

    run(check())


def test_changes_of_different_settings_at_once_both_hold(run, manual_clock, redis_url, name):
    async def check():
        async with a_worker("model", redis_url, name) as one, a_worker("model", redis_url, name) as other:
            await one.adjust("score", {"aliases": {"new": "b"}})
            await other.adjust("score", {"default": "a"})
            await exchanged(manual_clock)
            assert {"aliases": {"new": "b"}, "default": "a"} == settings_of(one) == settings_of(other)

    run(check())


@pytest.mark.parametrize("first", [0, 1])
def test_a_rollback_holds_against_a_promotion_at_the_same_time(run, manual_clock, redis_url, name, first):
    async def check():
        async with a_worker("canary", redis_url, name) as one, a_worker("canary", redis_url, name) as other:
            changes = [(one, {"rollback": True}), (other, {"promote": True})]
            for worker, change in (changes[first], changes[1 - first]):
                await worker.adjust("score", change)
                await manual_clock.settle()  # its save begins, and is there before or after that of the other
            await exchanged(manual_clock)
            await exchanged(manual_clock)
            assert ["rolled_back"] * 2 == [settings_of(worker)["stage"] for worker in (one, other)]
            assert one.router("score").revision == other.router("score").revision

            await other.adjust("score", {"stage": "50%"})  # who knows of it may begin anew
            await exchanged(manual_clock)
            assert ["50%"] * 2 == [settings_of(worker)["stage"] for worker in (one, other)]

    run(check())


def test_a_change_that_cannot_be_saved_is_saved_later_and_no_other_undoes_it(
    run, manual_clock, redis_url, name, monkeypatch, caplog
):
    failing, save = True, RedisStore.save

    def sometimes(store, *arguments):
        if failing:
            raise StateFailed("nobody there")
        return save(store, *arguments)

    async def check():
        nonlocal failing
        async with a_worker("model", redis_url, name) as one, a_worker("model", redis_url, name) as other:
            monkeypatch.setattr(RedisStore, "save", sometimes)
            await one.adjust("score", {"default": "a"})
            await exchanged(manual_clock)
            assert None is settings_of(other)["default"]
            failing = False
            await other.adjust("score", {"aliases": {"new": "b"}})
            await exchanged(manual_clock)
            await exchanged(manual_clock)
            assert {"aliases": {"new": "b"}, "default": "a"} == settings_of(one) == settings_of(other)

    run(check())
    assert 1 == sum("nobody there; it is tried again" in message for message in caplog.messages)


def test_feedback_finds_the_worker_whose_variant_answered(run, manual_clock, redis_url, name):
    async def check():
        async with a_worker("ab", redis_url, name) as one, a_worker("ab", redis_url, name) as other:
            variant = (await one.infer(x=X, id="r")).parameters["score.variant"]
            assert {"score": "passed_on"} == await other.feedback("r", reward=1.0)
            await exchanged(manual_clock)
            assert 1 == one.router("score").report()["rewards"]["reward"][variant]["count"]
            assert {} == other.router("score").report()["rewards"]

    run(check())


def test_of_two_processes_with_one_file_who_changed_nothing_undoes_nothing(run, manual_clock, tmp_path, name):
    place = str(tmp_path / "state.json")

    async def check():
        async with a_worker("ab", place, name), a_worker("ab", place, name) as other:
            await other.adjust("score", {"weights": {"a": 1, "b": 3}})
        saved = FileStore(tmp_path / "state.json").load(f"{name}/1/score")
        assert {"weights": {"a": 1, "b": 3}, "revision": 1} == saved

    run(check())


@pytest.mark.parametrize("kind", ["file", "redis"])
def test_a_document_takes_the_place_of_none_that_is_later(tmp_path, request, kind):
    store = open_store("state.json" if kind == "file" else request.getfixturevalue("redis_url"), tmp_path)
    key, later = str(tmp_path), {"revision": 3, "w": 1}
    assert None is store.save(key, later, 0)
    assert later == store.save(key, {"revision": 3, "w": 2}, 2)
    assert later == store.load(key)
    for upto, document in ((3, {"revision": 4}), (None, {"revision": 1}), (1, {}), (-1, {"w": 1})):
        assert None is store.save(key, document, upto)
        assert document == store.load(key)
    store.close()
