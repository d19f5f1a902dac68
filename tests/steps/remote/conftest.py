"""What remote steps call: a whole servinggraph in a process of its own, and servers that behave badly."""

from __future__ import annotations

import json
import re
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

STEPS = """
import asyncio
import sys
import numpy as np
from servinggraph import InvalidRequest, signature

# Each graph has this module to itself, and they count together, by the id of the request.
seen = sys.__dict__.setdefault("seen_by_all", {})

def counts_of(context):
    return seen.setdefault(context.id, {"cancelled": 0, "begun": 0})

@signature(inputs={"x": ("FP32", [-1])}, outputs={"y": ("FP32", [-1])})
def double(value):
    if (value["x"] < 0).any():
        raise InvalidRequest("x must not be negative")
    if (value["x"] > 1000).any():
        raise RuntimeError("too much")
    return {"y": value["x"] * 2}

def echo(value):
    return dict(value)

@signature(outputs={"told": ("BYTES", [1])})
def told(value, context):
    import json
    left = None if context.deadline is None else context.deadline - asyncio.get_running_loop().time()
    text = json.dumps({"id": context.id, "left": left, "headers": dict(context.headers), "parameters": dict(context.parameters)})
    return {"told": np.array([text.encode()], dtype=object)}

async def slow(value, context):
    counts_of(context)["begun"] += 1
    try:
        await asyncio.sleep(600)
    except asyncio.CancelledError:
        counts_of(context)["cancelled"] += 1
        raise
    return {"y": value["x"]}

@signature(outputs={"begun": ("INT64", [1]), "cancelled": ("INT64", [1])})
def count(value, context):
    return {name: np.array([number]) for name, number in counts_of(context).items()}
"""
GRAPHS = {
    "double": ("x: {datatype: FP32, shape: [-1]}", "double"),
    "slow": ("x: {datatype: FP32, shape: [-1]}", "slow"),
    "told": ("x: {datatype: FP32, shape: [-1]}", "told"),
    "count": ("x: {datatype: FP32, shape: [-1]}", "count"),
    "echo": (
        (
            "x: {datatype: FP32, shape: [-1, 2], optional: true}, text: {datatype: BYTES, shape: [-1], optional: true},"
            " half: {datatype: BF16, shape: [-1], optional: true}, flag: {datatype: BOOL, shape: [-1], optional: true}"
        ),
        "echo",
    ),
}


class Other:
    """A servinggraph process."""

    def __init__(self, folder: Path, *options: str) -> None:
        folder.mkdir(exist_ok=True)
        for name, (inputs, call) in GRAPHS.items():
            (folder / f"{name}.yaml").write_text(
                f"graph: {name}\ninputs: {{{inputs}}}\nnodes:\n  n: {{step: python, call: 'other_steps:{call}'}}\nanswer: n\n"
            )
        (folder / "other_steps.py").write_text(STEPS)
        command = [sys.executable, "-m", "servinggraph", "serve", str(folder), "--log-format", "json", "--grace-s", "0"]
        command += ["--http-port", "0", "--grpc-port", "0", *options]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert self.process.stderr is not None
        for line in self.process.stderr:
            # As text: libraries may say something that is no JSON.
            if found := re.search(r"serving .* on (\{.*?\})", line):
                ports_of = json.loads(found[1].replace("'", '"'))
                break
        self.http, self.grpc = f"http://127.0.0.1:{ports_of['http']}", f"grpc://127.0.0.1:{ports_of['grpc']}"
        # What it logs later must not fill the pipe.
        self._rest = threading.Thread(target=self.process.stderr.read, daemon=True)
        self._rest.start()

    def stop(self) -> None:
        self.process.kill()
        self.process.wait(30)
        self._rest.join(10)
        assert self.process.stderr is not None
        self.process.stderr.close()


@pytest.fixture(scope="session")
def other(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Other]:
    """Return a second servinggraph, over HTTP and gRPC."""
    server = Other(tmp_path_factory.mktemp("other"))
    yield server
    server.stop()


@pytest.fixture
def start_other(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Other]]:
    """Return what starts another one, with options of `serve`, for a test that does it harm."""
    started: list[Other] = []

    def start(*options: str) -> Other:
        started.append(Other(tmp_path_factory.mktemp("other"), *options))
        return started[-1]

    yield start
    for server in started:
        server.stop()


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Return files of a certificate for this machine, which is its own root, and of its key."""
    folder = tmp_path_factory.mktemp("tls")
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", "s.key", "-out", "s.pem", "-days", "2"]
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost"]
    subprocess.run([*command, *names], cwd=folder, check=True, capture_output=True)
    return str(folder / "s.pem"), str(folder / "s.key")


class BadServer:
    """Takes connections on a port and does to each what it is told; counts them."""

    def __init__(self, behave: Callable[[socket.socket], None], certificate: tuple[str, str] | None = None) -> None:
        self.behave = behave
        self._tls: ssl.SSLContext | None = None
        if certificate is not None:
            self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self._tls.load_cert_chain(*certificate)
        self.requests = 0
        self.seen: list[bytes] = []
        self._socket = socket.create_server(("127.0.0.1", 0))
        self._open: list[tuple[socket.socket, threading.Thread]] = []
        self.port = self._socket.getsockname()[1]
        self.url = f"http{'s' if certificate else ''}://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            if self._tls is not None:
                connection = self._tls.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)
            thread = threading.Thread(target=self._talk, args=(connection,), daemon=True)
            self._open.append((connection, thread))
            thread.start()

    def _talk(self, connection: socket.socket) -> None:
        try:
            if isinstance(connection, ssl.SSLSocket):
                connection.do_handshake()
            while request := read_request(connection):
                self.requests += 1
                self.seen.append(request)
                self.behave(connection)
        except OSError:
            pass
        finally:
            connection.close()

    def stop(self) -> None:
        # Threads end before their sockets are closed: one that waits at a descriptor when the process is stopped goes on at
        # whatever has the same number by then, and would answer for a later test's server.
        self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join(60)
        self._socket.close()
        for connection, thread in self._open:
            with suppress(OSError):  # it has ended by itself
                connection.shutdown(socket.SHUT_RDWR)
            thread.join(60)


def read_request(connection: socket.socket) -> bytes:
    """Return a request, once it is there with its body; empty when the client has gone."""
    data = b""
    while b"\r\n\r\n" not in data:
        more = connection.recv(65536)
        if not more:
            return b""
        data += more
    head, _, body = data.partition(b"\r\n\r\n")
    length = re.search(rb"\r\ncontent-length: *(\d+)", head, re.IGNORECASE)
    while length and len(body) < int(length[1]):
        more = connection.recv(65536)
        if not more:
            return b""
        body += more
    return head + b"\r\n\r\n" + body


@pytest.fixture
def bad_server() -> Iterator[Callable[..., BadServer]]:
    """Return what makes a server that behaves as a function of its connection says."""
    made: list[BadServer] = []

    def make(behave: Callable[[socket.socket], None], certificate: tuple[str, str] | None = None) -> BadServer:
        made.append(BadServer(behave, certificate))
        return made[-1]

    yield make
    for server in made:
        server.stop()


@pytest.fixture
def nobody() -> Iterator[str]:
    """Return a URL where nobody listens; nor can anybody until the end of the test."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{silent.getsockname()[1]}"
