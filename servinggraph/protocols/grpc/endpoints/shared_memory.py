"""Registering, unregistering and listing shared memory of clients. Source: Triton, extension_shared_memory."""

from __future__ import annotations

from collections.abc import Mapping

from servinggraph.lifecycle import Serving
from servinggraph.protocols.grpc.routing import Method
from servinggraph.protocols.protobuf.generated import grpc_service_pb2 as pb

__all__ = ["methods"]


def methods(serving: Serving) -> Mapping[str, Method]:
    """Return the RPCs by name."""
    memory = serving.memory

    def system_status(request: pb.SystemSharedMemoryStatusRequest) -> pb.SystemSharedMemoryStatusResponse:
        answer = pb.SystemSharedMemoryStatusResponse()
        for region in memory.status("system", request.name):
            answer.regions[region["name"]].MergeFrom(pb.SystemSharedMemoryStatusResponse.RegionStatus(**region))
        return answer

    def register_system(request: pb.SystemSharedMemoryRegisterRequest) -> pb.SystemSharedMemoryRegisterResponse:
        memory.register_system(request.name, request.key, request.offset, request.byte_size)
        return pb.SystemSharedMemoryRegisterResponse()

    def unregister_system(request: pb.SystemSharedMemoryUnregisterRequest) -> pb.SystemSharedMemoryUnregisterResponse:
        memory.unregister("system", request.name)
        return pb.SystemSharedMemoryUnregisterResponse()

    def cuda_status(request: pb.CudaSharedMemoryStatusRequest) -> pb.CudaSharedMemoryStatusResponse:
        answer = pb.CudaSharedMemoryStatusResponse()
        for region in memory.status("cuda", request.name):
            answer.regions[region["name"]].MergeFrom(pb.CudaSharedMemoryStatusResponse.RegionStatus(**region))
        return answer

    def register_cuda(request: pb.CudaSharedMemoryRegisterRequest) -> pb.CudaSharedMemoryRegisterResponse:
        memory.register_cuda(request.name, request.raw_handle, request.device_id, request.byte_size)
        return pb.CudaSharedMemoryRegisterResponse()

    def unregister_cuda(request: pb.CudaSharedMemoryUnregisterRequest) -> pb.CudaSharedMemoryUnregisterResponse:
        memory.unregister("cuda", request.name)
        return pb.CudaSharedMemoryUnregisterResponse()

    return {
        "SystemSharedMemoryStatus": system_status,
        "SystemSharedMemoryRegister": register_system,
        "SystemSharedMemoryUnregister": unregister_system,
        "CudaSharedMemoryStatus": cuda_status,
        "CudaSharedMemoryRegister": register_cuda,
        "CudaSharedMemoryUnregister": unregister_cuda,
    }
