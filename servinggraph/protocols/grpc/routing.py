"""From a method's name to its handler, and from what is wrong to a status."""

from __future__ import annotations

import logging
import re
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final, NoReturn

import grpc
from google.protobuf.message import DecodeError
from google.protobuf.message_factory import GetMessageClass

from servinggraph.errors import InvalidRequest, ServingGraphError, StepFailed
from servinggraph.protocols.grpc.status import status_of
from servinggraph.protocols.protobuf.generated import grpc_service_pb2 as pb

logger = logging.getLogger("servinggraph.grpc")

__all__ = ["SERVICE", "Call", "Method", "abort", "handler", "parse", "refuse", "unary", "version_of"]

SERVICE: Final = "inference.GRPCInferenceService"

Call = grpc.aio.ServicerContext[Any, Any]
Method = Callable[[Any], Any] | Callable[[Any], Awaitable[Any]]
"""A unary RPC: takes the request's message, returns the answer's or an awaitable of it, raises `ServingGraphError`.

A plain method runs on the event loop, so it must not block.
"""

_INTEGER: Final = re.compile(r"[+-]?[0-9]{1,18}")


def parse(kind: Any, data: bytes) -> Any:
    """Decode a message.

    Raises:
        InvalidRequest: these bytes are none of this kind.
    """
    try:
        return kind.FromString(data)
    except DecodeError as error:
        raise InvalidRequest(f"failed to parse the request as {kind.DESCRIPTOR.full_name}: {error}") from None


async def abort(call: Call, error: ServingGraphError) -> NoReturn:
    """End a call with an error's status and text."""
    await call.abort(*status_of(error))
    raise AssertionError("abort raises")  # for the type checker


def refuse(call: Call, error: ServingGraphError) -> bytes:
    """Have a call end with an error's status and text once its handler has returned; return what the handler returns.

    gRPC keeps what `abort` raises, and by its traceback all that the handler had, until the next collection. This raises
    nothing.
    """
    code, text = status_of(error)
    call.set_code(code)
    call.set_details(text)
    return b""


def unary(methods: Mapping[str, Method]) -> dict[str, grpc.RpcMethodHandler[Any, Any]]:
    """Return handlers for RPCs of the service, by their full path."""
    service = pb.DESCRIPTOR.services_by_name[SERVICE.rpartition(".")[2]]
    return {
        f"/{SERVICE}/{name}": handler(name, method, GetMessageClass(service.methods_by_name[name].input_type))
        for name, method in methods.items()
    }


def handler(name: str, method: Method, kind: Any) -> grpc.RpcMethodHandler[Any, Any]:
    """Return the handler of one RPC; `kind` is the request's message class."""

    async def answer(data: bytes, call: Call) -> bytes:
        try:
            result = method(parse(kind, data))
            if isinstance(result, Awaitable):
                result = await result
            encoded: bytes = result.SerializeToString()
        except ServingGraphError as error:
            failure = error
        except Exception as error:  # a defect of ours: the caller is answered all the same
            failure = StepFailed(f"{type(error).__name__}: {error}")
            logger.exception("%s failed", name)
        else:
            return encoded
        return await abort(call, failure)

    # Bytes in and out: what cannot be decoded is the caller's mistake, for which gRPC itself would say INTERNAL.
    return grpc.unary_unary_rpc_method_handler(answer)


def version_of(text: str) -> str:
    """Return a version as the catalog knows it; empty for the highest that is ready.

    Raises:
        InvalidRequest: not a whole number, or below 0.
    """
    if not text or (text.isascii() and text.isdigit() and text[0] != "0"):
        return text
    if not _INTEGER.fullmatch(text):
        raise InvalidRequest(
            f"failed to get model version from specified version string '{text[:40]}' (details: not a whole number)"
        )
    version = int(text)
    if version < 0:
        raise InvalidRequest(f"invalid model version specified: {version}, it is a whole number from 1 on")
    return str(version)
