"""A server without ports: the production path from bytes to bytes, in the test's process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, aclosing, contextmanager
from time import perf_counter_ns
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import orjson
from anyio.from_thread import BlockingPortal, start_blocking_portal

from servinggraph.context import Context, ParameterValue
from servinggraph.interfaces import FrontEndOptions, Router
from servinggraph.lifecycle import Serving
from servinggraph.lifecycle.control import seat_of
from servinggraph.messages import InferenceResponse
from servinggraph.plan import Plan
from servinggraph.protocols.freeform import decode_body
from servinggraph.protocols.freeform.body import media_of
from servinggraph.protocols.freeform.documents import decode_json
from servinggraph.protocols.freeform.media import NDJSON
from servinggraph.protocols.http.endpoints.generate import InferStream
from servinggraph.protocols.http.endpoints.invocations import Invocations, Lines
from servinggraph.protocols.http.server import make_asgi
from servinggraph.protocols.v2.checks import check_takes_tensors
from servinggraph.protocols.v2.client import decode_response, encode_request
from servinggraph.protocols.v2.json_data import decode_data
from servinggraph.statistics import code_of
from servinggraph.tensors import Array, TensorSpec
from servinggraph.testing.fakes import constant
from servinggraph.testing.given import free_form, unnested

__all__ = ["AsyncMock", "HttpReply", "MockServer", "SyncMock"]

Compile = Callable[[Mapping[str, Callable[..., Any]]], Plan]


class HttpReply(NamedTuple):
    """An HTTP answer."""

    status: int
    """Status code."""
    headers: dict[str, str]
    """Headers by lower-case name."""
    body: bytes
    """The body as sent."""

    def json(self) -> Any:
        """Return the body parsed as JSON."""
        return orjson.loads(self.body)


class MockServer:
    """Makes a server for a test: `with graph.mock() as server` or `async with graph.mock() as server`.

    Args:
        compile: makes the plan, given what stands in for which node.
        replace: node or branch name to a callable, or to a mapping of tensors.
        limits: fields of `FrontEndOptions`.
    """

    def __init__(self, compile: Compile, replace: Mapping[str, Any] | None = None, **limits: Any) -> None:
        stand_ins = {
            name: constant(stand_in) if isinstance(stand_in, Mapping) else stand_in
            for name, stand_in in (replace or {}).items()
        }
        self._plan = compile(stand_ins)
        self._options = FrontEndOptions(**limits)
        self._async: AsyncMock | None = None

    async def __aenter__(self) -> AsyncMock:
        self._async = AsyncMock(self._plan, self._options)
        await self._async.start()
        return self._async

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._async is not None
        await self._async.stop()

    def __enter__(self) -> SyncMock:
        with ExitStack() as stack:
            portal = stack.enter_context(start_blocking_portal())
            server = portal.call(self.__aenter__)
            stack.callback(portal.call, server.stop)
            self._stack = stack.pop_all()
        return SyncMock(server, portal)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.close()


class AsyncMock:
    """The running mock server.

    Attributes:
        in_flight: requests whose work has not ended.
    """

    def __init__(self, plan: Plan, options: FrontEndOptions) -> None:
        self._plan = plan
        self._serving = Serving(options)
        self._admission = self._serving.admission

    async def start(self) -> None:
        """Load the graph."""
        catalog = self._serving.catalog
        await catalog.load([self._plan])
        self._asgi = make_asgi(self._serving)
        self._invocations = Invocations(self._serving)
        self._lines = Lines(self._serving, NDJSON[0])
        self._streams = InferStream(self._serving)
        self._graph = catalog.get(self._plan.name)

    async def stop(self) -> None:
        """Unload the graph."""
        await self._serving.catalog.stop()
        await self._serving.close()

    @property
    def serving(self) -> Serving:
        """The state that the front ends of a server share."""
        return self._serving

    @property
    def in_flight(self) -> int:
        """Requests whose work has not ended yet; 0 when every slot is free."""
        return self._admission.in_flight

    def router(self, node: str) -> Router[Any]:
        """Return a router of the graph, to look at its `settings` and `report`.

        Raises:
            GraphNotFound: no such node, or it is no router.
        """
        return seat_of(self._graph.seats, node, self._plan.name).router

    async def adjust(self, node: str, changes: Mapping[str, Any], who: str = "test", why: str = "") -> dict[str, Any]:
        """Change settings of a router, as PATCH /admin/graphs/{graph}/routers/{node} does; returns all of them.

        Raises:
            InvalidRequest: a setting that there is not, or a value that it cannot have.
        """
        return self._serving.control.change(seat_of(self._graph.seats, node, self._plan.name), changes, who, why)

    async def feedback(
        self,
        id: str = "",
        *,
        variant: str = "",
        reward: float | None = None,
        truth: Any = None,
        metric: str = "",
        node: str = "",
    ) -> dict[str, str]:
        """Tell routers what became of an earlier answer, as POST /v2/models/{graph}/feedback does.

        Args:
            id: id of the request.
            variant: branch that answered, where the request has no id.
            reward: how good the answer was.
            truth: what the answer should have been, for a router with a scorer, in place of a reward.
            metric: name of what is measured; "reward" by default.
            node: the router that it is for; by default every one that can use it.

        Returns:
            Router name to "taken", "duplicate", "unknown" or "passed_on".

        Raises:
            InvalidRequest: no router could use it.
            RequestNotFound: no router remembers the request.
        """
        said = {"id": id, "variant": variant, "reward": reward, "truth": truth, "metric": metric, "node": node}
        receipts = self._serving.feedback(self._plan.name, said)
        return {name: receipt.value for name, receipt in receipts.items()}

    async def infer(
        self,
        inputs: Mapping[str, Any] | None = None,
        /,
        *,
        id: str = "",
        parameters: Mapping[str, ParameterValue] | None = None,
        headers: Mapping[str, str] | None = None,
        outputs: Sequence[str] = (),
        timeout_s: float | None = None,
        **tensors: Any,
    ) -> InferenceResponse:
        """Send one request through codec, graph and codec.

        Args:
            inputs: tensors by name; keyword arguments do as well. Arrays go as they are, lists
                are made arrays of the declared datatype.
            id: request id.
            parameters: V2 request parameters.
            headers: request headers.
            outputs: outputs to ask for; all by default.
            timeout_s: deadline, as the header X-Request-Timeout-Ms sets it.
            tensors: input tensors by name.

        Raises:
            ServingGraphError: what a client would get as an error; `__cause__` is the step's own.
        """
        body, raw = self._request({**(inputs or {}), **tensors}, id, parameters, headers, outputs, timeout_s)
        with self._counted() as context:
            encoded = await self._asgi.answer(self._graph, body, dict(raw), raw, context)
        return decode_response(encoded.body, encoded.header_length)

    async def stream(
        self,
        inputs: Mapping[str, Any] | None = None,
        /,
        *,
        id: str = "",
        parameters: Mapping[str, ParameterValue] | None = None,
        headers: Mapping[str, str] | None = None,
        outputs: Sequence[str] = (),
        timeout_s: float | None = None,
        **tensors: Any,
    ) -> AsyncGenerator[InferenceResponse, None]:
        """Send one request, and give its answers one by one, each made when it is asked for; see `infer`.

        Leave it with `aclose` (`contextlib.aclosing`) to be a client that goes away.

        Raises:
            ServingGraphError: what a client would get as an error, after the answers before it.
        """
        body, raw = self._request({**(inputs or {}), **tensors}, id, parameters, headers, outputs, timeout_s)
        with self._counted() as context:
            async with aclosing(self._streams.answers(self._graph, body, dict(raw), raw, context)) as answers:
                async for encoded in answers:
                    yield decode_response(encoded.body, encoded.header_length)

    @contextmanager
    def _counted(self) -> Iterator[Context]:
        """Surround one request: it takes a slot, and counts under the protocol `mock`."""
        traffic = self._graph.traffic
        context = Context()
        entered = False
        try:
            self._admission.enter()
            entered = True
            context.arrived = perf_counter_ns()
            yield context
            if traffic is not None:
                traffic["mock"].succeeded(context)
        except BaseException as error:
            if traffic is not None:
                traffic["mock"].failed(code_of(error), context)
            raise
        finally:
            if entered:
                context.when_idle(self._admission.leave)

    def _request(
        self,
        tensors: Mapping[str, Any],
        id: str,
        parameters: Mapping[str, ParameterValue] | None,
        headers: Mapping[str, str] | None,
        outputs: Sequence[str],
        timeout_s: float | None,
    ) -> tuple[bytes, list[tuple[bytes, bytes]]]:
        """Return an inference request's body and headers."""
        check_takes_tensors(self._plan)
        arrays = {name: self._array(name, given) for name, given in tensors.items()}
        body, length = encode_request(arrays, id, parameters, outputs)
        sent = dict(headers or {})
        sent["inference-header-content-length"] = str(length)
        if timeout_s is not None:
            sent["x-request-timeout-ms"] = repr(timeout_s * 1e3)
        return body, [(name.lower().encode("latin-1"), text.encode("latin-1")) for name, text in sent.items()]

    async def invoke(
        self,
        body: Any = b"",
        content_type: str | None = None,
        accept: str = "",
        headers: Mapping[str, str] | None = None,
        timeout_s: float | None = None,
    ) -> Any:
        """Send a free-form request through codec, graph and codec: what `POST /invocations` does.

        Args:
            body: bytes and text go as they are; anything else as JSON, or as msgpack where
                `content_type` says so or it holds arrays.
            content_type: type of the body; by default text/plain for text, application/octet-stream
                for bytes, else what it was encoded as.
            accept: value of the Accept header.
            headers: other request headers.
            timeout_s: deadline, as the header X-Request-Timeout-Ms sets it.

        Returns:
            The answer, decoded by its content type as a body is.

        Raises:
            ServingGraphError: what a client would get as an error; `__cause__` is the step's own.
        """
        data, raw = free_form(body, content_type, accept, headers, timeout_s)
        with self._counted() as context:
            answer = await self._invocations.answer(self._graph, data, dict(raw), raw, context)
        return decode_body(answer.body, media_of(dict(answer.fields)[b"content-type"].decode()))

    async def invoke_stream(
        self,
        body: Any = b"",
        content_type: str | None = None,
        headers: Mapping[str, str] | None = None,
        timeout_s: float | None = None,
    ) -> AsyncGenerator[Any, None]:
        """Send a free-form request, and give the items of its answer one by one, each made when it is asked for.

        Leave it with `aclose` (`contextlib.aclosing`) to be a client that goes away. See `invoke`.

        Raises:
            ServingGraphError: what a client would get as an error, after the items before it.
        """
        data, raw = free_form(body, content_type, "", headers, timeout_s)
        with self._counted() as context:
            async with aclosing(self._lines.events(self._graph, data, dict(raw), raw, context)) as lines:
                async for line in lines:
                    yield decode_json(line)

    async def request(self, method: str, path: str, body: bytes = b"", headers: Mapping[str, str] | None = None) -> HttpReply:
        """Send an HTTP request as bytes to the application that `serve` runs, without a socket."""
        sent: list[Any] = []
        bodies = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Any:
            if bodies:
                return bodies.pop()
            await asyncio.Event().wait()  # the client stays
            raise AssertionError

        async def send(message: Any) -> None:
            sent.append(message)

        raw = [(name.lower().encode("latin-1"), text.encode("latin-1")) for name, text in (headers or {}).items()]
        raw.append((b"content-length", str(len(body)).encode()))
        path, _, query = path.partition("?")
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "scheme": "http",
            "path": path, "raw_path": path.encode(), "root_path": "", "query_string": query.encode(), "headers": raw,
            "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80),
        }  # fmt: skip
        # A task of its own: a request that is cancelled must not cancel the test.
        task = asyncio.ensure_future(self._asgi(scope, receive, send))
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            # The test gave up: the client is gone, and its work ends before the test goes on.
            task.cancel()
            await asyncio.wait([task])
            raise
        start, *parts = sent
        answer_headers = {name.decode().lower(): text.decode() for name, text in start["headers"]}
        return HttpReply(start["status"], answer_headers, b"".join(part.get("body", b"") for part in parts))

    def _array(self, name: str, given: Any) -> Array:
        """Return what a test gave as an array; lists and plain values by the rules of JSON data."""
        if isinstance(given, np.ndarray):
            return given
        spec = self._plan.inputs.get(name, TensorSpec())
        if isinstance(given, np.generic) or spec.datatype is None:
            return np.asarray(given)
        shape, flat = unnested(name, given)
        if spec.datatype != "BYTES":
            return decode_data(name, spec.datatype, shape, flat)
        # Text as JSON has it, and raw bytes, which it has not.
        array = decode_data(name, "BYTES", shape, ["" if isinstance(item, bytes) else item for item in flat])
        elements = array.reshape(-1)
        for index, item in enumerate(flat):
            if isinstance(item, bytes):
                elements[index] = item
        return array


