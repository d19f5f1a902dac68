"""What every gRPC server offers: the health service `grpc.health.v1`, and reflection.

Source: GRPC Health Checking Protocol; GRPC Server Reflection Protocol.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, Final

import grpc
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from grpc_reflection.v1alpha.reflection import aio as reflection

from servinggraph.errors import GraphNotFound, ServingGraphError, Unavailable
from servinggraph.lifecycle import Serving
from servinggraph.protocols.grpc.routing import SERVICE, Call, abort, handler, parse
from servinggraph.protocols.protobuf.generated import grpc_service_pb2, model_config_pb2

__all__ = ["Health", "reflection_handlers"]

_HEALTH: Final = "grpc.health.v1.Health"
_REFLECTION: Final = "grpc.reflection.v1alpha.ServerReflection"
_Status: Final = health_pb2.HealthCheckResponse

Handlers = dict[str, "grpc.RpcMethodHandler[Any, Any]"]


class Health:
    """The health service: the whole server by the service name "" or that of the V2 service, a graph by its own name."""

    def __init__(self, serving: Serving) -> None:
        self._catalog = serving.catalog
        self._ended = False
        self._changed = asyncio.Event()
        self._catalog.on_change(self._tell)

    def handlers(self) -> Handlers:
        """Return the handlers by path."""
        return {
            f"/{_HEALTH}/Check": handler("Check", self._check, health_pb2.HealthCheckRequest),
            f"/{_HEALTH}/Watch": grpc.unary_stream_rpc_method_handler(self._watch),
        }

    def drain(self) -> None:
        """End everybody's watching, once the last state was told."""
        self._ended = True
        self._tell()

    def _tell(self) -> None:
        # Everybody who watches waits for the same event, and for a new one from then on.
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def _status(self, service: str) -> Any:
        if service in ("", SERVICE):
            return _Status.SERVING if self._catalog.ready else _Status.NOT_SERVING
        try:
            self._catalog.get(service)
        except GraphNotFound:
            return _Status.SERVICE_UNKNOWN
        except Unavailable:
            return _Status.NOT_SERVING
        return _Status.NOT_SERVING if self._catalog.draining else _Status.SERVING

    def _check(self, request: Any) -> Any:
        status = self._status(request.service)
        if status == _Status.SERVICE_UNKNOWN:
            raise GraphNotFound(f"Request for unknown model: '{request.service}' is not found")
        return _Status(status=status)

    async def _watch(self, data: bytes, call: Call) -> AsyncIterator[bytes]:
        try:
            service = parse(health_pb2.HealthCheckRequest, data).service
        except ServingGraphError as error:
            await abort(call, error)
        told: Any = None
        while True:
            changed = self._changed
            status = self._status(service)
            if status != told:
                told = status
                yield _Status(status=status).SerializeToString()
            elif self._ended:
                return
            else:
                await changed.wait()


def reflection_handlers() -> Handlers:
    """Return the handlers of the reflection service, by path; it describes all services that there are."""
    pool = DescriptorPool()
    for module in (model_config_pb2, grpc_service_pb2, health_pb2, reflection_pb2):
        pool.AddSerializedFile(module.DESCRIPTOR.serialized_pb)
    servicer = reflection.ReflectionServicer((SERVICE, _HEALTH, _REFLECTION), pool=pool)
    answer = grpc.stream_stream_rpc_method_handler(
        servicer.ServerReflectionInfo,
        reflection_pb2.ServerReflectionRequest.FromString,
        reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    return {f"/{_REFLECTION}/ServerReflectionInfo": answer}
