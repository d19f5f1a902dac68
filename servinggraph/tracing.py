"""The trace of one request: what happened when, to the request and in each node.

Only a request that was picked has one; `lifecycle.tracing` picks and writes them. Moments
are those of `perf_counter_ns`, which on Linux is the monotonic clock that Triton uses.
Source: Triton, docs/user_guide/trace.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from random import getrandbits
from time import perf_counter_ns
from typing import Any, Final, Protocol

import numpy as np

from servinggraph.context import Context

__all__ = ["NODE_STAMPS", "Batch", "Both", "Recorder", "Trace", "trace_alone", "trace_failure", "trace_headers"]

NODE_STAMPS: Final = (
    "REQUEST_START", "QUEUE_START", "COMPUTE_START", "COMPUTE_INPUT_END", "COMPUTE_OUTPUT_START", "COMPUTE_END", "REQUEST_END",
)  # fmt: skip
"""What is recorded of a node, in this order."""

_MOST_NODES: Final = 1024
"""Nodes in one trace, each run of a node counted; a request in very many pieces must not fill the memory."""

_MOST_ELEMENTS: Final = 1024
"""Elements of a tensor that are written."""


class Batch:
    """A batch that requests with a trace were in.

    Attributes:
        rows: its rows, padding included.
        requests: how many got their answer of it.
        members: trace and span of each node that ran in it, of traced requests; the first one's trace has the batch.
        span: trace and span of the batch.
    """

    __slots__ = ("members", "requests", "rows", "span")

    def __init__(self, rows: int, requests: int) -> None:
        self.rows, self.requests = rows, requests
        self.members: list[tuple[int, int]] = []
        self.span = 0, 0

    def join(self, trace_id: int, span_id: int) -> None:
        """Note that a node of a trace ran in it."""
        if not self.members:
            self.span = trace_id, getrandbits(64) or 1
        self.members.append((trace_id, span_id))

    def is_of(self, trace_id: int, span_id: int) -> bool:
        """Tell whether a node's trace has the batch."""
        return self.members[0] == (trace_id, span_id)


class Recorder(Protocol):
    """Takes what happens to one request."""

    def stamp(self, name: str) -> None:
        """Record that something happens to the request now."""

    def begin(self, inputs: Mapping[str, Any]) -> None:
        """Record that the graph begins with the request."""

    def answer(self, outputs: Mapping[str, Any]) -> None:
        """Record one of several answers."""

    def end(self, outputs: Mapping[str, Any] | None) -> None:
        """Record that the graph is done with the request; None for an error, or for answers that were recorded already."""

    def node(self, name: str, stamps: Iterable[tuple[str, int]], batch: Batch | None = None, error: str | None = None) -> None:
        """Record what happened in a node, and when, at `NODE_STAMPS`."""

    def values(self, activity: str, tensors: Mapping[str, Any]) -> None:
        """Record tensors."""

    def headers(self, node: str) -> dict[str, str]:
        """Return what tells another service that a node calls of the trace."""
        ...

    def failed(self, code: str, text: str, node: str | None) -> None:
        """Record that the request gets an error."""

    def finish(self, request_id: str, ending: str) -> None:
        """Record what happens last, and hand the trace over; nothing more may be recorded."""


class Both:
    """Records a request twice."""

    __slots__ = ("_recorders",)

    def __init__(self, *recorders: Recorder) -> None:
        self._recorders = recorders

    def stamp(self, name: str) -> None:
        for recorder in self._recorders:
            recorder.stamp(name)

    def begin(self, inputs: Mapping[str, Any]) -> None:
        for recorder in self._recorders:
            recorder.begin(inputs)

    def answer(self, outputs: Mapping[str, Any]) -> None:
        for recorder in self._recorders:
            recorder.answer(outputs)

    def end(self, outputs: Mapping[str, Any] | None) -> None:
        for recorder in self._recorders:
            recorder.end(outputs)

    def node(self, name: str, stamps: Iterable[tuple[str, int]], batch: Batch | None = None, error: str | None = None) -> None:
        stamps = list(stamps)
        for recorder in self._recorders:
            recorder.node(name, stamps, batch, error)

    def values(self, activity: str, tensors: Mapping[str, Any]) -> None:
        for recorder in self._recorders:
            recorder.values(activity, tensors)

    def headers(self, node: str) -> dict[str, str]:
        return {name: value for recorder in self._recorders for name, value in recorder.headers(node).items()}

    def failed(self, code: str, text: str, node: str | None) -> None:
        for recorder in self._recorders:
            recorder.failed(code, text, node)

    def finish(self, request_id: str, ending: str) -> None:
        for recorder in self._recorders:
            recorder.finish(request_id, ending)


