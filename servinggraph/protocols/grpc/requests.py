"""From a call's bytes to a graph and a decoded request: what one call and a stream of requests have in common."""

from __future__ import annotations

import asyncio
from functools import cached_property
from typing import Any, NamedTuple

from servinggraph.context import Context, Headers
from servinggraph.errors import ErrorCode, RequestTooLarge, ServingGraphError, StepFailed
from servinggraph.lifecycle import ServedGraph, Serving
from servinggraph.messages import InferenceRequest, InferenceResponse
from servinggraph.protocols.grpc.routing import Call, version_of
from servinggraph.protocols.protobuf.codec import decode_request, encode_response
from servinggraph.protocols.protobuf.generated import grpc_service_pb2 as pb
from servinggraph.protocols.protobuf.wire import Data, split_request
from servinggraph.protocols.v2 import RequestLimits
from servinggraph.protocols.v2.checks import ROUTES, check_routes, check_takes_tensors
from servinggraph.protocols.v2.parameters import priority_of, timeout_of

__all__ = ["Found", "Request", "Requests", "failure_of"]


Found = tuple[ServedGraph, bool]
"""A graph, and whether it gives any number of answers."""


class Metadata(Headers):
    """A call's metadata, asked for only when somebody looks."""

    __slots__ = ()

    @cached_property
    def _decoded(self) -> dict[str, str]:
        call: Any = self._raw
        return {
            name: value if isinstance(value, str) else value.decode("latin-1")
            for name, value in call.invocation_metadata() or ()
        }


class Request(NamedTuple):
    """A request that a graph can answer."""

    graph: ServedGraph
    """The graph."""
    decoupled: bool
    """True when the graph gives any number of answers."""
    request: InferenceRequest
    """The decoded request."""

    @property
    def found(self) -> Found:
        """What `Requests.find` gave."""
        return self.graph, self.decoupled


class Requests:
    """Decodes requests and fills their contexts.

    Attributes:
        serving: the graphs, the slots, the limits.
        closing: True once what is still in flight is cancelled, because the time to finish is over.
    """

    def __init__(self, serving: Serving) -> None:
        self.serving = serving
        self.closing = False
        self._limits = RequestLimits(serving.options.max_tensors)
        self._max_bytes = serving.options.max_body_bytes
        self._graphs: dict[tuple[str, str], Found] = {}
        serving.catalog.on_change(self._refresh)

    def split(self, data: bytes) -> tuple[pb.ModelInferRequest, list[Data]]:
        """Return the message and its raw contents.

        Raises:
            RequestTooLarge: it is over the limit.
            InvalidRequest: it is no such message.
        """
        if len(data) > self._max_bytes:
            raise RequestTooLarge(f"request size exceeds the maximum allowed: {self._max_bytes} bytes (limit 'max_body_bytes')")
        return split_request(data)

    def find(self, message: pb.ModelInferRequest) -> Found:
        """Return the graph that a request is for, and whether it is decoupled.

        Raises:
            ServingGraphError: there is none, or it takes no tensors.
        """
        found = self._graphs.get((message.model_name, message.model_version))
        if found is None:
            name, _, route = message.model_name.partition(ROUTES)
            graph = self.serving.catalog.get(name, version_of(message.model_version))
            if route:
                check_routes(graph.plan)
            check_takes_tensors(graph.plan)
            found = graph, graph.plan.decoupled
        return found

    def decode(self, found: Found, message: pb.ModelInferRequest, raw: list[Data], call: Call, context: Context) -> Request:
        """Decode the request, fill its context.

        Raises:
            ServingGraphError: whatever is wrong with the request.
        """
        graph, decoupled = found
        plan = graph.plan
        context.id = message.id
        context.graph = plan.name
        if graph.routed:
            context.version = version_of(message.model_version)
            context.route = message.model_name.partition(ROUTES)[2]
        context.headers = Metadata(call)  # type: ignore[arg-type]  # decoded when looked at
        request = decode_request(message, raw, plan.name, plan.inputs, plan.outputs, self._limits, self.serving.memory)
        left = call.time_remaining()
        if request.parameters:
            context.parameters = request.parameters
            context.priority = priority_of(request.parameters)
            timeout = timeout_of(request.parameters)
            if timeout is not None and (left is None or timeout < left):
                left = timeout
        if left is not None:
            context.deadline = graph.executor.now() + left
        return Request(graph, decoupled, request)

    def trace(self, request: Request, context: Context) -> None:
        """Give a request a trace, if it is to have one."""
        tracer = request.graph.tracer
        if tracer is not None:
            headers = context.headers
            tracer.pick(request.graph, context, "GRPC_WAITREAD_END", headers.get("traceparent"), headers.get("tracestate"))

    def encode(self, response: InferenceResponse, request: Request) -> bytes:
        """Encode an answer.

        Raises:
            ServingGraphError: it cannot be sent.
        """
        try:
            return encode_response(response, request.request)
        except Exception as error:  # an answer that cannot be encoded
            request.graph.executor.statistics.answer_failed()
            if isinstance(error, StepFailed):
                error.at(request.graph.plan.answer)
            if isinstance(error, ServingGraphError):
                raise
            raise StepFailed(f"{type(error).__name__}: {error}").at(request.graph.plan.answer) from error

    def succeeded(self, request: Request, context: Context) -> None:
        """Count a request whose answer can be sent."""
        if request.graph.traffic is not None:
            request.graph.traffic["grpc"].succeeded(context)

    def cancelled(self, found: Found | None, context: Context) -> None:
        """Count a request whose caller left."""
        if found is not None and found[0].traffic is not None:
            found[0].traffic["grpc"].failed(ErrorCode.CANCELLED.value, context)

    def report(self, error: ServingGraphError, context: Context, found: Found | None) -> None:
        """Count a failure, and log those that are ours or the graph's; a caller's mistakes are told to the caller only."""
        if found is None:
            if context.arrived:
                self.serving.refused("grpc", error)
        elif found[0].traffic is not None:
            found[0].traffic["grpc"].failed(error.code.value, context)
        if isinstance(error, StepFailed):
            self.serving.failures.report(context.graph, context.id, error)

    def _refresh(self) -> None:
        """Make the table of names and versions anew after a change of what is served."""
        table: dict[tuple[str, str], Found] = {}
        catalog = self.serving.catalog
        for graph in catalog.graphs():
            if graph.ready and not graph.plan.body:
                name = graph.plan.name
                if graph.traffic is not None:
                    graph.traffic["grpc"]  # shown from now on, not only from the first request
                for version in catalog.versions_of(graph):
                    table[name, version] = graph, graph.plan.decoupled
                newest = catalog.get(name)
                if not newest.plan.body:
                    table[name, ""] = newest, newest.plan.decoupled
        self._graphs = table


def failure_of(error: BaseException, task: asyncio.Task[Any]) -> ServingGraphError | None:
    """Return what a caller is told of an error; None when its task was cancelled, so that nobody is there to be told."""
    if isinstance(error, ServingGraphError):
        return error
    if isinstance(error, asyncio.CancelledError):
        if task.cancelling():
            return None
        failure = StepFailed("was cancelled from inside")  # a step raised it: nobody cancelled this task
    else:
        failure = StepFailed(f"{type(error).__name__}: {error}")  # a defect of ours: the caller is answered all the same
    failure.__cause__ = error
    return failure
