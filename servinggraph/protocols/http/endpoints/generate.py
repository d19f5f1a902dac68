"""Generate, and any number of answers to one request as server-sent events.

`generate` and `generate_stream` take and give JSON by the generate extension, `infer_stream` V2
requests and responses, as MLServer has it. An event is made when the client has room for it.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from functools import partial
from typing import Any, NamedTuple

from starlette.routing import Route

from servinggraph.context import Context
from servinggraph.errors import InvalidRequest
from servinggraph.lifecycle import ServedGraph, Serving, stream
from servinggraph.messages import InferenceRequest, InferenceResponse
from servinggraph.protocols.http.codec import fill_context, header_length_of
from servinggraph.protocols.http.endpoints.routing import MODEL, VERSION
from servinggraph.protocols.http.events import EventExchange, encoded
from servinggraph.protocols.http.exchange import JSON_FIELD, Exchange, Receive, Scope, Send
from servinggraph.protocols.v2 import EncodedResponse, RequestLimits, encode_response, parse_request
from servinggraph.protocols.v2.checks import check_takes_tensors
from servinggraph.protocols.v2.generate import NOT_ONE, encode_generated, event, parse_generate

__all__ = ["InferStream", "routes"]

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
        return Generated(encoded(encode_generated, first, graph, counted=True))


class _EventRoute(_Plain, EventExchange):
    """ASGI application: answers with events of the graph that the path names."""

    @abstractmethod
    def read(self, graph: ServedGraph, body: bytes, headers: dict[bytes, bytes]) -> tuple[InferenceRequest, Encode]:
        """Return the decoded request, and what encodes its answers.

        Raises:
            ServingGraphError: whatever is wrong with the request.
        """

    async def events(
        self, graph: ServedGraph, body: bytes, headers: dict[bytes, bytes], raw_headers: RawHeaders, context: Context
    ) -> AsyncGenerator[bytes, None]:
        self.check_body(body, headers)
        request, encode = self.read(graph, body, headers)
        fill_context(context, request, graph.plan.name, headers, raw_headers, graph.executor.now())
        async with aclosing(stream(graph, request, context)) as answers:
            async for response in answers:
                yield event(encoded(encode, response, graph, counted=not graph.plan.decoupled))


class GenerateStream(_EventRoute):
    """ASGI application: answers `generate_stream`."""

    def read(self, graph: ServedGraph, body: bytes, headers: dict[bytes, bytes]) -> tuple[InferenceRequest, Encode]:
        check_takes_tensors(graph.plan)
        return parse_generate(body, graph.plan.name, graph.plan.inputs), encode_generated


class InferStream(_EventRoute):
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
                yield encoded(encode, response, graph, counted=not graph.plan.decoupled)

    def _parsed(self, graph: ServedGraph, body: bytes, headers: dict[bytes, bytes]) -> InferenceRequest:
        plan = graph.plan
        check_takes_tensors(plan)
        return parse_request(body, header_length_of(headers, len(body)), plan.name, plan.inputs, plan.outputs, self._limits)


async def _nobody(scope: Scope, receive: Receive, send: Send) -> None:
    raise AssertionError("the routes pass on nothing else")
