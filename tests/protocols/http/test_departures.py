"""Clients that leave, stall or come in too great numbers: work is cancelled, slots come back."""

from __future__ import annotations

import asyncio
import json
import threading
from contextlib import suppress

import numpy as np
import pytest

from servinggraph import Graph
from servinggraph.protocols.http import wire

GRAPH = "/v2/models/g/infer"


def request(number: float = 1.0, headers: str = "") -> bytes:
    document = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1], "data": [number]}]}
    body = json.dumps(document).encode()
    return f"POST {GRAPH} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n{headers}\r\n".encode() + body


class Held:
    """A step that holds what it is called with until it is let go, and remembers."""

    def __init__(self) -> None:
        self.calls: list[list[float]] = []
        self.cancelled = 0
        self.free = threading.Event()

    async def wait(self, value):
        self.calls.append(value["x"].tolist())
        try:
            while not self.free.is_set():
                await asyncio.sleep(0.002)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return {"y": value["x"]}

    def block(self, value):
        self.calls.append(value["x"].tolist())
        assert self.free.wait(30)
        return {"y": value["x"]}


@pytest.fixture
def held():
    held = Held()
    yield held
    held.free.set()


def graph_of(work, **options):
    graph = Graph("g", {"x": ("FP32", [-1])})
    graph.to(work, "held", **options).respond()
    return graph


def test_a_client_that_leaves_before_its_body_is_complete_frees_its_slot(http_server, held, until):
    server = http_server(graph_of(held.wait))
    connection = server.connect()
    connection.send(request()[:-10])
    until(lambda: server.in_flight == 1)
    connection.close()

    until(lambda: server.in_flight == 0)
    assert [] == held.calls


def test_a_client_that_leaves_during_the_run_cancels_the_step(http_server, held, until):
    server = http_server(graph_of(held.wait))
    connection = server.connect()
    connection.send(request())
    until(lambda: held.calls)
    connection.close()

    until(lambda: held.cancelled)
    until(lambda: server.in_flight == 0)


def test_a_client_that_leaves_while_it_waits_for_a_batch_never_reaches_the_step(http_server, held, until):
    server = http_server(graph_of(held.wait, batch={"max_rows": 8}))
    first, second = server.connect(), server.connect()
    first.send(request(1))
    until(lambda: held.calls)
    second.send(request(2))
    until(lambda: server.in_flight == 2)
    second.close()

    until(lambda: server.in_flight == 1)
    held.free.set()
    assert 200 == first.answer().status
    until(lambda: server.in_flight == 0)
    assert [[1.0]] == held.calls
    first.close()


def test_a_slot_is_held_until_a_thread_that_cannot_be_stopped_has_ended(http_server, held, until):
    from servinggraph import steps

    server = http_server(graph_of(steps.Python(held.block, run="thread")), max_in_flight=1)
    connection = server.connect()
    connection.send(request())
    until(lambda: held.calls)
    connection.close()
    refused = server.post(GRAPH, request().partition(b"\r\n\r\n")[2])

    assert 503 == refused.status
    held.free.set()
    until(lambda: server.in_flight == 0)
    assert 200 == server.post(GRAPH, request().partition(b"\r\n\r\n")[2]).status


def test_a_client_that_leaves_with_requests_in_the_pipeline_cancels_the_one_that_runs(http_server, held, until):
    server = http_server(graph_of(held.wait))
    connection = server.connect()
    connection.send(request(1) + request(2) + request(3))
    until(lambda: held.calls)
    connection.close()

    until(lambda: held.cancelled == 1)
    until(lambda: server.in_flight == 0)
    assert [[1.0]] == held.calls


def test_a_server_that_is_full_says_so_and_which_limit_it_is(http_server, held, until):
    server = http_server(graph_of(held.wait), max_in_flight=2)
    connections = [server.connect() for _ in range(2)]
    for connection in connections:
        connection.send(request())
    until(lambda: len(held.calls) == 2)
    refused = server.post(GRAPH, request().partition(b"\r\n\r\n")[2])

    assert 503 == refused.status
    assert "1" == refused.headers["retry-after"]
    assert "limit 'max_in_flight' = 2" in refused.error
    held.free.set()
    assert [200, 200] == [connection.answer().status for connection in connections]
    assert 200 == server.post(GRAPH, request().partition(b"\r\n\r\n")[2]).status
    for connection in connections:
        connection.close()


def test_a_refused_upload_of_any_size_leaves_the_connection_usable(http_server, held, until):
    server = http_server(graph_of(held.wait), max_in_flight=1)
    first, second = server.connect(), server.connect()
    first.send(request())
    until(lambda: held.calls)
    for _ in range(3):
        second.send(f"POST {GRAPH} HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n".encode() + b" " * 1_000_000)
        assert 503 == second.answer().status
    held.free.set()
    assert 200 == first.answer().status
    until(lambda: server.in_flight == 0)
    second.send(request())

    assert 200 == second.answer().status
    first.close()
    second.close()


