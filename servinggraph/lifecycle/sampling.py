"""Which requests OpenTelemetry sees: those that their caller records, and a share of those that come without a trace."""

from __future__ import annotations

from collections.abc import Callable
from random import random
from typing import Protocol

from servinggraph.context import Context
from servinggraph.lifecycle.catalog import ServedGraph
from servinggraph.spans import Span, SpanTrace, parse_traceparent
from servinggraph.tracing import Both

__all__ = ["BothPickers", "Header", "Picker", "Sampler"]

Header = str | bytes | None


class Picker(Protocol):
    """Gives a trace to the requests that are to have one."""

    def pick(self, graph: ServedGraph, context: Context, beginning: str, parent: Header = None, state: Header = None) -> None:
        """Give a request's context a trace if it is to have one, with `beginning` as what happens first.

        Whoever asks for it calls the trace's `finish` when the request is answered.

        Args:
            graph: the graph.
            context: the request's.
            beginning: what happens first.
            parent: the request's `traceparent`.
            state: its `tracestate`.
        """
        ...


class Sampler:
    """Picks requests by their caller's word, else by chance.

    Args:
        share: of the requests without a trace of their caller, 0 to 1.
        collect: takes the spans of a finished request.
    """

    def __init__(self, share: float, collect: Callable[[list[Span]], None]) -> None:
        self._share = share
        self._collect = collect

    def pick(self, graph: ServedGraph, context: Context, beginning: str, parent: Header = None, state: Header = None) -> None:
        caller = parse_traceparent(parent) if parent else None
        if not (caller.sampled if caller is not None else random() < self._share):  # noqa: S311  (hides nothing)
            return
        plan = graph.plan
        text = state.decode("latin-1") if isinstance(state, bytes) else state or ""
        trace = SpanTrace(plan.name, plan.version, self._collect, caller, text if caller is not None else "")
        trace.stamp(beginning)
        context.trace = trace if context.trace is None else Both(context.trace, trace)


class BothPickers:
    """Asks two pickers."""

    def __init__(self, one: Picker, other: Picker) -> None:
        self._pickers = one, other

    def pick(self, graph: ServedGraph, context: Context, beginning: str, parent: Header = None, state: Header = None) -> None:
        for picker in self._pickers:
            picker.pick(graph, context, beginning, parent, state)
