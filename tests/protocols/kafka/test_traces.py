"""One request through HTTP, a remote V2 step, a second server, a topic and the graph behind it is one trace."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from servinggraph import Graph, steps
from servinggraph.otel import SpanSink

pytestmark = pytest.mark.anyio

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
INPUTS = {"x": ("FP32", [-1])}
TENSOR = {"name": "x", "datatype": "FP32", "shape": [1], "data": [1]}


def _conftest():
    # By path: tests are imported with importlib, which gives files of a folder no common package.
    path = Path(__file__).with_name("conftest.py")
    return next(module for module in sys.modules.values() if getattr(module, "__file__", None) == str(path))


def double(value):
    return {"x": value["x"] * 2}


@pytest.fixture
def exporter(monkeypatch):
    exporter = InMemorySpanExporter()

    def sink(options):
        made = SpanSink(SimpleSpanProcessor(exporter), "")
        made.close = lambda: None
        return made

    monkeypatch.setattr("servinggraph.lifecycle.serving.span_sink", sink)
    return exporter


async def test_one_request_is_one_trace_over_all_of_them(kit, http_server, exporter):
    until = _conftest().until
    kafka = await kit.options()
    async with kit.serve(Graph("last", INPUTS, kafka=kafka).to(double, "step").respond(), kafka, otel_sample=0.0) as served:
        second = Graph("second", INPUTS)
        second.to(steps.Publish(topic=served.input, brokers=kit.address, format="v2-json"), name="send").respond()
        behind = http_server(second, otel_sample=0.0)
        first = Graph("first", INPUTS)
        first.to(
            steps.V2(
                f"http://{behind.url}", model="second", outputs={"x": {"datatype": "FP32", "shape": [-1]}}, metadata="ignore"
            ),
            name="call",
        ).respond()
        front = http_server(first, otel_sample=0.0)
        answer = await _post(front, {"traceparent": f"00-{TRACE}-{SPAN}-01"})
        assert 200 == answer.status, answer.body
        (record,) = await kit.read(served.output, 1)
        whole = {"infer first", "infer second", "infer last"}  # each ends after its answer is on its way
        await until(lambda: whole <= {span.name for span in exporter.get_finished_spans()})

    spans = exporter.get_finished_spans()
    assert {int(TRACE, 16)} == {span.context.trace_id for span in spans}
    names = {span.context.span_id: span.name for span in spans}
    tree = {span.name: names.get(span.parent.span_id) for span in spans if span.name not in ("decode", "encode")}
    assert {
        "infer first": None, "call": "infer first", "infer second": "call", "send": "infer second", "infer last": "send",
        "step": "infer last",
    } == tree  # fmt: skip
    kinds = {span.name: span.kind.name for span in spans}
    assert {"call": "CLIENT", "send": "CLIENT", "infer last": "CONSUMER"} == {
        name: kinds[name] for name in ("call", "send", "infer last")
    }
    last = next(span.context.span_id for span in spans if span.name == "infer last")
    assert f"00-{TRACE}-{last:016x}-01" == dict(record.headers)["traceparent"].decode()


async def _post(server, headers):
    return await asyncio.to_thread(server.post, "/v2/models/first/infer", {"inputs": [TENSOR]}, headers)
