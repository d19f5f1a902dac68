"""What is read for metrics: over reloads, unloads and routers; and docs/metrics.md says all of it."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import numpy as np

from servinggraph import Context, Graph, routers
from servinggraph.accelerators.nvml import GpuState
from servinggraph.lifecycle import infer
from servinggraph.lifecycle.metrics import read_devices
from servinggraph.messages import InferenceRequest
from servinggraph.metrics import ALL, families as of
from servinggraph.protocols.kafka.report import Counts

PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"
X = {"x": np.ones(1, np.float32)}


def double(value):
    return {"y": value["x"] * 2}


def total(readings, family, **labels):
    """Return the sum of a counter over the series with these labels."""
    series = readings.values.get(family, {})
    return sum(
        value for texts, value in series.items() if labels.items() <= dict(zip(family.labels, texts, strict=True)).items()
    )


def of_version(readings, name):
    """Return the metrics that have a series of a graph."""
    return {family for family, series in readings.values.items() if any(name in texts for texts in series)}


def test_a_reload_goes_on_counting_and_an_unload_ends_the_series(folder, opened):
    folder.write("a", 1)
    folder.write("b", 1)

    async def check():
        async with opened() as running:
            await running.repository.load("a")
            await running.repository.load("b")
            before = 0
            for turn in range(6):
                for _ in range(turn + 1):
                    await running.ask("a")
                readings = running.serving.metrics()
                now = total(readings, of.NODE_REQUESTS, graph="a", node="n", code="ok")
                assert before + turn + 1 == now
                (series,) = [buckets for labels, buckets in readings.values[of.NODE_STAGE_SECONDS].items() if labels[0] == "a"]
                assert now == sum(series.counts)
                before = now
                folder.write("a", turn)
                await running.repository.load("a")
                assert before == total(running.serving.metrics(), of.NODE_REQUESTS, graph="a")
            await running.repository.unload("a")
            assert not of_version(running.serving.metrics(), "a")
            assert of_version(running.serving.metrics(), "b")
            await running.repository.load("a")
            await running.ask("a")
            assert before + 1 == total(running.serving.metrics(), of.NODE_REQUESTS, graph="a")

    asyncio.run(check())


def test_of_very_many_versions_one_that_is_served_all_along_goes_on_counting(folder, opened, monkeypatch):
    monkeypatch.setattr("servinggraph.lifecycle.metrics.MOST_VERSIONS", 3)
    folder.write("a", "def work(value, context):\n    context.count('seen')\n    return {'y': value['x']}\n")
    for name in "bcdef":
        folder.write(name, 1)

    async def check():
        async with opened() as running:
            await running.repository.load("a")
            for turn, name in enumerate("bcdef", 1):
                await running.ask("a")
                await running.repository.load(name)
                await running.repository.unload(name)
                readings = running.serving.metrics()
                (seen,) = [family for family in readings.values if family.name == "servinggraph_step_seen_total"]
                assert turn == total(readings, seen, graph="a")

    asyncio.run(check())


def test_a_request_that_a_replaced_graph_still_answers_is_counted(folder, opened):
    slow = "import asyncio\ngo = asyncio.Event()\nasync def work(value):\n    await go.wait()\n    return {'y': value['x'] * 0 + 1}\n"
    folder.write("a", slow)

    async def check():
        async with opened() as running:
            await running.repository.load("a")
            old = running.catalog.get("a")
            asked = asyncio.ensure_future(running.ask("a"))
            while not old.requests:
                await asyncio.sleep(0)
            folder.write("a", 2)
            await running.repository.load("a")
            await running.ask("a")
            assert 1 == total(running.serving.metrics(), of.NODE_REQUESTS, graph="a")
            old.plan.nodes[0].work._target.__globals__["go"].set()
            await asked
            assert 2 == total(running.serving.metrics(), of.NODE_REQUESTS, graph="a")

    asyncio.run(check())


def test_decisions_of_a_router_go_on_after_a_reload(folder, opened):
    place = folder.path / "a"
    place.mkdir(parents=True)
    (place / "steps.py").write_text("def work(value):\n    return {'y': value['x']}\n")
    (place / "graph.yaml").write_text(
        "inputs: {x: {datatype: FP32, shape: [-1]}}\nnodes:\n  r:\n    router: ab\n    weights: {one: 1, two: 0}\n"
        "    branches:\n      one: {step: python, call: 'steps:work'}\n      two: {step: python, call: 'steps:work'}\nanswer: r\n"
    )

    async def check():
        async with opened() as running:
            for asked in (3, 6, 9):
                await running.repository.load("a")
                for _ in range(3):
                    await infer(running.catalog.get("a"), InferenceRequest(inputs=X), Context())
                readings = running.serving.metrics()
                assert asked == total(readings, of.ROUTER_DECISIONS, router="r", branch="one")
                assert 0 == total(readings, of.ROUTER_DECISIONS, router="r", branch="two")
                assert asked == total(readings, of.NODE_REQUESTS, node="r.one", code="ok")
                assert {("a", "1", "r", "one"): 1.0, ("a", "1", "r", "two"): 0.0} == readings.values[of.ROUTER_WEIGHT]

    asyncio.run(check())


def test_what_became_of_a_challengers_copies_is_a_metric():
    graph = Graph("g", {"x": ("FP32", [-1])})
    options = {"shadow": {"max_loop_share": 1.0}}
    graph.to(routers.Champion({"one": double, "two": double}, "one", **options), name="r").respond()

    async def check():
        async with graph.mock() as server:
            assert of.SHADOW_AGREEMENT not in server.serving.metrics().values
            await server.infer(X)
            for _ in range(10):
                await asyncio.sleep(0)
            values = server.serving.metrics().values
            assert {("g", "1", "r", "two"): 1.0} == values[of.SHADOW_AGREEMENT]
            assert {"answered": 1, "failed": 0, "dropped": 0} == {
                labels[-1]: number for labels, number in values[of.SHADOW_COPIES].items()
            }

    asyncio.run(check())


def test_a_router_that_cannot_be_read_spoils_nothing_but_its_own_metrics(caplog):
    graph = Graph("g", {"x": ("FP32", [-1])})
    graph.to(routers.Ab({"one": double, "two": double}, weights={"one": 1, "two": 1}), name="r").respond()

    async def check():
        async with graph.mock() as server:
            await server.infer(X)
            for report in ({"challengers": {"x": 1}, "decisions": "none"}, {"challengers": [1]}, None):
                server.router("r").report = lambda: report  # noqa: B023
                readings = server.serving.metrics()
            server.router("r").report = lambda: 1 / 0
            for _ in range(3):
                readings = server.serving.metrics()
            assert 1 == total(readings, of.NODE_REQUESTS, node="r", code="ok")
            assert of.ROUTER_DECISIONS not in readings.values

    asyncio.run(check())
    assert 1 == caplog.text.count("router 'r' cannot be read for metrics")


class Staged:
    """What a router says that works in stages, and has challengers."""

    def report(self):
        challengers = {"two": {"answered": 3, "errors": {"failed": 1}, "dropped": {"late": 2}, "agreement": {"rate": 0.5}}}
        return {"decisions": {"one": 1}, "shares": {"one": 0.5, "two": 0.5}, "stage": "10%", "challengers": challengers}


GPU = GpuState("cuda:0", "GPU-1", 1000, 100, 0.5)
TOPICS = Counts(errors={"internal": 1}).plain() | {
    "graph": "g", "ready": True, "lag": 3, "in_flight": 1, "waiting": 2, "waiting_bytes": 9, "unwritten": 0, "paused": False,
    "commit_age_s": 0.5,
}  # fmt: skip


def test_every_metric_that_there_is_is_read_with_the_labels_that_it_declares(monkeypatch):
    graph = Graph("g", {"x": ("FP32", [-1])})
    graph.to(double, name="kept", cache={"max_bytes": 10_000}, pure=True).to(
        lambda value: {"x": value["y"]}, name="batched", batch={"max_rows": 4}
    ).to(routers.Ab({"one": double, "two": double}, weights={"one": 1, "two": 1}), name="r").respond()

    async def check():
        async with graph.mock() as server:
            await server.infer(X)
            served = server.serving.catalog.get("g")
            served.size_bytes = 1  # it may have fitted into what the process had already
            server.router("r").report = Staged().report
            server.serving.kafka = lambda: [TOPICS]
            readings = server.serving.metrics()
            monkeypatch.setattr("servinggraph.lifecycle.metrics.gpu_states", lambda: [GPU])
            read_devices(readings)
        assert set(ALL) == set(readings.values)
        for family, series in readings.values.items():
            assert all(len(family.labels) == len(labels) for labels in series), family.name

    asyncio.run(check())


def test_the_page_has_every_metric_with_kind_unit_and_labels():
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| ([\w ]+) \| (.*?) \| (.*?) \|$", PAGE.read_text(), re.MULTILINE)
    said = {name: (kind, unit, tuple(re.findall(r"`(\w+)`", labels)), meaning) for name, kind, unit, labels, meaning in rows}
    assert said == {family.name: (family.kind, family.unit, family.labels, family.help) for family in ALL}


def test_names_follow_the_rules_of_prometheus():
    for family in ALL:
        assert family.name.startswith("servinggraph_")
        assert (family.kind == "counter") == family.name.endswith("_total")
        if family.unit in ("seconds", "bytes", "ratio", "rows") and family.kind != "counter":
            assert family.name.endswith(("_seconds", "_bytes", "_ratio", "_rows", "_share")), family.name
        assert "le" not in family.labels
