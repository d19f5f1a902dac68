"""Which requests are traced, as Triton's trace extension has it, changeable while the server runs.

A graph of which no request is to be traced has no `tracer`: that is all that a request looks
at. Source: Triton, extension_trace.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any, Final

from servinggraph.context import Context
from servinggraph.errors import InvalidRequest, Unsupported, nearest
from servinggraph.lifecycle.catalog import Catalog, ServedGraph
from servinggraph.lifecycle.sampling import BothPickers, Header, Picker
from servinggraph.lifecycle.traces import TraceSink
from servinggraph.tracing import Trace

__all__ = ["Tracer", "Tracing"]

Setting = str | list[str]

_START: Final[Mapping[str, Setting]] = {
    "trace_level": ["OFF"],
    "trace_rate": "1000",
    "trace_count": "-1",
    "log_frequency": "0",
}
_LEVELS: Final = ("OFF", "TIMESTAMPS", "TENSORS")
_FIXED: Final = ("trace_file", "trace_mode")
_LOWEST: Final = {"trace_rate": 1, "trace_count": -1, "log_frequency": 0}
_MODE: Final = "triton"


class Tracer:
    """Picks requests to trace by one group of settings.

    Args:
        settings: the group's settings.
        numbers: gives numbers to traces.
        collect: takes a finished trace, and how many go into one file.
        exhausted: called when `trace_count` requests were picked.
    """

    def __init__(
        self,
        settings: Mapping[str, Setting],
        numbers: Callable[[], int],
        collect: Callable[[list[dict[str, Any]], int], None],
        exhausted: Callable[[], None],
    ) -> None:
        levels = settings["trace_level"]
        self._timestamps, self._tensors = "TIMESTAMPS" in levels, "TENSORS" in levels
        self._rate = int(str(settings["trace_rate"]))
        self.left = int(str(settings["trace_count"]))
        self._frequency = int(str(settings["log_frequency"]))
        self._numbers = numbers
        self._collect = collect
        self._exhausted = exhausted
        self._seen = 0

    @property
    def active(self) -> bool:
        """True when it may pick a request."""
        return (self._timestamps or self._tensors) and self.left != 0

    def pick(self, graph: ServedGraph, context: Context, beginning: str, parent: Header = None, state: Header = None) -> None:
        """Give a request's context a trace if it is this request's turn; see `Picker`."""
        self._seen += 1
        if self._seen < self._rate or not self.active:
            return
        self._seen = 0
        if self.left > 0:
            self.left -= 1
            if self.left == 0:
                self._exhausted()
        plan = graph.plan
        context.trace = Trace(
            plan.name, plan.version, self._numbers, self._finished, timestamps=self._timestamps, tensors=self._tensors
        )
        context.trace.stamp(beginning)

    def _finished(self, trace: list[dict[str, Any]]) -> None:
        self._collect(trace, self._frequency)


class Tracing:
    """Trace settings of all graphs together, and of those that have their own.

    Args:
        catalog: the graphs.
        sink: where traces go.
        sampler: picks requests for OpenTelemetry; None where that is off.
    """

    def __init__(self, catalog: Catalog, sink: TraceSink, sampler: Picker | None = None) -> None:
        self._catalog = catalog
        self._sampler = sampler
        self._sink = sink
        self._everywhere: dict[str, Setting] = dict(_START)
        self._own: dict[str, dict[str, Setting]] = {}
        self._numbers = itertools.count(1)
        self._tracer = self._new_tracer("")
        self._tracers: dict[str, Tracer] = {}
        catalog.on_change(self._refresh)

    def settings(self, graph: str = "") -> dict[str, Setting]:
        """Return the settings that hold for a graph, or for those without their own; all as text, as in Triton.

        Raises:
            InvalidRequest: no such graph.
        """
        self._check(graph)
        settings = self._merged(graph)
        tracer = self._tracers.get(graph, self._tracer)
        return settings | {"trace_count": str(tracer.left), "trace_file": self._sink.path, "trace_mode": _MODE}

    def update(self, changes: Mapping[str, Any], graph: str = "") -> dict[str, Setting]:
        """Change settings, all or none, and return those that hold then.

        Args:
            changes: setting to text or list of texts; None takes a graph's own setting back, or
                returns to how the server started.
            graph: the graph whose settings change; empty for those of all.

        Raises:
            InvalidRequest: no such graph or setting, or a value that is none.
            Unsupported: a setting that only the start of the server can make.
        """
        self._check(graph)
        parsed = {key: _parsed(key, value) for key, value in changes.items()}
        for key in _FIXED:
            if parsed.pop(key, None) is not None:
                text = "trace file location" if key == "trace_file" else "trace mode"
                raise Unsupported(f"{text} can not be updated through network protocol; it is set when the server starts")
        target = self._own.setdefault(graph, {}) if graph else self._everywhere
        if "trace_count" in target:  # what was counted already stays counted
            target["trace_count"] = str(self._tracers.get(graph, self._tracer).left)
        for key, value in parsed.items():
            if value is not None:
                target[key] = value
            elif graph:
                target.pop(key, None)
            else:
                target[key] = _START[key]
        if graph and not target:
            del self._own[graph]
        if parsed:
            # Counting begins anew for whoever the change concerns.
            if not graph:
                self._tracer = self._new_tracer("")
            self._tracers = {name: self._new_tracer(name) if graph in ("", name) else self._tracers[name] for name in self._own}
            self._refresh()
        return self.settings(graph)

    async def flush(self) -> None:
        """Return once all finished traces are written."""
        await self._sink.flush()

    def _merged(self, graph: str) -> dict[str, Setting]:
        return {**self._everywhere, **self._own.get(graph, {})}

    def _new_tracer(self, graph: str) -> Tracer:
        return Tracer(self._merged(graph), self._numbers.__next__, self._sink.add, self._refresh)

    def _refresh(self) -> None:
        """Give each graph its tracer, or none."""
        for graph in self._catalog.graphs():
            tracer = self._tracers.get(graph.plan.name, self._tracer)
            graph.tracer = self._sampler
            if tracer.active:
                graph.tracer = tracer if self._sampler is None else BothPickers(tracer, self._sampler)

    def _check(self, graph: str) -> None:
        if graph and all(served.plan.name != graph for served in self._catalog.graphs()):
            raise InvalidRequest(f"Request for unknown model : {graph}")


def _parsed(key: str, value: Any) -> Setting | None:
    """Return a setting as it is kept.

    Raises:
        InvalidRequest: there is no such setting, or the value is none for it.
    """
    if key not in _START and key not in _FIXED:
        raise InvalidRequest(f"unknown trace setting '{key}'{nearest(key, [*_START, *_FIXED])}")
    if value is None or value == []:
        return None
    values = value if isinstance(value, list) else [value]
    if any(type(item) is not str and type(item) is not int for item in values):
        raise InvalidRequest(f"'{key}' is text or a list of texts, got {str(value)[:60]}")
    texts = [str(item) for item in values]
    if key == "trace_level":
        return _levels(texts)
    if len(texts) > 1:
        raise InvalidRequest(f"expect 1 value for '{key}', got {len(texts)}")
    if key in _LOWEST:
        return _number(key, texts[0])
    return texts[0]


def _levels(texts: list[str]) -> list[str]:
    for text in texts:
        if text not in _LEVELS:
            raise InvalidRequest(f"unsupported trace level '{text[:40]}'{nearest(text, _LEVELS)}")
    chosen: list[str] = [level for level in _LEVELS if level in texts]
    if "OFF" in chosen and len(chosen) > 1:
        raise InvalidRequest(f"trace level OFF does not go with {' and '.join(chosen[1:])}")
    return chosen


def _number(key: str, text: str) -> str:
    digits = text.removeprefix("-")
    if not (digits.isascii() and digits.isdigit() and len(digits) < 16) or int(text) < _LOWEST[key]:
        raise InvalidRequest(f"Unable to parse '{key}', got: {text[:40]}; it is a whole number from {_LOWEST[key]} on")
    return str(int(text))
