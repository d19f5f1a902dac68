"""A server process from its start to its end: readiness, SIGTERM, a port in use."""

from __future__ import annotations

import contextlib
import json
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

PATIENCE_S = 60.0
GRAPH = """\
graph: slow
inputs:
  x: {datatype: FP32, shape: [-1]}
nodes:
  wait: {step: python, call: shutdown_steps:wait}
answer: wait
"""
STEPS = """\
import asyncio
import pathlib

async def wait(value):
    here = pathlib.Path(__file__).parent
    (here / "started").touch()
    while not (here / "go").exists():
        await asyncio.sleep(0.005)
    return {"y": value["x"]}
"""
BODY = json.dumps({"inputs": [{"name": "x", "datatype": "FP32", "shape": [1], "data": [1]}]}).encode()
INFER = b"POST /v2/models/slow/infer HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s" % (len(BODY), BODY)
READY = b"GET /v2/health/ready HTTP/1.1\r\nHost: x\r\n\r\n"


class Process:
    def __init__(self, folder: Path, *options: str) -> None:
        (folder / "graph.yaml").write_text(GRAPH)
        (folder / "shutdown_steps.py").write_text(STEPS)
        command = [sys.executable, "-c", "from servinggraph.cli import main; main()"]
        self.popen = subprocess.Popen(
            [*command, "serve", "graph.yaml", *options], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.folder = folder

    def _read(self) -> None:
        assert self.popen.stdout is not None
        self.lines.extend(iter(self.popen.stdout.readline, ""))

    def port(self) -> int:
        found = _until(lambda: re.search(r"HTTP on http://[^:]+:(\d+)", self.text) or self.popen.poll() is not None)
        assert found is not True, self.text
        return int(found[1])

    @property
    def text(self) -> str:
        return "".join(self.lines)

    def started(self) -> None:
        _until((self.folder / "started").exists)

    def go(self) -> None:
        (self.folder / "go").touch()

    def exit_code(self) -> int:
        code = self.popen.wait(PATIENCE_S)
        self._reader.join(PATIENCE_S)
        return code

    def close(self) -> None:
        if self.popen.poll() is None:
            self.popen.kill()
        self.popen.wait()
        self._reader.join(PATIENCE_S)
        assert self.popen.stdout is not None
        self.popen.stdout.close()


def _until(condition):
    end = time.monotonic() + PATIENCE_S
    while not (result := condition()):
        assert time.monotonic() < end
        time.sleep(0.005)
    return result


@pytest.fixture
def process(tmp_path) -> Iterator:
    with contextlib.ExitStack() as stack:

        def start(*options: str) -> Process:
            process = Process(tmp_path, *options)
            stack.callback(process.close)
            return process

        yield start


def talk(connection: socket.socket, data: bytes) -> tuple[int, bytes]:
    connection.sendall(data)
    return read(connection)


def read(connection: socket.socket) -> tuple[int, bytes]:
    data = b""
    while b"\r\n\r\n" not in data or len(data.partition(b"\r\n\r\n")[2]) < int(re.search(rb"content-length: (\d+)", data)[1]):
        more = connection.recv(65536)
        assert more, data
        data += more
    return int(data.split()[1]), data.partition(b"\r\n\r\n")[2]


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S)


@pytest.mark.slow
def test_sigterm_lets_requests_in_flight_finish_while_not_ready_and_exits_with_0(process):
    server = process("--http-port", "0", "--grpc-port", "off", "--shutdown-delay-s", "5")
    port = server.port()
    with connect(port) as kept, connect(port) as busy:
        assert (200, b'{"ready":true}') == talk(kept, READY)
        busy.sendall(INFER)
        server.started()
        server.popen.send_signal(signal.SIGTERM)
        _until(lambda: talk(kept, READY) == (503, b'{"ready":false}'))
        assert 503 == talk(kept, READY.replace(b"health", b"models/slow"))[0]
        assert 200 == talk(kept, READY.replace(b"ready", b"live"))[0]
        server.go()
        status, body = read(busy)
        assert (200, [1.0]) == (status, json.loads(body)["outputs"][0]["data"])

    assert 0 == server.exit_code(), server.text
    assert "Traceback" not in server.text


@pytest.mark.slow
def test_requests_that_outlast_the_grace_are_told_so(process):
    server = process("--http-port", "0", "--grpc-port", "off", "--grace-s", "0.2")
    port = server.port()
    with connect(port) as busy:
        busy.sendall(INFER)
        server.started()
        server.popen.send_signal(signal.SIGTERM)
        status, body = read(busy)
        assert (503, "the server is shutting down") == (status, json.loads(body)["error"])

    assert 0 == server.exit_code(), server.text
    assert "Traceback" not in server.text


@pytest.mark.slow
def test_idle_connections_do_not_delay_the_end(process):
    server = process("--http-port", "0", "--grpc-port", "off", "--grace-s", "600")
    port = server.port()
    with connect(port) as used, connect(port) as fresh:
        assert 200 == talk(used, READY)[0]
        server.popen.send_signal(signal.SIGINT)
        assert 0 == server.exit_code(), server.text  # long before the grace time is over
        assert select.select([fresh], [], [], 1)[0]


@pytest.mark.slow
def test_a_port_in_use_is_one_sentence_and_a_failure(process):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        server = process("--http-port", str(port), "--grpc-port", "off")

        assert 0 != server.exit_code()
        assert (
            f"cannot listen on 127.0.0.1 port {port} (http): Address already in use; choose another with --http-port\n"
            == server.text
        )


@pytest.mark.slow
def test_sigterm_while_graphs_are_compiled_ends_the_process_with_0(tmp_path):
    # As a container's first process it would not hear a signal that nobody has asked for, and be killed in the end.
    (tmp_path / "graph.yaml").write_text(GRAPH)
    (tmp_path / "shutdown_steps.py").write_text(
        "import pathlib, time\n(pathlib.Path(__file__).parent / 'began').touch()\nwhile True:\n    time.sleep(0.01)\n"
    )
    command = [sys.executable, "-c", "from servinggraph.cli import main; main()", "serve", "graph.yaml", "--http-port", "0"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as server:
        try:
            _until((tmp_path / "began").exists)
            server.send_signal(signal.SIGTERM)
            said, _ = server.communicate(timeout=PATIENCE_S)
        finally:
            server.kill()
    assert (0, True) == (server.returncode, "stopped while loading" in said), said
