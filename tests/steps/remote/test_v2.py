"""A model on another server: what goes there and comes back, over HTTP and gRPC, and what failures look like."""

import asyncio
import json
import sys
import threading
import time
from uuid import uuid4

import ml_dtypes
import numpy as np
import pytest

from servinggraph import Graph, InvalidRequest, steps
from servinggraph.errors import (
    DeadlineExceeded,
    GraphInvalid,
    RequestTooLarge,
    ServingGraphError,
    StepFailed,
    Unavailable,
)

X = {"x": ("FP32", [-1])}
PATIENCE_S = 60
PATIENT = {"connect_timeout_ms": PATIENCE_S * 1e3, "metadata_timeout_ms": PATIENCE_S * 1e3}
V2_ANSWER = b'{"model_name":"m","model_version":"1","outputs":[{"name":"y","datatype":"FP32","shape":[1],"data":[7]}]}'


def answer(status="200 OK", body=b"", *fields):
    """Return an HTTP answer."""
    head = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *fields]
    return "\r\n".join(head).encode() + b"\r\n\r\n" + body


def graph_of(url, model="double", inputs=X, **options):
    graph = Graph("g", inputs=inputs)
    graph.to(steps.V2(url, model, **{"metadata": "ignore", **PATIENT, **options}), name="far").respond()
    return graph


@pytest.fixture(params=["http", "grpc"])
def url(other, request):
    return getattr(other, request.param)


def test_a_model_of_another_server_answers(url):
    with graph_of(url, metadata="require").mock() as server:
        assert [2, 4] == server.infer(x=[1, 2]).outputs["y"].tolist()
        assert [6] == server.infer(x=[3]).outputs["y"].tolist()


def test_every_kind_of_tensor_arrives_as_it_went(url):
    inputs = {
        "x": {"datatype": "FP32", "shape": [-1, 2], "optional": True},
        "text": {"datatype": "BYTES", "shape": [-1], "optional": True},
        "half": {"datatype": "BF16", "shape": [-1], "optional": True},
        "flag": {"datatype": "BOOL", "shape": [-1], "optional": True},
    }
    tensors = {
        "x": np.arange(6, dtype="f4").reshape(3, 2)[::-1],
        "text": np.array([b"\xff\x00", b"", "ä".encode()], dtype=object),
        "half": np.array([1.5, -3], dtype=ml_dtypes.bfloat16),
        "flag": np.array([True, False]),
    }
    with graph_of(url, "echo", inputs).mock() as server:
        outputs = server.infer(tensors).outputs
        empty = server.infer(x=np.zeros((0, 2), "f4"), text=np.array([], dtype=object)).outputs
    assert tensors.keys() == outputs.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == outputs[name].dtype
        assert tensor.tolist() == outputs[name].tolist()
    assert [(0, 2), (0,)] == [empty["x"].shape, empty["text"].shape]


def test_identity_deadline_trace_and_secret_headers_go_along(url, monkeypatch):
    monkeypatch.setenv("FAR_TOKEN", "hunter22")
    graph = graph_of(
        url,
        "told",
        headers={"Authorization": "Bearer ${FAR_TOKEN}"},
        pass_headers=["X-User"],
        pass_parameters=["mood"],
    )
    sent = {"traceparent": "00-aa-bb-01", "x-user": "ann", "x-other": "no"}
    with graph.mock() as server:
        reply = server.infer(x=[1], id="r1", headers=sent, parameters={"mood": "calm", "other": 1}, timeout_s=20)
    told = json.loads(reply.outputs["told"][0])
    assert "r1" == told["id"]
    assert 10 < told["left"] < 20
    headers = {name: told["headers"].get(name) for name in ("traceparent", "x-user", "x-other", "authorization")}
    assert {"traceparent": "00-aa-bb-01", "x-user": "ann", "x-other": None, "authorization": "Bearer hunter22"} == headers
    assert "calm" == told["parameters"]["mood"]
    assert "other" not in told["parameters"]


