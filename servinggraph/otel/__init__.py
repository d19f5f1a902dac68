"""Hands finished spans to OpenTelemetry. The only folder that knows its SDK; the extra `otel` brings it."""

from servinggraph.otel.sink import SpanSink, otlp_sink

__all__ = ["SpanSink", "otlp_sink"]
