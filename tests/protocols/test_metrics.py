"""A scrape says of each protocol exactly what a load generator has seen: answers, errors by code, refusals, departures."""

import asyncio
import json
import threading
from collections import Counter

import grpc
import numpy as np
import pytest
import tritonclient.grpc.service_pb2 as triton
from prometheus_client.parser import text_string_to_metric_families

from servinggraph import Context, Graph
from servinggraph.errors import ServingGraphError
from servinggraph.metrics.exposition import write

HANGING, MIXED, CROWD = 6, 56, 40
MAX_IN_FLIGHT = 16
LATE_MS = 150
KINDS = ("ok", "ok", "bad", "fails", "late", "unknown", "ok")


reached = Counter()  # requests at the node, by kind: a deadline that passes before, on a busy machine, is none of the node's
full = threading.Event()


async def work(value, context: Context):
    kind = str(context.parameters.get("kind", "ok"))
    reached[kind] += 1
    if kind == "fails":
        raise RuntimeError("broken")
    if kind in ("late", "hangs"):
        await asyncio.Event().wait()
    while kind == "slow" and not full.is_set():
        await asyncio.sleep(0.002)
    await asyncio.sleep(0)
    return {"y": value["x"] * 2}


def graph():
    made = Graph("load", {"x": ("FP32", [-1])})
    made.to(work, name="work").to(lambda value: {"y": value["y"]}, name="rows", batch={"max_rows": 4}).respond()
    return made


def scrape(text):
    """Return every sample: (name, labels) to value."""
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def summed(samples, name, label, **labels):
    """Return the sums of a metric by one of its labels."""
    sums = Counter()
    for (sample, pairs), value in samples.items():
        if sample == name and labels.items() <= dict(pairs).items():
            sums[dict(pairs).get(label, "")] += int(value)
    return +sums


class Load:
    """Requests of all kinds at once, and what became of them; a subclass sends one."""

    protocol = ""

    def __init__(self):
        self.seen = Counter()
        reached.clear()
        full.clear()

    async def send(self, kind):
        """Send a request; return the code that its sender is told, `cancelled` for none."""
        raise NotImplementedError

    async def one(self, kind):
        try:
            self.seen[await self.send(kind)] += 1
        except asyncio.CancelledError:
            self.seen["cancelled"] += 1
            raise

    async def run(self, in_flight):
        async with asyncio.timeout(120):
            hanging = [asyncio.ensure_future(self.one("hangs")) for _ in range(HANGING)]
            while in_flight() < HANGING:
                await asyncio.sleep(0.001)
            for begin in range(0, MIXED, 8):
                await asyncio.gather(*(self.one(KINDS[i % len(KINDS)]) for i in range(begin, begin + 8)))
            crowd = asyncio.gather(*(self.one("slow") for _ in range(CROWD)))
            while not self.seen["limit_exceeded"] and not crowd.done():
                await asyncio.sleep(0.001)
            full.set()
            await crowd
            for task in hanging:
                task.cancel()
            await asyncio.wait(hanging)
            while in_flight():
                await asyncio.sleep(0.001)

    def check(self, text):
        samples = scrape(text)
        assert self.seen == summed(samples, "servinggraph_requests_total", "code", protocol=self.protocol)
        assert {"ok", "invalid_request", "internal", "deadline_exceeded", "cancelled"} <= self.seen.keys()
        assert HANGING == self.seen["cancelled"]
        ok = self.seen["ok"]
        for name in ("request_seconds_count", "request_stage_seconds_count"):
            of = {"stage": "encode"} if "stage" in name else {}
            found = summed(samples, f"servinggraph_{name}", "protocol", protocol=self.protocol, **of)
            assert {self.protocol: ok} == found
        at_work = {code: self.seen[code] for code in ("ok", "internal", "cancelled")}
        assert +Counter(at_work, deadline_exceeded=reached["late"]) == summed(
            samples, "servinggraph_node_requests_total", "code", node="work"
        )
        assert {"rows": ok} == summed(samples, "servinggraph_batch_rows_sum", "node")
        for stage in ("queue", "batch_wait", "compute"):
            assert {"rows": ok} == summed(samples, "servinggraph_node_stage_seconds_count", "node", node="rows", stage=stage)
        assert 0 == samples["servinggraph_in_flight_requests", ()]
        assert 0 == samples["servinggraph_graph_in_flight_requests", (("graph", "load"), ("version", "1"))]


