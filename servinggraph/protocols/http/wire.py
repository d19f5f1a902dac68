"""uvicorn's HTTP parser with bounds on what a client may send, and errors in JSON.

llhttp collects a head, a trailer or a chunk extension for as long as a client sends one, and
uvicorn queues pipelined requests without end and waits forever for the rest of a request; a
server has to say when it is enough. Kept to uvicorn's own extension point: a protocol class
given by `Config(http=...)`. Source of the order of answers: RFC 9112 §9.3.2, §9.6.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from typing import Any, Final

import httptools
import orjson
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT, FlowControl
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

__all__ = ["ABORT", "REPLY", "STATUS_LINE", "UNFRAMED", "bounded_protocol"]

REPLY: Final = "servinggraph.reply"
"""Name, in an ASGI scope's `extensions`, of the callable that sends a whole response at once."""

UNFRAMED: Final = "servinggraph.unframed"
"""Name of the callable after which the end of the connection is the end of a response's body: HTTP/1.0 has no chunks.
It returns what has to be called before the last part."""

ABORT: Final = "servinggraph.abort"
"""Name of the callable that cuts a connection off, with what its client has not read."""

MAX_PIPELINED: Final = 16
"""Requests that may wait behind one that runs; with more, the connection is not read any further."""

STALL_S: Final = 60.0
"""A head has to be complete after this time, and of a body some bytes have to come within it (as in nginx)."""

LINGER_S: Final = 2.0
"""How long the rest of a refused request is thrown away: closed at once, the refusal itself could be lost."""

_JOINED_BYTES: Final = 65536
_PHRASE: Final = {
    400: b"Bad Request",
    408: b"Request Timeout",
    431: b"Request Header Fields Too Large",
    503: b"Service Unavailable",
}


class _OneWrite:
    """A transport that holds the head of a response back until its body comes: one system call, not two.

    uvicorn writes them apart, and each write is sent at once.
    """

    __slots__ = ("_closing", "_head", "_owner", "_transport")

    def __init__(self, transport: asyncio.Transport, owner: Any) -> None:
        self._transport = transport
        self._owner = owner
        self._head: bytes | None = None
        self._closing = False

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
        if self._closing or self._transport.is_closing() or not self._owner.lingers():
            self.flush()
            self._transport.close()
            return
        self._closing = True
        self.flush()
        self._transport.write_eof()

    def is_closing(self) -> bool:
        return self._closing or self._transport.is_closing()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


class _Flow(FlowControl):
    """Flow control that does not read on while enough requests wait already."""

    def __init__(self, transport: asyncio.Transport, pipeline: Any) -> None:
        super().__init__(transport)
        self._pipeline = pipeline

    def resume_reading(self) -> None:
        if self.read_paused and len(self._pipeline) < MAX_PIPELINED:
            super().resume_reading()


