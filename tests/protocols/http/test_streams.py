"""Streams over real sockets: item by item, at the client's pace, until it leaves; errors; old and odd clients."""

from __future__ import annotations

import asyncio
import gzip
import json
import threading

import numpy as np
import pytest

from servinggraph import Graph, InvalidRequest, steps
from servinggraph.interfaces import FrontEndOptions
from servinggraph.lifecycle import Serving
from servinggraph.protocols.http import departures
from servinggraph.protocols.http.server import HttpFrontEnd

STREAM = "/v2/models/g/generate_stream"
SINGLE = "/v2/models/g/generate"


def request(path=STREAM, document=None, headers="", version="1.1", method="POST"):
    body = json.dumps({"x": 3} if document is None else document).encode()
    return f"{method} {path} HTTP/{version}\r\nHost: x\r\nContent-Length: {len(body)}\r\n{headers}\r\n".encode() + body


def graph_of(step, **options):
    return Graph("g", {"x": ("INT32", [-1])}, **options).to(step, "count").respond()


def count(value):
    for number in range(int(value["x"][0])):
        yield {"y": np.array([number])}


class Gated:
    """A generator that makes an item when told to, and remembers its end."""

    def __init__(self):
        self.made = 0
        self.ended = 0
        self.allowed = 0

    async def items(self, value):
        try:
            while True:
                while self.made >= self.allowed:
                    await asyncio.sleep(0.002)
                self.made += 1
                yield {"y": np.array([self.made])}
        finally:
            self.ended += 1


@pytest.fixture(scope="module")
def counting(shared_server):
    return shared_server(graph_of(count))


@pytest.fixture
def gated():
    return Gated()


class Reader:
    """Reads a stream from a connection as it comes."""

    def __init__(self, server, data=None):
        self.connection = server.connect()
        self.left = b""
        if data is not None:
            self.send(data)

    def send(self, data):
        self.connection.send(data)
        return self

    def _until(self, mark):
        while mark not in self.left:
            more = self.connection.socket.recv(1 << 16)
            assert more, self.left
            self.left += more
        part, _, self.left = self.left.partition(mark)
        return part

    def head(self):
        line, *fields = self._until(b"\r\n\r\n").decode().split("\r\n")
        self.headers = {name.lower(): value.strip() for name, _, value in (field.partition(":") for field in fields)}
        return int(line.split()[1])

    def chunk(self):
        """Return the next chunk's data; empty at the end."""
        size = int(self._until(b"\r\n"), 16)
        while len(self.left) < size + 2:
            more = self.connection.socket.recv(1 << 16)
            assert more, self.left
            self.left += more
        data, end, self.left = self.left[:size], self.left[size : size + 2], self.left[size + 2 :]
        assert b"\r\n" == end
        return data

    def event(self):
        """Return the next event, which is a chunk of its own; None at the end."""
        data = self.chunk()
        if not data:
            return None
        assert (b"data: ", b"\n\n", 2) == (data[:6], data[-2:], data.count(b"\n"))
        return json.loads(data[6:])

    def rest(self):
        events = []
        while (event := self.event()) is not None:
            events.append(event)
        return events

    def close(self):
        self.connection.close()


def read(server, data):
    reader = Reader(server, data)
    try:
        status = reader.head()
        return status, reader.headers, reader.rest()
    finally:
        reader.close()


def whole(server, data):
    connection = server.connect()
    try:
        connection.send(data)
        return connection.answer()
    finally:
        connection.close()


def test_events_come_as_the_extension_says(counting):
    server = counting
    status, headers, events = read(server, request(document={"x": 2, "id": "r"}))

    assert (200, "text/event-stream; charset=utf-8", "chunked") == (
        status, headers["content-type"], headers["transfer-encoding"],
    )  # fmt: skip
    assert "content-encoding" not in headers
    assert [{"model_name": "g", "model_version": "1", "id": "r", "y": number} for number in range(2)] == events
    assert 0 == server.in_flight


def test_an_item_is_sent_as_soon_as_it_is_made(http_server, gated):
    server = http_server(graph_of(gated.items))
    reader = Reader(server, request())
    for number in range(1, 4):
        gated.allowed = number
        if number == 1:
            assert 200 == reader.head()  # which has waited for it
        assert number == reader.event()["y"]
        assert number == gated.made
    reader.close()


def test_a_connection_goes_on_after_a_stream(http_server):
    server = http_server(graph_of(count))
    reader = Reader(server, request() + request(SINGLE, {"x": 1}) + request(document={"x": 1}))

    assert (200, 3) == (reader.head(), len(reader.rest()))
    assert 200 == reader.head()
    assert 0 == json.loads(reader.left[: int(reader.headers["content-length"])])["y"]
    reader.left = reader.left[int(reader.headers["content-length"]) :]
    assert (200, 1) == (reader.head(), len(reader.rest()))
    reader.close()


