"""Free-form answers item by item: lines and events, errors before and behind items, clients that leave."""

from __future__ import annotations

import asyncio
import http.client
import json
from contextlib import closing

import numpy as np
import pytest

from servinggraph import Body, Graph, InvalidRequest
from servinggraph.errors import StepFailed


def count(value):
    if value < 0:
        raise InvalidRequest("counts only upwards")
    for number in range(value):
        yield {"n": np.int64(number)}


def graph_of(work, name="g"):
    graph = Graph(name, "body")
    graph.to(work, "count").respond()
    return graph


def broken(value):
    yield 1
    raise RuntimeError("no more")


@pytest.fixture(scope="module")
def server(shared_server):
    return shared_server(graph_of(count), graph_of(broken, "broken"), graph_of(lambda value: value, "plain"), invocations="g")


def invoke(server, body, accept=None, graph="g"):
    with closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)) as connection:
        headers = {"Content-Type": "application/json", **({"Accept": accept} if accept else {})}
        connection.request("POST", f"/v2/models/{graph}/invocations", json.dumps(body), headers)
        answer = connection.getresponse()
        return answer.status, answer.headers["content-type"], answer.read()


@pytest.mark.parametrize("accept", [None, "*/*", "application/x-ndjson", "application/json;q=0.5, application/x-ndjson"])
def test_items_are_lines_by_default(server, accept):
    assert (200, "application/x-ndjson", b'{"n":0}\n{"n":1}\n') == invoke(server, 2, accept)


@pytest.mark.parametrize("name", ["application/jsonl", "application/ndjson"])
def test_lines_have_several_names(server, name):
    assert name == invoke(server, 1, name)[1]


def test_items_are_events_where_they_are_asked_for(server):
    expected = (200, "text/event-stream; charset=utf-8", b'data: {"n":0}\n\ndata: {"n":1}\n\n')
    assert expected == invoke(server, 2, "text/event-stream")


def test_there_may_be_no_item_at_all(server):
    assert (200, "application/x-ndjson", b"") == invoke(server, 0)


def test_an_error_before_the_first_item_is_a_plain_error(server):
    for accept in ("application/x-ndjson", "text/event-stream"):
        status, content_type, body = invoke(server, -1, accept)
        assert (400, "application/json") == (status, content_type)
        assert b"counts only upwards" in body
    assert 0 == server.in_flight


@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        ("application/x-ndjson", b'1\n{"error":"node \'count\': RuntimeError: no more"}\n'),
        ("text/event-stream", b'data: 1\n\nevent: error\ndata: {"error":"node \'count\': RuntimeError: no more"}\n\n'),
    ],
)
def test_an_error_behind_items_is_the_last_of_them(server, accept, expected):
    assert expected == invoke(server, 0, accept, "broken")[2]


def test_a_stream_is_nothing_else(server):
    status, _, body = invoke(server, 1, "application/json")

    assert 406 == status
    assert b"any number of answers, as application/x-ndjson or text/event-stream" in body


def test_any_graph_streams_its_one_answer_when_that_is_preferred(server):
    assert b"[1]\n" == invoke(server, [1], "application/x-ndjson", "plain")[2]
    assert b"data: [1]\n\n" == invoke(server, [1], "text/event-stream, application/json;q=0.9", "plain")[2]
    assert b"[1]" == invoke(server, [1], "text/event-stream;q=0.1, */*", "plain")[2]


def test_a_client_that_leaves_closes_the_generator(http_server, until):
    ended = []

    async def forever(value):
        try:
            while True:
                yield "x"
                await asyncio.sleep(0.002)
        finally:
            ended.append(value)

    server = http_server(graph_of(forever))
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    connection.request("POST", "/invocations", b"1", {"Content-Type": "application/json"})
    answer = connection.getresponse()
    assert b'"x"\n' == answer.readline()
    answer.close()
    connection.close()

    until(lambda: ended == [1])
    until(lambda: server.in_flight == 0)


def test_the_mock_gives_items_as_they_come():
    made = []

    def count_up(value):
        for number in range(value):
            made.append(number)
            yield Body({"n": number})

    with graph_of(count_up).mock() as server:
        items = server.invoke_stream(5)
        assert {"n": 0} == next(items)
        assert {"n": 1} == next(items)
        items.close()
        assert [0, 1] == made
        assert 0 == server.in_flight
        assert [{"n": 0}] == list(server.invoke_stream(1))
        assert 406 == server.request("POST", "/invocations", b"1", {"content-type": "text/plain", "accept": "text/csv"}).status


def test_the_mock_raises_what_a_client_would_get():
    with graph_of(broken).mock() as server:
        items = server.invoke_stream(0)
        assert 1 == next(items)
        with pytest.raises(StepFailed, match="no more"):
            next(items)


def test_an_item_that_cannot_be_sent_names_its_node():
    def odd(value):
        yield {"a": 1j}

    with (
        graph_of(odd).mock() as server,
        pytest.raises(StepFailed, match="node 'count': gave an answer that holds a builtins.complex"),
    ):
        list(server.invoke_stream(0))
