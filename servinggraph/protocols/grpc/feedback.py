"""Feedback over gRPC: an inference request with parameters that say so is not run, but told to the graph's routers.

V2 has no call for it, and every V2 client can send a request with parameters. What
`POST /v2/models/{graph}/feedback` takes as keys are parameters here: `feedback_id`,
`feedback_variant`, `feedback_metric` and `feedback_node` (string), `feedback_reward` (double or
int64). A truth is sent as the request's input tensors, in place of a reward. The answer has no
tensors, and a parameter `<node>.feedback` for each router: "taken", "duplicate" or "unknown".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from servinggraph.lifecycle import Serving
from servinggraph.messages import InferenceRequest, InferenceResponse
from servinggraph.protocols.grpc.routing import version_of
from servinggraph.protocols.protobuf.codec import decode_request, encode_response
from servinggraph.protocols.protobuf.generated import grpc_service_pb2 as pb
from servinggraph.protocols.protobuf.wire import Data
from servinggraph.protocols.v2 import RequestLimits
from servinggraph.tensors import TensorSpec

__all__ = ["PARAMETERS", "answer_feedback", "is_feedback"]

_PREFIX: Final = "feedback_"

PARAMETERS: Final = tuple(_PREFIX + name for name in ("id", "variant", "reward", "metric", "node"))
"""Parameters that make a request feedback."""


def is_feedback(message: pb.ModelInferRequest) -> bool:
    """Tell whether a request is feedback."""
    parameters = message.parameters
    return bool(parameters) and any(name in parameters for name in PARAMETERS)


def answer_feedback(message: pb.ModelInferRequest, raw: Sequence[Data], serving: Serving) -> bytes:
    """Hand feedback to the graph's routers, and return the encoded answer.

    Raises:
        ServingGraphError: as over HTTP.
    """
    graph = serving.catalog.get(message.model_name, version_of(message.model_version)).plan
    given = {entry.name: TensorSpec() for entry in message.inputs}
    limits = RequestLimits(serving.options.max_tensors)
    request = decode_request(message, raw, graph.name, given, None, limits, serving.memory)
    said: dict[str, Any] = {
        name.removeprefix(_PREFIX): value for name, value in request.parameters.items() if name.startswith(_PREFIX)
    }
    if request.inputs:
        said["truth"] = request.inputs
    receipts = serving.feedback(graph.name, said, graph.version)
    parameters = {f"{node}.feedback": receipt.value for node, receipt in receipts.items()}
    return encode_response(InferenceResponse(graph.name, graph.version, {}, message.id, parameters), InferenceRequest({}))
