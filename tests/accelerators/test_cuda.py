"""GPU memory of other processes: against a driver library that is none, and a real one where there is a GPU."""

from __future__ import annotations

import ctypes
import gc
import subprocess
import sys
from base64 import b64encode
from typing import Any

import numpy as np
import orjson
import pytest

from servinggraph import Graph
from servinggraph.accelerators import CudaDriver, cuda_device_count, cuda_driver
from servinggraph.errors import InvalidRequest, LimitExceeded, RegionNotFound, ServingGraphError, StepFailed, Unsupported
from servinggraph.lifecycle import SharedMemory, shared_memory
from servinggraph.testing import AsyncMock

BASE = 0x7F0000000000
HANDLE = bytes(range(64))


class FakeLibrary:
    """What libcuda does with one allocation of one other process, checked for order of calls.

    Args:
        size: bytes of the allocation.
        fails: function to the error code that it gives.
    """

    def __init__(self, size: int = 64, **fails: int) -> None:
        self.memory = bytearray(size)
        self.fails = fails
        self.pushed: list[int] = []
        self.retained: list[int] = []
        self.open = 0
        self.handles: list[bytes] = []

    def __getattr__(self, name: str) -> Any:
        function = getattr(type(self), f"do_{name}", None)
        if function is None:
            raise AttributeError(name)

        def call(*arguments: Any) -> int:
            if name in self.fails:
                return self.fails[name]
            function(self, *arguments)
            return 0

        return call

    def do_cuDevicePrimaryCtxRetain(self, context: Any, device: Any) -> None:
        context._obj.value = 1000 + device.value
        self.retained.append(device.value)

    def do_cuCtxPushCurrent_v2(self, context: Any) -> None:
        self.pushed.append(context.value)

    def do_cuCtxPopCurrent_v2(self, context: Any) -> None:
        context._obj.value = self.pushed.pop()

    def do_cuIpcOpenMemHandle_v2(self, pointer: Any, handle: Any, flags: Any) -> None:
        assert (1, True) == (flags.value, bool(self.pushed))
        self.handles.append(bytes(handle.reserved))
        self.open += 1
        pointer._obj.value = BASE + 16  # a pointer into the allocation

    def do_cuIpcCloseMemHandle(self, pointer: Any) -> None:
        assert (BASE + 16, True) == (pointer.value, bool(self.pushed))
        self.open -= 1

    def do_cuMemGetAddressRange_v2(self, base: Any, size: Any, pointer: Any) -> None:
        base._obj.value, size._obj.value = BASE, 16 + len(self.memory)

    def do_cuMemcpyDtoH_v2(self, target: Any, pointer: Any, size: Any) -> None:
        assert self.pushed
        at = pointer.value - BASE - 16
        assert 0 <= at <= at + size.value <= len(self.memory)
        ctypes.memmove(target, bytes(self.memory[at : at + size.value]), size.value)

    def do_cuMemcpyHtoD_v2(self, pointer: Any, source: Any, size: Any) -> None:
        assert self.pushed
        at = pointer.value - BASE - 16
        assert 0 <= at <= at + size.value <= len(self.memory)
        self.memory[at : at + size.value] = ctypes.string_at(source, size.value)

    def do_cuGetErrorString(self, code: Any, text: Any) -> None:
        text._obj.value = f"what {code.value} means".encode()


def memory_of(library: FakeLibrary, **options: Any) -> SharedMemory:
    return SharedMemory(allowed=True, limit=4, driver=CudaDriver(library, devices=2), **options)


def test_registered_gpu_memory_is_read_written_and_closed():
    library = FakeLibrary()
    library.memory[8:12] = b"abcd"
    memory = memory_of(library)
    memory.register_cuda("r", HANDLE, 1, 64)
    assert ([HANDLE], [1], 1) == (library.handles, library.retained, library.open)
    assert [{"name": "r", "device_id": 1, "byte_size": 64}] == memory.status("cuda") == memory.status("cuda", "r")

    data = memory.read("r", 8, 4)
    memory.destination("r", 60, 4).write(b"wxyz")
    memory.destination("r", 0, 4).write(np.array([1], "<u4").view(np.uint8).data)
    memory.destination("r", 0, 0).write(b"")

    assert (b"abcd", True) == (bytes(data), data.readonly)
    assert b"" == bytes(memory.read("r", 64, 0))
    assert (b"\1\0\0\0", b"wxyz") == (library.memory[:4], library.memory[60:])
    memory.unregister("cuda", "r")
    assert ([], 0, []) == (memory.status("cuda"), library.open, library.pushed)