def test_secrets_are_in_no_text_for_people(other, monkeypatch):
    monkeypatch.setenv("FAR_TOKEN", "hunter\n22")
    with pytest.raises(GraphInvalid, match="the value of 'Authorization' has line breaks") as refused:
        graph_of(other.http, headers={"Authorization": "${FAR_TOKEN}"}).compile()
    monkeypatch.setenv("FAR_TOKEN", "hunter22")
    plan = graph_of(other.http, headers={"Authorization": "${FAR_TOKEN}"}).compile()
    with pytest.raises(GraphInvalid) as in_url:
        graph_of("http://me:hunter22@there:1").compile()
    texts = [str(refused.value), str(in_url.value), plan.nodes[0].work.describe(), repr(plan)]
    assert "user name or password" in texts[1]
    assert not [text for text in texts if "hunter" in text]


def test_what_a_server_quotes_of_a_secret_is_taken_out(bad_server, caplog):
    place = bad_server(lambda connection: connection.sendall(answer("503 No", b"Bearer hunter2222 again?")))
    graph = graph_of([place.url, place.url + "/b"], headers={"Authorization": "Bearer hunter2222"}, ejection={"failures": 1})
    with graph.mock() as server, pytest.raises(Unavailable, match=r"answered 503: \*\*\* again\?"):
        server.infer(x=[1])
    assert "left alone" in caplog.text
    assert "hunter" not in caplog.text


def test_packages_that_are_missing_are_named_when_the_graph_is_compiled(monkeypatch):
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    for step in (steps.V2("http://a:1", "m"), steps.Rest("http://a:1")):
        graph = Graph("g", inputs=X)
        graph.to(step, name="far").respond()
        with pytest.raises(GraphInvalid, match=r"node 'far': needs packages .*pip install 'servinggraph.remote.'"):
            graph.compile()


def test_a_server_that_is_killed_in_the_middle_of_a_request(start_other):
    for protocol in ("http", "grpc"):
        other = start_other()

        def kill(other=other):
            counted_until(other, "r", "begun")
            other.process.kill()

        with graph_of(getattr(other, protocol), "slow").mock() as server:
            killer = threading.Thread(target=kill)
            killer.start()
            with pytest.raises(Unavailable, match="node 'far': .* closed the connection before its answer was there"):
                server.infer(x=[1], id="r")
            killer.join()
            end = time.monotonic() + PATIENCE_S
            while "cannot connect to" not in ended(server) and time.monotonic() < end:
                pass  # gRPC may learn only now that the connection is gone
            assert "node 'far': cannot connect to" in ended(server)


def test_connections_are_encrypted_and_certificates_are_checked(start_other, bad_server, certificate):
    other = start_other("--grpc-tls-cert", certificate[0], "--grpc-tls-key", certificate[1])
    web = bad_server(lambda connection: connection.sendall(answer(body=V2_ANSWER)), certificate)
    for place in (other.grpc.replace("grpc", "grpcs"), web.url):
        with graph_of(place, tls_ca=certificate[0]).mock() as server:
            assert [7] == server.infer(x=[3.5]).outputs["y"].tolist()
        with graph_of(place).mock() as server, pytest.raises(Unavailable, match="node 'far': cannot connect to"):
            server.infer(x=[3.5])
    with graph_of(other.grpc.replace("grpc", "grpcs"), tls_ca=certificate[0], metadata="require").mock():
        pass


def test_a_batch_goes_as_one_request(bad_server):
    body = V2_ANSWER.replace(b"[1]", b"[3]").replace(b"[7]", b"[7,8,9]")
    place = bad_server(lambda connection: connection.sendall(answer(body=body)))

    async def main():
        graph = graph_of(place.url, batch={"max_rows": 3, "max_delay_ms": 5000, "wait_when_idle": True})
        async with graph.mock() as server:
            return await asyncio.gather(server.infer(x=[1]), server.infer(x=[2, 3]))

    assert [[7], [8, 9]] == [reply.outputs["y"].tolist() for reply in asyncio.run(main())]
    assert 1 == place.requests


