"""uvicorn's HTTP parser with bounds on the head of a request, and errors in JSON.

llhttp collects a header for as long as a client sends one; a server has to say when it is
enough. Kept to uvicorn's own extension points: a protocol class given by `Config(http=...)`.
"""

from __future__ import annotations

import asyncio
from typing import Any, Final

import orjson
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

__all__ = ["bounded_protocol"]

_JOINED_BYTES: Final = 65536
_PHRASE: Final = {400: b"Bad Request", 431: b"Request Header Fields Too Large"}


class _OneWrite:
    """A transport that holds the head of a response back until its body comes: one system call, not two.

    uvicorn writes them apart, and each write is sent at once.
    """

    __slots__ = ("_head", "_transport")

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._head: bytes | None = None

    def write(self, data: bytes) -> None:
        if self._head is not None:
            head, self._head = self._head, None
            if len(data) < _JOINED_BYTES:
                self._transport.write(head + data)
            else:
                self._transport.writelines((head, data))
        elif data.startswith(b"HTTP/1.1 ") and not data.startswith(b"HTTP/1.1 1"):
            self._head = data
        else:
            self._transport.write(data)

    def flush(self) -> None:
        if self._head is not None:
            head, self._head = self._head, None
            self._transport.write(head)

    def close(self) -> None:
        self.flush()
        self._transport.close()

    def is_closing(self) -> bool:
        return self._transport.is_closing()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


def bounded_protocol(max_header_bytes: int) -> type[HttpToolsProtocol]:
    """Return a protocol class that refuses a request line and headers of more than `max_header_bytes`."""

    class BoundedHttpToolsProtocol(HttpToolsProtocol):
        """Counts the bytes that arrive before the headers are complete."""

        _in_head = True
        _head_bytes = 0

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's own
            super().connection_made(transport)
            self.transport = _OneWrite(transport)  # type: ignore[assignment]  # a transport in all that is used of it

        def on_response_complete(self) -> None:
            self.transport.flush()  # type: ignore[attr-defined]  # a head without a body: the answer to HEAD
            super().on_response_complete()

        def data_received(self, data: bytes) -> None:
            if self._in_head:
                self._head_bytes += len(data)
            super().data_received(data)
            if self._in_head and self._head_bytes > max_header_bytes and not self.transport.is_closing():
                self._refuse(431, f"request line and headers exceed {max_header_bytes} bytes (limit 'max_header_bytes')")

        def on_message_begin(self) -> None:
            self._in_head = True
            super().on_message_begin()

        def on_headers_complete(self) -> None:
            self._in_head = False
            arrived, self._head_bytes = self._head_bytes, 0
            # What arrived may hold a part of the body; only then is the head itself measured.
            if arrived > max_header_bytes and self._head_size() > max_header_bytes:
                raise ValueError("head too large")  # llhttp stops, and send_400_response is called
            super().on_headers_complete()

        def on_message_complete(self) -> None:
            self._in_head = True
            super().on_message_complete()

        def send_400_response(self, msg: str) -> None:
            if not self._in_head and self._head_size() > max_header_bytes:
                text = f"request line and headers exceed {max_header_bytes} bytes (limit 'max_header_bytes')"
                self._refuse(431, text)
            else:
                self._refuse(400, msg)

        def _head_size(self) -> int:
            return sum(len(name) + len(value) for name, value in self.headers or ()) + len(self.url)

        def _refuse(self, status: int, text: str) -> None:
            body = orjson.dumps({"error": text})
            head = b"HTTP/1.1 %d %s\r\n" % (status, _PHRASE[status])
            fields = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(body)
            self.transport.write(head + fields + body)
            self.transport.close()

    return BoundedHttpToolsProtocol