class SyncMock:
    """The running mock server for tests that are not async; calls may come from several threads."""

    def __init__(self, server: AsyncMock, portal: BlockingPortal) -> None:
        self._server = server
        self._portal = portal

    @property
    def in_flight(self) -> int:
        """Requests whose work has not ended yet; 0 when every slot is free."""
        return self._server.in_flight

    def router(self, node: str) -> Router[Any]:
        """Return a router of the graph; see `AsyncMock.router`."""
        return self._server.router(node)

    def adjust(self, node: str, changes: Mapping[str, Any], who: str = "test", why: str = "") -> dict[str, Any]:
        """Change settings of a router; see `AsyncMock.adjust`."""
        return self._portal.call(self._server.adjust, node, changes, who, why)

    def feedback(self, id: str = "", **said: Any) -> dict[str, str]:
        """Tell routers what became of an earlier answer; see `AsyncMock.feedback`."""
        return self._portal.call(lambda: self._server.feedback(id, **said))

    def infer(self, inputs: Mapping[str, Any] | None = None, /, **options: Any) -> InferenceResponse:
        """Send one request; see `AsyncMock.infer`."""
        return self._portal.call(lambda: self._server.infer(inputs, **options))

    def stream(self, inputs: Mapping[str, Any] | None = None, /, **options: Any) -> Generator[InferenceResponse, None, None]:
        """Send one request, and give its answers one by one; `close` goes away early. See `AsyncMock.stream`."""
        return self._each(self._server.stream(inputs, **options))

    def invoke_stream(self, body: Any = b"", content_type: str | None = None, **options: Any) -> Generator[Any, None, None]:
        """Send a free-form request, and give the items of its answer one by one; see `AsyncMock.invoke_stream`."""
        return self._each(self._server.invoke_stream(body, content_type, **options))

    def _each(self, answers: AsyncGenerator[Any, None]) -> Generator[Any, None, None]:
        try:
            while True:
                try:
                    answer = self._portal.call(answers.__anext__)
                except StopAsyncIteration:
                    return
                yield answer
        finally:
            self._portal.call(answers.aclose)

    def invoke(self, body: Any = b"", content_type: str | None = None, accept: str = "", **options: Any) -> Any:
        """Send a free-form request; see `AsyncMock.invoke`."""
        return self._portal.call(lambda: self._server.invoke(body, content_type, accept, **options))

    def request(self, method: str, path: str, body: bytes = b"", headers: Mapping[str, str] | None = None) -> HttpReply:
        """Send an HTTP request; see `AsyncMock.request`."""
        return self._portal.call(lambda: self._server.request(method, path, body, headers))
