"""One request as spans that OpenTelemetry knows: itself, its codec, each node, batches that it was in. Knows no library.

Spans are made of the moments that are recorded anyway, when the request is over; only their numbers are there before, for
whoever calls another service. Source: W3C Trace Context, level 1.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from random import getrandbits
from time import perf_counter_ns, time_ns
from typing import Any, Final, NamedTuple

from servinggraph.tracing import Batch

__all__ = ["Parent", "Span", "SpanTrace", "parse_traceparent"]

_MOST_NODES: Final = 1024
_TRACEPARENT: Final = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_STATE: Final = re.compile(r"[\x20-\x7e\t]*")
_LONGEST_STATE: Final = 512


class Parent(NamedTuple):
    """Where a request comes from."""

    trace_id: int
    """The trace that it belongs to."""
    span_id: int
    """The span that it is part of."""
    sampled: bool
    """Whether the caller records it."""


@dataclass(slots=True)
class Span:
    """A stretch of time with a name.

    Attributes:
        name: what happened.
        kind: server, consumer, client or internal.
        trace_id, span_id: its numbers.
        parent_id: the span that it is part of; 0 for none.
        began, ended: nanoseconds since 1970.
        attributes: what there is to know.
        links: spans of other traces that it had to do with.
        error: why it failed; None when it did not.
        state: the caller's tracestate.
    """

    name: str
    kind: str
    trace_id: int
    span_id: int
    parent_id: int
    began: int
    ended: int
    attributes: dict[str, str | int | float | bool] = field(default_factory=dict)
    links: list[tuple[int, int]] = field(default_factory=list)
    error: str | None = None
    state: str = ""


def parse_traceparent(text: str | bytes | None) -> Parent | None:
    """Return what a `traceparent` header says; None for what is none."""
    if not text:
        return None
    found = _TRACEPARENT.fullmatch(text.decode("latin-1") if isinstance(text, bytes) else text)
    if found is None or found[1] == "ff" or (found[1] == "00" and found[5]):
        return None
    trace_id, span_id = int(found[2], 16), int(found[3], 16)
    return Parent(trace_id, span_id, bool(int(found[4], 16) & 1)) if trace_id and span_id else None


def _handed_on(state: str) -> str:
    """Return the part of a `tracestate` that goes on: whole entries only, and nothing of what no header can hold."""
    if not _STATE.fullmatch(state):
        return ""
    while len(state) > _LONGEST_STATE:
        state = state.rpartition(",")[0]
    return state


class SpanTrace:
    """What happened to one request, for OpenTelemetry; recorded as `tracing.Trace` is.

    Args:
        graph: the graph.
        version: its version.
        collect: takes the spans of the finished trace.
        parent: where the request comes from; None where it says nothing.
        state: its tracestate, handed on as it is where that can be; of a long one what fits.
    """

    __slots__ = (
        "_attempts", "_called", "_calls", "_collect", "_error", "_graph", "_nodes", "_parent", "_stamps", "_state", "_version",
        "span_id", "trace_id",
    )  # fmt: skip

    def __init__(
        self, graph: str, version: str, collect: Callable[[list[Span]], None], parent: Parent | None, state: str = ""
    ) -> None:
        self._graph, self._version = graph, version
        self._collect = collect
        self._parent = parent
        self._state = _handed_on(state)
        self.trace_id = getrandbits(128) or 1 if parent is None else parent.trace_id
        self.span_id = getrandbits(64) or 1
        self._stamps: dict[str, int] = {}
        self._nodes: list[tuple[str, list[int], int, Batch | None, str | None]] = []
        self._calls: dict[str, list[tuple[int, int]]] = {}
        self._called: set[int] = set()
        self._attempts: list[tuple[str, int, int, int, int]] = []
        self._error: tuple[str, str, str] | None = None

    def stamp(self, name: str) -> None:
        """Record that something happens to the request now."""
        self._stamps[name] = perf_counter_ns()

    def begin(self, inputs: Mapping[str, Any]) -> None:
        """Record that the graph begins with the request."""
        self.stamp("REQUEST_START")

    def answer(self, outputs: Mapping[str, Any]) -> None:
        """Record nothing: how many answers there are is not for a span each."""

    def end(self, outputs: Mapping[str, Any] | None) -> None:
        """Record that the graph is done with the request."""
        self.stamp("REQUEST_END")

    def values(self, activity: str, tensors: Mapping[str, Any]) -> None:
        """Record nothing: a caller's data does not belong into traces."""

    def node(self, name: str, stamps: Iterable[tuple[str, int]], batch: Batch | None = None, error: str | None = None) -> None:
        """Record what happened in a node, and when."""
        if len(self._nodes) >= _MOST_NODES:
            return
        calls = self._calls.pop(name, ())
        span_id = calls[-1][0] if calls else getrandbits(64) or 1
        if calls:
            self._called.add(span_id)
            # A node that was run again has called more than once; who was called first has to find its parent, too.
            ends = [moment for _, moment in calls[1:]]
            self._attempts += [(name, span_id, *call, end) for call, end in zip(calls, ends, strict=False)]
        if batch is not None:
            batch.join(self.trace_id, span_id)
        self._nodes.append((name, [moment for _, moment in stamps], span_id, batch, error))

    def headers(self, node: str) -> dict[str, str]:
        """Return what tells another service that a node calls that it is part of this trace; no node: of the request."""
        span_id = self.span_id
        if node:
            span_id = getrandbits(64) or 1
            self._calls.setdefault(node, []).append((span_id, perf_counter_ns()))
        told = {"traceparent": f"00-{self.trace_id:032x}-{span_id:016x}-01"}
        return told | {"tracestate": self._state} if self._state else told

    def failed(self, code: str, text: str, node: str | None) -> None:
        """Record that the request gets an error."""
        self._error = code, text, node or ""

    def finish(self, request_id: str, ending: str) -> None:
        """Record what happens last, and hand the trace over; nothing more may be recorded."""
        self.stamp(ending)
        protocol = ending.partition("_")[0].lower()
        since_1970 = time_ns() - perf_counter_ns()
        moments = list(self._stamps.values())
        parent_id = 0 if self._parent is None else self._parent.span_id
        kind = "consumer" if protocol == "kafka" else "server"
        root = self._span(f"infer {self._graph}", kind, self.span_id, parent_id, moments[0], moments[-1])
        root.attributes = {
            "servinggraph.graph": self._graph, "servinggraph.version": self._version, "servinggraph.protocol": protocol,
        }  # fmt: skip
        if request_id:
            root.attributes["servinggraph.request_id"] = request_id
        if self._error is not None:
            code, root.error, node = self._error
            root.attributes |= {"error.type": code, "servinggraph.error_node": node} if node else {"error.type": code}
        spans = [root, *self._codec(moments), *self._of_nodes()]
        for span in spans:
            span.began += since_1970
            span.ended += since_1970
        self._collect(spans)

    def _span(self, name: str, kind: str, span_id: int, parent_id: int, began: int, ended: int) -> Span:
        return Span(name, kind, self.trace_id, span_id, parent_id, began, ended, state=self._state)

    def _codec(self, moments: list[int]) -> list[Span]:
        began, ended = self._stamps.get("REQUEST_START"), self._stamps.get("REQUEST_END")
        parts = [("decode", moments[0], began), ("encode", ended, moments[-1])]
        return [
            self._span(name, "internal", getrandbits(64) or 1, self.span_id, since, until)
            for name, since, until in parts
            if since is not None and until is not None
        ]

    def _of_nodes(self) -> list[Span]:
        """Return a span for each run of a node, inside that of the router that it is a branch of; and one for its batch."""
        spans: list[Span] = []
        by_name: dict[str, list[Span]] = {}
        for name, moments, span_id, batch, error in self._nodes:
            kind = "client" if span_id in self._called else "internal"
            span = self._span(name, kind, span_id, self.span_id, moments[0], moments[-1])
            span.error = error
            span.attributes = {"servinggraph.node": name}
            if batch is not None:
                span.attributes |= {"servinggraph.batch.rows": batch.rows, "servinggraph.batch.requests": batch.requests}
                span.attributes["servinggraph.queue_us"] = (moments[2] - moments[1]) // 1000
                span.links = [batch.span]
                if batch.is_of(self.trace_id, span_id):
                    spans.append(self._of_batch(span, batch, moments))
            spans.append(span)
            by_name.setdefault(name, []).append(span)
        for name, runs in by_name.items():
            around = by_name.get(name.rpartition(".")[0], ())
            for run in runs:
                inside = [outer for outer in around if outer.began <= run.began and run.ended <= outer.ended]
                if inside:
                    run.parent_id = inside[-1].span_id
        for name, node_id, span_id, began, ended in self._attempts:
            spans.append(self._span(f"attempt at {name}", "client", span_id, node_id, began, ended))
        return spans

    def _of_batch(self, first: Span, batch: Batch, moments: list[int]) -> Span:
        span = self._span(f"batch {first.name}", "internal", batch.span[1], first.span_id, moments[2], moments[-1])
        span.attributes = {"servinggraph.batch.rows": batch.rows, "servinggraph.batch.requests": batch.requests}
        span.links = list(batch.members)
        return span
