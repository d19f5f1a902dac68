"""Trace context in a call's metadata, and the time line of a request."""

import json

import numpy as np
import pytest
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from servinggraph import Graph
from servinggraph.otel import SpanSink

pytestmark = pytest.mark.anyio

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
X = {"x": np.ones(1, np.float32)}


def a_graph():
    return Graph("g", {"x": ("FP32", [-1])}).to(lambda value: {"y": value["x"]}, name="n").respond()


@pytest.fixture
def exporter(monkeypatch):
    exporter = InMemorySpanExporter()
    monkeypatch.setattr("servinggraph.lifecycle.serving.span_sink", lambda options: SpanSink(SimpleSpanProcessor(exporter), ""))
    return exporter


@pytest.mark.parametrize("streamed", [False, True], ids=["one", "stream"])
async def test_a_call_is_part_of_its_callers_trace(live, exporter, streamed):
    metadata = [("traceparent", f"00-{TRACE}-{SPAN}-01")]
    async with live(a_graph(), otel_sample=0.0) as server:
        if streamed:
            call = server.stream(metadata=metadata)
            await call.write(server.request("g", X))
            await call.done_writing()
            assert [""] == [answer.error_message async for answer in call]
        else:
            await server.infer(server.request("g", X), metadata=metadata)
        await server.infer(server.request("g", X))
    spans = exporter.get_finished_spans()
    assert {"infer g", "encode", "decode", "n"} == {span.name for span in spans}
    assert {int(TRACE, 16)} == {span.context.trace_id for span in spans}
    assert ["grpc"] == [span.attributes["servinggraph.protocol"] for span in spans if span.name == "infer g"]


async def test_a_request_gets_its_own_time_line_if_it_asks_for_it(live):
    async with live(a_graph()) as server:
        answer = await server.infer(server.request("g", X, profile=True))
    line = json.loads(answer.parameters["profile"].string_param)
    assert ["n"] == [node["node"] for node in line["nodes"]]
