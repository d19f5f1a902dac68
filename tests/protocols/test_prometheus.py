"""Dashboard and alerts speak of metrics that there are, and a real Prometheus answers and evaluates all of them."""

from __future__ import annotations

import json
import re
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from servinggraph import Graph, routers
from servinggraph.accelerators.nvml import GpuState
from servinggraph.metrics import ALL
from servinggraph.protocols.kafka.report import Counts

DEPLOY = Path(__file__).parents[2] / "deploy"
DASHBOARD = json.loads((DEPLOY / "grafana" / "dashboard.json").read_text())
ALERTS = [
    rule for group in yaml.safe_load((DEPLOY / "prometheus" / "alerts.yml").read_text())["groups"] for rule in group["rules"]
]
QUERIES = {
    f"{panel['title']} {target['refId']}": target["expr"]
    for panel in DASHBOARD["panels"]
    for target in panel.get("targets", ())
}
USUAL = {
    "up": {"job", "instance"},
    "process_resident_memory_bytes": {"job", "instance"},
    "process_cpu_seconds_total": {"job", "instance"},
}


def known() -> dict[str, set[str]]:
    """Return every series name that a scrape may have, with its labels."""
    names = {name: set(labels) for name, labels in USUAL.items()}
    for family in ALL:
        labels = {*family.labels, "instance", "job"}
        if family.kind == "histogram":
            names |= {f"{family.name}_bucket": labels | {"le"}, f"{family.name}_count": labels, f"{family.name}_sum": labels}
        else:
            names[family.name] = labels
    return names


@pytest.mark.parametrize("expression", [*QUERIES.values(), *(rule["expr"] for rule in ALERTS)])
def test_only_metrics_and_labels_that_there_are_are_asked_for(expression):
    series = known()
    used = set(re.findall(r"\b(?:servinggraph|process)_\w+|\bup\b", expression))
    assert used
    assert used <= series.keys()
    for name, matchers in re.findall(r"(\w+)\{([^}]*)\}", expression):
        assert set(re.findall(r"(\w+)\s*[=!]", matchers)) <= series[name], name
    labels = set.union(*(series[name] for name in used))
    for grouped in re.findall(r"\b(?:by|on) \(([^)]*)\)", expression):
        assert set(re.split(r",\s*", grouped)) <= labels


@pytest.mark.parametrize("expression", QUERIES.values())
def test_nodes_and_routers_of_one_name_in_two_graphs_are_two(expression):
    for grouped in re.findall(r"\bby \(([^)]*)\)", expression):
        labels = set(re.split(r",\s*", grouped))
        assert "graph" in labels or not labels & {"node", "router"}


def test_every_metric_but_those_that_tell_nothing_over_time_is_on_the_dashboard():
    used = " ".join(QUERIES.values())
    left_out = {
        "servinggraph_kafka_waiting_bytes", "servinggraph_kafka_abandoned_records_total", "servinggraph_kafka_pauses_total",
        "servinggraph_kafka_paused_seconds_total",
    }  # fmt: skip
    assert left_out == {family.name for family in ALL if not re.search(rf"\b{family.name}\b|\b{family.name}_", used)}


def test_the_alerts_are_right_by_their_own_tests():
    for command in (["check", "config", "prometheus.yml"], ["test", "rules", "alerts_test.yml"]):
        done = subprocess.run(
            ["promtool", *command], cwd=DEPLOY / "prometheus", capture_output=True, text=True, timeout=150, check=False
        )
        assert 0 == done.returncode, done.stdout + done.stderr


def test_every_alert_has_a_test_of_its_own():
    tests = (DEPLOY / "prometheus" / "alerts_test.yml").read_text()
    assert all(f"alertname: {rule['alert']}" in tests for rule in ALERTS)


class Prometheus:
    """A Prometheus of our own, which scrapes one server twice a second.

    Args:
        folder: where its settings and data go.
        target: port of the server.
        port: its own.
    """

    def __init__(self, folder: Path, target: int, port: int) -> None:
        settings = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
        settings["global"] = {"scrape_interval": "100ms", "scrape_timeout": "100ms", "evaluation_interval": "100ms"}
        settings["rule_files"] = [str(DEPLOY / "prometheus" / "alerts.yml")]
        settings["scrape_configs"][0] |= {"static_configs": [{"targets": [f"127.0.0.1:{target}"]}]}
        settings["scrape_configs"][0] |= {"scrape_interval": "500ms", "scrape_timeout": "500ms"}
        (folder / "prometheus.yml").write_text(yaml.safe_dump(settings))
        self.port = port
        self._log = (folder / "log").open("wb")
        self._process = subprocess.Popen(
            ["prometheus", f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}",
             f"--web.listen-address=127.0.0.1:{self.port}"],
            stdout=self._log, stderr=self._log,
        )  # fmt: skip

    def get(self, path: str, **query: str) -> Any:
        with urllib.request.urlopen(
            f"http://127.0.0.1:{self.port}/api/v1/{path}?{urllib.parse.urlencode(query)}", timeout=60
        ) as answer:
            document = json.load(answer)
        assert "success" == document["status"], document
        return document["data"]

    def query(self, expression: str) -> list[Any]:
        expression = expression.replace("$__rate_interval", "1m").replace("$graph", ".*").replace("$version", ".*")
        return list(self.get("query", query=expression)["result"])

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(60)
        self._log.close()


