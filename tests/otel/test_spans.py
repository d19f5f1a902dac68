"""A request as spans: itself, its codec, its nodes, the batches that it was in."""

from __future__ import annotations

import asyncio
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.trace import SpanKind, StatusCode

from servinggraph import Graph, routers
from servinggraph.spans import SpanTrace, parse_traceparent
from servinggraph.tracing import NODE_STAMPS

BODY = json.dumps({"id": "r-1", "inputs": [{"name": "x", "datatype": "FP32", "shape": [1], "data": [1]}]}).encode()
BAD = BODY.replace(b"[1]}]", b"[-1]}]")
TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


def positive(value):
    if value["x"][0] < 0:
        raise RuntimeError("negative")
    return {"x": value["x"]}


async def later(value):
    await asyncio.sleep(0)
    return {"x": value["x"]}


def two(value):
    yield {"x": value["x"]}
    yield {"x": value["x"] + 1}


def a_graph():
    graph = Graph("g", {"x": ("FP32", [-1])})
    graph.to(positive, name="check").to(later, name="batched", batch={"max_rows": 8, "max_delay_ms": 1}).to(
        routers.Ensemble({"one": positive, "two": later}, combine="mean"), name="both"
    ).respond()
    return graph


def ask(server, body=BODY, **headers):
    return server.request("POST", "/v2/models/g/infer", body, headers)


def traced(graph=None, **options):
    return (graph or a_graph()).mock(otel="on", **{"otel_sample": 1.0, **options})


def test_every_node_has_a_span_inside_the_request_and_a_branch_inside_its_router(spans):
    with traced() as server:
        assert 200 == ask(server).status
    assert {
        "infer g": "", "decode": "infer g", "encode": "infer g", "check": "infer g", "batched": "infer g",
        "batch batched": "batched", "both": "infer g", "both.one": "both", "both.two": "both",
    } == spans.tree  # fmt: skip
    root = spans.named("infer g")
    assert SpanKind.SERVER == root.kind
    assert {"servinggraph.graph": "g", "servinggraph.version": "1", "servinggraph.protocol": "http"} | {
        "servinggraph.request_id": "r-1"
    } == dict(root.attributes)
    assert ("servinggraph", "1.2.3") == tuple(root.resource.attributes[f"service.{key}"] for key in ("name", "version"))
    for span in spans.all:
        assert span.context.trace_id == root.context.trace_id
        assert root.start_time <= span.start_time <= span.end_time <= root.end_time


def test_requests_of_one_batch_are_linked_to_it_and_it_to_them(spans):
    graph = Graph("g", {"x": ("FP32", [-1])})
    graph.to(later, name="n", batch={"max_rows": 3, "max_delay_ms": 60_000, "wait_when_idle": True}).respond()

    async def check():
        async with traced(graph) as server:
            await asyncio.gather(*(ask(server) for _ in range(3)))

    asyncio.run(check())
    members = [span for span in spans.all if span.name == "n"]
    batch = spans.named("batch n")
    assert 3 == len({span.context.trace_id for span in members})
    assert {span.context.span_id for span in members} == {link.context.span_id for link in batch.links}
    assert {batch.context.span_id} == {link.context.span_id for span in members for link in span.links}
    assert {3} == {span.attributes["servinggraph.batch.rows"] for span in [*members, batch]}


@pytest.mark.parametrize("sample, flag, seen", [(0.0, "01", True), (1.0, "00", False), (0.0, None, False), (1.0, None, True)])
def test_a_caller_that_traces_decides_else_chance_does(spans, sample, flag, seen):
    headers = {"traceparent": f"00-{TRACE}-{SPAN}-{flag}", "tracestate": "a=1,b=2"} if flag else {}
    with traced(otel_sample=sample) as server:
        ask(server, **headers)
    assert seen == bool(spans.all)
    if seen and flag:
        root = spans.named("infer g")
        assert (int(TRACE, 16), int(SPAN, 16)) == (root.context.trace_id, root.parent.span_id)
        assert root.parent.is_remote
        assert "1" == root.context.trace_state["a"]


def test_a_failure_is_on_the_node_and_on_the_request(spans):
    with traced() as server:
        assert 500 == ask(server, BAD).status
        assert 400 == ask(server, b"{").status
    node = spans.named("check")
    assert (StatusCode.ERROR, "RuntimeError: negative") == (node.status.status_code, node.status.description)
    failed, unread = [span for span in spans.all if span.name == "infer g"]
    assert ("internal", "check") == (failed.attributes["error.type"], failed.attributes["servinggraph.error_node"])
    assert StatusCode.ERROR == unread.status.status_code
    assert "invalid_request" == unread.attributes["error.type"]


def test_what_is_off_costs_a_request_nothing():
    with a_graph().mock() as server:
        assert server._server.serving.catalog.get("g").tracer is None
        assert server._server.serving.spans is None


def test_triton_traces_and_spans_are_recorded_side_by_side(spans, tmp_path):
    with traced(trace_file=str(tmp_path / "t.json")) as server:
        server.request("POST", "/v2/trace/setting", b'{"trace_level": ["TIMESTAMPS"], "trace_rate": "1"}')
        ask(server)
    names = {entry["model_name"] for entry in json.loads((tmp_path / "t.json").read_text()) if "model_name" in entry}
    assert {"g", "g.check", "g.batched", "g.both", "g.both.one", "g.both.two"} == names
    assert "batch batched" in spans.tree


