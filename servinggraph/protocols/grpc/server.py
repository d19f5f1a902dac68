"""The gRPC front end: opens the port, runs grpc.aio in the server's own event loop, drains it."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from typing import Final

import grpc

from servinggraph.lifecycle import Serving
from servinggraph.protocols.grpc.codec import MAX_MESSAGE_BYTES
from servinggraph.protocols.grpc.requests import receive_limit
from servinggraph.protocols.grpc.service import Service

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
        self._service = Service(self._serving)
        options = [
            ("grpc.so_reuseport", 0),
            ("grpc.max_receive_message_length", receive_limit(self._serving.options.max_body_bytes)),
            ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        ]
        self._server = grpc.aio.server(handlers=[self._service], options=options)
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
