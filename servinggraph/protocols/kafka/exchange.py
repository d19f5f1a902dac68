"""One record through a graph: slot, format, deadline, answer, and the words for what went wrong."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Mapping
from functools import cached_property
from time import perf_counter_ns
from typing import Any, Final

from servinggraph.context import Context, Headers
from servinggraph.errors import (
    DeadlineExceeded,
    GraphNotFound,
    InvalidRequest,
    RequestTooLarge,
    ServingGraphError,
    StepFailed,
    Unavailable,
)
from servinggraph.kafka import KafkaOptions, headers as names
from servinggraph.lifecycle import ServedGraph, Serving, infer
from servinggraph.lifecycle.sampling import Picker
from servinggraph.protocols.kafka.cloudevents import ID, is_structured, unwrapped
from servinggraph.protocols.kafka.codec import Answer, Decoded, decode
from servinggraph.protocols.kafka.framing import unframed
from servinggraph.protocols.kafka.records import Work
from servinggraph.protocols.v2 import RequestLimits
from servinggraph.protocols.v2.checks import ROUTES, check_routes
from servinggraph.protocols.v2.compression import decompress
from servinggraph.protocols.v2.parameters import priority_of, timeout_of

__all__ = ["Exchange"]

_NUMBER: Final = re.compile(rb"[0-9]{1,15}(\.[0-9]{0,9})?")
_FRAME: Final = 5
_LARGE_BYTES: Final = 64 * 1024
"""Documents above this are decoded in a thread: a table of this size takes about 10 ms."""


class RecordHeaders(Headers):
    """A record's headers, decoded only when a step looks."""

    __slots__ = ()

    @cached_property
    def _decoded(self) -> dict[str, str]:
        raw: Any = self._raw
        return {name.lower(): (value or b"").decode("latin-1") for name, value in raw}


