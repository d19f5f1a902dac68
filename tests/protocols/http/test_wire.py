"""HTTP/1.1 as bytes on a socket: framing, order of answers, limits."""

from __future__ import annotations

import gzip
import http.client
import json
import shutil
import socket
import subprocess
import zlib

import numpy as np
import pytest

from servinggraph import Graph
from servinggraph.protocols.http import wire

GRAPH = "/v2/models/echo/infer"
BODY = json.dumps({"inputs": [{"name": "x", "datatype": "FP32", "shape": [2], "data": [1, 2]}]}).encode()


def request(body: bytes = BODY, *, path: str = GRAPH, method: str = "POST", headers: str = "", length: bool = True) -> bytes:
    size = f"Content-Length: {len(body)}\r\n" if length else ""
    return f"{method} {path} HTTP/1.1\r\nHost: x\r\n{size}{headers}\r\n".encode() + body


def chunked(*parts: bytes, end: bytes = b"0\r\n\r\n") -> bytes:
    head = request(b"", headers="Transfer-Encoding: chunked\r\n", length=False)
    return head + b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + end


def echo(value):
    return {"y": value["x"]}


@pytest.fixture(scope="module")
def server(shared_server):
    return shared_server(Graph("echo", {"x": ("FP32", [-1])}).to(echo).respond(), max_body_bytes=200_000, max_header_bytes=8192)


@pytest.fixture
def connection(server):
    connection = server.connect()
    yield connection
    connection.close()


def data_of(answer):
    assert 200 == answer.status, answer.body
    return answer.json()["outputs"][0]["data"]


def test_a_kept_alive_connection_serves_request_after_request(connection):
    for _ in range(3):
        connection.send(request())
        assert [1, 2] == data_of(connection.answer())


def test_a_request_may_arrive_byte_by_byte(connection):
    for byte in request():
        connection.send(bytes([byte]))

    assert [1, 2] == data_of(connection.answer())


def test_pipelined_requests_are_answered_in_order(connection):
    bodies = [
        json.dumps({"id": str(n), "inputs": [{"name": "x", "datatype": "FP32", "shape": [1], "data": [n]}]}) for n in range(50)
    ]
    connection.send(b"".join(request(body.encode()) for body in bodies))

    assert [[n] for n in range(50)] == [data_of(connection.answer()) for _ in range(50)]


def test_requests_pipelined_behind_one_that_is_refused_are_answered(connection):
    connection.send(request(path="/v2/models/nope/infer") + request(b"{") + request())

    assert [404, 400, 200] == [connection.answer().status for _ in range(3)]


def test_chunked_bodies_are_read_with_extensions_and_trailers(connection):
    connection.send(chunked(BODY[:10], BODY[10:]))
    assert [1, 2] == data_of(connection.answer())

    head, _, rest = chunked().partition(b"\r\n\r\n")
    connection.send(
        head + b"\r\n\r\n" + b"%x;name=value;other\r\n%s\r\n" % (len(BODY), BODY) + b"0;last\r\nX-Trailer: a\r\n\r\n"
    )
    assert [1, 2] == data_of(connection.answer())
    connection.send(request())
    assert 200 == connection.answer().status


def test_trailers_do_not_count_as_headers(connection):
    connection.send(chunked(BODY, end=b"0\r\nX-Request-Timeout-Ms: nonsense\r\nContent-Encoding: br\r\n\r\n"))

    assert [1, 2] == data_of(connection.answer())


@pytest.mark.parametrize("end", [b"0\r\nX-Endless: ", b"0;endless"])
def test_endless_trailers_and_chunk_extensions_are_cut_off(connection, end):
    connection.send(chunked(BODY, end=end))
    with pytest.raises((BrokenPipeError, ConnectionResetError, EOFError)):
        for _ in range(2000):
            connection.send(b"a" * 4096)
        connection.answer()
        connection.is_closed()
        raise EOFError


def test_a_binary_body_may_be_chunked(connection):
    array = np.array([1.5, 2.5], np.float32)
    document = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [2], "parameters": {"binary_data_size": 8}}]}
    head = json.dumps(document).encode()
    fields = f"Transfer-Encoding: chunked\r\nInference-Header-Content-Length: {len(head)}\r\n"
    body = head + array.tobytes()
    connection.send(request(b"", headers=fields, length=False) + b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body))

    assert [1.5, 2.5] == data_of(connection.answer())


