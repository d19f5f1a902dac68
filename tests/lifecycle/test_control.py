"""Routers read and changed while they serve: settings, state, audit."""

from __future__ import annotations

import asyncio
import json
import threading

import numpy as np
import pytest

from servinggraph import Graph, routers
from servinggraph.context import Context
from servinggraph.errors import Conflict, GraphNotFound, InvalidRequest, StepFailed
from servinggraph.interfaces import Feedback, Receipt
from servinggraph.lifecycle import Control
from servinggraph.lifecycle.audit import AuditLog
from servinggraph.lifecycle.catalog import Catalog
from servinggraph.lifecycle.control import seat_of
from servinggraph.lifecycle.feedback import give_feedback
from servinggraph.state import FileStore, StateFailed

X = np.array([1.0], np.float32)


def a(value):
    return {"y": value["x"]}


def b(value):
    return {"y": -value["x"]}


def a_plan(version=1, weights=None, **options):
    weights = weights or {"a": 1, "b": 1}
    graph = Graph("g", {"x": ("FP32", [-1])}, version=version)
    return graph.to(routers.Ab({"a": a, "b": b}, weights, **options), "test").respond().compile()


def test_a_change_raises_the_revision_and_stands_in_the_audit_log(run, tmp_path):
    async def check():
        control = Control(AuditLog(tmp_path / "logs" / "audit.jsonl"))
        catalog = Catalog(control)
        await catalog.load([a_plan()])
        seat = seat_of(catalog.get("g").seats, "test", "g")
        control.change(seat, {"weights": {"a": 1, "b": 3}}, "ann", "b looks better")
        control.change(seat, {"weights": {"a": 1, "b": 3}}, "ann", "the same again is no change")
        with pytest.raises(Conflict, match="at revision 1, not 0"):
            control.change(seat, {"weights": {"a": 1}}, "eve", revision=0)
        control.change(seat, {"weights": {"a": 1}}, "eve", revision=1)
        await catalog.stop()

        eve, ann = control.audit.last("g", "test")
        assert ("ann", "b looks better", 1) == (ann.who, ann.why, ann.revision)
        assert ({"weights": {"a": 1.0, "b": 1.0}}, {"weights": {"a": 1, "b": 3}}) == (ann.before, ann.after)
        assert ("g", "1", "test", "eve") == (eve.graph, eve.version, eve.node, eve.who)
        lines = [json.loads(line) for line in (tmp_path / "logs" / "audit.jsonl").read_text().splitlines()]
        assert ["ann", "eve"] == [line["who"] for line in lines]

    run(check())


def test_a_change_holds_and_is_saved_when_the_audit_log_cannot_be_written(run, tmp_path, caplog):
    async def check():
        path = tmp_path / "logs" / "audit.jsonl"
        control = Control(AuditLog(path))
        catalog = Catalog(control)
        await catalog.load([a_plan(state=str(tmp_path / "state.json"))])
        path.unlink()
        path.parent.rmdir()
        seat = catalog.get("g").seats["test"]
        assert {"weights": {"a": 1, "b": 3}} == control.change(seat, {"weights": {"a": 1, "b": 3}}, "ann")
        assert ["ann"] == [change.who for change in control.audit.last()]
        await catalog.stop()
        saved = json.loads((tmp_path / "state.json").read_text())
        assert {"weights": {"a": 1, "b": 3}, "revision": 1} == saved["g/1/test"]

    run(check())
    (error,) = [record.message for record in caplog.records if record.levelname == "ERROR"]
    assert error.endswith("No such file or directory; revision 1 of g/1 node 'test' is missing there")


def test_unknown_settings_and_nodes_are_refused_with_the_nearest(run):
    async def check():
        control = Control()
        catalog = Catalog(control)
        await catalog.load([a_plan()])
        seats = catalog.get("g").seats
        with pytest.raises(InvalidRequest, match="no setting 'weight'; did you mean 'weights'"):
            control.change(seats["test"], {"weight": {}})
        with pytest.raises(GraphNotFound, match="no router 'tst'; did you mean 'test'"):
            seat_of(seats, "tst", "g")
        with pytest.raises(InvalidRequest, match="no router that could use this feedback"):
            give_feedback(seats, Feedback(variant="c", reward=1.0), "g")
        await catalog.stop()

    run(check())


