"""Graphs that leave memory for others and come back when a request does."""

from __future__ import annotations

import asyncio
import sys

import pytest

from servinggraph import Context
from servinggraph.errors import DeadlineExceeded, GraphNotFound, LoadFailed, Unavailable
from servinggraph.interfaces import Receipt
from servinggraph.lifecycle import Control
from servinggraph.lifecycle.residence import MADE_ROOM

SLOW_LOAD = """\
import threading, pathlib
class work:
    def load(self):
        here = pathlib.Path(__file__).parent
        with (here / 'loads').open('a') as file:
            file.write('x')
        gate = here / 'wait'
        while gate.exists():
            threading.Event().wait(0.001)
    def __call__(self, value):
        return {'y': value['x'] * 0 + NUMBER}
"""
BLOCKED = (
    "import asyncio\ngo = asyncio.Event()\nasync def work(value):\n    await go.wait()\n    return {'y': value['x'] * 0 + 5}\n"
)


def go(check):
    async def limited():
        async with asyncio.timeout(120):
            await check()

    asyncio.run(limited())


async def until(condition):
    """Wait for something that threads or other tasks bring about."""
    while not condition():
        await asyncio.sleep(0.002)


def loads(folder):
    return len((folder.path / "a" / "loads").read_text())


def loaded(running):
    return {name for name, versions in running.repository._records.items() if any(r.built for r in versions.values())}


@pytest.mark.parametrize("mode", ["none", "poll", "explicit"])
def test_the_least_recently_used_makes_room_and_comes_back_for_a_request(folder, opened, mode):
    for number, name in enumerate("abc"):
        folder.write(name, number)

    async def check():
        async with opened(mode, load=["*"] if mode == "explicit" else (), max_loaded=2) as running:
            assert 2 == len(loaded(running))
            for number, name in enumerate("abc"):
                assert ("1", float(number)) == await running.ask(name)
            assert {"b", "c"} == loaded(running)
            await running.ask("b")
            await running.ask("a")
            assert {"a", "b"} == loaded(running)
            assert ("c", "1", "UNAVAILABLE", MADE_ROOM) == (await running.repository.index())[2]
            assert running.catalog.ready
            assert running.catalog.get("c").ready

    go(check)


WITH_ROUTER = """\
inputs: {x: {datatype: FP32, shape: [-1]}}
nodes:
  test:
    router: ROUTER
    branches: {a: {step: python, call: "steps:work"}, b: {step: python, call: "steps:work"}}
answer: test
"""


@pytest.mark.parametrize("state", ["", "\n    state: state.json"])
def test_a_graph_that_comes_back_has_its_routers_as_they_were(folder, opened, state):
    for name, router in (("champion", "champion\n    champion: a"), ("bandit", "bandit\n    policy: ucb1")):
        folder.write(name, 1)
        (folder.path / name / "graph.yaml").write_text(WITH_ROUTER.replace("ROUTER", router + state))

    async def check():
        async with opened("explicit", load=["champion"], max_loaded=1) as running:
            seat = lambda name: running.catalog.get(name).seats["test"]  # noqa: E731
            feedback = running.serving.feedback
            Control.change(seat("champion"), {"champion": "b"})
            await running.repository.load("bandit")
            with pytest.raises(
                Unavailable, match="graph 'champion' is not in memory: router 'test' listens again once a request"
            ):
                Control.change(seat("champion"), {"champion": "a"})
            await running.ask("bandit", context=Context("r"))
            assert {"test": Receipt.TAKEN} == feedback("bandit", {"variant": "a", "reward": 1.0})
            await running.ask("champion")
            assert {"champion"} == loaded(running)
            assert "b" == seat("champion").router.settings()["champion"]
            assert 1 == seat("champion").router.revision
            with pytest.raises(Unavailable, match="graph 'bandit' is not in memory"):
                feedback("bandit", {"id": "r", "reward": 1.0})
            await running.ask("bandit")
            assert {"test": Receipt.TAKEN} == feedback("bandit", {"id": "r", "reward": 1.0})
            rewards = seat("bandit").router.report()["rewards"]
            assert (2, 2) == tuple(sum(found[what] for found in rewards.values()) for what in ("requests", "count"))

    go(check)


def test_all_that_wait_share_one_load(folder, opened):
    folder.write("a", SLOW_LOAD.replace("NUMBER", "1"))
    folder.write("b", 2)

    async def check():
        async with opened("explicit", load=["a"], max_loaded=1) as running:
            await running.repository.load("b")
            assert {"b"} == loaded(running)
            (folder.path / "a" / "wait").touch()
            asking = [asyncio.ensure_future(running.ask("a")) for _ in range(20)]
            await until(lambda: loads(folder) == 2)
            assert not any(task.done() for task in asking)
            asking[3].cancel()
            (folder.path / "a" / "wait").unlink()
            answers = await asyncio.gather(*asking, return_exceptions=True)
            assert isinstance(answers.pop(3), asyncio.CancelledError)
            assert [("1", 1.0)] * 19 == answers
            assert 2 == loads(folder)
            assert 0 == running.catalog.get("a").requests

    go(check)


def test_a_request_waits_for_a_load_no_longer_than_its_deadline(folder, opened):
    folder.write("a", SLOW_LOAD.replace("NUMBER", "1"))
    folder.write("b", 2)

    async def check():
        async with opened("explicit", load=["a"], max_loaded=1) as running:
            await running.repository.load("b")
            (folder.path / "a" / "wait").touch()
            late = Context(deadline=asyncio.get_running_loop().time() + 0.02)
            with pytest.raises(DeadlineExceeded, match="Request timeout expired while the model was loaded"):
                await running.ask("a", context=late)
            (folder.path / "a" / "wait").unlink()
            assert ("1", 1.0) == await running.ask("a")

    go(check)


