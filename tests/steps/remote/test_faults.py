"""What servers, addresses, certificates and callers do wrong: a clear error each, and no secret in any."""

import asyncio
import json
import os
import socket
import time
import traceback
from contextlib import suppress
from pathlib import Path

import pytest

from servinggraph import Graph, InvalidRequest, routers, steps
from servinggraph.errors import GraphInvalid, ServingGraphError, StepFailed, Unavailable
from servinggraph.steps.remote.balancing import Ejection
from servinggraph.steps.remote.calls import Call
from servinggraph.steps.remote.endpoints import endpoint_of
from servinggraph.steps.remote.failures import CallFailed, broken
from servinggraph.steps.remote.fleet import Fleet
from servinggraph.steps.remote.headers import Secrets

X = {"x": ("FP32", [-1])}
PATIENT = {"connect_timeout_ms": 60_000}
SECRET = "hunter22+a/b== &long"  # noqa: S105  (nobody's)


def answer(status="200 OK", body=b"", *fields):
    """Return an HTTP answer."""
    head = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *fields]
    return "\r\n".join(head).encode() + b"\r\n\r\n" + body


def v2_answer(datatype="FP32", shape=(1,), data=(7,)):
    tensor = {"name": "y", "datatype": datatype, "shape": shape, "data": data}
    return answer(body=json.dumps({"model_name": "m", "outputs": [tensor]}).encode())


def graph_of(step):
    graph = Graph("g", inputs=X)
    graph.to(step, name="far").respond()
    return graph


def v2(url, **options):
    return graph_of(steps.V2(url, "double", **{"metadata": "ignore", "metadata_timeout_ms": 60_000, **PATIENT, **options}))


def failure_of(graph):
    """Return what a request to a graph ends with, and everything that a log of it would have."""
    with graph.mock() as server, pytest.raises(ServingGraphError) as failed:
        server.infer(x=[1])
    return failed.value, "".join(traceback.format_exception(failed.value))


def test_a_certificate_that_is_not_trusted_is_said(bad_server, certificate):
    web = bad_server(lambda connection: connection.sendall(v2_answer()), certificate)
    _, text = failure_of(v2(web.url))
    assert "certificate verify failed: self-signed certificate" in text


@pytest.mark.parametrize(
    "make",
    [
        lambda options: steps.V2("https://a:1", "m", **options),
        lambda options: steps.Rest("https://a:1", **options),
        lambda options: steps.Callback(url="https://a:1", **options),
    ],
)
def test_a_file_without_certificates_is_refused_when_the_graph_is_compiled(make, tmp_path, certificate):
    (tmp_path / "empty.pem").touch()
    for file, text in {"empty.pem": "holds no certificates in PEM", "none.pem": "does not exist"}.items():
        with pytest.raises(GraphInvalid, match=text):
            graph_of(make({"tls_ca": str(tmp_path / file)})).compile()
    graph_of(make({"tls_ca": certificate[0]})).compile()


@pytest.mark.parametrize("host", ["a" * 64 + ".example", "a..b", "1.2.3", "1.2.3.256", "999"])
@pytest.mark.parametrize(
    "make",
    [
        lambda host: steps.V2(f"http://{host}:1", "m"),
        lambda host: steps.V2(f"grpc://{host}:1", "m"),
        lambda host: steps.Rest(f"http://{host}/a"),
        lambda host: steps.Callback(url=f"http://{host}/a"),
    ],
)
def test_a_host_that_cannot_be_is_refused_when_the_graph_is_compiled(make, host):
    with pytest.raises(GraphInvalid, match="names no host|is no URL"):
        graph_of(make(host)).compile()


@pytest.mark.parametrize("host", ["a.example.", "a_b", "127.0.0.1", "[::1]", "ä.example", "3com.example"])
def test_a_host_that_can_be_is_taken(host):
    graph_of(steps.V2(f"http://{host}:1", "m")).compile()


def test_an_address_whose_name_is_not_found_is_passed_over(other):
    # A name that no resolver has to be asked for.
    for nowhere, there in (("grpc://ä.invalid:1", other.grpc), ("http://127.0.0.1:1", other.http)):
        with v2([nowhere, there]).mock() as server:
            assert [[2]] * 8 == [server.infer(x=[1]).outputs["y"].tolist() for _ in range(8)]


def test_a_path_before_v2_is_quoted(bad_server):
    place = bad_server(lambda connection: connection.sendall(v2_answer()))
    with v2(place.url + "/a b/ü/%7e").mock() as server:
        server.infer(x=[1])
    assert place.seen[0].startswith(b"POST /a%20b/%C3%BC/%7e/v2/models/double/infer HTTP/1.1\r\n")