@pytest.mark.parametrize("kind", ["file", "redis"])
def test_settings_survive_a_restart_where_the_file_says_so(run, tmp_path, request, kind):
    place = str(tmp_path / "state.json") if kind == "file" else request.getfixturevalue("redis_url")

    version = 4711  # what other tests keep in the same Redis is of version 1

    async def served(change=None):
        control = Control()
        catalog = Catalog(control)
        await catalog.load([a_plan(version, state=place)])
        seat = catalog.get("g").seats["test"]
        if change:
            control.change(seat, change)
        found = seat.router.settings(), seat.router.revision
        await catalog.stop()
        return found

    async def check():
        assert ({"weights": {"a": 1.0, "b": 1.0}}, 0) == await served()
        await served({"weights": {"a": 2, "b": 1}})
        assert ({"weights": {"a": 2, "b": 1}}, 1) == await served()

    run(check())


def test_a_change_that_could_not_be_saved_is_saved_once_it_can_be(run, manual_clock, tmp_path, monkeypatch, caplog):
    place = tmp_path / "state.json"

    async def saves(seat):
        await manual_clock.advance(1.1)
        while seat.unsaved and (task := seat._saving) is not None and not task.done():
            await asyncio.wait({task})

    async def check():
        control = Control()
        catalog = Catalog(control)
        await catalog.load([a_plan(state=str(place))])
        seat = catalog.get("g").seats["test"]
        with monkeypatch.context() as full:

            def refuse(*arguments):
                raise StateFailed("no space left")

            full.setattr(FileStore, "save", refuse)
            control.change(seat, {"weights": {"a": 2, "b": 1}})
            for _ in range(3):
                await saves(seat)
            assert seat.unsaved
        await saves(seat)
        assert not seat.unsaved
        assert {"a": 2, "b": 1} == json.loads(place.read_text())["g/1/test"]["weights"]
        await catalog.stop()

    run(check())
    said = [text for text in caplog.messages if text.startswith("router 'test'")]
    assert ["router 'test': no space left; it is tried again until it can be", "router 'test' is saved again"] == said


def test_a_graph_that_is_reloaded_takes_up_the_settings_of_the_one_that_still_serves(run, tmp_path):
    async def check():
        control = Control()
        plan = lambda: a_plan(state=str(tmp_path / "state.json"))  # noqa: E731
        old, new = Catalog(control), Catalog(control)
        await old.load([plan()])
        control.change(old.get("g").seats["test"], {"weights": {"a": 5}})
        await new.load([plan()])
        assert {"weights": {"a": 5, "b": 0.0}} == new.get("g").seats["test"].router.settings()
        control.change(new.get("g").seats["test"], {"weights": {"b": 7}})
        await old.stop()  # later than the other's change, and must not undo it
        await new.stop()
        last = Catalog(Control())
        await last.load([plan()])
        assert {"weights": {"a": 0.0, "b": 7}} == last.get("g").seats["test"].router.settings()
        await last.stop()

    run(check())


def test_a_save_that_the_successors_overtakes_does_not_undo_it(run, tmp_path, monkeypatch):
    really, overtaken, begun = FileStore.save, threading.Event(), []

    def save(*arguments):
        begun.append(True)
        if len(begun) == 1:
            assert overtaken.wait(30)
            return really(*arguments)
        try:
            return really(*arguments)
        finally:
            overtaken.set()

    monkeypatch.setattr(FileStore, "save", save)

    async def check():
        control = Control()
        old, new, last = Catalog(control), Catalog(control), Catalog(Control())
        await old.load([a_plan(state=str(tmp_path / "state.json"))])
        control.change(old.get("g").seats["test"], {"weights": {"a": 5}})
        while not begun:
            await asyncio.sleep(0)
        await new.load([a_plan(state=str(tmp_path / "state.json"))])
        control.change(new.get("g").seats["test"], {"weights": {"b": 7}})
        await old.stop()
        await new.stop()
        await last.load([a_plan(state=str(tmp_path / "state.json"))])
        assert {"weights": {"a": 0.0, "b": 7}} == last.get("g").seats["test"].router.settings()
        await last.stop()

    run(check())


def test_while_a_graph_is_loaded_anew_changes_reach_both_and_the_old_one_saves_nothing_more(run, tmp_path):
    path = tmp_path / "state.json"

    async def check():
        control = Control()
        old, new = Catalog(control), Catalog(control)
        await old.load([a_plan(state=str(path))])
        before = old.get("g").seats["test"]
        await new.load([a_plan(state=str(path))])
        after = new.get("g").seats["test"]
        control.change(before, {"weights": {"a": 1, "b": 3}}, "ann")  # what was served when she asked
        assert [{"weights": {"a": 1, "b": 3}}] * 2 == [seat.router.settings() for seat in (before, after)]
        assert [("ann", 1)] == [(change.who, change.revision) for change in control.audit.last()]
        with pytest.raises(InvalidRequest, match="no branch"):
            control.change(before, {"weights": {"z": 1}})

        before.router.adjust({"weights": {"a": 1}})  # by itself, as a canary does
        before.changed("router", "its time came", {"weights": {"b": 3}}, {"weights": {"b": 0}})
        before.keep()
        await old.stop()
        assert 1 == len(control.audit.last())
        control.change(after, {"weights": {"a": 1, "b": 4}}, "eve")
        await new.stop()
        assert {"weights": {"a": 1, "b": 4}, "revision": 2} == json.loads(path.read_text())["g/1/test"]

    run(check())


