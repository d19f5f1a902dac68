"""The free-form door: bodies of any content type in, answers by Accept out; and `/ping`.

The paths are those of SageMaker and MLflow. docs/freeform.md is the description for users.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from typing import Any, Final, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from servinggraph.context import Context, Headers, ParameterValue
from servinggraph.errors import GraphNotFound, InvalidRequest, StepFailed, nearest
from servinggraph.lifecycle import ServedGraph, Serving, infer, stream
from servinggraph.messages import Body, InferenceRequest, InferenceResponse
from servinggraph.protocols.freeform import Encoded, decode_body, decode_tensors, encode_answer
from servinggraph.protocols.freeform.answer import streamed
from servinggraph.protocols.freeform.body import media_of
from servinggraph.protocols.freeform.documents import encode_json
from servinggraph.protocols.freeform.media import NDJSON, SERVER_SENT
from servinggraph.protocols.http.codec import deadline_of
from servinggraph.protocols.http.endpoints.routing import MODEL, VERSION, json_response, route
from servinggraph.protocols.http.events import EVENT_FIELDS, EventExchange, encoded
from servinggraph.protocols.http.exchange import Exchange, Receive, Scope, Send
from servinggraph.protocols.v2.generate import event

__all__ = ["Invocations", "Lines", "routes"]

RawHeaders = list[tuple[bytes, bytes]]

_LARGE_BYTES: Final = 64 * 1024
"""Bodies above this are decoded in a thread: a table of this size takes about 10 ms."""

_LONGEST_PARAMETERS: Final = 8192
_LONGEST_ID: Final = 256
_NO_PARAMETERS: Final[Mapping[str, ParameterValue]] = {}

T = TypeVar("T")


def routes(serving: Serving) -> list[Route]:
    """Return the routes."""
    invocations = Invocations(serving)

    def ping(request: Request) -> Response:
        ready = serving.catalog.ready
        return json_response({"ready": ready}, 200 if ready else 503)

    return [
        route("/ping", ping, "GET"),
        *(_raw(path, invocations) for path in ("/invocations", MODEL + "/invocations", VERSION + "/invocations")),
    ]


def _raw(path: str, endpoint: Exchange[Any]) -> Route:
    made = Route(path, endpoint, methods=["POST"])
    made.methods = {"POST"}
    return made


class _Door(Exchange[Any]):
    """An exchange of the graph that the path names, or a header, or an option; reads free-form requests."""

    def __init__(self, serving: Serving) -> None:
        super().__init__(serving, _nowhere)
        self._default = serving.options.invocations

    def find(self, scope: Scope) -> ServedGraph:
        path = scope["path_params"]
        if "name" in path:
            return self._catalog.get(path["name"], path.get("version", ""))
        chosen = next((value.decode("latin-1").strip() for name, value in scope["headers"] if name == b"x-graph"), "")
        names = list(dict.fromkeys(graph.plan.name for graph in self._catalog.graphs()))
        name = chosen or self._default or (names[0] if len(names) == 1 else "")
        if name in names:
            return self._catalog.get(name)
        if not name and names:
            text = "say which with the header X-Graph, or start the server with --invocations"
            raise InvalidRequest(f"this server has several graphs, {', '.join(names)}: {text}")
        where = "the header X-Graph" if chosen else "--invocations"
        raise GraphNotFound(
            f"{where} names graph {name[:80]!r}, which is not served{nearest(name, names)}" if name else "no graph is served"
        )

    async def read(
        self, graph: ServedGraph, body: bytes, headers: dict[bytes, bytes], raw_headers: RawHeaders, context: Context
    ) -> InferenceRequest:
        """Return the decoded request, and fill its context.

        Raises:
            ServingGraphError: whatever is wrong with the request.
        """
        plan = graph.plan
        if len(body) > self._max_body_bytes:
            raise self.too_large()
        context.id = headers.get(b"x-request-id", b"")[:_LONGEST_ID].decode("latin-1")
        context.headers = Headers(raw_headers)
        context.graph = plan.name
        context.deadline = deadline_of(headers, _NO_PARAMETERS, graph.executor.now())
        graph.requests += 1  # threads may decode it: an unload waits for them, too
        try:
            inputs = await self._inputs(graph, body, headers, context)
        finally:
            graph.leave()
        return InferenceRequest(inputs, context.id)

    async def _inputs(self, graph: ServedGraph, body: bytes, headers: dict[bytes, bytes], context: Context) -> Any:
        """Return what a graph takes of a body: the body's value, or tensors."""
        plan = graph.plan
        if b"content-encoding" in headers:
            body = await self.unpacked(body, headers[b"content-encoding"].decode("latin-1"))
        content_type = headers.get(b"content-type", b"").decode("latin-1")
        media = media_of(content_type)
        if plan.body:
            return Body(await self._decoded(context, len(body), lambda: decode_body(body, media)), content_type)
        return await self._decoded(context, len(body), lambda: decode_tensors(body, media, plan.inputs, plan.name))

    async def _decoded(self, context: Context, size: int, decode: Callable[[], T]) -> T:
        """Decode a body, in a thread where that takes long; the request's slot is held until it has ended."""
        if size <= _LARGE_BYTES:
            return decode()

        def work() -> T:
            try:
                return decode()
            finally:
                self._loop.call_soon_threadsafe(context.end_work)

        context.begin_work()
        # Shielded: cancelled before its turn, the work would never end, and the slot with it.
        return await asyncio.shield(self._loop.run_in_executor(None, work))


