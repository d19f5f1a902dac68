"""What can be set: the base of all options, policies of nodes and graphs, settings of front ends."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

__all__ = ["BatchPolicy", "CachePolicy", "FrontEndOptions", "Options", "SequencePolicy"]


class Options(BaseModel):
    """Base of all options: immutable, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, arbitrary_types_allowed=True)


class BatchPolicy(Options):
    """When requests that wait for a node become a batch. Sizes count rows, not requests."""

    max_rows: int = Field(32, ge=1, description="Most rows in one run; larger requests run in pieces.")
    max_delay_ms: float = Field(
        0,
        ge=0,
        description="How long a request that found the node busy may wait for company once the node is free; "
        "a request that finds the node idle never waits. The event loop's clock ticks in milliseconds.",
    )
    wait_when_idle: bool = Field(
        False, description="Let `max_delay_ms` hold for requests that find the node idle, too (Triton's rule)."
    )
    preferred_rows: list[int] | None = Field(
        None, description="Sizes at which a batch leaves at once; by default only `max_rows`."
    )
    pad_to: list[int] | None = Field(None, description="Pad each batch with copies of its last row to the next of these sizes.")
    instances: int = Field(1, ge=1, le=256, description="How many batches may run at the same time.")
    max_queue: int = Field(1024, ge=1, description="Most requests waiting; one more is refused with 503.")
    queue_timeout_ms: float | None = Field(None, gt=0, description="Longest wait in the queue.")
    on_timeout: Literal["reject", "continue"] = Field(
        "reject", description="A request over `queue_timeout_ms`: refused with 503, or served after all others."
    )
    priorities: int = Field(1, ge=1, le=64, description="Number of priority levels; 1 is served first.")
    default_priority: int | None = Field(None, ge=1, description="Level of requests that name none; the last.")
    isolate: bool = Field(True, description="When a batch fails, run its members one by one, so that only the bad one fails.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in ("preferred_rows", "pad_to"):
            sizes = getattr(self, name)
            if sizes is not None and (not sizes or min(sizes) < 1):
                raise ValueError(f"{name} needs at least one size, each 1 or more, got {sizes}")
        if self.preferred_rows and max(self.preferred_rows) > self.max_rows:
            raise ValueError(f"preferred_rows {self.preferred_rows} go beyond max_rows {self.max_rows}")
        if self.pad_to and max(self.pad_to) < self.max_rows:
            raise ValueError(f"pad_to {self.pad_to} must reach max_rows {self.max_rows}")
        if self.default_priority and self.default_priority > self.priorities:
            raise ValueError(f"default_priority {self.default_priority} is beyond priorities {self.priorities}")
        return self


class SequencePolicy(Options):
    """Requests of a graph that belong together, and how many of them there may be at once."""

    idle_ms: float = Field(
        1000, gt=0, description="A sequence without a request for this long is ended, and what it kept is dropped."
    )
    max: int = Field(1024, ge=1, description="Most sequences at the same time; more wait until one ends.")
    max_backlog: int = Field(
        128, ge=0, description="Most sequences that wait for another to end; the start of one more is refused with 503."
    )
    max_queue: int = Field(128, ge=1, description="Most requests of one sequence that wait; one more is refused with 503.")


class CachePolicy(Options):
    """How many answers of a pure node are kept, and for how long."""

    max_bytes: int = Field(ge=1, description="Most bytes that kept answers take; the least recently used go first.")
    ttl_s: float | None = Field(
        None, gt=0, description="How long an answer is kept, seconds; by default as long as there is room."
    )


class FrontEndOptions(Options):
    """Limits and names that all front ends share."""

    server_name: str = Field("servinggraph", description="Name in the server metadata.")
    trace_file: str = Field(
        "", description="File for traces, which the trace settings switch on; by default they go to the log."
    )
    server_version: str = Field("", description="Version in the server metadata; by default this package's.")
    invocations: str = Field(
        "", description="Graph that `POST /invocations` is for, where the header X-Graph names none; by default the only one."
    )
    max_in_flight: int = Field(1024, ge=1, description="Most requests at the same time; one more gets 503.")
    max_body_bytes: int = Field(
        64 * 2**20, ge=1, description="Largest request body in bytes, also after decompression; more gets 413."
    )
    max_connections: int = Field(4096, ge=1, description="Most open connections; one more gets 503 and is closed.")
    max_header_bytes: int = Field(65536, ge=256, description="Largest request line and headers in bytes; more gets 431.")
    stream_stall_s: float = Field(
        60, gt=0, description="Longest time that the reader of a stream may take nothing; then its connection is cut off."
    )
    access_log: str = Field(
        "", description="File to which a line is appended for each request, `-` for standard output; empty for no such lines."
    )
    log_format: Literal["text", "json"] = Field("text", description="Form of the log's lines, and of the access log's.")
    otel: Literal["on", "off"] = Field("off", description="Whether spans of requests are sent to an OpenTelemetry collector.")
    otel_endpoint: str = Field(
        "",
        description="Address of the collector (OTLP over HTTP), http://host:4318 say; by default what "
        "OTEL_EXPORTER_OTLP_ENDPOINT says, else this machine's.",
    )
    otel_sample: float = Field(
        0.01, ge=0, le=1, description="Share of the requests that are traced; those whose caller traces them always are."
    )
    metrics: Literal["on", "off"] = Field(
        "on", description="Whether requests are measured, and what comes of it is shown to Prometheus at /metrics."
    )
    metrics_compat: Literal["none", "triton"] = Field(
        "none", description="Whose names metrics have besides our own: triton's nv_inference_*."
    )
    audit_log: str = Field("", description="File to which every change of a router is appended; empty for memory alone.")
    admin: Literal["auto", "on", "off"] = Field(
        "auto", description="Whether /admin is there, to read and change routers; auto: on loopback, or with a token."
    )
    admin_token: str = Field(
        "",
        description="What /admin asks for as `Authorization: Bearer`; by default the environment's SERVINGGRAPH_ADMIN_TOKEN.",
    )
    max_tensors: int = Field(1024, ge=1, description="Most inputs, or requested outputs, of a request.")
    max_stream_requests: int = Field(
        64, ge=1, description="Most unanswered requests of one gRPC stream; more are read once one is answered."
    )
    grpc_max_calls: int = Field(
        4096, ge=1, description="Most open gRPC calls, streams included; one more is refused with RESOURCE_EXHAUSTED."
    )
    grpc_max_connection_calls: int = Field(
        1024, ge=1, description="Most open gRPC calls of one connection; its client keeps more waiting."
    )
    grpc_compression: Literal["none", "low", "medium", "high"] = Field(
        "none", description="How much gRPC answers are compressed for clients that take it; requests may always be compressed."
    )
    grpc_tls_cert: str = Field("", description="File with the gRPC server's certificate chain (PEM); turns TLS on.")
    grpc_tls_key: str = Field("", description="File with the certificate's private key (PEM).")
    grpc_tls_client_ca: str = Field(
        "", description="File with root certificates (PEM): only clients with a certificate from one of them are served."
    )
    grpc_keepalive_time_ms: int = Field(
        7_200_000, ge=1000, description="Time after which a silent gRPC connection is asked whether it still lives."
    )
    grpc_keepalive_timeout_ms: int = Field(20_000, ge=1, description="Time that a connection has to answer that.")
    grpc_keepalive_without_calls: bool = Field(False, description="Ask connections without a call, too.")
    grpc_max_pings_without_data: int = Field(
        2, ge=0, description="Most such questions while nothing is sent; 0 for any number."
    )
    grpc_min_ping_interval_ms: int = Field(300_000, ge=0, description="Shortest time between such questions of a client.")
    grpc_max_ping_strikes: int = Field(
        2, ge=0, description="How often a client may ask more often before it is disconnected; 0 for any number."
    )
    grpc_max_connection_age_ms: int = Field(0, ge=0, description="Time after which a connection is closed; 0 for never.")
    grpc_max_connection_age_grace_ms: int = Field(0, ge=0, description="Time that its calls then have to end; 0 for any.")
    allow_client_shm: bool = Field(
        False,
        description="Let clients register shared memory regions. Only for clients that are trusted with all shared memory "
        "of the server's user.",
    )
    max_shm_regions: int = Field(1024, ge=1, description="Most shared memory regions of clients; one more gets 503.")
