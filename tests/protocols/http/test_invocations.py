"""The free-form door over real sockets: paths, headers, limits, departures."""

from __future__ import annotations

import gzip
import json
import threading
import zlib

import msgpack
import numpy as np
import pytest

from servinggraph import Body, Context, Graph, InvalidRequest, steps
from servinggraph.protocols.freeform import decode_body
from servinggraph.protocols.freeform.packing import encode_msgpack
from servinggraph.protocols.http.endpoints import invocations

JSON = {"Content-Type": "application/json"}


def graph_of(work, name="g", **options):
    graph = Graph(name, "body", **options)
    graph.to(work, "work").respond()
    return graph


def tensors_graph(name="t"):
    graph = Graph(name, {"x": ("FP32", [-1])})
    graph.to(lambda value: {"y": value["x"] * 2}, "double").respond()
    return graph


def echo(value):
    return value


def fail(value):
    raise RuntimeError("broken")


def look(value, context: Context):
    context.response_parameters["seen"] = type(value).__name__
    return {"id": context.id, "type": context.headers["content-type"]}


@pytest.fixture(scope="module")
def server(shared_server):
    return shared_server(
        graph_of(echo), graph_of(look, "look"), graph_of(fail, "fail"), tensors_graph(), max_body_bytes=100_000, invocations="g"
    )


@pytest.mark.parametrize("path", ["/invocations", "/v2/models/g/invocations", "/v2/models/g/versions/1/invocations"])
def test_a_document_goes_in_and_out(server, path):
    answer = server.post(path, b'{"a": [1, null, NaN]}', JSON)

    assert 200 == answer.status
    assert "application/json" == answer.headers["content-type"]
    assert b'{"a":[1,null,NaN]}' == answer.body


@pytest.mark.parametrize(
    ("content_type", "body"),
    [
        ("text/plain; charset=utf-8", "é".encode()),
        ("application/octet-stream", b"\x00\xff"),
        ("application/msgpack", b"\x93\x01\xc0\xc3"),
    ],
)
def test_text_bytes_and_msgpack_go_in_and_out(server, content_type, body):
    answer = server.post("/invocations", body, {"Content-Type": content_type, "Accept": content_type})

    assert 200 == answer.status
    assert content_type == answer.headers["content-type"]
    assert body == answer.body


def test_a_step_may_answer_with_a_type_of_its_own(http_server):
    server = http_server(graph_of(lambda value: Body(b"\x89PNG" + value, "image/png"), name="picture"))
    answer = server.post("/invocations", b"\x01", {"Content-Type": "image/jpeg", "Accept": "image/*"})

    assert "image/png" == answer.headers["content-type"]
    assert b"\x89PNG\x01" == answer.body


def test_the_header_names_a_graph_and_the_option_the_one_without_it(server):
    answer = server.post("/invocations", b"1", {**JSON, "X-Graph": "look", "X-Request-Id": "r-1"})

    assert {"id": "r-1", "type": "application/json"} == answer.json()
    assert "r-1" == answer.headers["x-request-id"]
    assert {"seen": "int"} == json.loads(answer.headers["x-response-parameters"])
    assert b"1" == server.post("/invocations", b"1", JSON).body


def test_a_graph_that_is_not_served_is_not_found_and_the_nearest_is_named(server):
    answer = server.post("/invocations", b"1", {**JSON, "X-Graph": "lok"})

    assert 404 == answer.status
    assert "did you mean 'look'?" in answer.error
    assert 404 == server.post("/v2/models/nobody/invocations", b"1", JSON).status
    assert 404 == server.post("/v2/models/g/versions/2/invocations", b"1", JSON).status


def test_among_several_graphs_the_caller_has_to_choose(http_server):
    server = http_server(graph_of(echo, "a"), graph_of(echo, "b"))
    answer = server.post("/invocations", b"1", JSON)

    assert 400 == answer.status
    assert "several graphs, a, b: say which with the header X-Graph" in answer.error


def test_several_versions_are_one_graph(http_server):
    server = http_server(graph_of(lambda value: 1, version="1"), graph_of(lambda value: 2, version="2"))
    assert b"2" == server.post("/invocations", b"0", JSON).body


def test_a_version_with_tensors_stays_reachable_beside_a_newer_one_with_a_body(http_server):
    tensors = Graph("g", {"x": ("FP32", [-1])}, version="1")
    tensors.to(echo).respond()
    server = http_server(tensors, graph_of(echo, version="2"))
    request = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1], "data": [1]}]}

    assert 200 == server.post("/v2/models/g/versions/1/infer", request).status
    assert "POST it to /v2/models/g/invocations" in server.post("/v2/models/g/infer", request).error


