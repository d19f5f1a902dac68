"""Requests to HTTP services: what is sent, what is taken of the answer, what cannot be smuggled in, what failures look like."""

import asyncio
import json
import re
import time

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from servinggraph import Graph, InvalidRequest, steps
from servinggraph.context import Context
from servinggraph.errors import DeadlineExceeded, GraphInvalid, StepFailed, Unavailable
from servinggraph.steps.remote.documents import NoTensor, tensor_of
from servinggraph.steps.remote.templates import UrlTemplate


def answer(status="200 OK", body=b"", *fields):
    """Return an HTTP answer."""
    head = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *fields]
    return "\r\n".join(head).encode() + b"\r\n\r\n" + body


def graph_of(url, inputs="body", outputs=None, **options):
    graph = Graph("g", inputs=inputs)
    node = {} if outputs is None else {"outputs": outputs}
    graph.to(steps.Rest(url, **{"connect_timeout_ms": 60_000, **options}), name="far", **node).respond()
    return graph


@pytest.fixture
def service(bad_server):
    """Return what makes a service that gives one answer, and keeps what it was asked: (method, target, headers, body)."""

    def make(body=b"{}", status="200 OK"):

        def behave(connection):
            connection.sendall(answer(status, body))

        server = bad_server(behave)

        def split(request):
            head, _, content = request.partition(b"\r\n\r\n")
            line, *fields = head.decode("latin-1").split("\r\n")
            method, target, _ = line.split()
            headers = {name.lower(): text.strip() for name, _, text in (field.partition(":") for field in fields)}
            return method, target, headers, content

        server.asked = lambda: [split(request) for request in server.seen]
        return server

    return make


def test_a_document_goes_and_its_answer_comes_back(service):
    place = service(b'{"score": 0.5}')
    with graph_of(f"{place.url}/score").mock() as server:
        assert {"score": 0.5} == server.invoke({"user": "ann", "items": [1, 2]})
    ((method, target, headers, body),) = place.asked()
    assert ("POST", "/score", "application/json") == (method, target, headers["content-type"])
    assert {"user": "ann", "items": [1, 2]} == json.loads(body)


def test_tensors_go_as_a_template_says_and_come_back_as_declared(service):
    place = service(b'{"predictions": {"label": ["a", "b"], "p": [[1, 0.5], [2, 3]]}, "n": 3}')
    graph = graph_of(
        f"{place.url}/v1/models/m:predict",
        inputs={"pixels": ("FP32", [-1, 2]), "name": ("BYTES", [1])},
        outputs={"label": ("BYTES", [-1]), "p": ("FP32", [-1, 2])},
        send={"instances": "{pixels}", "who": "user {name}", "fixed": [1, True, None], "brace": "{{x}}"},
        take={"label": "predictions.label", "p": "predictions.p"},
    )
    with graph.mock() as server:
        outputs = server.infer(pixels=[[1, 2], [3, 4]], name=["ann"]).outputs
    assert [b"a", b"b"] == outputs["label"].tolist()
    assert [[1, 0.5], [2, 3]] == outputs["p"].tolist()
    assert "f4" == outputs["p"].dtype
    sent = json.loads(place.asked()[0][3])
    assert {"instances": [[1, 2], [3, 4]], "who": "user ann", "fixed": [1, True, None], "brace": "{x}"} == sent


def test_fields_stand_in_path_and_query_and_a_part_of_the_answer_is_taken(service):
    place = service(b'{"data": [{"age": 7}]}')
    graph = graph_of(f"{place.url}/users/{{user.id}}?q={{query}}&n={{headers.x-n}}", method="GET", take="data.0.age")
    with graph.mock() as server:
        assert 7 == server.invoke({"user": {"id": "a/b c"}, "query": "x&y=1#?"}, headers={"x-n": "3"})
    assert ("GET", "/users/a%2Fb%20c?q=x%26y%3D1%23%3F&n=3") == place.asked()[0][:2]
    assert b"" == place.asked()[0][3]


@pytest.mark.parametrize("name", ["..", ".", "", "../admin", "a/../b", "..\\admin"])
def test_a_field_cannot_lead_to_another_path(service, name):
    place = service()
    refused = pytest.raises(InvalidRequest, match="node 'far': field 'name' would be")
    with graph_of(f"{place.url}/users/{{name}}", method="GET").mock() as server, refused:
        server.invoke({"name": name})
    assert not place.asked()


@settings(max_examples=300, deadline=None)
@given(name=st.text(), query=st.text())
def test_whatever_a_field_holds_the_path_keeps_its_segments(name, query):
    try:
        made = UrlTemplate("/a/{name}/b?x={query}&y=1").fill({"name": name, "query": query}, Context())
    except (InvalidRequest, UnicodeEncodeError):
        return
    assert re.fullmatch(r"/a/[A-Za-z0-9._~%-]+/b\?x=[A-Za-z0-9._~%-]*&y=1", made)