def test_no_answer_is_a_stream_without_events(counting):
    assert (200, []) == read(counting, request(document={"x": 0}))[::2]


def test_a_graph_with_one_answer_streams_it(http_server):
    server = http_server(graph_of(lambda value: {"y": value["x"]}))

    assert [{"model_name": "g", "model_version": "1", "y": 3}] == read(server, request())[2]
    assert 3 == whole(server, request(SINGLE)).json()["y"]


@pytest.mark.parametrize("path", [STREAM, "/v2/models/g/versions/1/generate_stream"])
def test_a_version_may_be_named(path, counting):
    assert 3 == len(read(counting, request(path))[2])


@pytest.mark.parametrize(("answers", "status"), [(0, 400), (1, 200), (2, 400), (100000000, 400)])
def test_generate_takes_exactly_one_answer(answers, status, counting, until):
    server = counting
    got = whole(server, request(SINGLE, {"x": answers}))

    assert status == got.status
    if status == 400:
        assert got.error.startswith("generate expects model to produce exactly 1 response")
    until(lambda: server.in_flight == 0)


def test_answers_are_never_compressed(counting):
    server = counting

    assert "content-encoding" not in read(server, request(headers="Accept-Encoding: gzip\r\n"))[1]
    assert "content-encoding" not in whole(server, request(SINGLE, {"x": 1}, "Accept-Encoding: gzip\r\n")).headers


@pytest.mark.parametrize("name", ["generate", "generate_stream", "infer_stream"])
def test_compressed_requests_are_refused(name, counting):
    server = counting
    got = server.post(f"/v2/models/g/{name}", gzip.compress(b'{"x": 1}'), {"Content-Encoding": "gzip"})

    assert (400, "Unsupported content-encoding 'gzip', only 'identity' is supported") == (got.status, got.error)
    assert 0 == server.in_flight


def test_the_identity_coding_is_none(counting):
    assert 200 == read(counting, request(headers="Content-Encoding: identity\r\n"))[0]


@pytest.mark.parametrize(
    ("document", "status", "text"),
    [
        ({"x": "a"}, 400, "input 'x' element 0"),
        ({}, 400, "missing required input"),
        ([], 400, "expected an object"),
        ({"x": 1, "timeout": "now"}, 400, "parameter 'timeout'"),
    ],
)
def test_an_error_before_the_first_answer_is_plain_json(document, status, text, counting):
    got = whole(counting, request(document=document))

    assert status == got.status
    assert text in got.error


@pytest.mark.parametrize("name", ["generate", "generate_stream", "infer_stream"])
@pytest.mark.parametrize(
    ("path", "text"),
    [("/v2/models/nope/", "Request for unknown model: 'nope' is not found"), ("/v2/models/g/versions/7/", "version 7")],
)
def test_what_is_not_served_is_not_found(name, path, text, counting):
    got = whole(counting, request(path + name))

    assert 404 == got.status
    assert text in got.error


def test_a_step_that_fails_before_the_first_answer_decides_the_status(http_server):
    def fails(value):
        if value["x"][0] == 1:
            raise InvalidRequest("not one")
        raise ValueError("broken")
        yield

    server = http_server(graph_of(fails))

    theirs, ours = whole(server, request(document={"x": 1})), whole(server, request())
    assert (400, "node 'count': not one") == (theirs.status, theirs.error)
    assert (500, "node 'count': ValueError: broken") == (ours.status, ours.error)


def test_a_later_error_is_the_last_event(http_server):
    def fails(value):
        yield {"y": value["x"]}
        raise ValueError("broken")

    server = http_server(graph_of(fails))
    status, _, events = read(server, request())

    assert (200, [3, None]) == (status, [event.get("y") for event in events])
    assert {"error": "node 'count': ValueError: broken"} == events[-1]
    assert 0 == server.in_flight


def test_an_answer_that_cannot_be_encoded_is_the_last_event(http_server):
    def odd(value):
        yield {"y": value["x"]}
        yield {"y": np.array([1j])}

    events = read(http_server(graph_of(odd)), request())[2]

    assert "node 'count': output 'y' has dtype complex128" in events[-1]["error"]


def begun_in_time(ask):
    """Return a server and a stream that has begun within its time; whose time is up before an item is there tries with more.

    Args:
        ask: starts a stream that has so many milliseconds; returns its server and its reader.
    """
    for milliseconds in (500, 2500, 12_500):
        server, reader = ask(milliseconds)
        status = reader.head()
        if status != 504:
            break
        reader.close()
    assert 200 == status
    return server, reader


