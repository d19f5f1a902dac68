"""What is served and how much of it at once."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from servinggraph import Context, Graph
from servinggraph.errors import GraphNotFound, LimitExceeded, StepFailed, Unavailable
from servinggraph.lifecycle import Admission, Catalog


class Model:
    """Counts what becomes of it."""

    def __init__(self, log, name, error=None):
        self.log, self.name, self.error = log, name, error

    def load(self):
        if self.error:
            raise self.error
        self.log.append(f"load {self.name}")

    def unload(self):
        self.log.append(f"unload {self.name}")

    def __call__(self, value):
        return {"y": value["x"]}


def a_plan(name="g", version=1, log=None, error=None):
    class Step(Model):
        def __init__(self):
            super().__init__([] if log is None else log, f"{name}{version}", error)

    return Graph(name, {"x": ("FP32", [-1])}, version=version).to(Step, "model").respond().compile()


def run(check):
    asyncio.run(check())


def test_slots_are_given_out_up_to_the_limit_and_taken_back():
    admission = Admission(2)
    admission.enter()
    admission.enter()
    with pytest.raises(LimitExceeded, match="2 requests are in flight .limit 'max_in_flight' = 2"):
        admission.enter()
    admission.leave()
    admission.enter()

    assert 2 == admission.in_flight


def test_waiting_for_idleness_ends_when_the_last_slot_comes_back():
    async def check():
        admission = Admission(2)
        await admission.wait_until_idle()
        admission.enter()
        admission.enter()
        waiting = asyncio.ensure_future(admission.wait_until_idle())
        for _ in range(2):
            await asyncio.sleep(0)
            assert not waiting.done()
            admission.leave()
        await asyncio.wait_for(waiting, 60)

    run(check)


def test_without_a_version_the_highest_that_is_ready_answers():
    async def check():
        catalog = Catalog()
        await catalog.load([a_plan(version=2), a_plan(version=10), a_plan("other")])
        assert ("10", "2", "1") == tuple(catalog.get(*key).plan.version for key in (("g",), ("g", "2"), ("other",)))
        assert ["2", "10"] == catalog.versions("g")
        assert ["g2", "g10", "other1"] == [graph.plan.name + graph.plan.version for graph in catalog.graphs()]
        await catalog.stop()

    run(check)


def test_what_is_not_there_is_not_found():
    async def check():
        catalog = Catalog()
        await catalog.load([a_plan()])
        with pytest.raises(GraphNotFound, match="Request for unknown model: 'nope' is not found"):
            catalog.get("nope")
        with pytest.raises(GraphNotFound, match="Request for unknown model: 'g' version 2 is not found"):
            catalog.get("g", "2")
        assert [] == catalog.versions("nope")
        await catalog.stop()

    run(check)


def test_a_server_is_ready_when_all_graphs_are_and_it_is_not_told_to_stop():
    async def check():
        catalog = Catalog()
        assert not catalog.ready
        await catalog.load([a_plan()])
        assert catalog.ready
        catalog.draining = True
        assert not catalog.ready
        catalog.draining = False
        await catalog.stop()
        assert not catalog.ready
        with pytest.raises(Unavailable, match="'g' has no available versions"):
            catalog.get("g")
        with pytest.raises(Unavailable, match="'g' version 1 is not at ready state"):
            catalog.get("g", "1")

    run(check)


def test_a_failed_load_leaves_what_is_served_as_it_was():
    async def check():
        log = []
        catalog = Catalog()
        await catalog.load([a_plan("first", log=log)])
        with pytest.raises(StepFailed, match="node 'model': failed to load: OSError: no disk"):
            await catalog.load([a_plan("second", log=log), a_plan("third", error=OSError("no disk"), log=log)])
        assert catalog.ready
        assert ["first"] == [graph.plan.name for graph in catalog.graphs()]
        assert "unload second1" in log
        assert "unload first1" not in log
        with pytest.raises(GraphNotFound):
            catalog.get("third")
        await catalog.stop()

    run(check)


def test_a_version_that_is_there_already_is_refused_and_changes_nothing():
    async def check():
        catalog = Catalog()
        await catalog.load([a_plan()])
        with pytest.raises(Unavailable, match="graph 'g' version 1 is there twice"):
            await catalog.load([a_plan("new"), a_plan()])
        assert ["g"] == [graph.plan.name for graph in catalog.graphs()]
        assert catalog.ready
        await catalog.stop()

    run(check)


def test_listeners_hear_of_every_change():
    async def check():
        catalog = Catalog()
        heard = []
        catalog.on_change(lambda: heard.append([graph.ready for graph in catalog.graphs()]))
        await catalog.load([a_plan()])
        await catalog.stop()
        assert [[], [True], [False]] == heard

    run(check)


def test_steps_are_unloaded_once_even_if_one_of_them_fails_to():
    async def check():
        log = []

        class Bad:
            def unload(self):
                log.append("bad")
                raise OSError("still in use")

            def __call__(self, value):
                return value

        bad = Graph("bad", {"x": ("FP32", [-1])}).to(Bad, "model").respond().compile()
        catalog = Catalog()
        await catalog.load([a_plan(log=log), bad])
        assert [1] == (await catalog.get("g").executor.run({"x": np.float32([1])}, Context()))["y"].tolist()
        await catalog.stop()
        await catalog.stop()
        assert ["bad", "load g1", "unload g1"] == sorted(log)

    run(check)