class Exchange:
    """Answers records for one graph.

    Args:
        serving: the graphs, the slots, the limits.
        graph: name of the graph whose `kafka:` block this is; a record may ask for another by header.
        options: that block.
        wall: the time, seconds since 1970, to hold deadlines against.
    """

    def __init__(self, serving: Serving, graph: str, options: KafkaOptions, wall: Callable[[], float] = time.time) -> None:
        self._serving = serving
        self._catalog = serving.catalog
        self._admission = serving.admission
        self._graph = graph
        self._format = options.format
        self._framed = options.framing == "confluent"
        self._limits = RequestLimits(serving.options.max_tensors)
        self._max_bytes = serving.options.max_body_bytes
        self._wall = wall

    async def answer(self, work: Work) -> Answer:
        """Answer one record.

        Raises:
            ServingGraphError: whatever is wrong with the request, or went wrong with it.
            asyncio.CancelledError: the task was cancelled.
        """
        context = Context()
        context.arrived = perf_counter_ns()
        self._admission.enter()
        try:
            return await self._answer(work, context)
        except ServingGraphError as error:
            if isinstance(error, StepFailed):
                self._report(error, work, context)
            raise
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            failure = StepFailed("was cancelled from inside")  # a step raised it: nobody cancelled this task
            self._report(failure, work, context)
            raise failure from error
        except Exception as error:  # a defect of ours: the record ends somewhere all the same
            failure = StepFailed(f"{type(error).__name__}: {error}")
            failure.__cause__ = error
            self._report(failure, work, context)
            raise failure from error
        finally:
            context.when_idle(self._admission.leave)
            if context.trace is not None:
                context.trace.finish(context.id, "KAFKA_WRITE_START")

    def _report(self, failure: StepFailed, work: Work, context: Context) -> None:
        self._serving.failures.report(context.graph, context.id or str(work.place), failure)

    async def _answer(self, work: Work, context: Context) -> Answer:
        context.graph = name = self._graph
        given, version, until = "", "", None
        if work.headers:  # most records of those who only write to a topic have none
            if is_structured(work.headers) and work.value is not None:
                work.value, work.headers = unwrapped(work.value, work.headers)
            headers = work.headers
            context.id = given = _text(headers.get(names.REQUEST_ID) or headers.get(ID) or b"")
            context.headers = RecordHeaders(work.record.headers)  # type: ignore[arg-type]  # decoded when looked at
            until = self.deadline_of(headers)
            if until is not None and until <= self._wall():
                text = f"Request timeout expired: its deadline ('{names.DEADLINE}') passed before it could run"
                raise DeadlineExceeded(text)
            name = headers.get(names.GRAPH, b"").decode("utf-8", "replace") or name
            name, _, context.route = name.partition(ROUTES)
            version = context.version = headers.get(names.VERSION, b"").decode("utf-8", "replace")
        graph = work.graph = self._find(name, version, context.route)
        context.graph = graph.plan.name
        if graph.tracer is not None:
            _trace(graph.tracer, work, graph, context)
        decoded = await self._decode(work, graph)
        request = decoded.request
        if given and not request.id:
            request.id = given
        elif request.id:
            context.id = request.id
        now = graph.executor.now()
        if request.parameters:
            context.parameters = request.parameters
            context.priority = priority_of(request.parameters)
            timeout = timeout_of(request.parameters)
            if timeout is not None:
                context.deadline = now + timeout
        if until is not None:
            end = now + until - self._wall()
            context.deadline = end if context.deadline is None else min(end, context.deadline)
        response = await infer(graph, request, context)
        try:
            answer = decoded.encode(response)
            if graph.traffic is not None:
                graph.traffic["kafka"].succeeded(context)
            return answer
        except Exception as error:  # an answer that cannot be encoded
            graph.executor.statistics.answer_failed()
            if isinstance(error, StepFailed):
                error.at(graph.plan.answer)
            if isinstance(error, ServingGraphError):
                raise
            raise StepFailed(f"{type(error).__name__}: {error}").at(graph.plan.answer) from error

    def _find(self, name: str, version: str, route: str) -> ServedGraph:
        try:
            graph = self._catalog.get(name, version)
        except GraphNotFound as error:
            if name != self._graph or version:
                raise
            # Unloaded, with the end of its stream on the way: the record is for whoever serves it next.
            raise Unavailable(str(error)) from None
        if route:
            check_routes(graph.plan)
        return graph

    async def _decode(self, work: Work, graph: ServedGraph) -> Decoded:
        """Return the request in a record.

        Raises:
            ServingGraphError: whatever is wrong with it.
        """
        value = work.value
        if value is None:
            raise InvalidRequest("the record has no value (a tombstone), and a request is in the value")
        if len(value) > self._max_bytes:
            raise RequestTooLarge(f"request size exceeds the maximum allowed: {self._max_bytes} bytes (limit 'max_body_bytes')")
        headers, plan = work.headers, graph.plan
        form = self._format
        if self._framed:
            protobuf = form == "v2-protobuf" or (
                form == "auto" and not plan.body and value[_FRAME : _FRAME + 1] not in (b"{", b"[")
            )
            value = unframed(value, protobuf=protobuf)
            form = "v2-protobuf" if protobuf else form
        coding = headers.get(names.CONTENT_ENCODING, b"").decode("latin-1") if headers else ""
        if not coding and len(value) <= _LARGE_BYTES:
            return decode(value, headers, form, plan, self._limits)

        def work_of_a_thread() -> Decoded:
            plain = decompress(value, coding, self._max_bytes) if coding else value
            return decode(plain, headers, form, plan, self._limits)

        graph.requests += 1  # it stays while this runs in a thread
        try:
            return await asyncio.to_thread(work_of_a_thread)
        finally:
            graph.leave()

    def given_up(self, work: Work, error: ServingGraphError) -> None:
        """Count a record that gets no answer."""
        if work.graph is None:
            self._serving.refused("kafka", error)
        elif work.graph.traffic is not None:
            work.graph.traffic["kafka"].failed(error.code.value)

    def version_of(self, work: Work) -> str:
        """Return the version of the graph that a record is for; empty when there is none."""
        return "" if work.graph is None else work.graph.plan.version

    def deadline_of(self, headers: Mapping[str, bytes]) -> float | None:
        """Return when a record's answer becomes worthless, seconds since 1970; None without a limit.

        Raises:
            InvalidRequest: the header is no number of milliseconds.
        """
        text = headers.get(names.DEADLINE)
        if text is None:
            return None
        if not _NUMBER.fullmatch(text):
            raise InvalidRequest(
                f"header '{names.DEADLINE}' is a number of milliseconds since 1970, got {text[:40].decode('latin-1')!r}"
            )
        return float(text) / 1e3

    def expired(self, work: Work) -> bool:
        """Tell whether a record's own deadline has passed, so that no further attempt can help."""
        try:
            until = self.deadline_of(work.headers)
        except InvalidRequest:
            return False
        return until is not None and until <= self._wall()


def _text(value: bytes) -> str:
    """Return an id as text: UTF-8 as a rule; of what is not, each byte is a character."""
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value.decode("latin-1")


def _trace(tracer: Picker, work: Work, graph: ServedGraph, context: Context) -> None:
    """Give a record a trace, if it is to have one, and its answer the headers that say so."""
    headers = work.headers
    tracer.pick(graph, context, "KAFKA_READ", headers.get(names.TRACEPARENT), headers.get(names.TRACESTATE))
    if context.trace is not None:
        work.trace = context.trace.headers("")
