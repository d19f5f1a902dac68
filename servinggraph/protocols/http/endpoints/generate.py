"""Generate, and any number of answers to one request as server-sent events.

`generate` and `generate_stream` take and give JSON by the generate extension, `infer_stream` V2
requests and responses, as MLServer has it. An event is made when the client has room for it.
"""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from functools import partial
from typing import Any, Final, NamedTuple

from starlette.routing import Route

from servinggraph.concurrency import run_until
from servinggraph.context import Context
from servinggraph.errors import DeadlineExceeded, InvalidRequest, ServingGraphError, StepFailed
from servinggraph.lifecycle import ServedGraph, Serving, stream
from servinggraph.messages import InferenceRequest, InferenceResponse
from servinggraph.protocols.http.codec import fill_context, header_length_of
from servinggraph.protocols.http.endpoints.routing import MODEL, VERSION
from servinggraph.protocols.http.exchange import (
    JSON_FIELD,
    ClientGone,
    Exchange,
    Message,
    Receive,
    Scope,
    Send,
    send_whole,
)
from servinggraph.protocols.http.status import error_response
from servinggraph.protocols.http.wire import ABORT, UNFRAMED
from servinggraph.protocols.v2 import EncodedResponse, RequestLimits, encode_response, parse_request
from servinggraph.protocols.v2.checks import check_takes_tensors
from servinggraph.protocols.v2.generate import NOT_ONE, encode_generated, event, parse_generate

__all__ = ["InferStream", "routes"]

_EVENTS: Final = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would collect events
]

RawHeaders = list[tuple[bytes, bytes]]
Encode = Callable[[InferenceResponse], bytes]


def routes(serving: Serving) -> list[Route]:
    """Return the routes."""
    endpoints = {
        "generate": Generate(serving),
        "generate_stream": GenerateStream(serving),
        "infer_stream": InferStream(serving),
    }
    # Starlette takes what is no function for an ASGI application.
    return [
        Route(f"{path}/{name}", endpoint, methods=["POST"]) for name, endpoint in endpoints.items() for path in (MODEL, VERSION)
    ]


class Generated(NamedTuple):
    """An encoded answer."""

    body: bytes
    """The whole body, JSON."""


class _Plain(Exchange[Any]):
    """An exchange whose bodies are never compressed, of a graph that the path names."""

    def __init__(self, serving: Serving) -> None:
        super().__init__(serving, _nobody)

    def find(self, scope: Scope) -> ServedGraph:
        parameters = scope["path_params"]
        return self._catalog.get(parameters["name"], parameters.get("version", ""))

    async def packed(self, content: bytes, accepted: bytes, headers: RawHeaders) -> bytes:
        return content

    def fields(self, answer: Any) -> RawHeaders:
        return [JSON_FIELD]

    def check_body(self, body: bytes, headers: dict[bytes, bytes]) -> None:
        """Check what can be known without looking into a body.

        Raises:
            RequestTooLarge: over the limit.
            InvalidRequest: compressed.
        """
        coding = headers.get(b"content-encoding", b"identity").decode("latin-1").strip()
        if coding.lower() not in ("", "identity"):
            raise InvalidRequest(f"Unsupported content-encoding '{coding[:40]}', only 'identity' is supported")
        if len(body) > self._max_body_bytes:
            raise self.too_large()


class Generate(_Plain):
    """ASGI application: answers `generate`."""

    async def answer(
        self, graph: ServedGraph, body: bytes, headers: dict[bytes, bytes], raw_headers: RawHeaders, context: Context
    ) -> Generated:
        self.check_body(body, headers)
        plan = graph.plan
        check_takes_tensors(plan)
        request = parse_generate(body, plan.name, plan.inputs)
        fill_context(context, request, plan.name, headers, raw_headers, graph.executor.now())
        async with aclosing(stream(graph, request, context)) as answers:
            first = await anext(answers, None)
            if first is None or await anext(answers, None) is not None:
                raise InvalidRequest(NOT_ONE)
        return Generated(_encoded(encode_generated, first, graph, counted=True))


class _Stalled(Exception):
    """The client has taken nothing for too long."""


class _Events:
    """The events of one response on their way to its client.

    Attributes:
        started: True once its status is decided.
        stall_s: longest time that the client may take nothing.
    """

    def __init__(self, scope: Scope, send: Send, stall_s: float) -> None:
        extensions = scope.get("extensions") or {}
        self._send = send
        self.stall_s = stall_s
        self._unframed = extensions.get(UNFRAMED) if scope["http_version"] == "1.0" else None
        self._abort = extensions.get(ABORT)
        self._end: Callable[[], None] | None = None
        self._loop = asyncio.get_running_loop()
        self.started = False

    async def send(self, data: bytes, context: Context) -> None:
        """Send an event once its client has room for it.

        Raises:
            DeadlineExceeded: the request's time was up before.
            _Stalled: the client took nothing for too long.
        """
        await self._start()
        await self._within({"type": "http.response.body", "body": event(data), "more_body": True}, context)

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
            await self._send({"type": "http.response.start", "status": 200, "headers": list(_EVENTS)})

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