class MockLoad(Load):
    protocol = "mock"

    def __init__(self, server):
        super().__init__()
        self.server = server

    async def send(self, kind):
        if kind == "unknown":  # the mock server has one graph, and is never asked for another
            return await self.send("ok")
        inputs = {"z": [1]} if kind == "bad" else {"x": np.ones(1, np.float32)}
        try:
            await self.server.infer(inputs, parameters={"kind": kind}, timeout_s=LATE_MS / 1e3 if kind == "late" else None)
        except ServingGraphError as error:
            return error.code.value
        return "ok"


class HttpLoad(Load):
    protocol = "http"
    codes = {
        200: "ok",
        400: "invalid_request",
        404: "not_found",
        500: "internal",
        503: "limit_exceeded",
        504: "deadline_exceeded",
    }

    def __init__(self, port):
        super().__init__()
        self.port = port

    async def send(self, kind):
        tensor = {"name": "z" if kind == "bad" else "x", "datatype": "FP32", "shape": [1], "data": [1]}
        body = json.dumps({"inputs": [tensor], "parameters": {"kind": kind}}).encode()
        path = f"/v2/models/{'nobody' if kind == 'unknown' else 'load'}/infer"
        limit = f"X-Request-Timeout-Ms: {LATE_MS}\r\n" if kind == "late" else ""
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{limit}Content-Length: {len(body)}\r\n\r\n"
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            writer.write(head.encode() + body)
            answer = await reader.read()
        finally:
            writer.close()
        return self.codes[int(answer.split()[1])]


class GrpcLoad(Load):
    protocol = "grpc"
    codes = {
        grpc.StatusCode.INVALID_ARGUMENT: "invalid_request",
        grpc.StatusCode.NOT_FOUND: "not_found",
        grpc.StatusCode.INTERNAL: "internal",
        grpc.StatusCode.UNAVAILABLE: "limit_exceeded",
        grpc.StatusCode.DEADLINE_EXCEEDED: "deadline_exceeded",
    }

    def __init__(self, channel):
        super().__init__()
        self.call = channel.unary_unary(
            "/inference.GRPCInferenceService/ModelInfer",
            triton.ModelInferRequest.SerializeToString,
            triton.ModelInferResponse.FromString,
        )

    async def send(self, kind):
        message = triton.ModelInferRequest(model_name="nobody" if kind == "unknown" else "load")
        message.inputs.add(name="z" if kind == "bad" else "x", datatype="FP32", shape=[1])
        message.raw_input_contents.append(np.ones(1, np.float32).tobytes())
        message.parameters["kind"].string_param = kind
        if kind == "late":  # a gRPC deadline would end the call on the client's side at once
            message.parameters["timeout"].int64_param = LATE_MS * 1000
        try:
            await self.call(message)
        except grpc.aio.AioRpcError as error:
            return self.codes[error.code()]
        return "ok"


def test_of_the_mock_server():
    async def check():
        async with graph().mock(max_in_flight=MAX_IN_FLIGHT) as server:
            load = MockLoad(server)
            await load.run(lambda: server.in_flight)
            assert load.seen["limit_exceeded"]
            load.check((await server.request("GET", "/metrics")).body.decode())

    asyncio.run(check())


def test_of_http(http_server):
    server = http_server(graph(), max_in_flight=MAX_IN_FLIGHT)
    load = HttpLoad(server.port)
    asyncio.run(load.run(lambda: server.in_flight))
    assert load.seen["limit_exceeded"]
    assert load.seen["not_found"]
    load.check(server.get("/metrics").body.decode())


def test_of_grpc(grpc_server):
    server = grpc_server(graph(), max_in_flight=MAX_IN_FLIGHT)

    async def check():
        async with grpc.aio.insecure_channel(server.url) as channel:
            load = GrpcLoad(channel)
            await load.run(lambda: server.in_flight)
            return load

    load = asyncio.run(check())
    assert load.seen["limit_exceeded"]
    assert load.seen["not_found"]
    load.check(write(server.serving.metrics(), "")[0].decode())


