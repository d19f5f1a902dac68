"""The `v2` step: a model on another server that speaks the V2 inference protocol."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, Literal, Self

from pydantic import Field, SecretStr, field_validator, model_validator

from servinggraph.context import Context, ParameterValue
from servinggraph.errors import GraphInvalid, InvalidRequest, Problem, StepFailed
from servinggraph.interfaces import BatchPolicy, Operation, Options, Step
from servinggraph.spec import TensorModel
from servinggraph.steps.remote.balancing import Ejection
from servinggraph.steps.remote.calls import Call, Transport, close_on
from servinggraph.steps.remote.endpoints import Endpoint, endpoint_of
from servinggraph.steps.remote.failures import CallFailed
from servinggraph.steps.remote.fleet import Fleet
from servinggraph.steps.remote.headers import Secrets, check_metadata, check_passed, forwarded, plain_headers
from servinggraph.steps.remote.metadata import Mismatch, NoMetadata, compare, fetch_metadata
from servinggraph.steps.remote.tls import roots_of
from servinggraph.tensors import Signature, TensorSpec
from servinggraph.tracing import trace_headers

__all__ = ["V2", "V2Options"]

logger = logging.getLogger("servinggraph.steps")

_RESERVED: Final = frozenset(
    {"sequence_id", "sequence_start", "sequence_end", "priority", "timeout", "headers", "binary_data_output"}
)


class V2Options(Options):
    """A model on another server, over HTTP or gRPC."""

    url: str | list[str] = Field(
        description="Where it is: http://host:port, https://, grpc:// or grpcs://; a list where several servers do the same."
    )
    model: str = Field(min_length=1, description="Name of the model there.")
    version: str | int | None = Field(None, description="Its version; by default the server's choice.")
    inputs: dict[str, TensorModel] | None = Field(
        None, description="Tensors that the model takes, for the compiler to check; others are not sent. By default all are."
    )
    headers: dict[str, SecretStr] = Field(
        default_factory=dict, description="Headers (gRPC: metadata) of each request, `Authorization: Bearer ${TOKEN}` say."
    )
    pass_headers: list[str] = Field(
        default_factory=list,
        description="Headers of the caller that go along, beside traceparent, tracestate and x-request-id; not from a batch.",
    )
    pass_parameters: list[str] = Field(
        default_factory=list,
        description="V2 parameters of the caller that go along, except the protocol's own (`sequence_id`, `priority`); "
        "not from a batch.",
    )
    metadata: Literal["compare", "require", "ignore"] = Field(
        "compare",
        description="At load, hold the model's own metadata against the tensors declared here: compare lets a server that "
        "is down pass, require does not.",
    )
    metadata_timeout_ms: float = Field(2000, gt=0, description="How long a server has to give its metadata.")
    idempotent: bool = Field(
        False,
        description="Whether a request may run twice. By default the next address is tried only where the one before cannot "
        "have seen the request; with true also after a lost connection, an unreadable answer or a 503. A batch is run again "
        "member by member after a refusal (400, 413); with true also after an error over there.",
    )
    ejection: Ejection = Field(default_factory=Ejection, description="When one of several addresses is left alone.")
    connections: int = Field(64, ge=1, description="Most HTTP connections to an address; more calls wait for one.")
    connect_timeout_ms: float = Field(1000, gt=0, description="Longest time to make an HTTP connection.")
    max_response_bytes: int = Field(64 * 2**20, ge=1, description="Largest answer.")
    tls_ca: str | None = Field(None, description="File with the root certificates (PEM) to trust; by default the system's.")

    @field_validator("url")
    @classmethod
    def _addresses(cls, url: str | list[str]) -> str | list[str]:
        urls = [url] if isinstance(url, str) else url
        if not urls:
            raise ValueError("is empty: give one address at least")
        if len({endpoint_of(one) for one in urls}) < len(urls):
            raise ValueError("names an address twice")
        return url

    @field_validator("pass_parameters")
    @classmethod
    def _not_the_protocols(cls, names: list[str]) -> list[str]:
        taken = [name for name in names if name in _RESERVED or name.startswith("triton_")]
        if taken:
            raise ValueError(f"'{taken[0]}' is the protocol's own, and says something about this server's request alone")
        return names

    @field_validator("headers")
    @classmethod
    def _sendable(cls, headers: dict[str, SecretStr]) -> dict[str, SecretStr]:
        plain_headers(headers)
        return headers

    @field_validator("pass_headers")
    @classmethod
    def _passable(cls, names: list[str]) -> list[str]:
        check_passed(names)
        return names

    @model_validator(mode="after")
    def _metadata(self) -> Self:
        if any(url.startswith("grpc") for url in ([self.url] if isinstance(self.url, str) else self.url)):
            check_metadata([*self.headers, *self.pass_headers])
        return self


class V2(Step[V2Options]):
    """Sends tensors to a model on another server, and gives what it answers.

    The request's id, the time that it has left, and its trace headers go along; when its caller leaves, the call over
    there is cancelled, too. Other names for tensors are `rename`'s; declared `outputs` are the ones that are asked for.
    `servinggraph check` and the compiler need no server.
    """

    options_type = V2Options
    gives_row_errors = False
    counts = False

    def prepare(self) -> Signature:
        urls = [self.options.url] if isinstance(self.options.url, str) else self.options.url
        self._endpoints = [endpoint_of(url) for url in urls]
        self._version = "" if self.options.version is None else str(self.options.version)
        self._ca = roots_of(self.base, self.options.tls_ca)
        self._headers = plain_headers(self.options.headers)
        self._hide = Secrets(self._headers.values()).hide
        if any(endpoint.path for endpoint in self._endpoints):  # some gateways take a key there
            self._endpoints = [replace(endpoint, shown=self.conceal(endpoint.url)) for endpoint in self._endpoints]
            headers = self._hide
            self._hide = lambda text: self.conceal(headers(text))
        self._passed = tuple(name.lower() for name in self.options.pass_headers)
        self._fleet: Fleet | None = None
        try:
            import aiohttp  # noqa: F401  (here to be missed before the first request)
            import tritonclient.grpc.aio
            import tritonclient.http.aio  # noqa: F401
        except (ImportError, RuntimeError) as error:
            text = f"needs packages that are not installed ({error}): pip install 'servinggraph[remote]'"
            raise GraphInvalid([Problem(text, node="step")]) from error
        declared = self.options.inputs
        self._inputs = None if declared is None else {name: model.spec() for name, model in declared.items()}
        return Signature(self._inputs, self.declared_outputs)

    def load(self, batch: BatchPolicy | bool | None) -> BatchPolicy | None:
        if self.options.metadata != "ignore":
            for endpoint in self._endpoints:
                self._compare(endpoint)
        return super().load(batch)

    def _compare(self, endpoint: Endpoint) -> None:
        """Hold a server's word on the model against the definition's.

        Raises:
            StepFailed: they differ, or nothing is heard and has to be.
        """
        seconds = self.options.metadata_timeout_ms / 1e3
        model = f"model '{self.options.model}'" + (f" version {self._version}" if self._version else "")
        try:
            found = fetch_metadata(endpoint, self.options.model, self._version, self._headers, seconds, self._ca)
            compare(found, self._inputs or {}, self.declared_outputs or {})
        except (Mismatch, NoMetadata) as error:
            # Some servers quote what they were sent: the error itself must not be in a log.
            reason = self._hide(" ".join(str(error).split()))
            if isinstance(error, Mismatch):
                raise StepFailed(f"{model} at {endpoint} is not what is declared: {reason}") from None
            if self.options.metadata == "require":
                raise StepFailed(f"{endpoint} says nothing about {model} ('metadata: require'): {reason}") from None
            logger.warning("node '%s': %s says nothing about %s for now: %s", self.name, endpoint, model, reason)

    def admit(self, value: Any) -> Any:
        """Pick the tensors that are sent."""
        return self._chosen(value)

    def files(self) -> Iterable[Path]:
        # One named by an absolute path is the machine's.
        ca = self.options.tls_ca
        return [] if ca is None or Path(ca).is_absolute() else [self.base / ca]

    def operation(self) -> Operation:
        self._loop = asyncio.get_running_loop()
        options = self.options
        transports = {endpoint: self._transport(endpoint) for endpoint in self._endpoints}
        fleet = self._fleet = Fleet(self.name, transports, options.ejection, self._hide, idempotent=options.idempotent)
        outputs = tuple(self.declared_outputs or ())

        async def infer(value: Any, context: Context) -> Any:
            tensors = self._chosen(value)
            headers = forwarded(context.headers, self._passed) | trace_headers(context, self.name)
            call = Call(tensors, outputs, context.id, None, headers, self._parameters(context.parameters))
            try:
                return await fleet.infer(call, context.deadline)
            except CallFailed as failure:
                if options.idempotent and isinstance(failure.error, StepFailed):
                    failure.error.of_batch = False
                raise failure.error from failure.__cause__

        return Operation(infer, suspends=True)

    def _transport(self, endpoint: Endpoint) -> Transport:
        options = self.options
        if endpoint.protocol == "grpc":
            from servinggraph.steps.remote.v2_grpc import GrpcTransport

            return GrpcTransport(
                endpoint,
                options.model,
                self._version,
                self._headers,
                max_bytes=options.max_response_bytes,
                probe_timeout_s=options.ejection.probe_timeout_ms / 1e3,
                tls_ca=self._ca,
            )
        from servinggraph.steps.remote.http import HttpClient
        from servinggraph.steps.remote.v2_http import HttpTransport

        client = HttpClient(options.connections, options.connect_timeout_ms / 1e3, options.max_response_bytes, self._ca)
        return HttpTransport(endpoint, options.model, self._version, client, self._headers)

    def unload(self) -> None:
        fleet, self._fleet = getattr(self, "_fleet", None), None
        if fleet is not None:
            close_on(self._loop, fleet.close())

    def describe(self) -> str:
        return f"v2 {self.options.model} at {', '.join(map(str, self._endpoints))}"

    def _chosen(self, value: Any) -> Mapping[str, Any]:
        if not isinstance(value, Mapping):
            raise InvalidRequest(f"sends tensors: it takes a mapping of tensor name to array, got {type(value).__name__}")
        if self._inputs is None:
            return value
        return {name: value[name] for name, spec in self._inputs.items() if self._is_there(name, spec, value)}

    @staticmethod
    def _is_there(name: str, spec: TensorSpec, value: Mapping[str, Any]) -> bool:
        if name in value:
            return True
        if spec.optional:
            return False
        raise InvalidRequest(f"takes tensor '{name}', but got {sorted(value)}")

    def _parameters(self, given: Mapping[str, ParameterValue]) -> dict[str, ParameterValue]:
        return {name: given[name] for name in self.options.pass_parameters if name in given}