def test_white_space_in_a_callers_header_does_not_fail_a_request_over_grpc(other):
    for name in ("x-request-id", "tracestate", "x-user"):
        with graph_of(steps.V2(other.grpc, "told", metadata="ignore", pass_headers=["x-user"])).mock() as server:
            told = json.loads(server.infer(x=[1], headers={name: "a\tb"}).outputs["told"][0])
        assert "a b" == told["headers"][name]


@pytest.mark.parametrize(
    ("scheme", "options", "text"),
    [
        ("http", {"pass_headers": [":path"]}, "':path' cannot go along"),
        ("http", {"pass_headers": ["Content-Type"]}, "'Content-Type' cannot go along"),
        ("grpc", {"pass_headers": ["x-trace-bin"]}, "'x-trace-bin' cannot go over gRPC"),
        ("grpc", {"pass_headers": ["grpc-timeout"]}, "'grpc-timeout' cannot go over gRPC"),
        ("grpc", {"headers": {"X!": "1"}}, "'X!' cannot go over gRPC"),
    ],
)
def test_headers_that_cannot_go_are_refused_when_the_graph_is_compiled(scheme, options, text):
    with pytest.raises(GraphInvalid, match=text):
        v2(f"{scheme}://a:1", **options).compile()
    v2("http://a:1", pass_headers=["X-Trace-Bin"], headers={"X!": "1"}).compile()


def test_headers_that_cannot_go_along_with_rest_are_refused(bad_server):
    with pytest.raises(GraphInvalid, match="'Host' cannot go along"):
        graph_of(steps.Rest("http://a:1", pass_headers=["Host"])).compile()


def test_a_number_beyond_grpc_is_the_callers(other):
    with v2(other.grpc, pass_parameters=["n"]).mock() as server:
        assert [2] == server.infer(x=[1], parameters={"n": 2**63 - 1}).outputs["y"].tolist()
        with pytest.raises(InvalidRequest, match="parameter 'n' is beyond"):
            server.infer(x=[1], parameters={"n": 2**63})


@pytest.mark.parametrize(
    ("datatype", "shape", "data", "fits"),
    [
        ("INT32", [1], [7.5], False),
        ("INT32", [1], [7.0], True),
        ("INT8", [1], [700], False),
        ("UINT8", [1], [-1], False),
        ("UINT64", [1], [2**64 - 1], True),
        ("INT64", [1], [2**63], False),
        ("INT32", [1], ["7"], False),
        ("BOOL", [1], [7], False),
        ("BOOL", [2], [True, 0], True),
        ("FP16", [1], [1e5], False),
        ("FP32", [1], [1e39], False),
        ("FP32", [2, 1], [[0.1], [None]], True),
        ("FP32", [-1], [1], False),
        ("FP32", [2], [1], False),
    ],
)
def test_numbers_of_an_answer_in_json_are_never_cut_to_fit(bad_server, datatype, shape, data, fits):
    place = bad_server(lambda connection: connection.sendall(v2_answer(datatype, shape, data)))
    if not fits:
        assert "cannot be read: it is no V2 answer" in failure_of(v2(place.url))[0].message
        return
    with v2(place.url).mock() as server:
        assert shape == list(server.infer(x=[1]).outputs["y"].shape)


def test_a_server_that_gives_its_metadata_byte_by_byte_does_not_hold_up_the_load(bad_server):
    def drip(fields):
        def behave(connection):
            connection.sendall(b"HTTP/1.1 200 OK\r\n" + fields + b"Content-Length: 1000000\r\n\r\n")
            while True:
                connection.sendall(b" ")
                time.sleep(0.01)

        return behave

    refused = pytest.raises(StepFailed, match=r"not within 200 ms .limit 'metadata_timeout_ms'.")
    for fields in (b"", b"Connection: close\r\n"):
        place = bad_server(drip(fields))
        with refused, v2(place.url, metadata="require", metadata_timeout_ms=200).mock():
            pass


def quoting(place):
    """Return what answers with the request, as some servers do when they do not like it."""

    def behave(connection):
        head = place().seen[-1].partition(b"\r\n\r\n")[0]
        line, _, fields = head.partition(b"\r\n")
        kept = [field for field in fields.split(b"\r\n") if field.lower().startswith(b"authorization")]
        connection.sendall(answer("404 Not Found", b"Cannot " + line + b" " + b"".join(kept)))

    return behave