def test_a_deadline_ends_a_stream_with_an_event(http_server, until):
    begun, ended = [], []

    async def one_item(value):
        begun.append(True)
        try:
            yield {"y": np.array([1])}
            await asyncio.Event().wait()
        finally:
            ended.append(True)

    server = http_server(graph_of(one_item))
    _, reader = begun_in_time(lambda ms: (server, Reader(server, request(headers=f"X-Request-Timeout-Ms: {ms}\r\n"))))
    events = reader.rest()
    reader.close()

    assert (1, True) == (events[0]["y"], "Request timeout expired" in events[1]["error"])
    until(lambda: len(ended) == len(begun) and server.in_flight == 0)


@pytest.mark.parametrize("path", ["generate", "generate_stream", "infer_stream"])
@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT"])
def test_another_method_is_refused(path, method, counting):
    server = counting
    connection = server.connect()
    connection.send(f"{method} /v2/models/g/{path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())

    assert 405 == connection.answer(head_only=method == "HEAD").status
    connection.send(request(SINGLE, {"x": 1}))
    assert 200 == connection.answer().status  # the answer before was framed as the client expects
    connection.close()


def test_a_client_of_http_1_0_gets_events_until_the_connection_ends(counting):
    server = counting
    reader = Reader(server, request(version="1.0"))

    assert 200 == reader.head()
    assert "transfer-encoding" not in reader.headers
    assert "close" == reader.headers["connection"]
    while data := reader.connection.socket.recv(1 << 16):
        reader.left += data
    assert (3, b'"y":2}\n\n') == (reader.left.count(b"data: {"), reader.left[-8:])
    assert 200 == whole(server, request(SINGLE, {"x": 1}, version="1.0")).status
    reader.close()


def test_a_client_that_wants_to_be_told_to_go_on_is(counting):
    reader = Reader(counting)
    head, _, body = request(headers="Expect: 100-continue\r\n").partition(b"\r\n\r\n")
    reader.send(head + b"\r\n\r\n")
    assert 100 == reader.head()
    reader.send(body)

    assert (200, 3) == (reader.head(), len(reader.rest()))
    reader.close()


def test_v2_requests_are_answered_with_events_of_v2_answers(counting):
    server = counting
    document = {"id": "r", "inputs": [{"name": "x", "datatype": "INT32", "shape": [1], "data": [2]}]}
    status, headers, events = read(server, request("/v2/models/g/infer_stream", document))

    assert (200, "text/event-stream; charset=utf-8") == (status, headers["content-type"])
    output = {"name": "y", "datatype": "INT64", "shape": [1]}
    assert [
        {"model_name": "g", "model_version": "1", "id": "r", "outputs": [{**output, "data": [n]}]} for n in range(2)
    ] == events


@pytest.mark.parametrize(
    "more", [{"parameters": {"binary_data_output": True}}, {"outputs": [{"name": "y", "parameters": {"binary_data": True}}]}]
)
def test_events_carry_no_binary_data(more, counting):
    document = {"inputs": [{"name": "x", "datatype": "INT32", "shape": [1], "data": [2]}], **more}
    got = whole(counting, request("/v2/models/g/infer_stream", document))

    assert (400, "an event is JSON: outputs cannot be asked for as binary data here") == (got.status, got.error)


def test_inference_says_that_it_has_one_answer_only(counting):
    document = {"inputs": [{"name": "x", "datatype": "INT32", "shape": [1], "data": [2]}]}
    got = whole(counting, request("/v2/models/g/infer", document))

    assert (501, "HTTP end point doesn't support models with decoupled transaction policy") == (got.status, got.error)


# Clients that leave.


def test_a_client_that_leaves_between_items_ends_the_generator(http_server, gated, until):
    server = http_server(graph_of(gated.items))
    gated.allowed = 2
    reader = Reader(server, request())
    assert (200, 1, 2) == (reader.head(), reader.event()["y"], reader.event()["y"])
    reader.close()

    until(lambda: gated.ended == 1 and server.in_flight == 0)
    assert 2 == gated.made


def test_a_client_that_leaves_before_the_first_item_ends_the_generator(http_server, gated, until):
    server = http_server(graph_of(gated.items))
    reader = Reader(server, request())
    until(lambda: server.in_flight == 1)
    reader.close()

    until(lambda: server.in_flight == 0)
    assert (0, 0) == (gated.made, server.catalog.get("g").requests)


def test_a_client_that_leaves_generate_ends_the_generator(http_server, gated, until):
    server = http_server(graph_of(gated.items))
    gated.allowed = 1
    reader = Reader(server, request(SINGLE))
    until(lambda: gated.made)
    reader.close()

    until(lambda: gated.ended == 1 and server.in_flight == 0)


@pytest.mark.parametrize("way", ["inline", "thread"])
def test_a_client_that_leaves_a_plain_generator_ends_it(way, http_server, until):
    ended = []

    def endless(value):
        try:
            while True:
                yield {"y": np.arange(100)}
        finally:
            ended.append(threading.current_thread().name)

    server = http_server(graph_of(steps.Python(endless, run=way)))
    reader = Reader(server, request())
    assert 200 == reader.head()
    reader.close()

    until(lambda: ended and server.in_flight == 0)
    assert ended[0].startswith("count-") == (way == "thread")


def test_a_slow_reader_slows_the_generator_and_may_leave(http_server, until):
    made, ended = [], []

    async def endless(value):
        try:
            while True:
                made.append(True)
                yield {"y": np.zeros(1000)}
        finally:
            ended.append(True)

    server = http_server(graph_of(endless))
    reader = Reader(server, request())
    assert 200 == reader.head()
    before = -1
    while len(made) != before:  # it stands still once the buffers are full
        before = len(made)
        threading.Event().wait(10 * departures.SWEEP_S)
    reader.event()
    assert 1 == server.in_flight
    for _ in range(before):
        reader.event()
    until(lambda: len(made) > before)
    reader.close()
    until(lambda: ended and server.in_flight == 0)


def test_a_reader_that_stalls_is_cut_off(http_server, until):
    ended = []

    async def endless(value):
        try:
            while True:
                yield {"y": np.zeros(1000)}
        finally:
            ended.append(True)

    server = http_server(graph_of(endless), stream_stall_s=0.5)
    reader = Reader(server, request())
    assert 200 == reader.head()

    until(lambda: ended and server.in_flight == 0)
    with pytest.raises((ConnectionResetError, AssertionError)):
        while True:
            reader.event()
    reader.close()


def test_a_deadline_reaches_a_generator_whose_reader_stalls(http_server, until):
    ended = []

    async def endless(value):
        try:
            while True:
                yield {"y": np.zeros(1000)}
        finally:
            ended.append(True)

    def ask(milliseconds):
        server = http_server(graph_of(endless, timeout_ms=milliseconds))
        return server, Reader(server, request())

    server, reader = begun_in_time(ask)

    until(lambda: ended and server.in_flight == 0)
    assert "Request timeout expired" in reader.rest()[-1]["error"]  # it hears of it if it reads after all
    reader.close()


def test_streams_hold_slots(http_server, gated, until):
    server = http_server(graph_of(gated.items), max_in_flight=1)
    reader = Reader(server, request())
    until(lambda: server.in_flight == 1)

    for path in (STREAM, SINGLE):
        got = whole(server, request(path))
        assert (503, True) == (got.status, "(limit 'max_in_flight' = 1)" in got.error)
    reader.close()
    until(lambda: server.in_flight == 0)


def test_a_body_over_the_limit_is_refused(http_server):
    server = http_server(graph_of(count), max_body_bytes=100)

    assert 413 == whole(server, request(document={"x": [1] * 100})).status
    assert 413 == whole(server, request(SINGLE, document={"x": [1] * 100})).status


def test_a_stop_does_not_wait_for_readers_that_stall(http_server, until):
    ended = []

    async def endless(value):
        try:
            while True:
                yield {"y": np.zeros(1000)}
        finally:
            ended.append(True)

    server = http_server(graph_of(endless))
    reader = Reader(server, request())
    assert 200 == reader.head()
    server.stop()

    assert ([True], 0) == (ended, server.in_flight)
    reader.close()


def test_a_stop_tells_readers_and_ends_generators(gated):
    async def check():
        serving = Serving(FrontEndOptions())
        front_end = HttpFrontEnd(serving, "127.0.0.1", 0)
        front_end.bind()
        await serving.catalog.load([graph_of(gated.items).compile()])
        await front_end.start()
        gated.allowed = 1
        reader, writer = await asyncio.open_connection("127.0.0.1", front_end.port)
        writer.write(request())
        await reader.readuntil(b"\n\n")
        serving.catalog.draining = True
        await front_end.stop(0.05)
        rest = await reader.read()
        assert b'data: {"error":"the server is shutting down"}\n\n' in rest
        assert (1, 0) == (gated.ended, serving.admission.in_flight)
        writer.close()
        await serving.catalog.stop()

    asyncio.run(check())
