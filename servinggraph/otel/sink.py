"""From our spans to the SDK's, and on to a processor that exports them in a thread of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from opentelemetry.sdk.resources import SERVICE_VERSION, Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Link, SpanContext, SpanKind, Status, StatusCode, TraceFlags, TraceState

from servinggraph.spans import Span

__all__ = ["SpanSink", "otlp_sink"]

_KINDS: Final = {
    "server": SpanKind.SERVER, "consumer": SpanKind.CONSUMER, "client": SpanKind.CLIENT, "internal": SpanKind.INTERNAL,
}  # fmt: skip
_SAMPLED: Final = TraceFlags(TraceFlags.SAMPLED)


class SpanSink:
    """Takes the spans of finished requests.

    Args:
        processor: exports them; its queue is bounded, and drops what does not fit.
        version: the release, for the spans' resource. `OTEL_SERVICE_NAME` and `OTEL_RESOURCE_ATTRIBUTES` say the rest.
    """

    def __init__(self, processor: SpanProcessor, version: str) -> None:
        self._processor = processor
        named = Resource.create({SERVICE_VERSION: version})
        # The SDK's own default is `unknown_service:python`.
        unnamed = str(named.attributes["service.name"]).startswith("unknown_service")
        self._resource = named.merge(Resource({"service.name": "servinggraph"})) if unnamed else named
        self._scope = InstrumentationScope("servinggraph", version)

    def add(self, spans: Sequence[Span]) -> None:
        """Take the spans of one request."""
        for span in spans:
            self._processor.on_end(self._readable(span))

    def close(self) -> None:
        """Export what waits; blocks."""
        self._processor.shutdown()

    def _readable(self, span: Span) -> ReadableSpan:
        state = TraceState.from_header([span.state]) if span.state else None
        parent = None
        if span.parent_id:
            parent = SpanContext(
                span.trace_id, span.parent_id, is_remote=span.kind in ("server", "consumer"), trace_flags=_SAMPLED
            )
        return ReadableSpan(
            span.name,
            SpanContext(span.trace_id, span.span_id, is_remote=False, trace_flags=_SAMPLED, trace_state=state),
            parent,
            self._resource,
            span.attributes,
            links=[Link(SpanContext(*link, is_remote=False, trace_flags=_SAMPLED)) for link in span.links],
            kind=_KINDS[span.kind],
            status=Status() if span.error is None else Status(StatusCode.ERROR, span.error),
            start_time=span.began,
            end_time=span.ended,
            instrumentation_scope=self._scope,
        )


def otlp_sink(endpoint: str, version: str) -> SpanSink:
    """Return a sink that sends spans to a collector, OTLP over HTTP with protobuf.

    Args:
        endpoint: the collector's, `http://host:4318` say; empty for what the environment says, else port 4318 of this machine.
        version: the release.
    """
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    exporter = OTLPSpanExporter(endpoint=f"{endpoint.rstrip('/')}/v1/traces" if endpoint else None)
    return SpanSink(BatchSpanProcessor(exporter), version)
