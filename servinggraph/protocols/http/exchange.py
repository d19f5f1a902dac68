"""One request and its answer over raw ASGI: slot, body, departures, errors; what is in the body is for a subclass.

Everything that every request pays for is in `Exchange.__call__`. A request runs in the task that
uvicorn made for it; a client that goes away is noticed by `Departures`.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, MutableMapping
from time import perf_counter_ns
from typing import Any, Final, Generic, Protocol, TypeVar

from servinggraph.context import Context
from servinggraph.errors import Cancelled, ErrorCode, RequestTooLarge, ServingGraphError, StepFailed, Unavailable
from servinggraph.lifecycle import ServedGraph, Serving
from servinggraph.protocols.http.departures import Departures
from servinggraph.protocols.http.status import error_response
from servinggraph.protocols.http.wire import REPLY, STATUS_LINE
from servinggraph.protocols.v2.compression import accepted_coding, compress, decompress

__all__ = [
    "JSON_FIELD",
    "ROUTE",
    "ASGIApp",
    "ClientGone",
    "Exchange",
    "Message",
    "Receive",
    "Scope",
    "Send",
    "addressed",
    "as_failure",
    "send_whole",
]

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
ASGIApp = Callable[[Scope, Receive, Send], Awaitable[None]]

ROUTE: Final = "servinggraph.route"
"""Where the route that a URL names stands in the scope."""
_NO_EXTENSIONS: Final[dict[str, Any]] = {}
JSON_FIELD: Final = (b"content-type", b"application/json")
_CLOSE: Final = (b"connection", b"close")
_JSON_HEAD: Final = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: "
_BLOCKING_BYTES: Final = 256 * 1024
"""Bodies above this are packed and unpacked in a thread: zlib takes a millisecond for about 100 KiB."""


class ClientGone(Exception):
    """The connection ended before the body was complete."""


class Encoded(Protocol):
    """An encoded answer."""

    @property
    def body(self) -> bytes: ...


AnswerT = TypeVar("AnswerT", bound=Encoded)


class Exchange(ABC, Generic[AnswerT]):
    """ASGI application: answers requests to graphs, hands on the rest.

    Args:
        serving: the graphs, the slots, the limits.
        others: application for all that `find` does not know.
    """

    def __init__(self, serving: Serving, others: ASGIApp) -> None:
        self._serving = serving
        self._catalog = serving.catalog
        self._admission = serving.admission
        self._max_body_bytes = serving.options.max_body_bytes
        self._others = others
        self._loop = asyncio.get_running_loop()
        self._departures = Departures(self._loop)
        self._failures = serving.failures

    @abstractmethod
    def find(self, scope: Scope) -> ServedGraph | None:
        """Return the graph that a request is for, None when it is not for here.

        Raises:
            ServingGraphError: it is for here, but not for a graph that is served.
        """

    @abstractmethod
    async def answer(
        self,
        graph: ServedGraph,
        body: bytes,
        headers: dict[bytes, bytes],
        raw_headers: list[tuple[bytes, bytes]],
        context: Context,
    ) -> AnswerT:
        """Answer one request, from the bytes of its body to the bytes of the answer.

        Args:
            graph: the graph.
            body: the body as it came.
            headers: headers by lower-case name, the last of several equal ones.
            raw_headers: all headers.
            context: to be filled.

        Raises:
            ServingGraphError: whatever is wrong with the request, or went wrong with it.
        """

    @abstractmethod
    def fields(self, answer: AnswerT) -> list[tuple[bytes, bytes]]:
        """Return the headers of an answer, without those that its length and coding need."""

    def found(self, scope: Scope) -> Any:
        """Return what `find` finds, and count a request for which it finds nothing that is served."""
        try:
            return self.find(scope)
        except ServingGraphError as error:
            self._serving.refused("http", error)
            raise

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        graph = self.found(scope)
        if graph is None:
            await self._others(scope, receive, send)
            return
        headers = dict(scope["headers"])
        # With the loop given: without it Python 3.11 asks the kernel for the process id first.
        task = asyncio.current_task(self._loop)
        assert task is not None  # an ASGI server calls from a task
        context = addressed(scope) if graph.routed else Context()
        try:
            self._admission.enter()
        except ServingGraphError as error:
            self.count_failure(graph, error.code, context)
            await send_whole(send, *error_response(error))
            return
        if graph.tracer is not None:
            graph.tracer.pick(graph, context, "HTTP_RECV_START", headers.get(b"traceparent"), headers.get(b"tracestate"))
        try:
            body = await self.read_body(receive, headers)
            context.arrived = perf_counter_ns()
            if context.trace is not None:
                context.trace.stamp("HTTP_RECV_END")
            if not graph.ready:
                graph = self.found_again(scope, graph)
            self._departures.expect(task, receive)
            encoded = await self.answer(graph, body, headers, scope["headers"], context)
            response = self.fields(encoded)
            content = encoded.body
            if b"accept-encoding" in headers:
                content = await self.packed(content, headers[b"accept-encoding"], response)
            status = 200
            if graph.traffic is not None:
                graph.traffic["http"].succeeded(context)
        except ClientGone:
            self.count_failure(graph, ErrorCode.CANCELLED, context)
            return
        except asyncio.CancelledError as error:
            if self._departures.gone(task):
                self.count_failure(graph, ErrorCode.CANCELLED, context)
                return  # nobody is there to answer
            status, response, content = self.failed(self.cancelled(task, error), graph, context)
        except Exception as error:
            # No name here for the failure: it would hold, by its traceback, this frame and with it all that the request had.
            status, response, content = self.failed(as_failure(error), graph, context)
        finally:
            self.leave(task, context)
        reply = scope.get("extensions", _NO_EXTENSIONS).get(REPLY)
        # ASGI's way where the connection has to be closed: uvicorn reads that off the headers.
        if reply is None or response[-1] is _CLOSE or not reply(_head(status, response, len(content)), content):
            await send_whole(send, status, response, content)

    def failed(
        self, failure: ServingGraphError, graph: ServedGraph, context: Context
    ) -> tuple[int, list[tuple[bytes, bytes]], bytes]:
        """Report a failure, and return status, headers and body of the answer."""
        self.report(failure, graph, context)
        status, response, content = error_response(failure)
        if failure.__class__ is RequestTooLarge:
            response.append(_CLOSE)  # what is left of the body is not worth reading
        return status, response, content

    def count_failure(self, graph: ServedGraph, code: ErrorCode, context: Context) -> None:
        """Count a request that gets no answer."""
        if graph.traffic is not None:
            graph.traffic["http"].failed(code.value, context)

    def report(self, error: ServingGraphError, graph: ServedGraph, context: Context) -> None:
        """Count a failure, and log those that are ours or the graph's; a caller's mistakes are told to the caller only."""
        self.count_failure(graph, error.code, context)
        if context.trace is not None:
            context.trace.failed(error.code.value, error.message, error.node)
        if isinstance(error, StepFailed):
            self._failures.report(graph.plan.name, context.id, error)

    def cancelled(self, task: asyncio.Task[Any], error: asyncio.CancelledError) -> ServingGraphError:
        """Return what a request that was cancelled, but whose client is still there, is told."""
        if not task.cancelling():
            failure = StepFailed("was cancelled from inside")  # a step raised it: nobody cancelled this task
            failure.__cause__ = error
            return failure
        if self._catalog.draining:  # the grace time of a stop is over; uvicorn cancels what still runs
            return Unavailable("the server is shutting down")
        return Cancelled("was cancelled")

    def found_again(self, scope: Scope, graph: ServedGraph) -> ServedGraph:
        """Return what took a graph's place while a request's body came in.

        Raises:
            ServingGraphError: nothing did.
        """
        found = self.find(scope)
        if found is None:
            raise Unavailable(f"Request for unknown model: '{graph.plan.name}' was unloaded")
        return found

    def leave(self, task: asyncio.Task[Any], context: Context) -> None:
        """End the watch over a request, give its slot back, and finish its trace."""
        self._departures.forget(task)
        context.when_idle(self._admission.leave)
        if context.trace is not None:
            context.trace.stamp("HTTP_SEND_START")
            self._loop.call_soon(context.trace.finish, context.id, "HTTP_SEND_END")

    async def read_body(self, receive: Receive, headers: dict[bytes, bytes]) -> bytes:
        """Return a request's body.

        Raises:
            RequestTooLarge: over the limit.
            ClientGone: the connection ended before.
        """
        length = headers.get(b"content-length")
        if length is not None and length.isdigit() and int(length) > self._max_body_bytes:
            raise self.too_large()
        message = await receive()
        if message["type"] != "http.request":
            raise ClientGone
        body: bytes = message["body"]
        if not message["more_body"]:
            return body
        parts = [body]
        size = len(body)
        while message["more_body"]:
            message = await receive()
            if message["type"] != "http.request":
                raise ClientGone
            parts.append(message["body"])
            size += len(parts[-1])
            if size > self._max_body_bytes:
                raise self.too_large()
        return b"".join(parts)

    def too_large(self) -> RequestTooLarge:
        """Return the error for a body over the limit."""
        limit = self._max_body_bytes
        return RequestTooLarge(f"request size exceeds the maximum allowed: {limit} bytes (limit 'max_body_bytes')")

    async def unpacked(self, body: bytes, coding: str) -> bytes:
        """Undo a body's content coding, in a thread where that takes long; see `decompress`."""
        if len(body) <= _BLOCKING_BYTES // 16:
            return decompress(body, coding, self._max_body_bytes)
        return await asyncio.to_thread(decompress, body, coding, self._max_body_bytes)

    async def packed(self, content: bytes, accepted: bytes, headers: list[tuple[bytes, bytes]]) -> bytes:
        """Apply the content coding that the client wants; see `compress`."""
        coding = accepted_coding(accepted.decode("latin-1"))
        if coding == "identity":
            return content
        headers.append((b"content-encoding", coding.encode()))
        if len(content) <= _BLOCKING_BYTES:
            return compress(content, coding)
        return await asyncio.to_thread(compress, content, coding)