def test_free_form_requests_and_streams_have_spans_too(spans):
    body = Graph("g", "body")
    body.to(lambda value: value, name="n").respond()
    with traced(body) as server:
        assert 200 == server.request("POST", "/invocations", b"{}", {"content-type": "application/json"}).status
    assert "n" in spans.tree
    spans.exporter.clear()
    many = Graph("g", {"x": ("FP32", [-1])})
    many.to(two, name="n").respond()
    with traced(many) as server:
        assert 200 == server.request("POST", "/v2/models/g/infer_stream", BODY).status
    assert {"infer g": "", "decode": "infer g", "encode": "infer g", "n": "infer g"} == spans.tree


@pytest.mark.parametrize(
    "text",
    ["", "00", f"00-{TRACE}-{SPAN}", f"ff-{TRACE}-{SPAN}-01", f"00-{'0' * 32}-{SPAN}-01", f"00-{TRACE}-{'0' * 16}-01",
     f"00-{TRACE.upper()}-{SPAN}-01", f"00-{TRACE}-{SPAN}-01-more", b"\xff"],
)  # fmt: skip
def test_a_header_that_is_none_is_ignored(text):
    assert parse_traceparent(text) is None


def test_a_later_version_of_the_header_is_read_as_far_as_it_is_known():
    assert parse_traceparent(f"01-{TRACE}-{SPAN}-01-more") == (int(TRACE, 16), int(SPAN, 16), True)


@pytest.mark.parametrize(
    ("state", "told"),
    [
        ("a=1,b=2", "a=1,b=2"),
        ("a=1,\tb=2", "a=1,\tb=2"),
        ("a=é", None),
        ("a=1\r\nx-evil: 1", None),
        ("a=\x00", None),
        (f"a=1,b={'x' * 600}", "a=1"),
        (",".join(f"v{number}={'x' * 100}" for number in range(9)), ",".join(f"v{number}={'x' * 100}" for number in range(4))),
        (f"a={'x' * 600}", None),
    ],
)
def test_of_a_tracestate_goes_on_what_a_header_can_hold_in_whole_entries(state, told):
    trace = SpanTrace("g", "1", [].extend, parse_traceparent(f"00-{TRACE}-{SPAN}-01"), state)
    assert told == trace.headers("node").get("tracestate")


def test_whoever_was_called_first_by_a_node_that_ran_again_has_a_parent_too():
    collected = []
    trace = SpanTrace("g", "1", collected.extend, None)
    trace.stamp("HTTP_RECV_START")
    trace.begin({})
    told = [trace.headers("call")["traceparent"].split("-")[2] for _ in range(3)]
    trace.node("call", zip(NODE_STAMPS, [1] * 7, strict=True))
    trace.end({})
    trace.finish("", "HTTP_SEND_END")
    by_id = {f"{span.span_id:016x}": span for span in collected}
    assert ["attempt at call", "attempt at call", "call"] == [by_id[one].name for one in told]
    assert {by_id[told[-1]].span_id} == {by_id[one].parent_id for one in told[:-1]}


def test_spans_arrive_at_a_collector(monkeypatch):
    """The exporter's own way: OTLP over HTTP, protobuf."""
    received = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self):
            received.append((self.path, self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    collector = HTTPServer(("127.0.0.1", 0), Collector)
    thread = threading.Thread(target=collector.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment=test")
    try:
        with traced(otel_endpoint=f"http://127.0.0.1:{collector.server_port}") as server:
            ask(server)
    finally:
        collector.shutdown()
        collector.server_close()
        thread.join()
    assert {"/v1/traces"} == {path for path, _ in received}
    resources = [each for _, body in received for each in ExportTraceServiceRequest.FromString(body).resource_spans]
    for resource in resources:
        attributes = {pair.key: pair.value.string_value for pair in resource.resource.attributes}
        assert ("servinggraph", "test") == (attributes["service.name"], attributes["deployment.environment"])
    names = {span.name for resource in resources for scope in resource.scope_spans for span in scope.spans}
    assert {"infer g", "both.one", "batch batched"} <= names


def test_a_request_gets_its_own_time_line_if_it_asks_for_it():
    async def check():
        async with a_graph().mock() as server:
            answer = await server.infer(x=np.ones(2, np.float32), parameters={"profile": True})
            plain = await server.infer(x=np.ones(2, np.float32))
        line = json.loads(answer.parameters["profile"])
        assert "profile" not in plain.parameters
        assert ["check", "batched"] == [node["node"] for node in line["nodes"]][:2]
        assert {"both", "both.one", "both.two"} == {node["node"] for node in line["nodes"][2:]}
        batched = line["nodes"][1]
        assert (2, 1) == (batched["batch_rows"], batched["batch_requests"])
        assert all(0 <= node["compute_us"] <= line["run_us"] for node in line["nodes"])
        assert 0 <= line["decode_us"] <= line["nodes"][0]["at_us"]

    asyncio.run(check())


def test_a_time_line_comes_over_the_wire_as_a_text():
    with a_graph().mock() as server:
        asked = json.loads(BODY) | {"parameters": {"profile": True}}
        answer = ask(server, json.dumps(asked).encode()).json()
    assert "check" == json.loads(answer["parameters"]["profile"])["nodes"][0]["node"]
