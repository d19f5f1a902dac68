"""The gRPC front end: opens the port, runs grpc.aio in the server's own event loop, drains it."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from typing import Final

import grpc

from servinggraph.lifecycle import Serving
from servinggraph.protocols.grpc.service import Service
from servinggraph.protocols.grpc.transport import channel_options, credentials

__all__ = ["GrpcFrontEnd"]

_FAREWELL_S: Final = 1.0
"""Time for calls that are cancelled at the end of a stop to send their status."""


class GrpcFrontEnd:
    """Serves over gRPC.

    Args:
        serving: the graphs, the slots, the limits.
        host: address to listen on.
        port: port to listen on; 0 takes a free one.
    """

    def __init__(self, serving: Serving, host: str, port: int) -> None:
        self._serving = serving
        self._host = host
        self._service: Service
        self._credentials: grpc.ServerCredentials | None = None
        self._server: grpc.aio.Server | None = None
        self._socket: socket.socket | None = None
        self.port = port

    def bind(self) -> None:
        """Take the port, so that a port in use is found out before models are loaded.

        gRPC can only bind and listen at once, and clients that are taken but not answered hang. So
        a socket that does not listen holds the port until `start`.

        Raises:
            OSError: in use, or not allowed.
            ServingGraphError: the files for TLS cannot be used.
        """
        self._credentials = credentials(self._serving.options)
        family = socket.AF_INET6 if ":" in self._host else socket.AF_INET
        self._socket = socket.socket(family, socket.SOCK_STREAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            self._socket.bind((self._host, self.port))
        except OSError:
            self._socket.close()
            raise
        self.port = self._socket.getsockname()[1]

    async def start(self) -> None:
        """Begin to answer.

        Raises:
            OSError: another process was quicker to listen.
        """
        options = self._serving.options
        self._service = Service(self._serving)
        self._server = grpc.aio.server(
            handlers=[self._service],
            options=channel_options(options),
            maximum_concurrent_rpcs=options.grpc_max_calls,
        )
        address = f"[{self._host}]:{self.port}" if ":" in self._host else f"{self._host}:{self.port}"
        try:
            if self._credentials is None:
                self._server.add_insecure_port(address)
            else:
                self._server.add_secure_port(address, self._credentials)
        except RuntimeError:
            raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE)) from None
        await self._server.start()
        self._release()

    async def stop(self, grace_s: float) -> None:
        """Stop accepting, let requests in flight finish, cancel what is left after `grace_s` seconds."""
        self._release()
        if self._server is None:
            return
        self._service.drain()
        # gRPC's own time is longer, so that what is cut off is told why.
        stopping = asyncio.ensure_future(self._server.stop(grace_s + _FAREWELL_S))
        done, _ = await asyncio.wait({stopping}, timeout=grace_s)
        if not done:
            self._service.close()
        await stopping

    def _release(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None
