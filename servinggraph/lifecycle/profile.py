"""A request's own time line, for one that asks for it: `parameters: {"profile": true}`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from time import perf_counter_ns
from typing import Any, Final

import orjson

from servinggraph.context import Context
from servinggraph.tracing import Batch, Both

__all__ = ["PROFILE", "Profile", "wants_profile"]

PROFILE: Final = "profile"
_MOST_NODES: Final = 256


class Profile:
    """Records what a request's nodes do; see `tracing.Recorder`.

    Args:
        context: the request's, which is recorded from now on.
    """

    def __init__(self, context: Context) -> None:
        self._began = context.arrived or perf_counter_ns()
        self._run_began = perf_counter_ns()
        self._nodes: list[dict[str, Any]] = []
        context.trace = self if context.trace is None else Both(context.trace, self)

    def node(self, name: str, stamps: Iterable[tuple[str, int]], batch: Batch | None = None, error: str | None = None) -> None:
        """Record what happened in a node, and when."""
        if len(self._nodes) >= _MOST_NODES:
            return
        moments = dict(stamps)
        entry = {"node": name, "at_us": self._us(moments["REQUEST_START"])}
        if batch is not None:
            entry["queue_us"] = (moments["COMPUTE_START"] - moments["QUEUE_START"]) // 1000
            entry["batch_rows"], entry["batch_requests"] = batch.rows, batch.requests
        entry["compute_us"] = (moments["COMPUTE_END"] - moments["COMPUTE_START"]) // 1000
        self._nodes.append(entry if error is None else entry | {"error": error})

    def text(self) -> str:
        """Return the time line until now as JSON: microseconds, `at_us` from when the request was there."""
        line = {"decode_us": self._us(self._run_began), "run_us": (perf_counter_ns() - self._run_began) // 1000}
        nodes = sorted(self._nodes, key=lambda entry: int(entry["at_us"]))
        return orjson.dumps(line | {"nodes": nodes}).decode()

    def _us(self, moment: int) -> int:
        return max(0, moment - self._began) // 1000

    def stamp(self, name: str) -> None:
        """Record nothing."""

    def begin(self, inputs: Mapping[str, Any]) -> None:
        """Record nothing."""

    def answer(self, outputs: Mapping[str, Any]) -> None:
        """Record nothing."""

    def end(self, outputs: Mapping[str, Any] | None) -> None:
        """Record nothing."""

    def values(self, activity: str, tensors: Mapping[str, Any]) -> None:
        """Record nothing."""

    def headers(self, node: str) -> dict[str, str]:
        """Return nothing."""
        return {}

    def failed(self, code: str, text: str, node: str | None) -> None:
        """Record nothing: who gets an error gets no time line."""

    def finish(self, request_id: str, ending: str) -> None:
        """Record nothing."""


def wants_profile(context: Context) -> bool:
    """Tell whether a request asks for its time line."""
    return context.parameters.get(PROFILE) is True
