"""The model repository: index, load, unload."""

from __future__ import annotations

from collections.abc import Mapping

from servinggraph.errors import InvalidRequest
from servinggraph.lifecycle import Serving
from servinggraph.protocols.grpc.routing import Method
from servinggraph.protocols.protobuf.generated import grpc_service_pb2 as pb

__all__ = ["methods"]


def methods(serving: Serving) -> Mapping[str, Method]:
    """Return the RPCs by name; a repository's name is not looked at: there is one."""

    async def index(request: pb.RepositoryIndexRequest) -> pb.RepositoryIndexResponse:
        lines = await serving.repository.index(ready=request.ready)
        return pb.RepositoryIndexResponse(models=[pb.RepositoryIndexResponse.ModelIndex(**line._asdict()) for line in lines])

    async def load(request: pb.RepositoryModelLoadRequest) -> pb.RepositoryModelLoadResponse:
        parameters = {key: _load_parameter(key, value) for key, value in request.parameters.items()}
        await serving.repository.load(request.model_name, parameters)
        return pb.RepositoryModelLoadResponse()

    async def unload(request: pb.RepositoryModelUnloadRequest) -> pb.RepositoryModelUnloadResponse:
        for key, value in request.parameters.items():
            if key != "unload_dependents":
                raise InvalidRequest(f"unrecognized unload parameter '{key}'; expected unload_dependents")
            if value.WhichOneof("parameter_choice") != "bool_param":
                raise InvalidRequest(f"unload parameter '{key}' is a bool_param")
        await serving.repository.unload(request.model_name)
        return pb.RepositoryModelUnloadResponse()

    return {"RepositoryIndex": index, "RepositoryModelLoad": load, "RepositoryModelUnload": unload}


def _load_parameter(key: str, value: pb.ModelRepositoryParameter) -> str | bytes:
    kind = value.WhichOneof("parameter_choice")
    if kind == "string_param":
        return value.string_param
    if kind == "bytes_param":
        return value.bytes_param
    raise InvalidRequest(f"load parameter '{key}' is a string_param (config) or a bytes_param (file:...), got {kind}")