def test_of_streams_over_grpc_each_request_counts(grpc_server):
    server = grpc_server(graph())

    async def check():
        async with grpc.aio.insecure_channel(server.url) as channel:
            call = channel.stream_stream(
                "/inference.GRPCInferenceService/ModelStreamInfer",
                triton.ModelInferRequest.SerializeToString,
                triton.ModelStreamInferResponse.FromString,
            )()
            for kind in ("ok", "ok", "fails", "unknown"):
                message = triton.ModelInferRequest(model_name="nobody" if kind == "unknown" else "load")
                message.inputs.add(name="x", datatype="FP32", shape=[1])
                message.raw_input_contents.append(np.ones(1, np.float32).tobytes())
                message.parameters["kind"].string_param = kind
                await call.write(message)
            await call.done_writing()
            return [answer.error_message async for answer in call]

    errors = asyncio.run(check())
    assert [False, False, True, True] == [bool(error) for error in errors]
    samples = scrape(write(server.serving.metrics(), "")[0].decode())
    assert {"ok": 2, "internal": 1, "not_found": 1} == summed(samples, "servinggraph_requests_total", "code", protocol="grpc")


def test_feedback_over_grpc_is_no_request(grpc_server):
    server = grpc_server(graph())

    async def check():
        async with grpc.aio.insecure_channel(server.url) as channel:
            load = GrpcLoad(channel)
            message = triton.ModelInferRequest(model_name="load")
            message.parameters["feedback_id"].string_param = "nobody"
            with pytest.raises(grpc.aio.AioRpcError):
                await load.call(message)

    asyncio.run(check())
    samples = scrape(write(server.serving.metrics(), "")[0].decode())
    assert {} == summed(samples, "servinggraph_requests_total", "code", protocol="grpc")


def test_of_free_form_requests(http_server):

    body = Graph("body", "body")
    body.to(lambda value: {"length": len(value)}, name="n").respond()
    server = http_server(body)
    server.post("/v2/models/body/invocations", b"abc", {"content-type": "text/plain"})
    server.post("/v2/models/body/invocations", b"abc", {"content-type": "text/plain", "accept": "image/png"})
    server.post("/v2/models/body/infer", {"inputs": []})
    server.post("/v2/models/other/generate", {})
    samples = scrape(server.get("/metrics").body.decode())
    counted = summed(samples, "servinggraph_requests_total", "code", protocol="http")
    assert {"ok": 1, "not_acceptable": 1, "invalid_request": 1, "not_found": 1} == counted


def test_a_request_that_its_graph_has_no_answer_for_counts_for_that_graph(http_server):
    def items(value):
        yield {"y": value["x"]}

    streaming = Graph("many", {"x": ("FP32", [-1])})
    streaming.to(items, name="items").respond()
    free = Graph("free", "body")
    free.to(lambda value: value, name="same").respond()
    server = http_server(streaming, free)
    for name in ("many", "free"):
        server.post(f"/v2/models/{name}/infer", {"inputs": []})
    samples = scrape(server.get("/metrics").body.decode())
    for name, code in {"many": "unsupported", "free": "invalid_request", "": None}.items():
        assert ({code: 1} if code else {}) == summed(samples, "servinggraph_requests_total", "code", graph=name)


@pytest.mark.parametrize(
    "accept, begins", [("", "text/plain"), ("application/openmetrics-text", "application/openmetrics-text")]
)
def test_the_form_follows_the_accept_header(http_server, accept, begins):
    server = http_server(graph())
    connection = server.connect()
    connection.send(f"GET /metrics HTTP/1.1\r\nHost: x\r\nAccept: {accept}\r\n\r\n".encode())
    answer = connection.answer()
    connection.close()
    assert 200 == answer.status
    assert answer.headers["content-type"].startswith(begins)
    assert (b"# EOF" in answer.body) == bool(accept)


def test_where_metrics_are_off_nothing_is_measured_and_there_is_no_page(http_server):
    server = http_server(graph(), metrics="off")
    load = HttpLoad(server.port)
    assert "ok" == asyncio.run(load.send("ok"))
    assert 404 == server.get("/metrics").status
    served = server.catalog.get("load")
    assert served.traffic is None
    assert all(node.durations is None for node in served.executor.statistics.nodes.values())
    assert {} == server.serving.metrics().values