@pytest.mark.parametrize(
    "make",
    [
        lambda url: steps.Rest(url + "/a", query={"key": "${FAR_TOKEN}"}, **PATIENT),
        lambda url: steps.Rest(url + "/a/${FAR_TOKEN}/b", **PATIENT),
        lambda url: steps.Rest(url + "/a", headers={"Authorization": "${FAR_TOKEN}"}, **PATIENT),
        lambda url: steps.V2(url, "m", headers={"Authorization": "${FAR_TOKEN}"}, metadata="ignore", **PATIENT),
    ],
)
def test_a_secret_that_a_server_quotes_is_not_printed_however_it_is_spelled(bad_server, monkeypatch, make):
    monkeypatch.setenv("FAR_TOKEN", SECRET)
    place = bad_server(quoting(lambda: place))
    failed, text = failure_of(graph_of(make(place.url)))
    assert "answered 404: Cannot POST /" in failed.message
    assert "hunter" not in text


def test_a_secret_in_the_address_of_a_callback_is_not_printed(bad_server, monkeypatch):
    monkeypatch.setenv("FAR_TOKEN", "hunter22/long")
    place = bad_server(quoting(lambda: place))
    failed, text = failure_of(graph_of(steps.Callback(url=place.url + "/a/${FAR_TOKEN}", on_failure="fail", **PATIENT)))
    assert "answered 404: Cannot POST /a/${FAR_TOKEN}" in failed.message
    assert "hunter" not in text


def test_a_secret_in_the_path_of_an_address_is_not_printed(bad_server, monkeypatch, caplog):
    monkeypatch.setenv("FAR_TOKEN", "hunter22 long")
    place = bad_server(quoting(lambda: place))
    graph = v2([place.url + "/${FAR_TOKEN}", "http://127.0.0.1:1/${FAR_TOKEN}"], ejection={"failures": 1}, metadata="compare")
    texts = [graph.compile().nodes[0].work.describe()]
    with pytest.raises(StepFailed, match="is not what is declared: it answered 404: Cannot GET /") as failed, graph.mock():
        pass
    texts += traceback.format_exception(failed.value)
    place.behave = lambda connection: connection.sendall(answer("503 Busy", b"Cannot " + place.seen[-1].split()[1]))
    for url, text in ((place.url, "answered 503: Cannot /"), ("http://127.0.0.1:1", "cannot connect to http://127.0.0.1:1/")):
        ended, whole = failure_of(v2(url + "/${FAR_TOKEN}"))
        assert text in ended.message
        texts.append(whole)
    assert "${FAR_TOKEN}" in texts[0]
    assert "hunter" not in "".join(texts) + caplog.text


@pytest.mark.parametrize("metadata", ["compare", "require"])
def test_a_secret_is_not_printed_at_load(bad_server, monkeypatch, caplog, metadata):
    monkeypatch.setenv("FAR_TOKEN", SECRET)
    place = bad_server(quoting(lambda: place))
    refused = pytest.raises(StepFailed, match="it answered 404: Cannot GET /v2/models/double")
    with refused as failed, v2(place.url, metadata=metadata, headers={"Authorization": "${FAR_TOKEN}"}).mock():
        pass
    assert "hunter" not in "".join(traceback.format_exception(failed.value)) + caplog.text


def test_the_cause_of_an_error_does_not_have_the_secret_either(bad_server, monkeypatch):
    monkeypatch.setenv("FAR_TOKEN", "hunter22long")

    def no_http(connection):
        connection.sendall(b"SSH-2.0\r\n\r\n")
        connection.close()

    place = bad_server(no_http)
    failed, text = failure_of(graph_of(steps.Rest(place.url + "/a", query={"key": "${FAR_TOKEN}"}, **PATIENT)))
    assert "cannot be read" in failed.message
    assert "hunter" not in text


def test_a_secret_that_is_cut_off_with_the_text_is_hidden_too():
    hide = Secrets(["hunter2222"]).hide
    assert "it was ***..." == hide("it was hunter222...")
    assert "it was ***..." == hide("it was hunter2222...")
    assert "it was hunter2..." == hide("it was hunter2...")  # as short as words that are anywhere
    assert "hunter222" == hide("hunter222")


class Held:
    """A way to a server whose connection is lost when the test says so."""

    def __init__(self):
        self.lost = asyncio.Event()
        self.asked = 0

    async def infer(self, call):
        await self.lost.wait()
        raise broken("there", "gone")

    async def ready(self):
        self.asked += 1
        return True

    async def close(self):
        self.lost.set()


def test_calls_that_end_with_their_fleet_leave_nobody_to_be_asked(run, manual_clock):
    async def main():
        ways = {endpoint_of(f"http://a:{port}"): Held() for port in (1, 2)}
        fleet = Fleet("far", ways, Ejection(failures=1), str, idempotent=False)
        calls = [asyncio.ensure_future(fleet.infer(Call({}, (), "", None, {}, {}), None)) for _ in range(4)]
        await manual_clock.settle()
        await fleet.close()
        assert 4 == len(
            [error for error in await asyncio.gather(*calls, return_exceptions=True) if isinstance(error, CallFailed)]
        )
        await manual_clock.advance(60)
        assert [0, 0] == [way.asked for way in ways.values()]

    run(main())