class _EventExchange(_Plain):
    """ASGI application: answers with events, as many as the graph gives answers."""

    def __init__(self, serving: Serving) -> None:
        super().__init__(serving)
        self._stall_s = serving.options.stream_stall_s

    @abstractmethod
    def read(self, graph: ServedGraph, body: bytes, headers: dict[bytes, bytes]) -> tuple[InferenceRequest, Encode]:
        """Return the decoded request, and what encodes its answers.

        Raises:
            ServingGraphError: whatever is wrong with the request.
        """

    async def answer(self, *_: Any) -> Any:
        """Answers are sent one by one: there is no whole one."""
        raise NotImplementedError

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        graph = self.find(scope)
        headers = dict(scope["headers"])
        task = asyncio.current_task(self._loop)
        assert task is not None  # an ASGI server calls from a task
        context = Context()
        try:
            self._admission.enter()
        except ServingGraphError as error:
            await send_whole(send, *error_response(error))
            return
        events = _Events(scope, send, self._stall_s)
        failure: ServingGraphError | None = None
        try:
            body = await self.read_body(receive, headers)
            if not graph.ready:
                graph = self.find(scope)
            self._departures.expect(task, receive)
            self.check_body(body, headers)
            request, encode = self.read(graph, body, headers)
            fill_context(context, request, graph.plan.name, headers, scope["headers"], graph.executor.now())
            async with aclosing(stream(graph, request, context)) as answers:
                async for response in answers:
                    await events.send(_encoded(encode, response, graph, counted=not graph.plan.decoupled), context)
        except ClientGone:
            return
        except _Stalled:
            events.cut_off()
            return
        except ServingGraphError as error:
            failure = error
        except asyncio.CancelledError as error:
            if self._departures.gone(task):
                return  # nobody is there to answer
            failure = self.cancelled(task, error)
            events.stall_s = 0  # the server ends: the client is told if it has room for it, and nobody waits
        except Exception as error:  # a defect of ours: the caller is answered all the same
            failure = StepFailed(f"{type(error).__name__}: {error}")
            failure.__cause__ = error
        finally:
            self._departures.forget(task)
            context.when_idle(self._admission.leave)
        if failure is not None:
            self.report(failure, graph, context)
            status, fields, content = error_response(failure)
            if not events.started:
                await send_whole(send, status, fields, content)
                return
        try:
            if failure is not None:
                await events.send(content, Context())
            await events.end()
        except _Stalled:
            events.cut_off()


class GenerateStream(_EventExchange):
    """ASGI application: answers `generate_stream`."""

    def read(self, graph: ServedGraph, body: bytes, headers: dict[bytes, bytes]) -> tuple[InferenceRequest, Encode]:
        check_takes_tensors(graph.plan)
        return parse_generate(body, graph.plan.name, graph.plan.inputs), encode_generated


class InferStream(_EventExchange):
    """ASGI application: answers `infer_stream`."""

    def __init__(self, serving: Serving) -> None:
        super().__init__(serving)
        self._limits = RequestLimits(serving.options.max_tensors)

    def read(self, graph: ServedGraph, body: bytes, headers: dict[bytes, bytes]) -> tuple[InferenceRequest, Encode]:
        request = self._parsed(graph, body, headers)
        if request.binary or any(output.binary for output in request.outputs):
            raise InvalidRequest("an event is JSON: outputs cannot be asked for as binary data here")
        return request, lambda response: encode_response(response, request).body

    async def answers(
        self, graph: ServedGraph, body: bytes, headers: dict[bytes, bytes], raw_headers: RawHeaders, context: Context
    ) -> AsyncGenerator[EncodedResponse, None]:
        """Answer one request, from the bytes of its body to the bytes of its answers, binary ones as well.

        Raises:
            ServingGraphError: whatever is wrong with the request, or went wrong with it.
        """
        request = self._parsed(graph, body, headers)
        fill_context(context, request, graph.plan.name, headers, raw_headers, graph.executor.now())
        async with aclosing(stream(graph, request, context)) as answers:
            async for response in answers:
                encode = partial(encode_response, request=request)
                yield _encoded(encode, response, graph, counted=not graph.plan.decoupled)

    def _parsed(self, graph: ServedGraph, body: bytes, headers: dict[bytes, bytes]) -> InferenceRequest:
        plan = graph.plan
        check_takes_tensors(plan)
        return parse_request(body, header_length_of(headers, len(body)), plan.name, plan.inputs, plan.outputs, self._limits)


def _encoded(
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


async def _nobody(scope: Scope, receive: Receive, send: Send) -> None:
    raise AssertionError("the routes pass on nothing else")