def test_secrets_go_in_headers_and_query_and_are_printed_nowhere(service, monkeypatch):
    monkeypatch.setenv("API_KEY", "hunter 2211")
    monkeypatch.setenv("HOOK", "hooks-9")
    monkeypatch.setenv("PIN", "pin-4711")
    place = service(b"no 'hunter 2211' pin-4711", "500 Oops")
    secrets = {"headers": {"X-Key": "${API_KEY}"}, "query": {"key": "${API_KEY}"}, "send": {"pin": "${PIN}"}}
    graph = graph_of(f"{place.url}/x/${{HOOK}}?a=1", **secrets)
    plan = graph.compile()
    with (
        graph.mock() as server,
        pytest.raises(
            StepFailed, match=r"node 'far': POST http://.*/x/\$\{HOOK\} answered 500: no '\*\*\*' \$\{PIN\}"
        ) as failed,
    ):
        server.invoke({})
    _, target, headers, _ = place.asked()[0]
    assert ("/x/hooks-9?a=1&key=hunter%202211", "hunter 2211") == (target, headers["x-key"])
    printed = f"{failed.value} {plan.nodes[0].work.describe()} {plan!r}"
    assert "hunter" not in printed
    assert "pin-4711" not in printed
    assert {"pin": "pin-4711"} == json.loads(place.asked()[0][3])
    assert "hooks-9" not in plan.nodes[0].work.describe()


def test_a_content_type_can_be_given(service):
    place = service()
    with graph_of(place.url, headers={"content-type": "application/vnd.api+json"}).mock() as server:
        server.invoke({})
    assert "application/vnd.api+json" == place.asked()[0][2]["content-type"]


def test_trace_headers_and_the_time_that_is_left_go_along(service):
    place = service()
    with graph_of(place.url, pass_headers=["x-user"]).mock() as server:
        server.invoke({}, headers={"traceparent": "00-1", "x-user": "ann", "x-no": "1"}, timeout_s=20)
    headers = place.asked()[0][2]
    assert ("00-1", "ann", None) == (headers["traceparent"], headers["x-user"], headers.get("x-no"))
    assert 10_000 < float(headers["x-request-timeout-ms"]) < 20_000


@pytest.mark.parametrize(
    ("reply", "options", "kind", "text"),
    [
        (answer(body=b"<html>"), {}, StepFailed, "the answer of POST .* cannot be read"),
        (answer(body=b"{}"), {"take": "a.b"}, StepFailed, "there is no 'a.b' in it"),
        (answer(body=b'{"a": [1]}'), {"take": {"x": "a.1"}}, StepFailed, "there is no 'a.1' in it"),
        (answer(body=b"x" * 2000), {"max_response_bytes": 1000}, StepFailed, "larger than 1000 bytes"),
        (answer("404 Gone", b"who?"), {}, StepFailed, "answered 404: who?"),
        (answer("422 Bad", b"age?"), {}, InvalidRequest, "answered 422: age?"),
        (answer("503 Busy"), {}, Unavailable, "answered 503"),
        (answer("302 Moved", b"", "Location: http://127.0.0.1:1/"), {}, StepFailed, "answered 302"),
        (b"", {}, Unavailable, "closed the connection"),
    ],
)
def test_what_is_no_good_answer_is_a_clear_error(bad_server, reply, options, kind, text):
    def behave(connection):
        connection.sendall(reply)
        if not reply:
            connection.close()

    place = bad_server(behave)
    with graph_of(place.url, **options).mock() as server, pytest.raises(kind, match=text) as failed:
        server.invoke({})
    assert "node 'far': " in str(failed.value)
    assert place.url in str(failed.value)


def test_a_service_that_is_not_there_is_unavailable(nobody):
    with graph_of(nobody).mock() as server, pytest.raises(Unavailable, match=f"cannot connect to POST {nobody}: "):
        server.invoke({})


def test_text_and_bytes_can_be_taken_as_they_are(service):
    for parse, wanted in (("text", "ä"), ("bytes", "ä".encode())):
        with graph_of(service("ä".encode()).url, parse=parse).mock() as server:
            assert wanted == server.invoke({})


def test_a_deadline_and_a_caller_who_leaves_end_the_connection(bad_server, manual_clock, run):
    ended = []

    def behave(connection):
        ended.append(connection.recv(1))

    place = bad_server(behave)

    async def until(condition):
        end = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < end
            await asyncio.to_thread(time.sleep, 0.001)

    async def main():
        async with graph_of(place.url).mock() as server:
            late = asyncio.ensure_future(server.invoke({}, timeout_s=0.5))
            await until(lambda: place.requests == 1)
            await manual_clock.advance(0.4)
            assert not ended
            await manual_clock.advance(0.2)
            with pytest.raises(DeadlineExceeded):
                await late
            await until(lambda: len(ended) == 1)
            asked = asyncio.ensure_future(server.invoke({}))
            await until(lambda: place.requests == 2)
            asked.cancel()
            await asyncio.wait([asked])
            await until(lambda: len(ended) == 2)

    run(main())
    assert [b"", b""] == ended


