"""The metadata's list of extensions names just what can be reached."""

from __future__ import annotations

import asyncio

import pytest

from servinggraph.interfaces import FrontEndOptions
from servinggraph.lifecycle import Serving
from servinggraph.protocols.grpc.routing import SERVICE
from servinggraph.protocols.grpc.service import Service
from servinggraph.protocols.http.app import make_app
from servinggraph.protocols.v2 import server_metadata

# What stands for an extension: its HTTP route and its RPC; None for what is part of inference itself.
MARKS = {
    "classification": None,
    "sequence": None,
    "sequence(string_id)": None,
    "model_repository": ("/v2/repository/index", "RepositoryIndex"),
    "model_repository(unload_dependents)": ("/v2/repository/models/{name}/unload", "RepositoryModelUnload"),
    "schedule_policy": None,
    "model_configuration": ("/v2/models/{name}/config", "ModelConfig"),
    "system_shared_memory": ("/v2/systemsharedmemory/status", "SystemSharedMemoryStatus"),
    "cuda_shared_memory": ("/v2/cudasharedmemory/status", "CudaSharedMemoryStatus"),
    "binary_tensor_data": None,
    "parameters": None,
    "statistics": ("/v2/models/{name}/stats", "ModelStatistics"),
    "trace": ("/v2/trace/setting", "TraceSetting"),
    "logging": ("/v2/logging", "LogSettings"),
    "generate": ("/v2/models/{name}/generate", None),
}
SWITCHED = {"system_shared_memory", "cuda_shared_memory"}  # there, but may be refused by settings or for want of a GPU


@pytest.fixture
def seen():
    async def look():
        serving = Serving(FrontEndOptions())
        paths = {getattr(route, "path_format", "") for route in make_app(serving).routes}
        return server_metadata(serving)["extensions"], paths, set(Service(serving)._handlers)

    return asyncio.run(look())


def test_what_is_listed_can_be_reached_and_what_can_be_reached_is_listed(seen):
    listed, paths, methods = seen
    assert set(listed) <= set(MARKS)
    assert len(listed) == len(set(listed))
    for extension, mark in MARKS.items():
        if mark is None:
            assert extension in listed
            continue
        path, method = mark
        there = path in paths
        if extension in listed or extension not in SWITCHED:
            assert there == (extension in listed), extension
        if extension in listed and method is not None:
            assert f"/{SERVICE}/{method}" in methods, extension
