"""The service put together: every RPC that there is, by its path."""

from __future__ import annotations

from typing import Any

import grpc

from servinggraph.lifecycle import Serving
from servinggraph.protocols.grpc.endpoints import health
from servinggraph.protocols.grpc.routing import unary

__all__ = ["Service"]

_PARTS = (health,)


class Service(grpc.GenericRpcHandler):
    """Finds the handler of a call; what is not there, gRPC answers with UNIMPLEMENTED.

    Bytes go in and out of the handlers: they decode and encode themselves.
    """

    def __init__(self, serving: Serving) -> None:
        self._handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {}
        for part in _PARTS:
            self._handlers |= unary(part.methods(serving))

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Return the handler for a path, None when there is none."""
        return self._handlers.get(handler_call_details.method)