def test_rows_of_several_requests_go_together(service):
    place = service(b'{"y": [2, 4, 6]}')
    graph = graph_of(
        place.url,
        inputs={"x": ("FP32", [-1])},
        outputs={"y": ("FP32", [-1])},
        send={"rows": "{x}"},
        batch={"max_rows": 3, "max_delay_ms": 5000, "wait_when_idle": True},
    )

    async def main():
        async with graph.mock() as server:
            return await asyncio.gather(server.infer(x=[1]), server.infer(x=[2, 3]))

    assert [[2], [4, 6]] == [reply.outputs["y"].tolist() for reply in asyncio.run(main())]
    assert [{"rows": [1, 2, 3]}] == [json.loads(request[3]) for request in place.asked()]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"url": "http://{host}/x"}, "'url': has a field in its host"),
        ({"url": "http://a:{port}/x"}, "'url': has a field in its host"),
        ({"url": "{base}/x"}, "'url': has a field in its host"),
        ({"url": "grpc://a:1/x"}, "'url': "),
        ({"url": "http://u:p@a/x"}, "'url': has a user name or password"),
        ({"url": "http://a/{x y}"}, "'url': '{x y}' is no field"),
        ({"url": "http://a/{x"}, "'url': '{' stands alone"),
        ({"url": "http://a/x#y"}, "'url': has a fragment"),
        ({"url": "http://a/{x}", "batch": True}, "cannot batch: its URL has the field 'x'"),
        ({"url": "http://a/", "send": "{id}", "batch": True}, "cannot batch: 'send' has the field 'id'"),
        ({"url": "http://a/", "send": {"a": "}"}}, "'send': '}' stands alone"),
        (
            {"url": "http://a/", "take": {"z": "a"}, "outputs": {"y": ("FP32", [1])}},
            "'take' names 'z', which 'outputs' does not",
        ),
        ({"url": "http://a/", "take": {"z": "a"}, "outputs": {"y": ("FP32", [1])}}, "'take' does not say where output 'y' is"),
        ({"url": "http://a/", "take": "z", "outputs": {"y": ("FP32", [1])}}, "'take' says for each of the declared outputs"),
        ({"url": "http://a/", "parse": "text", "take": "z"}, "'parse: text' gives no JSON"),
    ],
)
def test_options_are_checked_when_the_graph_is_compiled(options, text):
    with pytest.raises(GraphInvalid) as refused:
        graph_of(**options).compile()
    assert text in str(refused.value)


def test_what_json_cannot_hold_is_refused(service):
    place = service()
    for value in (np.array([1, np.nan], "f4"), np.array([b"\xff"], dtype=object)):
        name = "x" if value.dtype == "f4" else "t"
        inputs = {name: ("FP32" if name == "x" else "BYTES", [-1])}
        graph = graph_of(place.url, inputs=inputs, outputs={"y": ("FP32", [1])})
        with graph.mock() as server, pytest.raises(InvalidRequest, match="node 'far': .*JSON"):
            server.infer({name: value})


@pytest.mark.parametrize(
    ("data", "datatype", "wanted"),
    [
        ([1, 2], "INT8", [1, 2]),
        ([1, 2], "FP32", [1, 2]),
        (3, "FP64", 3),
        ([], "FP32", []),
        ([[True], [False]], "BOOL", [[True], [False]]),
        (["a", ["b"]], "BYTES", None),
        ([["a"], ["b"]], "BYTES", [[b"a"], [b"b"]]),
        ("a", "BYTES", b"a"),
        ([1, 2.5], "INT8", None),
        ([300], "INT8", None),
        ([-1], "UINT8", None),
        ([1e300], "FP32", None),
        ([1, None], "FP32", None),
        ([[1], [1, 2]], "FP32", None),
        ([1], "BOOL", None),
        ([True], "INT8", None),
        ([1], "BYTES", None),
        (["1"], "FP32", None),
        ({"a": 1}, "FP32", None),
        ([2**63], "INT64", None),
        ([2**63], "UINT64", [2**63]),
    ],
)
def test_parts_of_an_answer_become_tensors_or_an_error_and_never_other_numbers(data, datatype, wanted):
    if wanted is None:
        with pytest.raises(NoTensor):
            tensor_of(data, datatype)
        return
    assert wanted == tensor_of(data, datatype).tolist()
