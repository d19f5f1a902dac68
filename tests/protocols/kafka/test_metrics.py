"""What a scrape says of topics is what went through them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from servinggraph.metrics.exposition import write

pytestmark = pytest.mark.anyio


def _conftest():
    # By path: tests are imported with importlib, which gives files of a folder no common package.
    path = Path(__file__).with_name("conftest.py")
    return next(module for module in sys.modules.values() if getattr(module, "__file__", None) == str(path))


here = _conftest()
body, until = here.body, here.until


def strict(value):
    if value["x"][0] < 0:
        raise ValueError("negative")
    return {"y": value["x"]}


async def test_answers_dead_letters_lag_and_commits_are_those_that_there_were(kit):
    kafka = await kit.options(commit={"interval_ms": 20})
    async with kit.serve(strict, kafka) as served:
        good, bad, nonsense = 40, 3, 2
        records = [*(body(1) for _ in range(good)), *(body(-1) for _ in range(bad)), *(b"{" for _ in range(nonsense))]
        await kit.send(served.input, *records)
        await until(lambda: served.report["produced"] == good and served.report["dead_letters"] == bad + nonsense)
        assert len(records) == await served.committed(at_least=len(records))
        await until(lambda: served.report["commits"] > 0)
        text = write(served.serving.metrics(), "")[0].decode()

    found = {
        (sample.name, sample.labels.get("code")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name.startswith("servinggraph_kafka_") or sample.labels.get("protocol") == "kafka"
    }
    assert good == found["servinggraph_requests_total", "ok"]
    assert good == found["servinggraph_request_seconds_count", None]
    assert bad == found["servinggraph_requests_total", "internal"]
    assert nonsense == found["servinggraph_requests_total", "invalid_request"]
    assert len(records) == found["servinggraph_kafka_consumed_records_total", None]
    assert good == found["servinggraph_kafka_produced_records_total", None]
    assert bad + nonsense == found["servinggraph_kafka_dead_letters_total", None]
    assert bad == found["servinggraph_kafka_errors_total", "internal"]
    assert 1 == found["servinggraph_kafka_ready", None]
    assert 0 == found["servinggraph_kafka_in_flight_records", None]
    assert 0 < found["servinggraph_kafka_commits_total", None]
    assert 0 < found["servinggraph_kafka_rebalances_total", None]