class Trace:
    """What happened to one request, as Triton writes it.

    Args:
        model: the graph.
        version: its version.
        new_number: gives numbers to identify the trace and those of its nodes by.
        timestamps: whether moments are recorded.
        tensors: whether tensors are recorded.
        collect: takes the finished trace as Triton writes it: an object for who it is about, and
            one for each thing recorded.
    """

    __slots__ = ("_collect", "_entries", "_model", "_new_number", "_nodes", "_number", "_stamps", "_tensors", "_version")

    def __init__(
        self,
        model: str,
        version: str,
        new_number: Callable[[], int],
        collect: Callable[[list[dict[str, Any]]], None],
        *,
        timestamps: bool,
        tensors: bool,
    ) -> None:
        self._model = model
        self._version = int(version)
        self._number = new_number()
        self._new_number = new_number
        self._collect = collect
        self._stamps: list[tuple[str, int]] | None = [] if timestamps else None
        self._tensors = tensors
        self._entries: list[dict[str, Any]] = []
        self._nodes = 0

    def stamp(self, name: str) -> None:
        """Record that something happens to the request now."""
        if self._stamps is not None:
            self._stamps.append((name, perf_counter_ns()))

    def begin(self, inputs: Mapping[str, Any]) -> None:
        """Record that the graph begins with the request."""
        self.stamp("REQUEST_START")
        self.values("TENSOR_QUEUE_INPUT", inputs)

    def answer(self, outputs: Mapping[str, Any]) -> None:
        """Record one of several answers."""
        self.stamp("INFER_RESPONSE_COMPLETE")
        self.values("TENSOR_BACKEND_OUTPUT", outputs)

    def end(self, outputs: Mapping[str, Any] | None) -> None:
        """Record that the graph is done with the request; None for an error, or for answers that were recorded already."""
        if outputs is not None:
            self.answer(outputs)
        self.stamp("REQUEST_END")

    def node(self, name: str, stamps: Iterable[tuple[str, int]], batch: Batch | None = None, error: str | None = None) -> None:
        """Record what happened in a node, and when; nothing of one that failed, as in Triton."""
        if error is not None or self._nodes >= _MOST_NODES or self._stamps is None:
            return
        self._nodes += 1
        number = self._new_number()
        # A batcher of whole requests bears the graph's name.
        model = name if name == self._model else f"{self._model}.{name}"
        entry = {"id": number, "model_name": model, "model_version": self._version, "parent_id": self._number}
        self._entries.append(entry)
        self._entries.append({"id": number, "timestamps": _timestamps(stamps)})

    def values(self, activity: str, tensors: Mapping[str, Any]) -> None:
        """Record tensors, each with no more than its first elements; free-form bodies are left out."""
        if not self._tensors or not isinstance(tensors, Mapping):
            return
        for name, tensor in tensors.items():
            array = np.asarray(tensor)
            shown = ",".join(_shown(item) for item in array.reshape(-1)[:_MOST_ELEMENTS].tolist())
            shape = ",".join(map(str, array.shape))
            entry = {"name": name, "data": shown, "shape": shape, "dtype": str(array.dtype)}
            self._entries.append({"id": self._number, "activity": activity, "tensor": entry})

    def headers(self, node: str) -> dict[str, str]:
        """Return nothing: these traces end at the server."""
        return {}

    def failed(self, code: str, text: str, node: str | None) -> None:
        """Record nothing: an error has no place in this form."""

    def finish(self, request_id: str, ending: str) -> None:
        """Record what happens last, and hand the trace over; nothing more may be recorded."""
        self.stamp(ending)
        about: dict[str, Any] = {"id": self._number, "model_name": self._model, "model_version": self._version}
        if request_id:
            about["request_id"] = request_id
        stamps = [] if self._stamps is None else [{"id": self._number, "timestamps": _timestamps(self._stamps)}]
        self._collect([about, *stamps, *self._entries])


def trace_alone(trace: Recorder, node: str, began: int, ended: int) -> None:
    """Record a node that ran for this request alone: it did not queue, and nothing was joined or split."""
    trace.node(node, zip(NODE_STAMPS, (began, began, began, began, ended, ended, ended), strict=True))


def trace_failure(trace: Recorder, node: str, began: int, error: BaseException) -> None:
    """Record a node that has failed now; 0 for one that had not begun."""
    now = perf_counter_ns()
    began = began or now
    text = f"{type(error).__name__}: {error}"
    trace.node(node, zip(NODE_STAMPS, (began, began, began, began, now, now, now), strict=True), None, text)


def trace_headers(context: Context, node: str) -> dict[str, str]:
    """Return the headers that make another service's part of a request one trace with this one; none where it is not traced.

    They go before headers of the same names that the request came with, which name its caller.

    Args:
        context: the request's.
        node: the node that calls.
    """
    return {} if context.trace is None else context.trace.headers(node)


def _timestamps(stamps: Iterable[tuple[str, int]]) -> list[dict[str, Any]]:
    return [{"name": name, "ns": moment} for name, moment in stamps]


def _shown(item: Any) -> str:
    return item.decode("utf-8", "replace") if isinstance(item, bytes) else str(item)
