"""The inference route: raw ASGI, one dictionary look-up from the path to the graph.

Everything that every request pays for is in this file. A request runs in the task that
uvicorn made for it; a client that goes away is noticed by `Departures`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Final

from servinggraph.context import Context, Headers
from servinggraph.errors import Cancelled, RequestTooLarge, ServingGraphError, StepFailed, Unavailable
from servinggraph.lifecycle import ServedGraph, Serving, infer
from servinggraph.protocols.http.codec import deadline_of, header_length_of
from servinggraph.protocols.http.departures import Departures
from servinggraph.protocols.http.status import error_response
from servinggraph.protocols.http.wire import REPLY, STATUS_LINE
from servinggraph.protocols.v2 import EncodedResponse, RequestLimits, encode_response, parse_request
from servinggraph.protocols.v2.compression import accepted_coding, compress, decompress
from servinggraph.protocols.v2.parameters import priority_of

__all__ = ["InferRoute"]

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
ASGIApp = Callable[[Scope, Receive, Send], Awaitable[None]]

_NO_EXTENSIONS: Final[dict[str, Any]] = {}
_JSON: Final = (b"content-type", b"application/json")
_CLOSE: Final = (b"connection", b"close")
_BINARY: Final = (b"content-type", b"application/octet-stream")
_JSON_HEAD: Final = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: "
_BLOCKING_BYTES: Final = 256 * 1024
"""Bodies above this are packed and unpacked in a thread: zlib takes a millisecond for about 100 KiB."""


class _ClientGone(Exception):
    """The connection ended before the body was complete."""


class InferRoute:
    """ASGI application: answers `POST /v2/models/{graph}[/versions/{version}]/infer`, hands on the rest.

    Args:
        serving: the graphs, the slots, the limits.
        others: application for all other paths.
    """

    def __init__(self, serving: Serving, others: ASGIApp) -> None:
        self._catalog = serving.catalog
        self._admission = serving.admission
        self._max_body_bytes = serving.options.max_body_bytes
        self._limits = RequestLimits(serving.options.max_tensors)
        self._others = others
        self._routes: dict[str, ServedGraph] = {}
        self._loop = asyncio.get_running_loop()
        self._departures = Departures(self._loop)
        self._failures = serving.failures
        self._catalog.on_change(self._refresh)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        graph = self._routes.get(scope["path"]) if scope["type"] == "http" else None
        if graph is None or scope["method"] != "POST":
            await self._others(scope, receive, send)
            return
        headers = dict(scope["headers"])
        # With the loop given: without it Python 3.11 asks the kernel for the process id first.
        task = asyncio.current_task(self._loop)
        assert task is not None  # an ASGI server calls from a task
        context = Context()
        try:
            self._admission.enter()
        except ServingGraphError as error:
            await _send(send, *error_response(error))
            return
        try:
            body = await self._body(receive, headers)
            self._departures.expect(task, receive)
            encoded = await self.answer(graph, body, headers, scope["headers"], context)
            response = (
                [_JSON]
                if encoded.header_length is None
                else [
                    _BINARY,
                    (b"inference-header-content-length", str(encoded.header_length).encode()),
                ]
            )
            content = encoded.body
            if b"accept-encoding" in headers:
                content = await self._packed(content, headers[b"accept-encoding"], response)
            status = 200
        except _ClientGone:
            return
        except ServingGraphError as error:
            self._report(error, graph, context)
            status, response, content = error_response(error)
            if error.__class__ is RequestTooLarge:
                response.append(_CLOSE)  # what is left of the body is not worth reading
        except asyncio.CancelledError as error:
            if self._departures.gone(task):
                return  # nobody is there to answer
            failure = self._cancelled(task, error)
            self._report(failure, graph, context)
            status, response, content = error_response(failure)
        except Exception as error:  # a defect of ours: the caller is answered all the same
            failure = StepFailed(f"{type(error).__name__}: {error}")
            failure.__cause__ = error
            self._report(failure, graph, context)
            status, response, content = error_response(failure)
        finally:
            self._departures.forget(task)
            context.when_idle(self._admission.leave)
        reply = scope.get("extensions", _NO_EXTENSIONS).get(REPLY)
        # ASGI's way where the connection has to be closed: uvicorn reads that off the headers.
        if reply is None or response[-1] is _CLOSE or not reply(_head(status, response, len(content)), content):
            await _send(send, status, response, content)

    async def answer(
        self,
        graph: ServedGraph,
        body: bytes,
        headers: dict[bytes, bytes],
        raw_headers: list[tuple[bytes, bytes]],
        context: Context,
    ) -> EncodedResponse:
        """Answer one inference request, from the bytes of its body to the bytes of the answer.

        Raises:
            ServingGraphError: whatever is wrong with the request, or went wrong with it.
        """
        plan = graph.plan
        if len(body) > self._max_body_bytes:
            raise self._too_large()
        if b"content-encoding" in headers:
            body = await self._unpacked(body, headers[b"content-encoding"].decode("latin-1"))
        request = parse_request(body, header_length_of(headers, len(body)), plan.name, plan.inputs, plan.outputs, self._limits)
        context.id = request.id
        context.headers = Headers(raw_headers)
        context.graph = plan.name
        if request.parameters:
            context.parameters = request.parameters
            context.priority = priority_of(request.parameters)
        context.deadline = deadline_of(headers, request.parameters, graph.executor.now())
        response = await infer(graph, request, context)
        try:
            return encode_response(response, request)
        except StepFailed as error:
            error.at(plan.answer)
            raise
        except ServingGraphError:
            raise
        except Exception as error:  # an answer that cannot be encoded
            raise StepFailed(f"{type(error).__name__}: {error}").at(plan.answer) from error

    def _report(self, error: ServingGraphError, graph: ServedGraph, context: Context) -> None:
        """Log failures that are ours or the graph's; a caller's mistakes are told to the caller only."""
        if isinstance(error, StepFailed):
            self._failures.report(graph.plan.name, context.id, error)

    def _cancelled(self, task: asyncio.Task[Any], error: asyncio.CancelledError) -> ServingGraphError:
        """Return what a request that was cancelled, but whose client is still there, is told."""
        if not task.cancelling():
            failure = StepFailed("was cancelled from inside")  # a step raised it: nobody cancelled this task
            failure.__cause__ = error
            return failure
        if self._catalog.draining:  # the grace time of a stop is over; uvicorn cancels what still runs
            return Unavailable("the server is shutting down")
        return Cancelled("was cancelled")

    async def _body(self, receive: Receive, headers: dict[bytes, bytes]) -> bytes:
        length = headers.get(b"content-length")
        if length is not None and length.isdigit() and int(length) > self._max_body_bytes:
            raise self._too_large()
        message = await receive()
        if message["type"] != "http.request":
            raise _ClientGone
        body: bytes = message["body"]
        if not message["more_body"]:
            return body
        parts = [body]
        size = len(body)
        while message["more_body"]:
            message = await receive()
            if message["type"] != "http.request":
                raise _ClientGone
            parts.append(message["body"])
            size += len(parts[-1])
            if size > self._max_body_bytes:
                raise self._too_large()
        return b"".join(parts)

    def _too_large(self) -> RequestTooLarge:
        limit = self._max_body_bytes
        return RequestTooLarge(f"request size exceeds the maximum allowed: {limit} bytes (limit 'max_body_bytes')")

    async def _unpacked(self, body: bytes, coding: str) -> bytes:
        if len(body) <= _BLOCKING_BYTES // 16:
            return decompress(body, coding, self._max_body_bytes)
        return await asyncio.to_thread(decompress, body, coding, self._max_body_bytes)

    async def _packed(self, content: bytes, accepted: bytes, headers: list[tuple[bytes, bytes]]) -> bytes:
        coding = accepted_coding(accepted.decode("latin-1"))
        if coding == "identity":
            return content
        headers.append((b"content-encoding", coding.encode()))
        if len(content) <= _BLOCKING_BYTES:
            return compress(content, coding)
        return await asyncio.to_thread(compress, content, coding)

    def _refresh(self) -> None:
        """Make the table of paths anew after a change of what is served."""
        table: dict[str, ServedGraph] = {}
        for graph in self._catalog.graphs():
            if graph.ready:
                name, version = graph.plan.name, graph.plan.version
                table[f"/v2/models/{name}/versions/{version}/infer"] = graph
                table[f"/v2/models/{name}/infer"] = self._catalog.get(name)
        self._routes = table


def _head(status: int, headers: list[tuple[bytes, bytes]], length: int) -> bytes:
    """Return a status line and headers as they go over the wire, but for the empty line at their end."""
    if status == 200 and len(headers) == 1:
        return b"%b%d\r\n" % (_JSON_HEAD, length)
    lines = [STATUS_LINE[status], *(b"%b: %b\r\n" % header for header in headers), b"content-length: %d\r\n" % length]
    return b"".join(lines)


async def _send(send: Send, status: int, headers: list[tuple[bytes, bytes]], body: bytes) -> None:
    headers.append((b"content-length", str(len(body)).encode()))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