def test_an_answer_that_nobody_takes_counts_as_a_failure(server):
    def failures():
        return server.get("/v2/models/g/stats").json()["model_stats"][0]["inference_stats"]["fail"]["count"]

    before = failures()
    assert 406 == server.post("/invocations", b"1", {**JSON, "Accept": "image/png"}).status
    assert before + 1 == failures()


def test_a_graph_with_tensors_is_called_by_document_table_and_array(server):
    path = "/v2/models/t/invocations"

    assert b'{"y":[2.0,5.0]}' == server.post(path, b'{"x":[1,2.5]}', JSON).body
    assert b'{"y":[2.0,5.0]}' == server.post(path, b"x\n1\n2.5\n", {"Content-Type": "text/csv"}).body
    assert b"y\r\n2.0\r\n" == server.post(path, b'{"x":[1]}', {**JSON, "Accept": "text/csv"}).body
    answer = server.post(
        path, encode_msgpack({"x": np.ones(1, "f4")}), {"Content-Type": "application/msgpack", "Accept": "application/msgpack"}
    )
    assert {"y": msgpack.ExtType(86, b"\x04FP32\x01\x01" + bytes(7) + np.full(1, 2, "f4").tobytes())} == msgpack.unpackb(
        answer.body
    )
    assert 400 == server.post(path, b'{"x":[[1]]}', JSON).status
    assert 415 == server.post(path, b"x", {"Content-Type": "text/plain"}).status


def test_v2_inference_on_a_graph_with_a_body_says_where_to_go(server):
    for path in ("/v2/models/g/infer", "/v2/models/g/versions/1/infer"):
        answer = server.post(path, {"inputs": []})
        assert 400 == answer.status
        assert "POST it to /v2/models/g/invocations" in answer.error


def test_the_metadata_of_a_graph_with_a_body_says_so(server):
    metadata = server.get("/v2/models/g").json()

    assert [] == metadata["inputs"]
    assert {"inputs": "body"} == metadata["parameters"]
    assert "parameters" not in server.get("/v2/models/t").json()


def test_ping_tells_whether_the_server_is_ready(server):
    assert 200 == server.get("/ping").status
    server.catalog.draining = True
    try:
        assert 503 == server.get("/ping").status
    finally:
        server.catalog.draining = False


def test_only_post_is_for_invocations(server):
    for path in ("/invocations", "/v2/models/g/invocations"):
        assert 405 == server.get(path).status
    assert 405 == server.post("/ping", b"").status


@pytest.mark.parametrize(
    ("body", "headers", "status", "text"),
    [
        (b"{", JSON, 400, "JSON"),
        (b"\xc1", {"Content-Type": "application/msgpack"}, 400, "msgpack"),
        (b"a,b\n1\n", {"Content-Type": "text/csv"}, 400, "line 2"),
        (b"\xff", {"Content-Type": "text/plain"}, 400, "utf-8"),
        (b"a=1", {"Content-Type": "application/x-www-form-urlencoded"}, 415, "curl"),
        (b"x", {"Content-Type": "text/plain; charset=x-none"}, 415, "charset"),
        (b"1", {**JSON, "Accept": "image/png"}, 406, "application/json"),
        (b"[" * 101 + b"]" * 101, JSON, 400, "depth (100)"),
        (b"1" * 100_001, JSON, 413, "max_body_bytes"),
        (b"1", {**JSON, "Content-Encoding": "br"}, 501, "gzip, deflate"),
        (b"1111111111111", {**JSON, "Content-Encoding": "gzip"}, 400, "corrupt"),
        (gzip.compress(bytes(100_001)), {**JSON, "Content-Encoding": "gzip"}, 413, "max_body_bytes"),
        (b"1", {**JSON, "X-Request-Timeout-Ms": "soon"}, 400, "x-request-timeout-ms"),
    ],
)  # fmt: skip
def test_a_bad_request_is_told_what_is_wrong(server, body, headers, status, text):
    answer = server.post("/invocations", body, headers)

    assert status == answer.status
    assert text in answer.error
    assert 0 == server.in_flight


def test_a_step_that_fails_is_an_internal_error_that_names_it(server):
    answer = server.post("/v2/models/fail/invocations", b"1", JSON)

    assert 500 == answer.status
    assert "node 'work': RuntimeError: broken" == answer.error


def test_an_answer_that_cannot_be_encoded_names_its_node(http_server):
    server = http_server(graph_of(lambda value: {"a": 1j}))
    answer = server.post("/invocations", b"1", JSON)

    assert 500 == answer.status
    assert answer.error.startswith("node 'work': gave an answer")


