"""The gRPC front end: opens the port, runs grpc.aio in the server's own event loop, drains it."""

from __future__ import annotations

import errno
import os
import socket

import grpc

from servinggraph.lifecycle import Serving
from servinggraph.protocols.grpc.service import Service

__all__ = ["GrpcFrontEnd"]


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
        self._server: grpc.aio.Server | None = None
        self._socket: socket.socket | None = None
        self.port = port

    def bind(self) -> None:
        """Take the port, so that a port in use is found out before models are loaded.

        gRPC can only bind and listen at once, and clients that are taken but not answered hang. So
        a socket that does not listen holds the port until `start`.

        Raises:
            OSError: in use, or not allowed.
        """
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
        self._server = grpc.aio.server(handlers=[Service(self._serving)], options=[("grpc.so_reuseport", 0)])
        host = f"[{self._host}]" if ":" in self._host else self._host
        try:
            self._server.add_insecure_port(f"{host}:{self.port}")
        except RuntimeError:
            raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE)) from None
        await self._server.start()
        self._release()

    async def stop(self, grace_s: float) -> None:
        """Stop accepting, let requests in flight finish, cancel what is left after `grace_s` seconds."""
        self._release()
        if self._server is not None:
            await self._server.stop(grace_s)

    def _release(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None
