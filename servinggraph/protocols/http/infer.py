"""The inference route: one dictionary look-up from the path to the graph, V2 in and out."""

from __future__ import annotations

from typing import Final

from servinggraph.context import Context, Headers
from servinggraph.errors import ServingGraphError, StepFailed
from servinggraph.lifecycle import ServedGraph, Serving, infer
from servinggraph.protocols.http.codec import deadline_of, header_length_of
from servinggraph.protocols.http.exchange import JSON_FIELD, ASGIApp, Exchange, Scope
from servinggraph.protocols.v2 import EncodedResponse, RequestLimits, encode_response, parse_request
from servinggraph.protocols.v2.parameters import priority_of

__all__ = ["InferRoute"]

_BINARY: Final = (b"content-type", b"application/octet-stream")


class InferRoute(Exchange[EncodedResponse]):
    """ASGI application: answers `POST /v2/models/{graph}[/versions/{version}]/infer`, hands on the rest.

    Args:
        serving: the graphs, the slots, the limits.
        others: application for all other paths.
    """

    def __init__(self, serving: Serving, others: ASGIApp) -> None:
        super().__init__(serving, others)
        self._limits = RequestLimits(serving.options.max_tensors)
        self._regions = serving.memory
        self._routes: dict[str, ServedGraph] = {}
        self._catalog.on_change(self._refresh)

    def find(self, scope: Scope) -> ServedGraph | None:
        graph = self._routes.get(scope["path"]) if scope["type"] == "http" else None
        return None if graph is None or scope["method"] != "POST" else graph

    found = find  # it refuses nothing: what is not in the table is for others

    async def answer(
        self,
        graph: ServedGraph,
        body: bytes,
        headers: dict[bytes, bytes],
        raw_headers: list[tuple[bytes, bytes]],
        context: Context,
    ) -> EncodedResponse:
        plan = graph.plan
        if len(body) > self._max_body_bytes:
            raise self.too_large()
        if b"content-encoding" in headers:
            graph.requests += 1  # it stays while this runs in a thread
            try:
                body = await self.unpacked(body, headers[b"content-encoding"].decode("latin-1"))
            finally:
                graph.leave()
        request = parse_request(
            body, header_length_of(headers, len(body)), plan.name, plan.inputs, plan.outputs, self._limits, self._regions
        )
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
        except Exception as error:  # an answer that cannot be encoded
            graph.executor.statistics.answer_failed()
            if isinstance(error, StepFailed):
                error.at(plan.answer)
            if isinstance(error, ServingGraphError):
                raise
            raise StepFailed(f"{type(error).__name__}: {error}").at(plan.answer) from error

    def fields(self, answer: EncodedResponse) -> list[tuple[bytes, bytes]]:
        if answer.header_length is None:
            return [JSON_FIELD]
        return [_BINARY, (b"inference-header-content-length", str(answer.header_length).encode())]

    def _refresh(self) -> None:
        """Make the table of paths anew after a change of what is served."""
        table: dict[str, ServedGraph] = {}
        for graph in self._catalog.graphs():
            if graph.ready and not graph.plan.body and not graph.plan.decoupled:
                if graph.traffic is not None:
                    graph.traffic["http"]  # shown from now on, not only from the first request
                name = graph.plan.name
                for version in self._catalog.versions_of(graph):
                    table[f"/v2/models/{name}/versions/{version}/infer"] = graph
                newest = self._catalog.get(name)
                if not newest.plan.body and not newest.plan.decoupled:
                    table[f"/v2/models/{name}/infer"] = newest
        self._routes = table
