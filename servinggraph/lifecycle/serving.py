"""What every front end is given: the graphs, the slots, and what they share besides."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from servinggraph.errors import ServingGraphError
from servinggraph.interfaces import FrontEndOptions, Receipt
from servinggraph.lifecycle.access import AccessLog
from servinggraph.lifecycle.admission import Admission
from servinggraph.lifecycle.audit import AuditLog
from servinggraph.lifecycle.catalog import Catalog
from servinggraph.lifecycle.control import Control
from servinggraph.lifecycle.failures import FailureLog
from servinggraph.lifecycle.feedback import give_feedback, read_feedback
from servinggraph.lifecycle.logs import LogSettings
from servinggraph.lifecycle.metrics import Ledger, read_metrics
from servinggraph.lifecycle.repository import Repository, RepositorySettings
from servinggraph.lifecycle.sampling import Sampler
from servinggraph.lifecycle.shared_memory import SharedMemory
from servinggraph.lifecycle.traces import TraceSink
from servinggraph.lifecycle.tracing import Tracing
from servinggraph.metrics import Readings

if TYPE_CHECKING:
    from servinggraph.otel import SpanSink

__all__ = ["Serving"]


class Serving:
    """One server's state, shared by its front ends. Made on the running event loop.

    Attributes:
        options: limits and names.
        control: the graphs' routers, to be read and changed.
        ledger: what is counted for metrics and the access log; None where both are off.
        access: the access log; None without one.
        kafka: what the Kafka front end reports of each graph's topics; None where nothing is read.
        catalog: the graphs.
        admission: slots for requests in flight.
        failures: where failures of graphs are logged.
        memory: shared memory regions of clients.
        tracing: which requests are traced.
        spans: where spans for OpenTelemetry go; None where that is off.
        logs: what is logged.
        repository: loads graphs into the catalog and out of it.

    Args:
        options: limits and names.
        repository: how the repository is kept; by default there is none to load from.
        spans: where spans go; by default where the options say.
    """

    def __init__(
        self,
        options: FrontEndOptions | None = None,
        repository: RepositorySettings | None = None,
        spans: SpanSink | None = None,
    ) -> None:
        self.options = options or FrontEndOptions()
        self.control = Control(AuditLog(Path(self.options.audit_log) if self.options.audit_log else None))
        self.access = access_log(self.options)
        measured = self.options.metrics == "on" or self.access is not None
        self.ledger = Ledger(triton=self.options.metrics_compat == "triton", access=self.access) if measured else None
        self.kafka: Callable[[], Sequence[Mapping[str, Any]]] | None = None
        self.catalog = Catalog(self.control, self.ledger)
        self.admission = Admission(self.options.max_in_flight)
        self.memory = SharedMemory(allowed=self.options.allow_client_shm, limit=self.options.max_shm_regions)
        self.failures = FailureLog(asyncio.get_running_loop().time)
        self.repository = Repository(self.catalog, repository)
        self.spans = span_sink(self.options) if spans is None else spans
        sampler = None if self.spans is None else Sampler(self.options.otel_sample, self.spans.add)
        self.tracing = Tracing(self.catalog, TraceSink(self.options.trace_file), sampler)
        self.logs = LogSettings()

    def feedback(self, graph: str, document: Mapping[str, Any], version: str = "") -> dict[str, Receipt]:
        """Tell a graph what became of an earlier answer.

        Args:
            graph: its name.
            document: `id` of the request or `variant` that answered; `reward` or `truth`; where needed `metric`, `node`.
            version: its version; the newest by default.

        Returns:
            What became of it, by router.

        Raises:
            InvalidRequest: no such feedback, or no router that could use it.
            RequestNotFound: no router remembers the request.
            GraphNotFound: no such graph or router.
        """
        record = read_feedback(document)
        found = self.catalog.get(graph, version)
        return give_feedback(found.seats, record, found.plan.name)

    def metrics(self) -> Readings:
        """Return all metrics as they are now; none where they are off."""
        return Readings() if self.ledger is None else read_metrics(self, self.ledger)

    def refused(self, protocol: str, error: ServingGraphError) -> None:
        """Count a request that was refused before its graph was known, or because that graph is not served."""
        if self.ledger is not None:
            self.ledger.unknown[protocol].failed(error.code.value)

    async def close(self) -> None:
        """Write what is still to be written, and undo what settings changed in the process; the graphs have stopped."""
        if self.access is not None:
            await self.access.close()
        await self.tracing.flush()
        if self.spans is not None:
            await asyncio.to_thread(self.spans.close)
        self.logs.close()


def access_log(options: FrontEndOptions) -> AccessLog | None:
    """Return the access log; None without one.

    Raises:
        ServingGraphError: its file cannot be written.
    """
    if not options.access_log:
        return None
    try:
        return AccessLog(options.access_log, options.log_format)
    except OSError as error:
        raise ServingGraphError(f"--access-log {options.access_log}: {error.strerror}") from error


def span_sink(options: FrontEndOptions) -> SpanSink | None:
    """Return where spans go; None where they are off.

    Raises:
        ServingGraphError: the packages that they need are not installed, or the collector's address is none.
    """
    if options.otel == "off":
        return None
    if options.otel_endpoint and not re.match(r"https?://[^/]", options.otel_endpoint):
        raise ServingGraphError(f"--otel-endpoint {options.otel_endpoint}: expected http://host:4318")
    try:
        from servinggraph.otel import otlp_sink
    except ImportError as error:
        raise ServingGraphError(f"--otel on: {error}: pip install 'servinggraph[otel]'") from error
    return otlp_sink(options.otel_endpoint, options.server_version)