def test_gpu_memory_is_closed_when_its_last_user_ends():
    library = FakeLibrary()
    memory = memory_of(library)
    memory.register_cuda("r", HANDLE, 0, 64)
    part = memory.destination("r", 0, 8)
    memory.unregister("cuda")
    assert (1, ["r"]) == (library.open, [region["name"] for region in memory.status("cuda")])
    with pytest.raises(RegionNotFound):
        memory.read("r", 0, 8)
    part.write(b"12345678")
    del part
    assert (0, [], b"12345678") == (library.open, memory.status("cuda"), library.memory[:8])


@pytest.mark.parametrize(
    "handle, device, byte_size, error, reason",
    [
        (HANDLE, 2, 8, InvalidRequest, "there is no GPU 2, this machine has 2"),
        (HANDLE, -1, 8, InvalidRequest, "there is no GPU -1"),
        (HANDLE, 2**40, 8, InvalidRequest, "there is no GPU"),
        (HANDLE[:-1], 0, 8, InvalidRequest, "a CUDA IPC handle has 64 bytes, got 63"),
        (HANDLE, 0, 65, InvalidRequest, r"Invalid offset \+ byte size for shared memory region: 'r' .* has 64 bytes"),
        (HANDLE, 0, 2**64 - 1, InvalidRequest, r"Invalid offset \+ byte size"),
        (HANDLE, 0, 0, InvalidRequest, "'byte_size' is 0"),
    ],
)
def test_gpu_memory_that_cannot_be_is_refused(handle, device, byte_size, error, reason):
    library = FakeLibrary()
    memory = memory_of(library)
    with pytest.raises(error, match=reason):
        memory.register_cuda("r", handle, device, byte_size)
    gc.collect()
    assert ([], 0, []) == (memory.status("cuda"), library.open, library.pushed)


@pytest.mark.parametrize(
    "function, error, reason",
    [
        ("cuIpcOpenMemHandle_v2", InvalidRequest, "failed to open CUDA IPC handle: what 201 means"),
        ("cuMemGetAddressRange_v2", InvalidRequest, "failed to get the CUDA address range: what 201 means"),
        ("cuDevicePrimaryCtxRetain", StepFailed, "the CUDA driver failed: what 201 means"),
        ("cuCtxPushCurrent_v2", StepFailed, "the CUDA driver failed: what 201 means"),
    ],
)
def test_a_driver_that_refuses_to_open_is_told_of(function, error, reason):
    library = FakeLibrary(**{function: 201})
    memory = memory_of(library)
    with pytest.raises(error, match=reason):
        memory.register_cuda("r", HANDLE, 0, 64)
    assert ([], 0, []) == (memory.status("cuda"), library.open, library.pushed)


def test_a_driver_that_refuses_to_copy_or_close_is_told_of_or_let_be():
    library = FakeLibrary()
    memory = memory_of(library)
    memory.register_cuda("r", HANDLE, 0, 64)
    library.fails = {"cuMemcpyDtoH_v2": 700, "cuMemcpyHtoD_v2": 1, "cuGetErrorString": 1}
    with pytest.raises(StepFailed, match="the CUDA driver failed: error 700"):
        memory.read("r", 0, 8)
    with pytest.raises(StepFailed, match="the CUDA driver failed: error 1"):
        memory.destination("r", 0, 8).write(b"12345678")
    assert [] == library.pushed
    library.fails = {"cuCtxPushCurrent_v2": 4}
    memory.unregister("cuda")  # the process is ending: nothing to be done, nothing raised
    assert [] == memory.status("cuda")


def test_names_are_shared_with_system_memory_and_bounded():
    memory = memory_of(FakeLibrary())
    for number in range(4):
        memory.register_cuda(str(number), HANDLE, 0, 8)
    with pytest.raises(InvalidRequest, match="shared memory region '0' already in manager"):
        memory.register_system("0", "/k", 0, 8)
    with pytest.raises(LimitExceeded, match="'max_shm_regions' = 4"):
        memory.register_cuda("4", HANDLE, 0, 8)
    with pytest.raises(RegionNotFound, match="'0' is registered as CUDA shared memory, not system shared memory"):
        memory.status("system", "0")
    memory.unregister("system")
    assert 4 == len(memory.status("cuda"))