def test_what_is_in_flight_is_answered_before_its_graph_makes_room(folder, opened):
    folder.write("a", BLOCKED)
    folder.write("b", 2)

    async def check():
        async with opened("none", max_loaded=1) as running:
            asking = asyncio.ensure_future(running.ask("a"))
            await until(lambda: "a" in loaded(running) and running.catalog.get("a").requests == 1)
            graph = running.catalog.get("a")
            other = asyncio.ensure_future(running.ask("b"))
            await until(lambda: "a" not in loaded(running))
            again = asyncio.ensure_future(running.ask("a"))
            assert not asking.done()
            assert not other.done()
            sys.modules[graph.plan.nodes[0].work._target.__module__].go.set()
            assert ("1", 5.0) == await asking
            assert ("1", 2.0) == await other
            await until(lambda: running.catalog.get("a") is not graph and running.catalog.get("a").requests == 1)
            sys.modules[running.catalog.get("a").plan.nodes[0].work._target.__module__].go.set()
            assert ("1", 5.0) == await again

    go(check)


def test_many_requests_for_more_graphs_than_there_is_room_for_are_all_answered(folder, opened):
    for number in range(4):
        folder.write(f"g{number}", number)

    async def check():
        async with opened("none", max_loaded=2) as running:

            async def one(number):
                return number, await running.ask(f"g{number}")

            answers = await asyncio.gather(*(one(i * 7 % 4) for i in range(200)))
            assert all(("1", float(number)) == answer for number, answer in answers)
            assert len(loaded(running)) <= 2
            assert all(graph.requests == 0 for graph in running.catalog.graphs())

    go(check)


def test_an_unload_and_a_load_reach_a_graph_that_has_made_room(folder, opened):
    folder.write("a", 1)
    folder.write("b", 2)

    async def check():
        async with opened("explicit", load=["a"], max_loaded=1) as running:
            await running.repository.load("b")
            folder.write("a", 3)
            await running.repository.load("a")
            assert ("1", 3.0) == await running.ask("a")
            await running.ask("b")
            await running.repository.unload("a")
            with pytest.raises(GraphNotFound):
                await running.ask("a")
            assert ("1", 2.0) == await running.ask("b")

    go(check)


def test_a_graph_that_is_unloaded_while_requests_wait_for_it_is_not_found(folder, opened):
    folder.write("a", SLOW_LOAD.replace("NUMBER", "1"))
    folder.write("b", 2)

    async def check():
        async with opened("explicit", load=["a"], max_loaded=1) as running:
            await running.repository.load("b")
            (folder.path / "a" / "wait").touch()
            asking = asyncio.ensure_future(running.ask("a"))
            await until(lambda: loads(folder) == 2)
            await running.repository.unload("a")
            (folder.path / "a" / "wait").unlink()
            with pytest.raises(GraphNotFound, match="'a' has no available versions"):
                await asking

    go(check)


def test_a_load_on_demand_that_fails_is_told_to_all_and_tried_again_later(folder, opened, monkeypatch):
    folder.write("a", 1)
    folder.write("b", 2)

    async def check():
        async with opened("explicit", load=["a"], max_loaded=1) as running:
            await running.repository.load("b")
            monkeypatch.setattr("servinggraph.lifecycle.residence.RETRY_S", 3600.0)
            folder.write("a", "1/0\n")
            answers = await asyncio.gather(*(running.ask("a") for _ in range(5)), return_exceptions=True)
            assert all(isinstance(answer, LoadFailed) and "ZeroDivisionError" in str(answer) for answer in answers)
            assert 5 == len({id(answer) for answer in answers})
            folder.write("a", 3)
            with pytest.raises(LoadFailed):  # not a load for every request
                await running.ask("a")
            monkeypatch.setattr("servinggraph.lifecycle.residence.RETRY_S", 0.0)
            assert ("1", 3.0) == await running.ask("a")
            assert ("1", 2.0) == await running.ask("b")

    go(check)


def test_a_memory_budget_counts_at_least_the_files(folder, opened):
    for name in "ab":
        (folder.write(name, 1) / "weights.bin").write_bytes(b"x" * 2**26)

    async def check():
        async with opened("none", memory_budget=100 * 2**20) as running:
            assert 1 == len(loaded(running))
            await running.ask("a")
            assert {"a"} == loaded(running)
            await running.ask("b")
            assert {"b"} == loaded(running)

    go(check)


def test_a_graph_that_is_larger_than_the_budget_is_refused_with_both_figures(folder, opened):
    (folder.write("a", 1) / "weights.bin").write_bytes(b"x" * 2**21)

    async def check():
        async with opened("explicit", memory_budget=2**20) as running:
            with pytest.raises(LoadFailed, match=r"it takes about \d{7,} bytes, more than 'memory_budget' = 1048576"):
                await running.repository.load("a")

    go(check)


def test_a_stop_ends_what_waits(folder, opened):
    folder.write("a", SLOW_LOAD.replace("NUMBER", "1"))
    folder.write("b", 2)

    async def check():
        async with opened("explicit", load=["a"], max_loaded=1) as running:
            await running.repository.load("b")
            (folder.path / "a" / "wait").touch()
            asking = asyncio.ensure_future(running.ask("a"))
            await until(lambda: loads(folder) == 2)
            (folder.path / "a" / "wait").unlink()
        with pytest.raises(Exception, match="shutting down|unloaded|no available versions|is not found"):
            await asking

    go(check)