def test_a_raw_body_is_the_only_input(connection):
    connection.send(request(np.array([1, 2, 3], np.float32).tobytes(), headers="Inference-Header-Content-Length: 0\r\n"))
    answer = connection.answer()

    assert "application/octet-stream" == answer.headers["content-type"]
    length = int(answer.headers["inference-header-content-length"])
    assert [1, 2, 3] == np.frombuffer(answer.body[length:], np.float32).tolist()


def test_expect_100_continue_is_answered_before_the_body(connection):
    connection.send(request(b"", headers=f"Content-Length: {len(BODY)}\r\nExpect: 100-continue\r\n", length=False))
    assert 100 == connection.answer().status
    connection.send(BODY)

    assert [1, 2] == data_of(connection.answer())


def test_a_body_that_would_be_too_large_is_refused_before_it_is_sent(connection):
    connection.send(request(b"", headers="Content-Length: 200001\r\nExpect: 100-continue\r\n", length=False))
    answer = connection.answer()

    assert 413 == answer.status
    assert "200000 bytes (limit 'max_body_bytes')" in answer.error
    assert "close" == answer.headers["connection"]


@pytest.mark.parametrize("method", ["HEAD", "PUT", "DELETE", "GET", "OPTIONS", "PATCH"])
def test_a_wrong_method_is_405_with_json_and_leaves_the_connection_in_order(connection, method):
    connection.send(request(b"", method=method))
    answer = connection.answer(head_only=method == "HEAD")

    assert 405 == answer.status
    assert "POST" == answer.headers["allow"]
    if method != "HEAD":
        assert "Method Not Allowed" == answer.error
    connection.send(request())
    assert 200 == connection.answer().status


@pytest.mark.parametrize(
    "path",
    ["/", "/v1/models", "/v2/models/echo/", "/v2/models/echo/infer/", "/v2/models/echo/versions/abc/infer", "/v2/models/echo/versions/-1",
     "/v2/models/a/b/infer", "/v2/health", "//v2", "/v2/models/echo/versions/1/"],
)  # fmt: skip
def test_a_path_that_does_not_exist_is_404_with_json(server, path):
    assert (404, "Not Found") == (server.get(path).status, server.get(path).error)


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("/v2/models/nope", "Request for unknown model: 'nope' is not found"),
        ("/v2/models/echo/versions/2", "Request for unknown model: 'echo' version 2 is not found"),
        ("/v2/models/nope/ready", "Request for unknown model: 'nope' is not found"),
        ("/v2/models/echo/versions/2/ready", "Request for unknown model: 'echo' version 2 is not found"),
    ],
)
def test_an_unknown_model_or_version_is_404_and_named(server, path, text):
    answer = server.get(path)

    assert (404, text) == (answer.status, answer.error)


def test_health_and_metadata_have_json_bodies(server):
    assert {"live": True} == server.get("/v2/health/live").json()
    assert {"ready": True} == server.get("/v2/health/ready").json()
    assert {"name": "echo", "ready": True} == server.get("/v2/models/echo/ready").json()
    assert {"name": "echo", "ready": True} == server.get("/v2/models/echo/versions/1/ready?a=b").json()
    assert server.get("/v2").json() == server.get("/v2/").json()
    assert {"models": ["echo"]} == server.get("/v2/models").json()


def test_the_query_is_ignored_and_the_path_may_be_percent_encoded(server):
    assert [1, 2] == data_of(server.post(GRAPH + "?a=b&c", BODY))
    assert [1, 2] == data_of(server.post("/v2/models/%65cho/infer", BODY))


def test_a_head_that_is_too_large_is_431(connection):
    connection.send(request(headers="X-Large: " + "a" * 9000 + "\r\n"))
    answer = connection.answer()

    assert 431 == answer.status
    assert "exceed 8192 bytes (limit 'max_header_bytes')" in answer.error
    assert connection.is_closed()


@pytest.fixture
def lingering(monkeypatch):
    """Give whoever sends on although the answer is there all the time that the machine may take over it."""
    monkeypatch.setattr(wire, "LINGER_S", 60.0)


@pytest.mark.usefixtures("lingering")
def test_an_endless_head_is_431_and_the_answer_is_not_lost(connection):
    connection.send(b"POST / HTTP/1.1\r\nX-Large: ")
    for _ in range(100):
        connection.send(b"a" * 65536)

    assert 431 == connection.answer().status