class _Bounded(HttpToolsProtocol):
    """One connection. `max_header_bytes` and `stall_s` are set by `bounded_protocol`."""

    max_header_bytes: int
    max_connections: int
    stall_s: float

    _open = True  # a request has begun, or the first is awaited, and is not complete
    _in_head = True
    _head_bytes = 0
    _quiet_bytes = 0  # received since the last byte of a body: chunk extensions, trailers
    _upgrading = False  # the head asked for an upgrade, and is read once more without
    _deaf = False  # what still arrives is thrown away
    _running: RequestResponseCycle | None = None
    _last_words: bytes | None = None  # a refusal that waits for the answers before it
    _stall: asyncio.TimerHandle | None = None
    _idle_timer: asyncio.TimerHandle | None = None
    _idle_since = 0.0
    _default_list: list[tuple[bytes, bytes]] | None = None
    _default_fields = b""
    _began_at = 0.0
    _moved_at = 0.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's own
        super().connection_made(transport)
        self._plain_transport = transport
        # One for all requests: bound to a request it would be a cycle of references, garbage for each.
        self._extensions = {REPLY: self.reply, UNFRAMED: self.unframed, ABORT: self.abort}
        self.transport = _OneWrite(transport, self)  # type: ignore[assignment]  # a transport in all that is used of it
        self.flow = _Flow(transport, self.pipeline)
        if len(self.connections) > self.max_connections:
            self._refuse(503, f"the server has {self.max_connections} connections (limit 'max_connections')")
            return
        self._watch_progress()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget_progress()
        self.pipeline.clear()
        running = self._running
        if running is not None and not running.response_complete:  # uvicorn tells only the newest request
            running.disconnected = True
            running.message_event.set()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._deaf:
            return
        if self._in_head:
            self._head_bytes += len(data)
        else:
            self._quiet_bytes += len(data)
        self._unset_keepalive_if_required()
        while True:
            try:
                self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as upgrade:
                if self.parser.get_method() == b"CONNECT":
                    self._refuse(400, "CONNECT is for proxies, and this is none")
                    return
                data = self._without_upgrade() + data[upgrade.args[0] :]
                continue
            except httptools.HttpParserError:
                self.send_400_response("Invalid HTTP request received.")
                return
            break
        if self._open:
            self._incomplete()

    def on_message_begin(self) -> None:
        self._open = self._in_head = True
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._in_head = False
        arrived, self._head_bytes = self._head_bytes, 0
        self._quiet_bytes = 0
        # What arrived may hold a part of the body; only then is the head itself measured.
        if arrived > self.max_header_bytes and self._head_size() > self.max_header_bytes:
            raise ValueError("head too large")  # llhttp stops, and send_400_response is called
        if self.parser.should_upgrade():
            self._upgrading = True
            return  # begins again without the upgrade; see `data_received`
        super().on_headers_complete()
        self.headers = []  # trailers end here, and not among the headers (RFC 9110 §6.5.1)
        if not self.pipeline:
            self._running = self.cycle
        self.scope["extensions"] = self._extensions  # type: ignore[typeddict-item]  # ours

    def reply(self, head: bytes, body: bytes) -> bool:
        """Send a whole response at once: what two ASGI messages do, without taking them apart again.

        Args:
            head: status line and headers, content-length among them, each line with its end.
            body: the body.

        Returns:
            False when it was not sent, because the client has to read first: use ASGI's way.
        """
        cycle = self._running  # only one runs at a time, and it is the one that answers
        assert cycle is not None
        if cycle.disconnected:
            return True
        if self.flow.write_paused or cycle.response_started:
            return False
        if self.server_state.default_headers is not self._default_list:  # uvicorn makes it anew each second
            self._default_list = self.server_state.default_headers
            self._default_fields = b"".join(name + b": " + value + b"\r\n" for name, value in self._default_list)
        end = b"\r\n" if cycle.keep_alive else b"connection: close\r\n\r\n"
        cycle.response_started = cycle.response_complete = True
        cycle.waiting_for_100_continue = False
        cycle.message_event.set()
        if len(body) < _JOINED_BYTES:
            self._plain_transport.write(b"".join((head, self._default_fields, end, body)))
        else:
            self._plain_transport.writelines((head, self._default_fields, end, body))
        if not cycle.keep_alive:
            self.transport.close()
        cycle.on_response()
        return True

    def unframed(self) -> Callable[[], None]:
        """See `UNFRAMED`; called before the response begins."""
        cycle = self._running
        assert cycle is not None
        cycle.chunked_encoding = cycle.keep_alive = False
        cycle.expected_content_length = sys.maxsize

        def end() -> None:
            cycle.expected_content_length = 0

        return end

    def abort(self) -> None:
        """See `ABORT`."""
        if self._running is not None:
            self._running.disconnected = True
        self._plain_transport.abort()

    def on_body(self, body: bytes) -> None:
        self._quiet_bytes = 0
        cycle = self.cycle
        if cycle.response_complete:
            return
        cycle.body += body
        if len(cycle.body) > HIGH_WATER_LIMIT:
            self.flow.pause_reading()
        cycle.message_event.set()

    def on_message_complete(self) -> None:
        self._open = False
        self._in_head = True
        if self._stall is not None:
            self._forget_progress()
        cycle = self.cycle
        if not self._upgrading and not cycle.response_complete:
            cycle.more_body = False
            cycle.message_event.set()

    def on_response_complete(self) -> None:
        self.transport.flush()  # type: ignore[attr-defined]  # a head without a body: the answer to HEAD
        if self.pipeline:
            self._running = self.pipeline[-1][0]
        elif self._last_words is not None and not self.transport.is_closing():
            self.transport.write(self._last_words)
            self.transport.close()
        super().on_response_complete()

    def _without_upgrade(self) -> bytes:
        """Return the head that was just read as one that asks for no upgrade, and a parser for it.

        An upgrade may be ignored (RFC 9110 §7.8), but llhttp then takes the body for the new
        protocol. Java's HTTP client asks for h2c with every first request, those with a body too.
        """
        lines = [self.parser.get_method() + b" " + self.url + b" HTTP/1.1"]
        for name, value in self.headers:
            if name == b"connection" and b"close" not in value.lower():
                continue
            if name not in (b"upgrade", b"http2-settings"):
                lines.append(name + b": " + (b"close" if name == b"connection" else value))
        self._upgrading = False
        self.parser = httptools.HttpRequestParser(self)
        if hasattr(self.parser, "set_dangerous_leniencies"):  # as uvicorn sets it; httptools from 0.6.3 on
            self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
        return b"\r\n".join(lines) + b"\r\n\r\n"

    def send_400_response(self, msg: str) -> None:
        if not self._in_head and self._head_size() > self.max_header_bytes:
            self._refuse_head()
        else:
            self._refuse(400, msg)

    def lingers(self) -> bool:
        """Tell whether more of a request may be on its way, and if so begin to throw it away."""
        more = self._deaf or (self._open and (self._head_bytes > 0 or not self._in_head))
        if not more or not self.transport.can_write_eof():
            return False
        self._deaf = True
        self._forget_progress()
        FlowControl.resume_reading(self.flow)
        self._stall = self.loop.call_later(LINGER_S, self.transport.close)
        return True

    def _incomplete(self) -> None:
        """Hold what has arrived of a request against the limits."""
        if self._in_head:
            if self._head_bytes > self.max_header_bytes:
                self._refuse_head()
                return
        elif self._quiet_bytes > self.max_header_bytes:
            self._refuse(431, f"chunk extensions or trailers exceed {self.max_header_bytes} bytes (limit 'max_header_bytes')")
            return
        if self._stall is None:
            self._watch_progress()
        else:
            self._moved_at = self.loop.time()

    def _watch_progress(self) -> None:
        self._began_at = self._moved_at = self.loop.time()
        self._stall = self.loop.call_later(self.stall_s, self._look_at_progress)

    def _forget_progress(self) -> None:
        if self._stall is not None:
            self._stall.cancel()
            self._stall = None

    def _look_at_progress(self) -> None:
        self._stall = None
        if not self._open or self.transport.is_closing():
            return
        now = self.loop.time()
        since = now if self.flow.read_paused else self._began_at if self._in_head else self._moved_at
        left = since + self.stall_s - now
        if left > 0.001:
            self._stall = self.loop.call_later(left, self._look_at_progress)
        elif self._in_head and not self._head_bytes and self.cycle is None:
            self.transport.close()  # never said a word
        else:
            what = "request line and headers were" if self._in_head else "rest of the body was"
            self._refuse(408, f"the {what} not received within {self.stall_s:g} s")

    def _head_size(self) -> int:
        return sum(len(name) + len(value) for name, value in self.headers or ()) + len(self.url)

    def _refuse_head(self) -> None:
        limit = self.max_header_bytes
        self._refuse(431, f"request line and headers exceed {limit} bytes (limit 'max_header_bytes')")

    def _refuse(self, status: int, text: str) -> None:
        """Answer a request that cannot be read, after those before it, and close the connection."""
        body = orjson.dumps({"error": text})
        head = b"HTTP/1.1 %d %s\r\n" % (status, _PHRASE[status])
        fields = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(body)
        words = head + fields + body
        self._deaf = True
        self._forget_progress()
        cycle, running = self.cycle, self._running
        broken = cycle if self._open and not self._in_head else None  # its head was fine, so it has a cycle
        if broken is not None and self.pipeline and self.pipeline[0][0] is broken:
            self.pipeline.popleft()
        if running is not None and running is not broken and not running.response_complete:
            self._last_words = words
            return
        if broken is not None:
            if broken.response_started:
                words = b""  # it has its answer
            broken.disconnected = True
            broken.message_event.set()
        if words:
            self.transport.write(words)
        self.transport.close()


def bounded_protocol(max_header_bytes: int, max_connections: int) -> type[HttpToolsProtocol]:
    """Return a protocol class with limits.

    Args:
        max_header_bytes: largest request line and headers, or trailers.
        max_connections: most connections at the same time.
    """
    limits = {"max_header_bytes": max_header_bytes, "max_connections": max_connections, "stall_s": STALL_S}
    return type("BoundedHttpToolsProtocol", (_Bounded,), limits)