def test_without_a_gpu_there_is_no_gpu_memory():
    if cuda_device_count():
        pytest.skip("this machine has a GPU")
    memory = SharedMemory(allowed=True, limit=4)
    assert ("system_shared_memory",) == memory.extensions
    with pytest.raises(Unsupported, match="failed to register CUDA shared memory region: 'r', GPUs not supported"):
        memory.register_cuda("r", HANDLE, 0, 8)


def test_an_inference_through_gpu_memory(run, monkeypatch):
    """Over HTTP, with the fake library in place of the driver."""
    library = FakeLibrary()
    monkeypatch.setattr(shared_memory, "cuda_driver", lambda: CudaDriver(library, devices=1))
    graph = Graph("g", {"x": ("FP32", [-1])}).to(lambda value: {"y": value["x"] * 2}, "double").respond()

    async def main() -> None:
        async with graph.mock(allow_client_shm=True) as server:
            await talk(server)

    async def talk(server: AsyncMock) -> None:
        library.memory[:8] = np.array([1, 2], "<f4").tobytes()

        async def post(path: str, document: Any) -> Any:
            return await server.request("POST", path, orjson.dumps(document))

        assert "cuda_shared_memory" in (await server.request("GET", "/v2")).json()["extensions"]
        path = "/v2/cudasharedmemory/region/r/register"
        handle = {"b64": b64encode(HANDLE).decode()}
        for bad in ({}, {"raw_handle": handle, "byte_size": 8}, {"raw_handle": "x", "device_id": 0, "byte_size": 8},
                    {"raw_handle": {"b64": "?"}, "device_id": 0, "byte_size": 8}):  # fmt: skip
            assert 400 == (await post(path, bad)).status
        reply = await post(path, {"raw_handle": handle, "device_id": 0, "byte_size": 64})
        assert (200, b"") == (reply.status, reply.body)

        place = {"shared_memory_region": "r", "shared_memory_byte_size": 8}
        reply = await post(
            "/v2/models/g/infer",
            {
                "inputs": [{"name": "x", "datatype": "FP32", "shape": [2], "parameters": place}],
                "outputs": [{"name": "y", "parameters": {**place, "shared_memory_offset": 56}}],
            },
        )
        assert (200, [{"name": "y", "datatype": "FP32", "shape": [2]}]) == (reply.status, reply.json()["outputs"])
        assert [2, 4] == np.frombuffer(bytes(library.memory[56:]), "<f4").tolist()

        assert 1 == len((await server.request("GET", "/v2/cudasharedmemory/status")).json())
        assert 200 == (await post("/v2/cudasharedmemory/region/r/unregister", {})).status
        assert 0 == library.open

    run(main())


OTHER_PROCESS = """
import ctypes, sys
cuda = ctypes.CDLL("libcuda.so.1")
def check(code):
    assert code == 0, code
check(cuda.cuInit(0))
context = ctypes.c_void_p()
check(cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0))
check(cuda.cuCtxPushCurrent_v2(context))
pointer = ctypes.c_uint64()
check(cuda.cuMemAlloc_v2(ctypes.byref(pointer), ctypes.c_size_t(4096)))
check(cuda.cuMemcpyHtoD_v2(pointer, b"here", ctypes.c_size_t(4)))
handle = (ctypes.c_char * 64)()
check(cuda.cuIpcGetMemHandle(ctypes.byref(handle), pointer))
print(bytes(handle).hex(), flush=True)
sys.stdin.readline()
data = ctypes.create_string_buffer(5)
check(cuda.cuMemcpyDtoH_v2(data, pointer, ctypes.c_size_t(5)))
print(data.raw[:5].decode(), flush=True)
"""


@pytest.mark.gpu
@pytest.mark.skipif(not cuda_device_count(), reason="needs an NVIDIA GPU")
def test_memory_of_another_process_on_a_real_gpu():
    with subprocess.Popen(
        [sys.executable, "-c", OTHER_PROCESS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        memory = SharedMemory(allowed=True, limit=4, driver=cuda_driver())
        memory.register_cuda("r", bytes.fromhex(other.stdout.readline().strip()), 0, 4096)
        assert b"here" == bytes(memory.read("r", 0, 4))
        memory.destination("r", 0, 5).write(b"there")
        with pytest.raises(ServingGraphError):
            memory.read("r", 4096, 1)
        memory.unregister("cuda")
        other.stdin.write("\n")
        other.stdin.flush()
        assert "there" == other.stdout.readline().strip()