def test_bodies_and_answers_may_be_compressed(server):
    text = json.dumps({"a": "x" * 5000}).encode()
    answer = server.post(
        "/invocations", gzip.compress(text), {**JSON, "Content-Encoding": "gzip", "Accept-Encoding": "deflate"}
    )

    assert "deflate" == answer.headers["content-encoding"]
    assert json.loads(text) == json.loads(zlib.decompress(answer.body))


def test_a_large_body_is_decoded_beside_the_event_loop(server, until):
    rows = [f"{number},x" for number in range(12_000)]
    answer = server.post("/invocations", "\n".join(["n,s", *rows]).encode(), {"Content-Type": "text/csv", "Accept": "text/csv"})

    assert 200 == answer.status
    assert "\r\n".join(["n,s", *rows, ""]).encode() == answer.body
    assert 400 == server.post("/invocations", b"[" + b"1," * 40_000, JSON).status
    until(lambda: server.in_flight == 0)


class Held:
    """A step that holds what it is called with until it is let go, and remembers."""

    def __init__(self):
        self.calls, self.cancelled, self.free = [], 0, threading.Event()

    async def wait(self, value):
        import asyncio

        self.calls.append(value)
        try:
            while not self.free.is_set():
                await asyncio.sleep(0.002)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return value


@pytest.fixture
def held():
    held = Held()
    yield held
    held.free.set()


def request(body=b"1"):
    return b"POST /invocations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (
        len(body),
        body,
    )


def test_a_client_that_leaves_cancels_the_step(http_server, held, until):
    server = http_server(graph_of(held.wait))
    connection = server.connect()
    connection.send(request())
    until(lambda: held.calls)
    connection.close()

    until(lambda: held.cancelled)
    until(lambda: server.in_flight == 0)


def test_a_full_server_says_so(http_server, held, until):
    server = http_server(graph_of(held.wait), max_in_flight=1)
    connection = server.connect()
    connection.send(request())
    until(lambda: held.calls)

    assert 503 == server.post("/invocations", b"1", JSON).status
    held.free.set()
    assert 200 == connection.answer().status
    connection.close()


def test_a_deadline_ends_the_request(http_server, held):
    server = http_server(graph_of(held.wait))
    for milliseconds in (30, 300, 3000, 30_000):  # one that takes longer to the step than it has time never gets there
        answer = server.post("/invocations", b"1", {**JSON, "X-Request-Timeout-Ms": str(milliseconds)})

        assert 504 == answer.status
        assert 0 == server.in_flight
        if held.calls:
            break
    assert len(held.calls) == held.cancelled == 1


def test_a_refusal_of_a_step_is_the_callers_mistake(http_server):
    def refuse(value):
        raise InvalidRequest("no cats")

    server = http_server(graph_of(steps.Python(refuse, run="thread")))
    answer = server.post("/invocations", b"1", JSON)

    assert 400 == answer.status
    assert "node 'work': no cats" == answer.error


def test_a_graph_is_not_unloaded_while_a_body_is_decoded_for_it(http_server, until, monkeypatch):
    decoding, go_on = threading.Event(), threading.Event()

    def slow(body, media):
        decoding.set()
        assert go_on.wait(30)
        return decode_body(body, media)

    monkeypatch.setattr(invocations, "decode_body", slow)
    server = http_server(graph_of(echo))
    graph = server.catalog.get("g")
    connection = server.connect()
    connection.send(request(b'"%b"' % (b"x" * 70_000)))
    assert decoding.wait(30)
    assert 1 == graph.requests
    go_on.set()

    assert 200 == connection.answer().status
    assert 0 == graph.requests
    connection.close()


def test_a_client_that_leaves_while_its_body_is_decoded_keeps_its_slot_until_that_has_ended(http_server, until, monkeypatch):
    decoding, go_on = threading.Event(), threading.Event()

    def slow(body, media):
        decoding.set()
        assert go_on.wait(30)
        return decode_body(body, media)

    monkeypatch.setattr(invocations, "decode_body", slow)
    calls = []
    server = http_server(graph_of(calls.append))
    graph = server.catalog.get("g")
    connection = server.connect()
    connection.send(request(b'"%b"' % (b"x" * 70_000)))
    assert decoding.wait(30)
    connection.close()
    until(lambda: graph.requests == 0)

    assert 1 == server.in_flight
    go_on.set()
    until(lambda: server.in_flight == 0)
    assert [] == calls
