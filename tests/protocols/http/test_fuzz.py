"""A short run of the fuzzer, and one of nonsense on a socket; FUZZ.md has the long ones."""

from __future__ import annotations

import asyncio
import importlib.util
import random
from pathlib import Path

import pytest

from servinggraph import Graph

_SPEC = importlib.util.spec_from_file_location("fuzz", Path(__file__).with_name("fuzz.py"))
fuzz = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(fuzz)

BODY = b'{"inputs":[{"name":"x","datatype":"FP32","shape":[1],"data":[1]}]}'
REQUEST = b"POST /v2/models/g/infer HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s" % (len(BODY), BODY)
SEEDS = [
    REQUEST,
    REQUEST * 3,
    b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n",
    b"POST /v2/models/g/infer HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n%x;a=b\r\n%s\r\n0\r\nX-T: a\r\n\r\n"
    % (len(BODY), BODY),
    b"POST /v2/models/g/infer HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: %d\r\n\r\n%s" % (len(BODY), BODY),
    b"POST /v2/models/g/infer HTTP/1.0\r\nConnection: Upgrade, keep-alive\r\nUpgrade: h2c\r\nContent-Length: 0\r\n\r\n",
    b"CONNECT a:1 HTTP/1.1\r\nHost: x\r\n\r\n",
    b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
]
TOKENS = [b"\r\n", b"\n", b"\r", b" ", b"\0", b":", b"HTTP/1.1", b"Content-Length: 5\r\n", b"Transfer-Encoding: chunked\r\n", b"0\r\n\r\n", b"ffffffffffffffff\r\n",
          b"Connection: close\r\n", b"Content-Encoding: gzip\r\n", b"Connection: upgrade\r\nUpgrade: websocket\r\n", b"%", b"/../", b"\xff", b"HEAD ", b"A" * 5000]  # fmt: skip


@pytest.mark.slow
def test_no_mutated_request_is_answered_wrongly_or_not_at_all():
    assert "3000 inputs" in asyncio.run(fuzz.run(3000, seed=20))


def mutated(rng: random.Random) -> bytes:
    data = rng.choice(SEEDS)
    for _ in range(rng.choice((0, 1, 1, 2, 4))):
        at = rng.randrange(len(data) + 1)
        end = min(len(data), at + rng.choice((0, 0, 1, 4, 20)))
        data = data[:at] + rng.choice((b"", rng.choice(TOKENS), rng.randbytes(end - at), data[at:end] * 3)) + data[end:]
    return rng.randbytes(rng.randrange(2000)) if rng.random() < 0.1 else data


@pytest.mark.slow
def test_a_server_outlives_nonsense_on_its_socket(http_server, until):
    rng = random.Random(3)
    server = http_server(Graph("g", {"x": ("FP32", [-1])}).to(lambda value: {**value}, "echo").respond(), max_header_bytes=4096)
    for number in range(1500):
        connection = server.connect()
        try:
            connection.send(mutated(rng))
            if rng.random() < 0.3:
                connection.send(mutated(rng))
            if rng.random() < 0.5:
                connection.socket.settimeout(0.005)
                answered = connection.socket.recv(12)
                assert answered == b"" or answered.startswith(b"HTTP/1.1 ")
                assert answered[9:12] not in (b"500", b"502", b"505")
        except (TimeoutError, ConnectionError):
            pass
        finally:
            connection.close()
        if number % 100 == 0:
            assert 200 == server.post("/v2/models/g/infer", BODY).status
    until(lambda: server.in_flight == 0)

    assert 200 == server.post("/v2/models/g/infer", BODY).status