def test_a_large_body_behind_a_small_head_is_no_large_head(connection):
    numbers = [0.5] * 20_000
    body = json.dumps({"inputs": [{"name": "x", "datatype": "FP32", "shape": [20_000], "data": numbers}]}).encode()
    connection.send(request(body) + request(body))

    assert [numbers, numbers] == [data_of(connection.answer()), data_of(connection.answer())]


@pytest.mark.usefixtures("lingering")
@pytest.mark.parametrize("kind", ["length", "chunked", "chunks"])
def test_a_body_that_is_too_large_is_413_and_the_answer_is_not_lost(server, kind):
    # http.client sends all of it before it reads: a connection closed at once would be an error there.
    client = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    body = b"a" * 3_000_000
    if kind == "length":
        client.request("POST", GRAPH, body)
    else:
        pieces = [body] if kind == "chunked" else (body[:1000] for _ in range(1000))
        client.request("POST", GRAPH, iter(pieces), {"Transfer-Encoding": "chunked"}, encode_chunked=True)
    answer = client.getresponse()

    assert 413 == answer.status
    assert "200000 bytes (limit 'max_body_bytes')" in json.loads(answer.read())["error"]
    assert client.sock is None  # the server said that it closes
    client.close()


def test_a_connection_is_closed_after_a_body_that_is_too_large(connection):
    connection.send(request(b"a" * 300_000))

    assert 413 == connection.answer().status
    assert connection.is_closed()


def test_a_stream_without_end_is_cut_off(connection):
    connection.send(chunked(b"a" * 300_000, end=b""))
    assert 413 == connection.answer().status
    connection.socket.settimeout(30)
    with pytest.raises((BrokenPipeError, ConnectionResetError)):
        while True:
            connection.send(b"400\r\n" + b"a" * 1024 + b"\r\n")


@pytest.mark.parametrize(("coding", "pack"), [("gzip", gzip.compress), ("deflate", zlib.compress), ("GZip", gzip.compress)])
def test_compressed_bodies_are_read(server, coding, pack):
    assert [1, 2] == data_of(server.post(GRAPH, pack(BODY), {"Content-Encoding": coding}))


def test_all_members_of_a_gzip_body_are_read(server):
    body = gzip.compress(BODY[:20]) + gzip.compress(BODY[20:])

    assert [1, 2] == data_of(server.post(GRAPH, body, {"Content-Encoding": "gzip"}))


@pytest.mark.parametrize(("coding", "pack"), [("gzip", gzip.compress), ("deflate", zlib.compress)])
def test_a_body_that_unpacks_to_too_much_is_413(server, coding, pack):
    answer = server.post(GRAPH, pack(b" " * 50_000_000), {"Content-Encoding": coding})

    assert 413 == answer.status
    assert "unpacks to more than 200000 bytes" in answer.error


@pytest.mark.parametrize(
    ("body", "coding", "status", "text"),
    [
        (b"not gzip", "gzip", 400, "the gzip body is corrupt"),
        (gzip.compress(BODY)[:-4], "gzip", 400, "cut off"),
        (gzip.compress(BODY)[:-8] + b"\0" * 8, "gzip", 400, "corrupt"),
        (zlib.compress(BODY) + b"x", "deflate", 400, "bytes follow"),
        (b"", "gzip", 400, "cut off"),
        (BODY, "br", 501, "Unsupported compression type 'br'"),
        (BODY, "gzip, gzip", 501, "Unsupported compression type"),
    ],
)
def test_a_bad_compressed_body_is_refused(server, body, coding, status, text):
    answer = server.post(GRAPH, body, {"Content-Encoding": coding})

    assert status == answer.status
    assert text in answer.error
    if status == 501:
        assert "gzip, deflate" == answer.headers["accept-encoding"]


@pytest.mark.parametrize(
    ("accepted", "coding"),
    [
        ("gzip", "gzip"), ("deflate", "deflate"), ("gzip, deflate", "gzip"), ("deflate, gzip", "deflate"), ("gzip;q=0.5, deflate", "deflate"),
        ("GZIP", "gzip"), ("identity", None), ("br", None), ("gzip;q=0", None), ("", None), ("gzip;q=x", None), ("identity, gzip;q=0.5", None),
    ],
)  # fmt: skip
def test_the_answer_is_packed_as_the_client_accepts_it(server, accepted, coding):
    answer = server.post(GRAPH, BODY, {"Accept-Encoding": accepted})

    assert coding == answer.headers.get("content-encoding")
    unpack = {None: bytes, "gzip": gzip.decompress, "deflate": zlib.decompress}[coding]
    assert [1, 2] == json.loads(unpack(answer.body))["outputs"][0]["data"]