def test_tensors_have_other_names_there(other):
    graph = Graph("g", inputs={"a": ("FP32", [-1]), "b": ("FP32", [-1])})
    names = {"inputs": {"a": "x"}, "outputs": {"y": "c"}}
    far = steps.V2(other.http, "double", inputs={"x": {"datatype": "FP32", "shape": [-1]}}, rename=names, **PATIENT)
    graph.to(far, name="far", outputs={"y": ("FP32", [-1])}).respond()
    plan = graph.compile()
    assert {"c"} == plan.outputs.keys()
    with graph.mock() as server:
        assert [4] == server.infer(a=[2], b=[0]).outputs["c"].tolist()


@pytest.mark.parametrize(
    ("x", "kind", "text"),
    [
        ([-1], InvalidRequest, "node 'far': {url} answered .*: .*x must not be negative"),
        ([2000], StepFailed, "node 'far': {url} answered .*: .*RuntimeError: too much"),
    ],
)
def test_errors_over_there_are_told_with_the_address(url, x, kind, text):
    with graph_of(url).mock() as server, pytest.raises(kind, match=text.format(url=url)):
        server.infer(x=x)


def test_a_model_that_is_not_there_fails_the_load_or_the_request(url):
    refused = pytest.raises(StepFailed, match="node 'far': model 'nope' at .* is not what is declared: it answered .*nope")
    with refused, graph_of(url, "nope", metadata="compare").mock():
        pass
    with graph_of(url, "nope").mock() as server, pytest.raises(StepFailed, match="answered .*nope"):
        server.infer(x=[1])


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"inputs": {"x": {"datatype": "FP64", "shape": [-1]}}},
            "declared input 'x' does not fit: its datatype is FP64, expected",
        ),
        ({"inputs": {"z": {"datatype": "FP32", "shape": [-1]}}}, "it has no input 'z'; its inputs are x"),
        ({"outputs": {"y": {"datatype": "FP32", "shape": [-1, 3]}}}, "declared output 'y' does not fit: its shape is"),
    ],
)
def test_declared_tensors_are_held_against_the_metadata_at_load(url, options, text):
    graph = Graph("g", inputs={"x": ("FP64", [-1]), "z": ("FP32", [-1])})
    if "inputs" not in options:
        graph = Graph("g", inputs=X)
    graph.to(steps.V2(url, "double", **PATIENT, **options), name="far").respond()
    graph.compile()  # needs no server
    with pytest.raises(StepFailed, match=text), graph.mock():
        pass


def test_a_server_that_is_down_lets_the_load_pass_unless_it_is_required(nobody):
    for place in (nobody, nobody.replace("http", "grpc")):
        told = pytest.raises(Unavailable, match=f"node 'far': cannot connect to {place}: .*Connection refused$")
        with graph_of(place, metadata="compare").mock() as server, told:
            server.infer(x=[1])
        refused = pytest.raises(StepFailed, match="says nothing about model 'double' .'metadata: require'.")
        with refused, graph_of(place, metadata="require").mock():
            pass