def as_failure(error: Exception) -> ServingGraphError:
    """Return what a client is told of an error; for a defect of ours it is answered all the same."""
    if isinstance(error, ServingGraphError):
        return error
    failure = StepFailed(f"{type(error).__name__}: {error}")
    failure.__cause__ = error
    return failure


def _head(status: int, headers: list[tuple[bytes, bytes]], length: int) -> bytes:
    """Return a status line and headers as they go over the wire, but for the empty line at their end."""
    if status == 200 and len(headers) == 1 and headers[0] is JSON_FIELD:
        return b"%b%d\r\n" % (_JSON_HEAD, length)
    lines = [STATUS_LINE[status], *(b"%b: %b\r\n" % header for header in headers), b"content-length: %d\r\n" % length]
    return b"".join(lines)


def addressed(scope: Scope) -> Context:
    """Return a context that knows which route and version of a graph the URL names."""
    context = Context()
    context.route = scope.get(ROUTE, "")
    _, _, behind = scope["path"].partition("/versions/")
    context.version = behind.partition("/")[0]
    return context


async def send_whole(send: Send, status: int, headers: list[tuple[bytes, bytes]], body: bytes) -> None:
    """Send a response in ASGI's way."""
    headers.append((b"content-length", str(len(body)).encode()))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
