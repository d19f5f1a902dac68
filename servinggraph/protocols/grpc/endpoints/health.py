"""Health and metadata."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from servinggraph.errors import GraphNotFound, Unavailable
from servinggraph.lifecycle import Serving
from servinggraph.protocols.grpc.routing import Method, version_of
from servinggraph.protocols.protobuf.generated import grpc_service_pb2 as pb
from servinggraph.protocols.v2 import model_metadata, server_metadata

__all__ = ["methods"]


def methods(serving: Serving) -> Mapping[str, Method]:
    """Return the RPCs by name."""
    catalog = serving.catalog

    def server_live(request: pb.ServerLiveRequest) -> pb.ServerLiveResponse:
        return pb.ServerLiveResponse(live=True)

    def server_ready(request: pb.ServerReadyRequest) -> pb.ServerReadyResponse:
        return pb.ServerReadyResponse(ready=catalog.ready)

    def model_ready(request: pb.ModelReadyRequest) -> pb.ModelReadyResponse:
        try:
            catalog.get(request.name, version_of(request.version))
        except (GraphNotFound, Unavailable):  # Triton's clients take every status but OK for a failure of the call
            return pb.ModelReadyResponse(ready=False)
        return pb.ModelReadyResponse(ready=not catalog.draining)

    def metadata(request: pb.ServerMetadataRequest) -> pb.ServerMetadataResponse:
        return pb.ServerMetadataResponse(**server_metadata(serving))

    def model(request: pb.ModelMetadataRequest) -> pb.ModelMetadataResponse:
        version = version_of(request.version)
        graph = catalog.get(request.name, version)
        described = model_metadata(graph.plan, [version] if version else catalog.versions(graph.plan.name))
        for key in ("inputs", "outputs"):
            described[key] = [_tensor(entry) for entry in described[key]]
        return pb.ModelMetadataResponse(**described)

    return {
        "ServerLive": server_live,
        "ServerReady": server_ready,
        "ModelReady": model_ready,
        "ServerMetadata": metadata,
        "ModelMetadata": model,
    }


def _tensor(entry: Mapping[str, Any]) -> pb.ModelMetadataResponse.TensorMetadata:
    return pb.ModelMetadataResponse.TensorMetadata(name=entry["name"], datatype=entry["datatype"], shape=entry["shape"])