@pytest.mark.parametrize(
    ("bytes_sent", "kind", "text"),
    [
        (b"", Unavailable, "closed the connection before its answer was there"),
        (
            b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{",
            Unavailable,
            "closed the connection .*in the middle of its answer",
        ),
        (b"SSH-2.0-OpenSSH\r\n\r\n", StepFailed, "the answer of .* cannot be read"),
        (answer(body=b"<html>"), StepFailed, "cannot be read: it is no V2 answer"),
        (answer(body=b'{"outputs": [{"name": 3}]}'), StepFailed, "cannot be read: it is no V2 answer"),
        (answer(body=V2_ANSWER.replace(b"[1]", b"[9]")), StepFailed, "cannot be read: it is no V2 answer"),
        (answer(body=b"x" * 2000), StepFailed, "larger than 1000 bytes .limit 'max_response_bytes'."),
        (answer("503 Busy", b'{"error": "full"}'), Unavailable, "answered 503: full"),
        (answer("504 Late"), DeadlineExceeded, "answered 504: no reason given"),
        (answer("413 Large"), RequestTooLarge, "answered 413"),
        (answer("401 No", b"who are you"), StepFailed, "answered 401: who are you"),
        (answer("302 Moved", b"", "Location: http://elsewhere"), StepFailed, "answered 302"),
    ],
)
def test_what_is_no_good_answer_is_a_clear_error(bad_server, bytes_sent, kind, text):
    def behave(connection):
        connection.sendall(bytes_sent)
        if not bytes_sent.startswith(b"HTTP") or b"100" in bytes_sent[:40]:
            connection.close()

    place = bad_server(behave)
    with graph_of(place.url, max_response_bytes=1000).mock() as server, pytest.raises(kind, match=text) as failed:
        server.infer(x=[1])
    assert place.url in str(failed.value)
    assert 1 == place.requests


def test_a_grpc_server_that_speaks_no_grpc_is_a_clear_error(bad_server):
    place = bad_server(lambda connection: connection.sendall(b"garbage garbage garbage"))
    url = place.url.replace("http", "grpc")
    with graph_of(url).mock() as server, pytest.raises((Unavailable, DeadlineExceeded), match=f"{url}|time"):
        server.infer(x=[1], timeout_s=3)


def test_a_deadline_ends_the_call_here_and_there(other, url):
    with graph_of(url, "slow").mock() as server:
        for timeout_s in (1, 2, 4, 8, 16, 32):
            key = uuid4().hex
            with pytest.raises(DeadlineExceeded):
                server.infer(x=[1], id=key, timeout_s=timeout_s)
            assert 0 == server.in_flight
            if counted(other, key)["begun"]:  # else its time was up before it got there
                break
    assert {"begun": 1, "cancelled": 1} == counted_until(other, key, "cancelled")


def test_a_caller_who_leaves_cancels_the_call_over_there(other, url):
    key = uuid4().hex

    async def main():
        async with graph_of(url, "slow").mock() as server:
            asked = asyncio.ensure_future(server.infer(x=[1], id=key))
            await asyncio.to_thread(counted_until, other, key, "begun")
            asked.cancel()
            await asyncio.wait([asked])

    asyncio.run(main())
    assert {"begun": 1, "cancelled": 1} == counted_until(other, key, "cancelled")


def counted(other, key):
    """Return how often a request of `slow` has begun over there, and was cancelled."""
    with graph_of(other.http, "count").mock() as server:
        return {name: int(tensor[0]) for name, tensor in server.infer(x=[1], id=key).outputs.items()}


def counted_until(other, key, name):
    """Return the same, once it is true of the request, or has not become so."""
    end = time.monotonic() + PATIENCE_S
    while not (now := counted(other, key))[name] and time.monotonic() < end:
        pass
    return now


def test_a_breaker_opens_and_closes(bad_server, manual_clock, run):
    broken = []

    def behave(connection):
        if broken:
            connection.close()
        else:
            connection.sendall(answer(body=V2_ANSWER))

    place = bad_server(behave)
    broken.append(True)

    async def main():
        async with graph_of(place.url, circuit_breaker={"failures": 2, "open_ms": 100}).mock() as server:
            for _ in range(2):
                with pytest.raises(Unavailable, match="closed the connection"):
                    await server.infer(x=[1])
            for _ in range(2):
                with pytest.raises(Unavailable, match="circuit breaker is open"):
                    await server.infer(x=[1])
                await manual_clock.advance(0.06)
            assert 2 == place.requests
            broken.clear()
            assert [[7], [7]] == [(await server.infer(x=[1])).outputs["y"].tolist() for _ in range(2)]

    run(main())


def test_the_next_address_is_tried_only_where_the_first_cannot_have_seen_the_request(bad_server, nobody):
    good = bad_server(lambda connection: connection.sendall(answer(body=V2_ANSWER)))
    dying = bad_server(lambda connection: connection.close())
    with graph_of([nobody, good.url]).mock() as server:
        for _ in range(10):
            assert [7] == server.infer(x=[1]).outputs["y"].tolist()
    assert 10 == good.requests
    with graph_of([dying.url, good.url], ejection={"failures": 1000}).mock() as server:
        ends = [ended(server) for _ in range(30)]
    assert {"answered", "lost"} == set(ends)
    assert ends.count("lost") == dying.requests
    with graph_of([dying.url, good.url], ejection={"failures": 1000}, idempotent=True).mock() as server:
        assert ["answered"] * 30 == [ended(server) for _ in range(30)]


def ended(server):
    try:
        server.infer(x=[1])
    except ServingGraphError as error:
        return "lost" if "closed the connection" in str(error) else str(error)
    return "answered"


def test_an_address_that_fails_is_left_alone_until_it_is_ready(bad_server):
    sick = [True]
    asked = []

    def behave(connection):
        if sick:
            asked.append(1)
            connection.sendall(answer("503 Sick"))
        else:
            connection.sendall(answer(body=V2_ANSWER))

    ill = bad_server(behave)
    good = bad_server(lambda connection: connection.sendall(answer(body=V2_ANSWER)))
    ejection = {"failures": 2, "pause_ms": 60_000}
    with graph_of([ill.url, good.url], idempotent=True, ejection=ejection).mock() as server:
        for _ in range(40):
            server.infer(x=[1])
    assert 2 == ill.requests  # and then never again
    sick.append(True)
    with graph_of([ill.url, good.url], idempotent=True, ejection={"failures": 1, "pause_ms": 20}).mock() as server:
        before = len(asked)
        while len(asked) < before + 3:  # a failure, and probes that it does not answer well
            server.infer(x=[1])
        assert any(request.startswith(b"GET /v2/health/ready ") for request in ill.seen)
        sick.clear()
        healthy = ill.requests
        end = time.monotonic() + PATIENCE_S
        while ill.requests < healthy + 5 and time.monotonic() < end:
            server.infer(x=[1])
        assert ill.requests >= healthy + 5


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"url": "there:1"}, "'url': has no scheme: expected http://"),
        ({"url": "ftp://there:1"}, "'url': has scheme 'ftp'"),
        ({"url": "grpc://there"}, "'url': names no port"),
        ({"url": "http://there:x"}, "'url': is no URL"),
        ({"url": []}, "'url': is empty"),
        ({"url": ["http://a:1", "http://a:1/"]}, "'url': names an address twice"),
        ({"url": "http://a:1", "headers": {"Host": "b"}}, "'headers': 'Host' cannot be given"),
        ({"url": "http://a:1", "tls_ca": "no.pem"}, "file 'no.pem' does not exist"),
        ({"url": "http://a:1", "pass_parameters": ["priority"]}, "'pass_parameters': 'priority' is the protocol's own"),
        ({"url": "http://a:1", "ejecton": {}}, "unknown key 'ejecton'; did you mean 'ejection'?"),
    ],
)
def test_options_are_checked_without_a_server(options, text):
    graph = Graph("g", inputs=X)
    url = options.pop("url")
    graph.to(steps.V2(url, "m", **options), name="far").respond()
    with pytest.raises(GraphInvalid) as refused:
        graph.compile()
    assert text in str(refused.value)


def test_what_is_no_tensor_is_refused(other):
    graph = Graph("g", inputs=X)
    graph.to(lambda value: {"x": "text"}, name="a").to(steps.V2(other.http, "double", metadata="ignore"), name="far").respond()
    refused = pytest.raises(InvalidRequest, match="node 'far': sends tensors, and 'x' is no array but str")
    with graph.mock() as server, refused:
        server.infer(x=[1])


def test_a_graph_with_remote_steps_survives_the_round_trip(tmp_path, other):
    graph = graph_of([other.http, other.grpc], headers={"A": "${TOKEN}"})
    graph.save(tmp_path / "g.yaml")
    assert graph == Graph.load(tmp_path / "g.yaml")
