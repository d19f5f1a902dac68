"""Any number of answers to one request, each sent when the client has room for it.

An answer is made when the one before it has been taken, so a slow client slows the graph, and
nothing is kept for one that takes nothing.
"""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from time import perf_counter_ns
from typing import Any, Final

from servinggraph.concurrency import run_until
from servinggraph.context import Context
from servinggraph.errors import DeadlineExceeded, ErrorCode, ServingGraphError, StepFailed
from servinggraph.lifecycle import ServedGraph, Serving
from servinggraph.messages import InferenceResponse
from servinggraph.protocols.http.exchange import (
    ASGIApp,
    ClientGone,
    Exchange,
    Message,
    Receive,
    Scope,
    Send,
    addressed,
    as_failure,
    send_whole,
)
from servinggraph.protocols.http.status import error_response
from servinggraph.protocols.http.wire import ABORT, UNFRAMED
from servinggraph.protocols.v2.generate import event

__all__ = ["EVENT_FIELDS", "EventExchange", "encoded"]

RawHeaders = list[tuple[bytes, bytes]]

EVENT_FIELDS: Final = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would collect events
]


class _Stalled(Exception):
    """The client has taken nothing for too long."""


class _Events:
    """The events of one response on their way to its client.

    Attributes:
        started: True once its status is decided.
        stall_s: longest time that the client may take nothing.
    """

    def __init__(self, scope: Scope, send: Send, fields: RawHeaders, stall_s: float) -> None:
        extensions = scope.get("extensions") or {}
        self._send = send
        self._fields = fields
        self.stall_s = stall_s
        self._unframed = extensions.get(UNFRAMED) if scope["http_version"] == "1.0" else None
        self._abort = extensions.get(ABORT)
        self._end: Callable[[], None] | None = None
        self._loop = asyncio.get_running_loop()
        self.started = False

    async def send(self, data: bytes, context: Context) -> None:
        """Send an event, framed already, once its client has room for it.

        Raises:
            DeadlineExceeded: the request's time was up before.
            _Stalled: the client took nothing for too long.
        """
        await self._start()
        await self._within({"type": "http.response.body", "body": data, "more_body": True}, context)

    async def end(self) -> None:
        """End the response.

        Raises:
            _Stalled: the client took nothing for too long.
        """
        await self._start()
        if self._end is not None:
            self._end()
        await self._within({"type": "http.response.body", "body": b"", "more_body": False}, None)

    def cut_off(self) -> None:
        """End the connection, whatever waits to be sent."""
        if self._abort is not None:
            self._abort()

    async def _start(self) -> None:
        if not self.started:
            self.started = True
            if self._unframed is not None:
                self._end = self._unframed()
            # Goes out with the first event: nothing waits here.
            await self._send({"type": "http.response.start", "status": 200, "headers": list(self._fields)})

    async def _within(self, message: Message, context: Context | None) -> None:
        end = self._loop.time() + self.stall_s
        deadline = None if context is None else context.deadline
        if deadline is not None and deadline < end:
            await run_until(deadline, self._loop, self._sent, message, Context(), "Request timeout expired")
            return
        try:
            await run_until(end, self._loop, self._sent, message, Context(), "")
        except DeadlineExceeded:
            raise _Stalled from None

    async def _sent(self, message: Message, context: Context) -> None:
        await self._send(message)


class EventExchange(Exchange[Any]):
    """ASGI application: answers with events, as many as the graph gives answers."""

    event_fields: RawHeaders = EVENT_FIELDS
    """Headers of the answer."""

    def __init__(self, serving: Serving, others: ASGIApp) -> None:
        super().__init__(serving, others)
        self._stall_s = serving.options.stream_stall_s

    @abstractmethod
    def find(self, scope: Scope) -> ServedGraph:
        """Return the graph that a request is for; see `Exchange.find`."""

    @abstractmethod
    def events(
        self, graph: ServedGraph, body: bytes, headers: dict[bytes, bytes], raw_headers: RawHeaders, context: Context
    ) -> AsyncGenerator[bytes, None]:
        """Answer one request, from the bytes of its body to events as they go over the wire; see `Exchange.answer`.

        Raises:
            ServingGraphError: whatever is wrong with the request, or went wrong with it.
        """

    def last_event(self, error: bytes) -> bytes:
        """Return the event that tells a client of an error after answers, from the error as JSON."""
        return event(error)

    async def answer(self, *_: Any) -> Any:
        """Answers are sent one by one: there is no whole one."""
        raise NotImplementedError

    def fields(self, answer: Any) -> RawHeaders:
        """Answers are sent one by one: there is no whole one."""
        raise NotImplementedError

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        graph = self.found(scope)
        headers = dict(scope["headers"])
        task = asyncio.current_task(self._loop)
        assert task is not None  # an ASGI server calls from a task
        context = addressed(scope) if graph.routed else Context()
        try:
            self._admission.enter()
        except ServingGraphError as error:
            self.count_failure(graph, error.code, context)
            await send_whole(send, *error_response(error))
            return
        _trace(graph, context, headers)
        events = _Events(scope, send, self.event_fields, self._stall_s)
        failure: ServingGraphError | None = None
        try:
            body = await self.read_body(receive, headers)
            context.arrived = perf_counter_ns()
            if not graph.ready:
                graph = self.found_again(scope, graph)
            self._departures.expect(task, receive)
            async with aclosing(self.events(graph, body, headers, scope["headers"], context)) as framed:
                async for data in framed:
                    await events.send(data, context)
            if graph.traffic is not None:
                graph.traffic["http"].succeeded(context)
        except ClientGone:
            self.count_failure(graph, ErrorCode.CANCELLED, context)
            return
        except _Stalled:
            self.count_failure(graph, ErrorCode.CANCELLED, context)
            events.cut_off()
            return
        except asyncio.CancelledError as error:
            if self._departures.gone(task):
                self.count_failure(graph, ErrorCode.CANCELLED, context)
                return  # nobody is there to answer
            failure = self.cancelled(task, error)
            events.stall_s = 0  # the server ends: the client is told if it has room for it, and nobody waits
        except Exception as error:
            failure = as_failure(error)
        finally:
            self.leave(task, context)
        if failure is not None:
            self.report(failure, graph, context)
            status, fields, content = error_response(failure)
            if not events.started:
                await send_whole(send, status, fields, content)
                return
        try:
            if failure is not None:
                await events.send(self.last_event(content), Context())
            await events.end()
        except _Stalled:
            events.cut_off()
        finally:
            failure = None  # by its traceback it holds this frame, and with it all that the request had


def _trace(graph: ServedGraph, context: Context, headers: dict[bytes, bytes]) -> None:
    if graph.tracer is not None:
        graph.tracer.pick(graph, context, "HTTP_RECV_START", headers.get(b"traceparent"), headers.get(b"tracestate"))


def encoded(
    encode: Callable[[InferenceResponse], Any], response: InferenceResponse, graph: ServedGraph, *, counted: bool
) -> Any:
    """Return an encoded answer; one that cannot be encoded is the failure of the node that gave it.

    Args:
        encode: what encodes it.
        response: the answer.
        graph: who gave it.
        counted: True when its request counts as a success already.
    """
    try:
        return encode(response)
    except Exception as error:
        if counted:
            graph.executor.statistics.answer_failed()
        if isinstance(error, StepFailed):
            error.at(graph.plan.answer)
        if isinstance(error, ServingGraphError):
            raise
        raise StepFailed(f"{type(error).__name__}: {error}").at(graph.plan.answer) from error
