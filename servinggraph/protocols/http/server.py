"""The HTTP front end: opens the port, runs uvicorn in the server's own event loop, drains it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Generator

import uvicorn

from servinggraph.lifecycle import Serving
from servinggraph.protocols.http.app import make_app, make_metrics_app
from servinggraph.protocols.http.exchange import ASGIApp
from servinggraph.protocols.http.infer import InferRoute
from servinggraph.protocols.http.routes import RoutePaths
from servinggraph.protocols.http.wire import bounded_protocol

__all__ = ["HttpFrontEnd", "MetricsFrontEnd", "make_asgi"]

logger = logging.getLogger("servinggraph.http")

BACKLOG = 2048


def make_asgi(serving: Serving) -> InferRoute:
    """Return the whole ASGI application, without a port."""
    paths = RoutePaths(serving, make_app(serving))
    paths.front = InferRoute(serving, paths)
    return paths.front


class HttpFrontEnd:
    """Serves over HTTP.

    Args:
        serving: the graphs, the slots, the limits.
        host: address to listen on.
        port: port to listen on; 0 takes a free one.
    """

    def __init__(self, serving: Serving, host: str, port: int) -> None:
        self._options = serving.options
        self._address = (host, port)
        self._asgi = self.application(serving)
        self._server: uvicorn.Server | None = None
        self._serving: asyncio.Task[None] | None = None
        self.port = port

    def application(self, serving: Serving) -> ASGIApp:
        """Return what answers requests."""
        return make_asgi(serving)

    def bind(self) -> None:
        """Take the port, so that a port in use is found out before models are loaded.

        Raises:
            OSError: in use, or not allowed.
        """
        host, port = self._address
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._socket = socket.socket(family, socket.SOCK_STREAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            self._socket.bind((host, port))
        except OSError:
            self._socket.close()
            raise
        self.port = self._socket.getsockname()[1]

    async def start(self) -> None:
        """Begin to answer.

        Raises:
            OSError: another process was quicker to listen.
        """
        self._socket.listen(BACKLOG)  # uvloop would keep its failure to itself
        config = uvicorn.Config(
            self._asgi,
            http=bounded_protocol(self._options.max_header_bytes, self._options.max_connections),
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            backlog=BACKLOG,
            timeout_keep_alive=75,
            timeout_graceful_shutdown=None,
        )
        config.load()
        # uvicorn's access logger decides per connection by whether somebody listens to it.
        logging.getLogger("uvicorn.access").propagate = False
        logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
        self._server = _Server(config)
        self._serving = asyncio.create_task(self._server.serve(sockets=[self._socket]), name="http")
        while not self._server.started:
            if self._serving.done():
                await self._serving
            await asyncio.sleep(0.001)

    async def stop(self, grace_s: float) -> None:
        """Stop accepting, let requests in flight finish, cancel what is left after `grace_s` seconds."""
        if self._server is None or self._serving is None:
            if hasattr(self, "_socket"):
                self._socket.close()
            return
        self._server.config.timeout_graceful_shutdown = max(0, grace_s)  # type: ignore[assignment]  # seconds, fractions work
        self._server.should_exit = True
        await self._serving


class MetricsFrontEnd(HttpFrontEnd):
    """Serves metrics alone, on a port that the callers of graphs need not reach."""

    def application(self, serving: Serving) -> ASGIApp:
        return make_metrics_app(serving)


class _Server(uvicorn.Server):
    """uvicorn without signal handlers: our server has them, and exits with 0 after a clean stop."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield
