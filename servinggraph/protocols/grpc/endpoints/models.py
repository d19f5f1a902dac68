"""Model configuration and statistics."""

from __future__ import annotations

from collections.abc import Mapping

from google.protobuf.json_format import ParseDict

from servinggraph.lifecycle import Serving
from servinggraph.protocols.grpc.routing import Method, version_of
from servinggraph.protocols.protobuf.generated import grpc_service_pb2 as pb
from servinggraph.protocols.v2.config import model_config
from servinggraph.protocols.v2.statistics import model_statistics

__all__ = ["methods"]


def methods(serving: Serving) -> Mapping[str, Method]:
    """Return the RPCs by name."""
    catalog = serving.catalog

    # The documents have the messages' own keys and values: they are what proto-JSON reads.
    def config(request: pb.ModelConfigRequest) -> pb.ModelConfigResponse:
        document = model_config(catalog, request.name, version_of(request.version))
        return ParseDict({"config": document}, pb.ModelConfigResponse())

    def statistics(request: pb.ModelStatisticsRequest) -> pb.ModelStatisticsResponse:
        document = model_statistics(catalog.graphs(), request.name, version_of(request.version))
        return ParseDict(document, pb.ModelStatisticsResponse())

    return {"ModelConfig": config, "ModelStatistics": statistics}