def test_a_flood_of_pipelined_requests_is_not_read_ahead_without_end(http_server, held, until):
    server = http_server(graph_of(held.wait))
    connection = server.connect()
    connection.socket.settimeout(0.5)
    one = request()
    with pytest.raises(TimeoutError):  # the server stops reading, and the buffers between are full
        for _ in range(3000):
            connection.send(one * 100)
    held.free.set()
    connection.socket.settimeout(30)

    assert [200] * 100 == [connection.answer().status for _ in range(100)]
    connection.close()
    until(lambda: server.in_flight == 0)


def sent_away(server, part):
    """Send a part of a request; whoever takes longer to that than a client may stall is closed without a word, and tries again."""
    for _ in range(10):
        connection = server.connect()
        with suppress(EOFError, ConnectionError):
            connection.send(part)
            return connection, connection.answer()
        connection.close()
    raise AssertionError("never a word")


@pytest.mark.parametrize(
    ("part", "text"),
    [(request()[:30], "request line and headers were not received"), (request()[:-5], "rest of the body was not received")],
)
def test_a_client_that_stalls_is_sent_away(http_server, held, until, monkeypatch, part, text):
    monkeypatch.setattr(wire, "STALL_S", 1.0)
    server = http_server(graph_of(held.wait))
    connection, answer = sent_away(server, part)

    assert 408 == answer.status
    assert text in answer.error
    assert connection.is_closed()
    until(lambda: server.in_flight == 0)
    connection.close()


def test_a_connection_that_never_says_a_word_is_closed(http_server, held, monkeypatch):
    monkeypatch.setattr(wire, "STALL_S", 0.05)
    connection = http_server(graph_of(held.wait)).connect()

    assert connection.is_closed()
    connection.close()


def test_a_run_that_takes_longer_than_a_stall_is_no_stall(http_server, held, until, monkeypatch):
    monkeypatch.setattr(wire, "STALL_S", 3.0)  # enough to send a request in
    server = http_server(graph_of(held.wait))
    connection = server.connect()
    for byte in request():
        connection.send(bytes([byte]))
    until(lambda: held.calls)
    threading.Timer(3.5, held.free.set).start()

    assert 200 == connection.answer().status
    connection.close()


def test_a_deadline_in_a_header_or_in_the_request_ends_the_run(http_server, held, until):
    server = http_server(graph_of(held.wait))
    body = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1], "data": [1]}]}
    for headers, parameters in (
        ({"X-Request-Timeout-Ms": "20"}, {}),
        ({"X-Envoy-Expected-Rq-Timeout-Ms": "20.5"}, {}),
        ({}, {"timeout": 20_000}),
        ({"X-Request-Timeout-Ms": "20"}, {"timeout": 60_000_000}),
        ({"X-Request-Timeout-Ms": "60000"}, {"timeout": 20_000}),
    ):
        answer = server.post(GRAPH, {**body, "parameters": parameters}, headers)
        assert 504 == answer.status
        assert answer.error in ("Request timeout expired", "node 'held': Request timeout expired before it ran")
    until(lambda: server.in_flight == 0)

    assert held.calls
    assert len(held.calls) == held.cancelled  # a machine that is slow may let a deadline pass before the step begins


@pytest.mark.parametrize("value", ["", "abc", "0", "-1", "nan", "inf", "1e15", "1_000", "0x10", "٣"])
def test_a_deadline_that_is_none_is_refused(http_server, held, value):
    answer = http_server(graph_of(held.wait)).post(GRAPH, request().partition(b"\r\n\r\n")[2], {"X-Request-Timeout-Ms": value})

    assert 400 == answer.status
    assert "header x-request-timeout-ms is a number of milliseconds above 0" in answer.error


def test_a_timeout_of_0_is_no_limit_and_priorities_order_the_queue(http_server, held, until):
    server = http_server(graph_of(held.wait, batch={"max_rows": 1, "priorities": 3, "default_priority": 2}))
    connections = [server.connect() for _ in range(5)]
    for number, priority in enumerate([0, 3, 0, 1, 99]):
        document = {
            "parameters": {"priority": priority, "timeout": 0},
            "inputs": [{"name": "x", "datatype": "FP32", "shape": [1], "data": [number]}],
        }
        body = json.dumps(document).encode()
        connections[number].send(f"POST {GRAPH} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        until(lambda: server.in_flight == number + 1)
        until(lambda: held.calls)  # the first one runs, the others queue
    held.free.set()

    assert [200] * 5 == [connection.answer().status for connection in connections]
    assert [[0.0], [3.0], [2.0], [4.0], [1.0]] == held.calls
    for connection in connections:
        connection.close()


def test_views_of_a_body_stay_valid_after_the_next_request(http_server):
    kept = []

    def keep(value):
        kept.append(value["x"])
        return {"y": value["x"]}

    server = http_server(graph_of(keep))
    connection = server.connect()
    for number in range(20):
        connection.send(request(number))
        connection.answer()
    connection.close()

    assert list(range(20)) == np.concatenate(kept).tolist()