def test_saved_state_that_does_not_fit_any_more_is_said_at_the_load(run, tmp_path):
    path = tmp_path / "state.json"
    path.write_text(json.dumps({"g/1/test": {"weights": {"gone": 1}}}))

    async def check():
        with pytest.raises(StepFailed, match="node 'test': its saved state 'g/1/test' does not fit the graph any more.*'gone'"):
            await Catalog(Control()).load([a_plan(state=str(path))])

    run(check())


@pytest.mark.parametrize("saved", [5, "x", [], {"revision": "x", "weights": {"a": 1}}, {"weights": {"a": 1}, "revision": None}])
def test_saved_state_that_is_something_else_is_said_at_the_load(run, tmp_path, saved):
    path = tmp_path / "state.json"
    path.write_text(json.dumps({"g/1/test": saved}))

    async def check():
        with pytest.raises(StepFailed, match="node 'test': its saved state 'g/1/test' does not fit.*remove it to begin anew"):
            await Catalog(Control()).load([a_plan(state=str(path))])

    run(check())


@pytest.mark.parametrize("changed", [False, True])
def test_a_definition_that_was_edited_holds_unless_its_settings_were_changed_while_it_served(run, tmp_path, caplog, changed):
    place = str(tmp_path / "state.json")
    caplog.set_level("INFO", "servinggraph.control")

    async def check():
        catalog = Catalog(Control())
        await catalog.load([a_plan(state=place)])
        if changed:
            Control.change(catalog.get("g").seats["test"], {"weights": {"a": 5}})
        await catalog.stop()
        catalog = Catalog(Control())
        await catalog.load([a_plan(weights={"a": 1, "b": 9}, state=place)])
        expected = {"a": 5, "b": 0.0} if changed else {"a": 1.0, "b": 9.0}
        assert {"weights": expected} == catalog.get("g").seats["test"].router.settings()
        await catalog.stop()

    run(check())
    said = "router 'test': 'weights' is {'a': 5, 'b': 0.0}, as changed while it served"
    assert changed == (said in caplog.messages)


def test_a_load_that_failed_takes_no_part_in_the_next_one(run, tmp_path):
    path = tmp_path / "state.json"
    text = json.dumps({"g/1/test": {"weights": {"a": 3, "b": 4}, "revision": 5}})
    path.write_text(text)

    async def check():
        control = Control()
        graph = Graph("g", {"x": ("FP32", [-1])})
        other = graph.to(routers.Ab({"a": a}, {"a": 1}, state=str(path)), "test").respond().compile()
        with pytest.raises(StepFailed, match="'b', which is no branch"):
            await Catalog(control).load([other])
        catalog = Catalog(control)
        await catalog.load([a_plan(state=str(path))])
        router = catalog.get("g").seats["test"].router
        assert ({"weights": {"a": 3, "b": 4}}, 5) == (router.settings(), router.revision)
        await catalog.stop()
        assert json.loads(text) == json.loads(path.read_text())

    run(check())


@pytest.mark.parametrize("kind", ["ab", "bandit"])
def test_feedback_finds_its_request_also_when_the_graph_was_loaded_anew_meanwhile(run, tmp_path, kind):
    def plan():
        options = {"state": str(tmp_path / "state.json")}
        branches = {"a": a, "b": b}
        made = (
            routers.Ab(branches, {"a": 1, "b": 1}, **options) if kind == "ab" else routers.Bandit(branches, "ucb1", **options)
        )
        return Graph("g", {"x": ("FP32", [-1])}).to(made, "test").respond().compile()

    async def check():
        control = Control()
        old, new = Catalog(control), Catalog(control)
        await old.load([plan()])
        context = Context("r")
        await old.get("g").run({"x": X}, context)
        give_feedback(old.get("g").seats, Feedback(variant="a", reward=1.0), "g")
        await new.load([plan()])
        await old.stop()
        assert {"test": Receipt.TAKEN} == give_feedback(new.get("g").seats, Feedback(id="r", reward=1.0), "g")
        assert {"test": Receipt.DUPLICATE} == give_feedback(new.get("g").seats, Feedback(id="r", reward=1.0), "g")
        rewards = new.get("g").seats["test"].router.report()["rewards"]
        assert 2 == sum(of["count"] for of in (rewards["reward"] if kind == "ab" else rewards).values())
        await new.stop()

    run(check())
