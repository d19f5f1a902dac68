"""The free-form door: bodies of any content type in, answers by Accept out; and `/ping`.

The paths are those of SageMaker and MLflow. docs/freeform.md is the description for users.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from typing import Any, Final, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from servinggraph.context import Context, Headers, ParameterValue
from servinggraph.errors import GraphNotFound, InvalidRequest, ServingGraphError, StepFailed, nearest
from servinggraph.lifecycle import ServedGraph, Serving, infer
from servinggraph.messages import Body, InferenceRequest
from servinggraph.protocols.freeform import Encoded, decode_body, decode_tensors, encode_answer
from servinggraph.protocols.freeform.body import media_of
from servinggraph.protocols.http.codec import deadline_of
from servinggraph.protocols.http.endpoints.routing import MODEL, VERSION, json_response, route
from servinggraph.protocols.http.exchange import Exchange, Receive, Scope, Send

__all__ = ["routes"]

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


class Invocations(Exchange["Answer"]):
    """ASGI application: answers free-form requests.

    Args:
        serving: the graphs, the slots, the limits.
    """

    def __init__(self, serving: Serving) -> None:
        super().__init__(serving, _nowhere)
        self._default = serving.options.invocations

    def find(self, scope: Scope) -> ServedGraph | None:
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

    async def answer(
        self,
        graph: ServedGraph,
        body: bytes,
        headers: dict[bytes, bytes],
        raw_headers: list[tuple[bytes, bytes]],
        context: Context,
    ) -> Answer:
        plan = graph.plan
        if len(body) > self._max_body_bytes:
            raise self.too_large()
        if b"content-encoding" in headers:
            body = await self.unpacked(body, headers[b"content-encoding"].decode("latin-1"))
        context.id = headers.get(b"x-request-id", b"")[:_LONGEST_ID].decode("latin-1")
        context.headers = Headers(raw_headers)
        context.graph = plan.name
        context.deadline = deadline_of(headers, _NO_PARAMETERS, graph.executor.now())
        content_type = headers.get(b"content-type", b"").decode("latin-1")
        media = media_of(content_type)
        inputs: Any
        if plan.body:
            value = await self._decoded(context, len(body), lambda: decode_body(body, media))
            inputs = Body(value, content_type)
        else:
            inputs = await self._decoded(context, len(body), lambda: decode_tensors(body, media, plan.inputs, plan.name))
        response = await infer(graph, InferenceRequest(inputs, context.id), context)
        answer: Any = response.outputs
        accept = ",".join(value.decode("latin-1") for name, value in raw_headers if name == b"accept")
        try:
            encoded = encode_answer(answer if plan.body else Body(answer), accept)
            return Answer(encoded, context.id, _parameters(response.parameters))
        except Exception as error:  # an answer that cannot be encoded
            graph.executor.statistics.answer_failed()
            if isinstance(error, StepFailed):
                error.at(plan.answer)
            if isinstance(error, ServingGraphError):
                raise
            raise StepFailed(f"{type(error).__name__}: {error}").at(plan.answer) from error

    def fields(self, answer: Answer) -> list[tuple[bytes, bytes]]:
        return answer.fields

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
