"""What steps count and observe themselves."""

import asyncio

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from servinggraph import Context, Graph
from servinggraph.metrics.steps import MOST_NAMES, StepMeter, StepNames

X = {"x": np.ones(1, np.float32)}


def samples(page):
    return {
        sample.name: (sample.labels, sample.value)
        for family in text_string_to_metric_families(page)
        for sample in family.samples
        if sample.name.startswith("servinggraph_step_") and sample.labels.get("le") in (None, "0.5")
    }


def counting(value, context: Context):
    context.count("rows_seen", len(value["x"]))
    context.observe("confidence", 0.4)
    return {"y": value["x"]}


@pytest.mark.parametrize(
    "options", [{}, {"batch": {"max_rows": 4}}, {"run": "thread"}], ids=["alone", "batched", "in a thread"]
)
def test_a_step_counts_and_observes_under_names_of_its_own(options):
    graph = Graph("g", {"x": ("FP32", [-1])})
    graph.to(counting, name="n", **options).respond()

    async def check():
        async with graph.mock() as server:
            for _ in range(3):
                await server.infer(X)
            found = samples((await server.request("GET", "/metrics")).body.decode())
        place = {"graph": "g", "version": "1", "node": "n"}
        assert (place, 3) == found["servinggraph_step_rows_seen_total"]
        assert (place, 3) == found["servinggraph_step_confidence_count"]
        assert place | {"le": "0.5"} == found["servinggraph_step_confidence_bucket"][0]
        assert pytest.approx(1.2) == found["servinggraph_step_confidence_sum"][1]

    asyncio.run(check())


def test_where_metrics_are_off_a_step_counts_for_nobody():
    graph = Graph("g", {"x": ("FP32", [-1])})
    graph.to(counting, name="n").respond()
    with graph.mock(metrics="off") as server:
        assert server.infer(X).outputs["y"].tolist() == [1.0]


def test_names_are_bounded_and_a_name_is_of_one_kind(caplog):
    names = StepNames()
    meter = StepMeter(names)
    for name in ("ok", "-", "with space", "ends_total", "9"):
        meter.count(name, 1)
    meter.observe("ok", 1)
    meter.count("ok", -1)
    for number in range(2 * MOST_NAMES):
        meter.observe(f"name_{number}", 1)
    assert MOST_NAMES == len(names._families)
    assert 1 == meter._counted[names.family("ok", counts=True)]
    assert "'with space' of a step is dropped" in caplog.text
    assert "counted in one place and observed in another" in caplog.text
    assert 1 == caplog.text.count("names already")


def test_a_router_that_compares_its_branches_hears_what_a_step_observes_too():
    heard = []

    class Listener:
        def count(self, name, amount):
            heard.append((name, amount))

        def observe(self, name, value):
            heard.append((name, value))

    graph = Graph("g", {"x": ("FP32", [-1])})
    graph.to(counting, name="n").respond()

    async def check():
        async with graph.mock() as server:
            served = server.serving.catalog.get("g")
            await served.run(X, Context().metered(Listener()))
            assert [("rows_seen", 1), ("confidence", 0.4)] == heard
            assert 1 == samples((await server.request("GET", "/metrics")).body.decode())["servinggraph_step_rows_seen_total"][1]

    asyncio.run(check())
