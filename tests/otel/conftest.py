"""Spans in memory instead of at a collector."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from servinggraph.otel import SpanSink


class Spans:
    """What servers have traced."""

    def __init__(self) -> None:
        self.exporter = InMemorySpanExporter()

    def sink(self, options: Any) -> SpanSink | None:
        if options.otel == "off":
            return None
        sink = SpanSink(SimpleSpanProcessor(self.exporter), "1.2.3")
        sink.close = lambda: None  # type: ignore[method-assign]  # several servers share the exporter
        return sink

    @property
    def all(self) -> list[Any]:
        return list(self.exporter.get_finished_spans())

    def named(self, name: str) -> Any:
        (found,) = [span for span in self.all if span.name == name]
        return found

    @property
    def tree(self) -> dict[str, str]:
        """Span name to that of its parent; empty for what has none here."""
        names = {span.context.span_id: span.name for span in self.all}
        return {span.name: names.get(span.parent.span_id, "elsewhere") if span.parent else "" for span in self.all}


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> Iterator[Spans]:
    """Have servers with `otel="on"` give their spans to this test."""
    collected = Spans()
    monkeypatch.setattr("servinggraph.lifecycle.serving.span_sink", collected.sink)
    return collected
