"""The trace of one request: what happened when, to the request and in each node.

Only a request that was picked has one; `lifecycle.tracing` picks and writes them. Moments
are those of `perf_counter_ns`, which on Linux is the monotonic clock that Triton uses.
Source: Triton, docs/user_guide/trace.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from time import perf_counter_ns
from typing import Any, Final

import numpy as np

__all__ = ["NODE_STAMPS", "Trace", "trace_alone"]

NODE_STAMPS: Final = (
    "REQUEST_START", "QUEUE_START", "COMPUTE_START", "COMPUTE_INPUT_END", "COMPUTE_OUTPUT_START", "COMPUTE_END", "REQUEST_END",
)  # fmt: skip
"""What is recorded of a node, in this order."""

_MOST_NODES: Final = 1024
"""Nodes in one trace, each run of a node counted; a request in very many pieces must not fill the memory."""

_MOST_ELEMENTS: Final = 1024
"""Elements of a tensor that are written."""


class Trace:
    """What happened to one request.

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

    def node(self, name: str, stamps: Iterable[tuple[str, int]]) -> None:
        """Record what happened in a node, and when."""
        if self._nodes >= _MOST_NODES or self._stamps is None:
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

    def finish(self, request_id: str, ending: str) -> None:
        """Record what happens last, and hand the trace over; nothing more may be recorded."""
        self.stamp(ending)
        about: dict[str, Any] = {"id": self._number, "model_name": self._model, "model_version": self._version}
        if request_id:
            about["request_id"] = request_id
        stamps = [] if self._stamps is None else [{"id": self._number, "timestamps": _timestamps(self._stamps)}]
        self._collect([about, *stamps, *self._entries])


def trace_alone(trace: Trace, node: str, began: int, ended: int) -> None:
    """Record a node that ran for this request alone: it did not queue, and nothing was joined or split."""
    trace.node(node, zip(NODE_STAMPS, (began, began, began, began, ended, ended, ended), strict=True))


def _timestamps(stamps: Iterable[tuple[str, int]]) -> list[dict[str, Any]]:
    return [{"name": name, "ns": moment} for name, moment in stamps]


def _shown(item: Any) -> str:
    return item.decode("utf-8", "replace") if isinstance(item, bytes) else str(item)
