"""What tests of front ends share: a real HTTP server in a thread, and a raw connection to it."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any, NamedTuple

import pytest

from servinggraph import Graph
from servinggraph.interfaces import FrontEndOptions
from servinggraph.lifecycle import RepositorySettings, Serving
from servinggraph.protocols.grpc.server import GrpcFrontEnd
from servinggraph.protocols.http.server import HttpFrontEnd
from servinggraph.server import new_event_loop

PATIENCE_S = 60.0


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def error(self) -> str:
        assert "application/json" == self.headers["content-type"]
        return str(json.loads(self.body)["error"])

    def json(self) -> Any:
        return json.loads(self.body)


class Connection:
    """A TCP connection on which a test says what it likes."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S)
        self._left = b""

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def _more(self) -> None:
        data = self.socket.recv(1 << 16)
        if not data:
            raise EOFError(f"closed after {self._left[:200]!r}")
        self._left += data

    def answer(self, *, head_only: bool = False) -> Answer:
        """Read one answer."""
        while b"\r\n\r\n" not in self._left:
            self._more()
        head, _, self._left = self._left.partition(b"\r\n\r\n")
        line, *fields = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (field.partition(":") for field in fields)}
        status = int(line.split()[1])
        length = 0 if head_only or status == 100 else int(headers["content-length"])
        while len(self._left) < length:
            self._more()
        body, self._left = self._left[:length], self._left[length:]
        return Answer(status, headers, body)

    def is_closed(self) -> bool:
        """Wait for the server to close, and say whether nothing more came."""
        while data := self.socket.recv(1 << 16):
            self._left += data
        return not self._left

    def close(self) -> None:
        self.socket.close()


class LiveServer:
    """A server with a port, on an event loop of its own in a thread."""

    front_end: Callable[[Serving, str, int], Any]

    def __init__(
        self, graphs: tuple[Graph, ...], options: dict[str, Any], repository: RepositorySettings | None = None
    ) -> None:
        self._repository = repository
        self._plans = [graph.compile() for graph in graphs]
        self._options = FrontEndOptions(**options)
        self._ready = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._main, daemon=True)
        self._thread.start()
        assert self._ready.wait(PATIENCE_S)
        if self._error is not None:
            raise self._error
        self.url = f"127.0.0.1:{self.port}"

    def _main(self) -> None:
        with asyncio.Runner(loop_factory=new_event_loop) as runner:
            try:
                runner.run(self._serve())
            except BaseException as error:
                self._error = error
            finally:
                self._ready.set()

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        self.serving = Serving(self._options, self._repository)
        self.catalog, self.admission = self.serving.catalog, self.serving.admission
        front_end = type(self).front_end(self.serving, "127.0.0.1", 0)
        front_end.bind()
        await self.catalog.load(self._plans)
        await self.serving.repository.start()
        await front_end.start()
        self.port = front_end.port
        self._ready.set()
        await self._stop.wait()
        await front_end.stop(1.0)
        await self.serving.repository.stop()
        await self.serving.close()

    def stop(self) -> None:
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive()
        if self._error is not None:
            raise self._error

    @property
    def in_flight(self) -> int:
        return self.admission.in_flight


class GrpcServer(LiveServer):
    """A gRPC server; what speaks to it is up to the test."""

    front_end = GrpcFrontEnd


class HttpServer(LiveServer):
    """An HTTP server, and ways to speak to it."""

    front_end = HttpFrontEnd

    def connect(self) -> Connection:
        return Connection(self.port)

    def post(self, path: str, body: bytes | dict[str, Any], headers: dict[str, str] | None = None) -> Answer:
        """Send one request on a connection of its own."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        lines = "".join(f"{name}: {value}\r\n" for name, value in (headers or {}).items())
        connection = self.connect()
        try:
            connection.send(f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n{lines}\r\n".encode() + data)
            return connection.answer()
        finally:
            connection.close()

    def get(self, path: str) -> Answer:
        connection = self.connect()
        try:
            connection.send(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            return connection.answer()
        finally:
            connection.close()


def _until(condition: Callable[[], Any], what: str = "it never came true") -> Any:
    end = time.monotonic() + PATIENCE_S
    while not (result := condition()):
        assert time.monotonic() < end, what
        time.sleep(0.002)
    return result


@pytest.fixture(scope="session")
def until() -> Callable[..., Any]:
    """Return what polls a condition until it holds, with a limit."""
    return _until


@pytest.fixture(scope="module")
def shared_server() -> Iterator[Callable[..., HttpServer]]:
    """Return what starts an HTTP server that ends with the module."""
    with ExitStack() as stack:
        yield _starter(stack, HttpServer)


@pytest.fixture
def http_server() -> Iterator[Callable[..., HttpServer]]:
    """Return what starts an HTTP server that ends with the test."""
    with ExitStack() as stack:
        yield _starter(stack, HttpServer)


@pytest.fixture(scope="module")
def shared_grpc_server() -> Iterator[Callable[..., GrpcServer]]:
    """Return what starts a gRPC server that ends with the module."""
    with ExitStack() as stack:
        yield _starter(stack, GrpcServer)


@pytest.fixture
def grpc_server() -> Iterator[Callable[..., GrpcServer]]:
    """Return what starts a gRPC server that ends with the test."""
    with ExitStack() as stack:
        yield _starter(stack, GrpcServer)


def _starter(stack: ExitStack, kind: type[Any]) -> Callable[..., Any]:
    def start(*graphs: Graph, repository: RepositorySettings | None = None, **options: Any) -> Any:
        server = kind(graphs, options, repository)
        stack.callback(server.stop)
        return server

    return start