def broken(value):
    if value["x"][0] < 0:
        raise RuntimeError("negative")
    return {"y": value["x"]}


def served() -> Graph:
    graph = Graph("shop", {"x": ("FP32", [-1])})
    graph.to(broken, name="kept", cache={"max_bytes": 100_000}, pure=True).to(
        lambda value: {"x": value["y"]}, name="batched", batch={"max_rows": 8}
    ).to(routers.Ab({"one": broken, "two": broken}, weights={"one": 1, "two": 1}), name="choose").respond()
    return graph


@pytest.fixture(scope="module")
def scraped(shared_server: Any, tmp_path_factory: Any, free_port: Any) -> Iterator[Any]:
    """Return a server under load and the Prometheus that scrapes it."""
    server = shared_server(served())
    counts = Counts(errors={"internal": 1})
    topics = {
        "graph": "shop", "ready": True, "lag": 3, "in_flight": 1, "waiting": 2, "waiting_bytes": 9, "unwritten": 0,
        "paused": False, "commit_age_s": 0.5,
    }  # fmt: skip
    server.serving.kafka = lambda: [counts.plain() | topics]
    graph = server.catalog.get("shop")
    graph.size_bytes = 1
    for code in ("deadline_exceeded", "limit_exceeded"):
        graph.traffic["http"].failed(code)
    staged = graph.seats["choose"].router
    report = staged.report
    copies = {"answered": 3, "errors": {"failed": 1}, "dropped": {"full": 1}, "agreement": {"rate": 0.9}}
    staged.report = lambda: report() | {"stage": "50%", "challengers": {"two": copies}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("servinggraph.lifecycle.metrics.gpu_states", lambda: [GpuState("cuda:0", "GPU-1", 1000, 100, 0.5)])
        prometheus = Prometheus(tmp_path_factory.mktemp("prometheus"), server.port, free_port())
        try:
            end = time.monotonic() + 120
            asked = 2
            while True:
                for number in range(20):
                    tensor = {"name": "x", "datatype": "FP32", "shape": [1], "data": [number if number < 19 else -1]}
                    server.post("/v2/models/shop/infer", {"inputs": [tensor]})
                    asked += 1
                time.sleep(0.05)
                counts.consumed, counts.produced = counts.consumed + 20, counts.produced + 20
                counts.seconds += 0.2
                try:
                    seen = prometheus.query('sum(count_over_time(servinggraph_requests_total{code="ok"}[1m]))')
                except OSError:
                    seen = []
                if seen and float(seen[0]["value"][1]) >= 4:
                    break
                assert time.monotonic() < end, prometheus.get("targets")
            yield server, prometheus, asked
        finally:
            prometheus.stop()


@pytest.mark.parametrize("title", QUERIES)
def test_every_query_of_the_dashboard_has_a_result(scraped, title, until):
    _, prometheus, _ = scraped
    result = until(lambda: prometheus.query(QUERIES[title]), QUERIES[title])  # none while the last scrape came too late
    assert all(series["value"][1] not in ("+Inf", "-Inf") for series in result)


def test_prometheus_has_counted_what_was_asked(scraped, until):
    _, prometheus, asked = scraped
    until(lambda: [str(asked)] == [series["value"][1] for series in prometheus.query("sum(servinggraph_requests_total)")])


def test_the_alerts_are_evaluated_and_quiet_ones_stay_quiet(scraped, until):
    _, prometheus, _ = scraped

    def evaluated():
        rules = [rule for group in prometheus.get("rules")["groups"] for rule in group["rules"]]
        assert {rule["alert"] for rule in ALERTS} == {rule["name"] for rule in rules}
        assert [] == [rule["lastError"] for rule in rules if rule["health"] != "ok" and "lastError" in rule]
        state = {rule["name"]: rule["state"] for rule in rules}
        loud = state.pop("ServingGraphErrors")  # 1 of 20 requests fails
        del state["ServingGraphDeadLetters"]
        return "pending" == loud and {"inactive"} == set(state.values())  # a scrape that came too late has its own alert

    until(evaluated)


@pytest.mark.parametrize("rule", ALERTS, ids=lambda rule: rule["alert"])
def test_every_alert_compares_something_that_a_server_has(scraped, rule, until):
    _, prometheus, _ = scraped
    compared = re.split(r"(?<!label) (?:>|==) [\d.]+", rule["expr"].removeprefix("absent"))[0]
    until(lambda: prometheus.query(compared), compared)


def test_numbers_in_prometheus_are_those_of_the_page(scraped, until):
    _, prometheus, _ = scraped
    rows, bucket = (
        until(lambda asked=asked: prometheus.query(f"servinggraph_batch_rows_{asked}"))
        for asked in ('count{node="batched"}', 'bucket{node="batched",le="+Inf"}')
    )
    assert np.isclose(float(rows[0]["value"][1]), float(bucket[0]["value"][1]))
