"""The service put together: every RPC that there is, by its path."""

from __future__ import annotations

from typing import Any

import grpc

from servinggraph.lifecycle import Serving
from servinggraph.protocols.grpc.endpoints import health, models, repository, settings, shared_memory
from servinggraph.protocols.grpc.infer import ModelInfer
from servinggraph.protocols.grpc.requests import Requests
from servinggraph.protocols.grpc.routing import SERVICE, unary
from servinggraph.protocols.grpc.standard import Health, reflection_handlers
from servinggraph.protocols.grpc.stream import ModelStreamInfer

__all__ = ["Service"]

_PARTS = (
    health,
    models,
    repository,
    shared_memory,
    settings,
)


class Service(grpc.GenericRpcHandler):
    """Finds the handler of a call; what is not there, gRPC answers with UNIMPLEMENTED.

    Bytes go in and out of the handlers: they decode and encode themselves.
    """

    def __init__(self, serving: Serving) -> None:
        self._health = Health(serving)
        self._handlers = self._health.handlers() | reflection_handlers()
        for part in _PARTS:
            self._handlers |= unary(part.methods(serving))
        self._requests = Requests(serving)
        self._infer = ModelInfer(self._requests)
        self._handlers[f"/{SERVICE}/ModelInfer"] = grpc.unary_unary_rpc_method_handler(self._infer.answer)
        self._stream = ModelStreamInfer(self._requests)
        self._handlers[f"/{SERVICE}/ModelStreamInfer"] = grpc.stream_stream_rpc_method_handler(self._stream.answer)

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Return the handler for a path, None when there is none."""
        return self._handlers.get(handler_call_details.method)

    def drain(self) -> None:
        """End streams and watches once what is in flight on them is answered."""
        self._stream.drain()
        self._health.drain()

    def close(self) -> None:
        """Cancel what is in flight: the time that it had to finish is over."""
        self._requests.closing = True
        self._infer.cancel()
        self._stream.cancel()
