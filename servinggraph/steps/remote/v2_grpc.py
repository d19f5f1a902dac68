"""V2 over gRPC to one server, through Triton's asynchronous client."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from tritonclient.grpc import InferInput, InferRequestedOutput
from tritonclient.grpc.aio import InferenceServerClient
from tritonclient.utils import InferenceServerException

from servinggraph.errors import InvalidRequest, LimitExceeded
from servinggraph.steps.remote.calls import Call, plain_bytes, sendable
from servinggraph.steps.remote.endpoints import Endpoint
from servinggraph.steps.remote.failures import CallFailed, broken, garbage, late, refused, unreachable
from servinggraph.tensors import Array

__all__ = ["GrpcTransport"]

_HTTP_STATUS: Final = {
    "INVALID_ARGUMENT": 400, "FAILED_PRECONDITION": 400, "OUT_OF_RANGE": 400, "ALREADY_EXISTS": 409, "ABORTED": 409,
    "UNAUTHENTICATED": 401, "PERMISSION_DENIED": 403, "NOT_FOUND": 404, "UNIMPLEMENTED": 501,
}  # fmt: skip
"""Status of gRPC to the one of HTTP that says the same; 500 for others."""

_UNSENT: Final = ("failed to connect to all addresses", "errors resolving", "DNS resolution failed")
"""How gRPC begins what it says of a connection that was never made."""
_LOST: Final = ("Socket closed", "Connection reset", "Broken pipe", "GOAWAY", "Stream removed", "keepalive")


class GrpcTransport:
    """V2 over gRPC to one server. To be made on the event loop.

    Args:
        endpoint: the server.
        model: name of the model.
        version: its version; empty for the server's choice.
        headers: metadata of each request.
        max_bytes: largest message that comes back.
        probe_timeout_s: how long the server has to say that it is ready.
        tls_ca: file with the root certificates (PEM) to trust; the system's by default.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        model: str,
        version: str,
        headers: Mapping[str, str],
        *,
        max_bytes: int,
        probe_timeout_s: float,
        tls_ca: str | None = None,
    ) -> None:
        self._where = str(endpoint)
        self._model, self._version = model, version
        self._headers = {name.lower(): value for name, value in headers.items()}
        self._probe_timeout_s = probe_timeout_s
        self._client: Any = InferenceServerClient(
            endpoint.target,
            ssl=endpoint.tls,
            root_certificates=tls_ca,
            channel_args=[
                ("grpc.max_send_message_length", -1),
                ("grpc.max_receive_message_length", max_bytes),
                # After a failure gRPC tries again at its own pace, up to two minutes apart: too late for a breaker's probe.
                ("grpc.initial_reconnect_backoff_ms", 100),
                ("grpc.max_reconnect_backoff_ms", 1000),
                # A peer that has vanished without a word would hold the channel for a quarter of an hour: what it has not
                # acknowledged after this while (TCP_USER_TIMEOUT) ends it. Pings are as rare as servers put up with.
                ("grpc.keepalive_time_ms", 330_000),
                ("grpc.keepalive_timeout_ms", 10_000),
                # Another graph's connection, and its pause after a failure, are its own.
                ("grpc.use_local_subchannel_pool", 1),
            ],
        )

    async def infer(self, call: Call) -> dict[str, Array]:
        for name, parameter in call.parameters.items():
            if type(parameter) is int and not -(2**63) <= parameter < 2**63:
                raise InvalidRequest(f"parameter '{name}' is beyond what V2 over gRPC can hold (INT64)")
        inputs = []
        for name, value in call.inputs.items():
            array, datatype = sendable(name, value)
            inputs.append(InferInput(name, list(array.shape), datatype).set_data_from_numpy(array))
        try:
            result = await self._client.infer(
                self._model,
                inputs,
                self._version,
                outputs=[InferRequestedOutput(name) for name in call.outputs] or None,
                request_id=call.id,
                timeout=None if call.left_s is None else max(1, int(call.left_s * 1e6)),
                client_timeout=call.left_s,
                # A tab is white space in a header, and an error in metadata.
                headers={name: value.replace("\t", " ") for name, value in {**call.headers, **self._headers}.items()},
                parameters=dict(call.parameters) or None,
            )
        except InferenceServerException as error:
            raise self._failure(error) from None  # it holds all that the other says
        try:
            names = [output.name for output in result.get_response().outputs]
            return {name: plain_bytes(result.as_numpy(name)) for name in names}
        except Exception as error:  # whatever Triton's client stumbles over is no V2 answer
            raise garbage(self._where, f"it is no V2 answer: {type(error).__name__}: {error}") from error

    async def ready(self) -> bool:
        try:
            return bool(await self._client.is_server_ready(headers=self._headers, client_timeout=self._probe_timeout_s))
        except InferenceServerException as error:
            raise self._failure(error) from None  # it holds all that the other says

    async def close(self) -> None:
        await self._client.close()

    def _failure(self, error: InferenceServerException) -> CallFailed:
        status = str(error.status()).removeprefix("StatusCode.")
        text = str(error.message())
        if status == "DEADLINE_EXCEEDED":
            return late(self._where)
        if status == "UNAVAILABLE":
            if text.startswith(_UNSENT):
                return unreachable(self._where, text)
            if any(mark in text for mark in _LOST):
                return broken(self._where, text)
            return refused(self._where, 503, text, status)
        if status == "CANCELLED":
            return broken(self._where, text)
        if status == "RESOURCE_EXHAUSTED":
            if "larger than max" in text:
                return garbage(self._where, text)
            return CallFailed(LimitExceeded(f"{self._where} answered {status}: {text[:500]}"), sent=True, unhealthy=False)
        return refused(self._where, _HTTP_STATUS.get(status, 500), text, status)