def test_a_connection_that_is_not_made_in_time_is_said(bad_server):
    web = bad_server(lambda connection: None)  # takes the connection, and never says a word of TLS
    failed, _ = failure_of(v2(web.url.replace("http", "https"), connect_timeout_ms=200))
    assert isinstance(failed, Unavailable)
    assert f"cannot connect to https://127.0.0.1:{web.port}: not within 200 ms (limit 'connect_timeout_ms')" == failed.message


@pytest.mark.parametrize(
    ("sent", "options", "asked"),
    [
        (b"", {}, 1),
        (answer("500 Broken", b"boom"), {}, 1),
        (answer("503 Busy", b"later"), {}, 1),
        (answer("504 Late", b"late"), {"idempotent": True}, 1),
        (answer("503 Busy", b"later"), {"idempotent": True}, 1),
        (answer(body=b"junk"), {}, 1),
        (answer("400 Bad", b"a member is bad"), {}, 4),
        (answer("413 Large", b"too many"), {}, 4),
        (answer("500 Broken", b"boom"), {"idempotent": True}, 4),
    ],
)
def test_a_batch_that_may_have_run_is_not_sent_again_member_by_member(bad_server, sent, options, asked):
    def behave(connection):
        connection.sendall(sent)
        if not sent:
            connection.close()

    place = bad_server(behave)

    async def main():
        async with v2(
            place.url, batch={"max_rows": 3, "max_delay_ms": 5000, "wait_when_idle": True}, **options
        ).mock() as server:
            return await asyncio.gather(*(server.infer(x=[number]) for number in range(3)), return_exceptions=True)

    ends = asyncio.run(main())
    assert [True] * 3 == [isinstance(end, ServingGraphError) and end.node == "far" for end in ends]
    assert asked == place.requests


def test_a_batch_over_rest_that_may_have_run_is_not_sent_again_either(bad_server):
    place = bad_server(lambda connection: connection.sendall(answer("500 Broken", b"boom")))
    declared = {"y": {"datatype": "FP32", "shape": [-1]}}

    async def main():
        batch = {"max_rows": 2, "max_delay_ms": 5000, "wait_when_idle": True}
        async with graph_of(steps.Rest(place.url, batch=batch, outputs=declared, **PATIENT)).mock() as server:
            return await asyncio.gather(server.infer(x=[1]), server.infer(x=[2]), return_exceptions=True)

    assert [StepFailed] * 2 == [type(end) for end in asyncio.run(main())]
    assert 1 == place.requests


def test_a_batch_keeps_the_other_members_of_an_ensemble_when_one_is_another_server_in_trouble(bad_server):
    place = bad_server(lambda connection: connection.sendall(answer("500 Broken", b"boom")))

    async def main():
        graph = Graph("g", inputs=X)
        far = steps.V2(place.url, "m", metadata="ignore", outputs={"y": {"datatype": "FP32", "shape": [-1]}}, **PATIENT)
        members = {"near": lambda value: {"y": value["x"]}, "far": far}
        ensemble = routers.Ensemble(members, combine="mean", quorum=1, on_failure="reweight")
        graph.to(ensemble, name="both", batch={"max_rows": 3, "max_delay_ms": 5000, "wait_when_idle": True}).respond()
        async with graph.mock() as server:
            return await asyncio.gather(*(server.infer(x=[number]) for number in range(3)))

    assert [[0], [1], [2]] == [reply.outputs["y"].tolist() for reply in asyncio.run(main())]
    assert 1 == place.requests


def options_of_connections_to(port, level, option):
    """Return the values that a socket option has on the connections of this process to a port."""
    found = set()
    for descriptor in Path("/proc/self/fd").iterdir():
        try:
            copied = os.dup(int(descriptor.name))
        except OSError:  # closed meanwhile
            continue
        try:
            connection = socket.socket(fileno=copied)
        except OSError:  # no socket
            os.close(copied)
            continue
        with connection, suppress(OSError, IndexError):  # not connected, or without a port
            if connection.getpeername()[1] == port:
                found.add(connection.getsockopt(level, option))
    return found


def test_a_server_that_vanishes_without_a_word_is_noticed(other):
    for url, milliseconds in ((other.http, 60_000), (other.grpc, 10_000)):
        port = int(url.rpartition(":")[2])
        with v2(url).mock() as server:
            server.infer(x=[1])
            assert {milliseconds} == options_of_connections_to(port, socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)
            if url == other.http:
                assert {1} == options_of_connections_to(port, socket.SOL_SOCKET, socket.SO_KEEPALIVE)