def test_errors_are_never_packed(server):
    answer = server.post(GRAPH, b"{", {"Accept-Encoding": "gzip"})

    assert 400 == answer.status
    assert "failed to parse the request JSON buffer" in answer.error


@pytest.mark.parametrize(
    "text", [b"\0\1\2\3\r\n\r\n", b"GET\r\n\r\n", b"POST /x HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n",
             b"POST / HTTP/1.1\r\nContent-Length: -1\r\n\r\n", b"POST / HTTP/1.1\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n",
             b"GET /\xff HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"],
)  # fmt: skip
def test_what_is_no_http_is_400_with_json_and_the_end(connection, text):
    connection.send(text)
    answer = connection.answer()

    assert 400 == answer.status
    assert "Invalid HTTP request received." == answer.error
    assert connection.is_closed()


def test_a_broken_chunk_is_400(connection):
    connection.send(chunked(BODY[:10], end=b"zz\r\n"))

    assert 400 == connection.answer().status
    assert connection.is_closed()


def test_garbage_behind_a_request_is_refused_after_the_answer(connection):
    connection.send(request() + b"\0garbage\r\n\r\n")

    assert [1, 2] == data_of(connection.answer())
    assert 400 == connection.answer().status
    assert connection.is_closed()


def test_an_upgrade_is_not_taken_up(connection):
    upgrade = "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n"
    connection.send(request(headers=upgrade) + request())

    assert [[1, 2], [1, 2]] == [data_of(connection.answer()), data_of(connection.answer())]


def test_an_http_1_0_client_gets_an_answer_and_the_end(connection):
    connection.send(request().replace(b"HTTP/1.1", b"HTTP/1.0"))

    assert [1, 2] == data_of(connection.answer())
    assert connection.is_closed()


def test_a_client_that_asks_for_the_end_gets_it(connection):
    connection.send(request(headers="Connection: close\r\n"))
    answer = connection.answer()

    assert "close" == answer.headers["connection"]
    assert connection.is_closed()


def test_a_client_that_has_said_all_still_gets_its_answer(connection):
    connection.send(request(headers="Connection: close\r\n"))
    connection.socket.shutdown(socket.SHUT_WR)

    assert 200 == connection.answer().status


@pytest.mark.parametrize(
    ("value", "status", "text"),
    [
        ("abc", 400, "Unable to parse Inference-Header-Content-Length, got: abc"),
        ("", 400, "Unable to parse Inference-Header-Content-Length, got: "),
        ("0x10", 400, "Unable to parse Inference-Header-Content-Length, got: 0x10"),
        ("99999999999999999999999", 400, "value is out of range"),
        ("-1", 400, "inference header size should be in range (0, 77), got: -1"),
        ("78", 400, "inference header size should be in range (0, 77), got: 78"),
        ("10", 400, "failed to parse the request JSON buffer"),
        ("77", 200, ""),
    ],
)
def test_a_bad_header_length_is_refused(server, value, status, text):
    body = BODY.ljust(77)
    answer = server.post(GRAPH, body, {"Inference-Header-Content-Length": value})

    assert status == answer.status
    assert text in answer.body.decode()


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_curl_works_with_its_own_content_type_and_compression(server):
    url = f"http://127.0.0.1:{server.port}{GRAPH}"
    for options in ([], ["--compressed"], ["-H", "Transfer-Encoding: chunked"], ["-H", "Expect: 100-continue"], ["--http1.0"]):
        done = subprocess.run(
            ["curl", "-sS", "--max-time", "60", *options, "-d", "@-", url],
            input=BODY,
            capture_output=True,
            check=True,
            timeout=120,
        )
        assert [1, 2] == json.loads(done.stdout)["outputs"][0]["data"]


@pytest.mark.usefixtures("lingering")
@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_curl_sees_a_refused_upload(server, tmp_path):
    large = tmp_path / "large"
    large.write_bytes(b"a" * 5_000_000)
    url = f"http://127.0.0.1:{server.port}{GRAPH}"
    for options in (["-H", "Expect:"], [], ["-H", "Transfer-Encoding: chunked", "-H", "Expect:"]):
        done = subprocess.run(
            ["curl", "-sS", "--max-time", "60", *options, "--data-binary", f"@{large}", "-w", "%{http_code}", url],
            capture_output=True, check=False, timeout=120,
        )  # fmt: skip
        assert done.stdout.endswith(b"413"), (options, done.stdout, done.stderr)