class Invocations(_Door):
    """ASGI application: answers free-form requests, with one answer or with any number, one by one.

    Args:
        serving: the graphs, the slots, the limits.
    """

    def __init__(self, serving: Serving) -> None:
        super().__init__(serving)
        lines = [Lines(serving, name) for name in NDJSON]
        self._streams: dict[str, EventExchange] = {SERVER_SENT: Events(serving), **{one.media_type: one for one in lines}}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        graph: ServedGraph = self.found(scope)
        stream_type = streamed(_accept(scope["headers"]), decoupled=graph.plan.decoupled)
        if stream_type is None:
            await super().__call__(scope, receive, send)
        else:
            await self._streams[stream_type](scope, receive, send)

    async def answer(
        self, graph: ServedGraph, body: bytes, headers: dict[bytes, bytes], raw_headers: RawHeaders, context: Context
    ) -> Answer:
        request = await self.read(graph, body, headers, raw_headers, context)
        accept = _accept(raw_headers)

        def encode(response: InferenceResponse) -> Answer:
            return Answer(encode_answer(_body_of(response), accept), context.id, _parameters(response.parameters))

        return encoded(encode, await infer(graph, request, context), graph, counted=True)  # type: ignore[no-any-return]

    def fields(self, answer: Answer) -> RawHeaders:
        return answer.fields


class Items(_Door, EventExchange):
    """ASGI application: answers free-form requests with a stream of items, each JSON."""

    def item(self, data: bytes) -> bytes:
        """Return an item as it goes over the wire."""
        return event(data)

    async def events(
        self, graph: ServedGraph, body: bytes, headers: dict[bytes, bytes], raw_headers: RawHeaders, context: Context
    ) -> AsyncGenerator[bytes, None]:
        request = await self.read(graph, body, headers, raw_headers, context)
        async with aclosing(stream(graph, request, context)) as answers:
            async for response in answers:
                yield self.item(encoded(_item, response, graph, counted=not graph.plan.decoupled))


class Events(Items):
    """Items as server-sent events; an error behind items is an event called `error`."""

    def last_event(self, error: bytes) -> bytes:
        return b"event: error\n" + event(error)


class Lines(Items):
    """Items as lines; an error behind items is the last, `{"error": ...}`.

    Attributes:
        media_type: what the lines are called.
    """

    def __init__(self, serving: Serving, media_type: str) -> None:
        super().__init__(serving)
        self.media_type = media_type
        self.event_fields = [(b"content-type", media_type.encode()), *EVENT_FIELDS[1:]]

    def item(self, data: bytes) -> bytes:
        return data + b"\n"

    def last_event(self, error: bytes) -> bytes:
        return error + b"\n"


class Answer:
    """An encoded answer with its headers.

    Attributes:
        body: the bytes.
        fields: headers.
    """

    __slots__ = ("body", "fields")

    def __init__(self, encoded: Encoded, request_id: str, parameters: bytes) -> None:
        self.body = encoded.body
        self.fields = [(b"content-type", encoded.content_type.encode("latin-1"))]
        if request_id:
            self.fields.append((b"x-request-id", request_id.encode("latin-1")))
        if parameters:
            self.fields.append((b"x-response-parameters", parameters))


def _accept(raw_headers: RawHeaders) -> str:
    return ",".join(value.decode("latin-1") for name, value in raw_headers if name == b"accept")


def _body_of(response: InferenceResponse) -> Body:
    outputs: Any = response.outputs
    return outputs if type(outputs) is Body else Body(outputs)


def _item(response: InferenceResponse) -> bytes:
    return encode_json(_body_of(response).value)


def _parameters(parameters: Mapping[str, Any]) -> bytes:
    """Return response parameters for a header: ASCII JSON, empty for none.

    Raises:
        StepFailed: they cannot be written, or are longer than a header should be.
    """
    if not parameters:
        return b""
    try:
        text = json.dumps(dict(parameters), default=lambda value: value.item()).encode()
    except Exception as error:
        raise StepFailed(f"set response parameters that JSON cannot carry: {error}") from error
    if len(text) > _LONGEST_PARAMETERS:
        raise StepFailed(f"set response parameters of {len(text)} bytes, and a header holds at most {_LONGEST_PARAMETERS}")
    return text


async def _nowhere(scope: Scope, receive: Receive, send: Send) -> None:
    raise GraphNotFound("Not Found")  # `find` returns a graph or raises
