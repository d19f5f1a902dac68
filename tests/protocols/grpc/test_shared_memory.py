"""Shared memory of clients over gRPC, through an unmodified tritonclient; what is the same over HTTP is tested there."""

from __future__ import annotations

import itertools
import os
import threading
import time
from base64 import b64encode
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton
import tritonclient.utils.shared_memory as shm
from ml_dtypes import bfloat16
from tritonclient.utils import InferenceServerException, serialize_byte_tensor

from servinggraph import Graph

ARRAYS: dict[str, np.ndarray[Any, Any]] = {
    "BOOL": np.array([[True, False, True]]),
    "UINT8": np.array([[0, 1, 255]], np.uint8),
    "UINT16": np.array([[0, 1, 65535]], np.uint16),
    "UINT32": np.array([[0, 1, 2**32 - 1]], np.uint32),
    "UINT64": np.array([[0, 1, 2**64 - 1]], np.uint64),
    "INT8": np.array([[-128, 0, 127]], np.int8),
    "INT16": np.array([[-(2**15), 0, 2**15 - 1]], np.int16),
    "INT32": np.array([[-(2**31), 0, 2**31 - 1]], np.int32),
    "INT64": np.array([[-(2**63), 0, 2**63 - 1]], np.int64),
    "FP16": np.array([[0.1, -65504, 6e-8]], np.float16),
    "FP32": np.array([[0.1, -3.4e38, 1e-45]], np.float32),
    "FP64": np.array([[0.1, -1.7e308, 5e-324]], np.float64),
    "BF16": np.array([[0.1, -3.3e38, 1e-38]], bfloat16),
    "BYTES": np.array([[b"", b"\x00\xff raw", "text é".encode()]], np.object_),
}
SHM = Path("/dev/shm")
NUMBERS = itertools.count()
let_go, begun = threading.Event(), threading.Event()


def echo(value):
    return {"y": value["x"]}


def twice(a, b):
    return {"sum": a + b, "difference": a - b}


def hold(value):
    begun.set()
    assert let_go.wait(30)
    return {"y": value["x"] * 2}


def until_cancelled(value, context):
    begun.set()
    end = time.monotonic() + 60
    while not context.cancelled:
        assert time.monotonic() < end
        time.sleep(0.002)
    return {"y": value["x"] * 2}


@pytest.fixture(scope="module")
def server(shared_grpc_server):
    graphs = [Graph(f"echo_{name}", {"x": (name, [-1, -1])}).to(echo).respond() for name in ARRAYS]
    graphs.append(Graph("twice", {"a": ("FP32", [-1]), "b": ("FP32", [-1])}).to(twice).respond())
    graphs.append(Graph("hold", {"x": ("FP32", [-1])}).to(hold, run="thread").respond())
    graphs.append(Graph("until_cancelled", {"x": ("FP32", [-1])}).to(until_cancelled, run="thread").respond())
    return shared_grpc_server(*graphs, allow_client_shm=True)


@pytest.fixture
def client(server):
    with triton.InferenceServerClient(server.url) as client:
        yield client
        client.unregister_system_shared_memory()


@pytest.fixture
def region():
    """Return what makes a shared memory object: a size to (handle, key)."""
    made = []

    def make(byte_size):
        key = f"/servinggraph-test-grpc-{os.getpid()}-{next(NUMBERS)}"
        made.append(shm.create_shared_memory_region("r", key, byte_size))
        return made[-1], key

    before = set(SHM.iterdir())
    yield make
    for handle in made:
        shm.destroy_shared_memory_region(handle)
    assert set() == {path for path in set(SHM.iterdir()) - before if f"-{os.getpid()}-" in path.name}


def input_in(region, name, datatype, shape, byte_size, offset=0):
    tensor = triton.InferInput(name, shape, datatype)
    tensor.set_shared_memory(region, byte_size, offset)
    return tensor


def output_in(region, name, byte_size, offset=0):
    output = triton.InferRequestedOutput(name)
    output.set_shared_memory(region, byte_size, offset)
    return output


def an_input(name, array, datatype):
    tensor = triton.InferInput(name, list(array.shape), datatype)
    tensor.set_data_from_numpy(array)
    return tensor


def numbers():
    return np.arange(1, 5, dtype="f4")


@pytest.mark.parametrize("datatype", ARRAYS)
def test_a_request_through_shared_memory_gives_what_one_without_gives(client, region, datatype):
    array = ARRAYS[datatype]
    data = serialize_byte_tensor(array).item() if datatype == "BYTES" else array.tobytes()
    handle, key = region(4096)
    handle._mpsm_handle.buf[8 : 8 + len(data)] = data
    client.register_system_shared_memory("r", key, 4096)
    plain = client.infer(f"echo_{datatype}", [an_input("x", array, datatype)])

    answer = client.infer(
        f"echo_{datatype}",
        [input_in("r", "x", datatype, [1, 3], len(data), 8)],
        outputs=[output_in("r", "y", 1000, 2048)],
    )

    assert plain.get_response().raw_output_contents[0] == bytes(handle._mpsm_handle.buf[2048 : 2048 + len(data)])
    assert [b""] == list(answer.get_response().raw_output_contents)
    (output,) = answer.get_response().outputs
    assert ("y", datatype, [1, 3], "r") == (
        output.name,
        output.datatype,
        list(output.shape),
        output.parameters["shared_memory_region"].string_param,
    )


def test_tensors_in_shared_memory_and_in_the_message_go_together(client, region):
    handle, key = region(64)
    shm.set_shared_memory_region(handle, [numbers()])
    client.register_system_shared_memory("r", key, 64)
    inputs = [input_in("r", "a", "FP32", [4], 16), an_input("b", numbers() * 10, "FP32")]
    for given in (inputs, inputs[::-1]):
        outputs = [output_in("r", "difference", 16, 16), triton.InferRequestedOutput("sum")]
        answer = client.infer("twice", given, outputs=outputs)
        assert (numbers() * 11).tolist() == answer.as_numpy("sum").tolist()
        got = shm.get_contents_as_numpy(handle, np.float32, [4], 16)
        assert (numbers() * -9).tolist() == got.tolist()
        del got


def test_regions_are_listed_and_unregistered(client, region):
    _, key = region(4096)
    client.register_system_shared_memory("one", key, 100)
    client.register_system_shared_memory("two", key, 64, 5)
    regions = client.get_system_shared_memory_status(as_json=True)["regions"]
    assert {"name": "one", "key": key, "byte_size": "100"} == regions["one"]
    assert {"name": "two", "key": key, "offset": "5", "byte_size": "64"} == regions["two"]
    assert ["two"] == list(client.get_system_shared_memory_status("two").regions)
    assert {} == dict(client.get_cuda_shared_memory_status().regions)
    client.unregister_system_shared_memory("one")
    client.unregister_system_shared_memory("one")
    client.unregister_cuda_shared_memory()
    assert ["two"] == list(client.get_system_shared_memory_status().regions)
    client.unregister_system_shared_memory()
    assert [] == list(client.get_system_shared_memory_status().regions)


@pytest.mark.parametrize(
    ("call", "status", "text"),
    [
        (lambda c, key: c.get_system_shared_memory_status("x"), "NOT_FOUND", "Unable to find system shared memory region: 'x'"),
        (lambda c, key: c.get_cuda_shared_memory_status("x"), "NOT_FOUND", "Unable to find cuda shared memory region: 'x'"),
        (lambda c, key: c.register_system_shared_memory("r", key, 8), "INVALID_ARGUMENT", "shared memory region 'r' already in manager"),
        (lambda c, key: c.register_system_shared_memory("x", "///" + key, 8), "INVALID_ARGUMENT", "Unable to open shared memory region"),
        (lambda c, key: c.register_system_shared_memory("x", "/no-such", 8), "INVALID_ARGUMENT", "Unable to open shared memory region"),
        (lambda c, key: c.register_system_shared_memory("x", "/triton_python_backend_shm_region_1", 8), "INVALID_ARGUMENT", "reserved prefix"),
        (lambda c, key: c.register_system_shared_memory("x", key, 65), "INVALID_ARGUMENT", "Invalid offset + byte size"),
        (lambda c, key: c.register_system_shared_memory("x", key, 8, 2**64 - 4), "INVALID_ARGUMENT", "Invalid offset + byte size"),
        (lambda c, key: c.register_system_shared_memory("x", key, 0), "INVALID_ARGUMENT", "'byte_size' is 0"),
        (lambda c, key: c.register_system_shared_memory("x", "", 8), "INVALID_ARGUMENT", "Unable to open shared memory region"),
        (lambda c, key: c.register_system_shared_memory("", key, 8), "INVALID_ARGUMENT", "needs a name"),
        (lambda c, key: c.infer("hold", [input_in("x", "x", "FP32", [4], 16)]), "NOT_FOUND", "Unable to find shared memory region: 'x'"),
        (lambda c, key: c.infer("hold", [input_in("r", "x", "FP32", [4], 16, 50)]), "INVALID_ARGUMENT", "Invalid offset + byte size"),
        (lambda c, key: c.infer("hold", [input_in("r", "x", "FP32", [4], 16, 64)]), "INVALID_ARGUMENT", "Invalid offset"),
        (lambda c, key: c.infer("hold", [input_in("r", "x", "FP32", [4], 12)]), "INVALID_ARGUMENT", "Expected 16, got 12"),
        (lambda c, key: c.infer("echo_UINT8", [an_input("x", ARRAYS["UINT8"], "UINT8")], outputs=[output_in("r", "y", 2)]), "INVALID_ARGUMENT", "should be at least 3 bytes"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(client, region, call, status, text):
    handle, key = region(64)
    client.register_system_shared_memory("r", key, 64)
    with pytest.raises(InferenceServerException) as caught:
        call(client, key)
    assert f"StatusCode.{status}" == caught.value.status()
    assert text in caught.value.message()
    assert bytes(64) == bytes(handle._mpsm_handle.buf[:64])


def test_gpu_memory_is_refused_without_a_gpu_or_with_a_wrong_handle(client):
    with pytest.raises(InferenceServerException) as caught:
        client.register_cuda_shared_memory("r", b64encode(bytes(8)), 0, 64)
    assert caught.value.status() in ("StatusCode.UNIMPLEMENTED", "StatusCode.INVALID_ARGUMENT")
    assert "failed to register CUDA shared memory region" in caught.value.message()


def test_a_region_that_is_unregistered_during_an_inference_goes_when_that_ends(client, region, until):
    handle, key = region(64)
    shm.set_shared_memory_region(handle, [numbers()])
    client.register_system_shared_memory("r", key, 64)
    let_go.clear()
    begun.clear()
    done = threading.Event()
    client.async_infer(
        "hold",
        [input_in("r", "x", "FP32", [4], 16)],
        callback=lambda result, error: done.set(),
        outputs=[output_in("r", "y", 16, 32)],
    )
    assert begun.wait(30)
    client.unregister_system_shared_memory("r")
    assert ["r"] == list(client.get_system_shared_memory_status().regions)
    let_go.set()
    assert done.wait(30)
    got = shm.get_contents_as_numpy(handle, np.float32, [4], 32)
    assert (numbers() * 2).tolist() == got.tolist()
    del got
    until(lambda: not client.get_system_shared_memory_status().regions)


def test_a_request_that_is_cancelled_lets_its_region_go_and_writes_nothing(client, region, until):
    handle, key = region(64)
    client.register_system_shared_memory("r", key, 64)
    begun.clear()
    running = client.async_infer(
        "until_cancelled",
        [input_in("r", "x", "FP32", [4], 16)],
        callback=lambda result, error: None,
        outputs=[output_in("r", "y", 16, 32)],
    )
    handle._mpsm_handle.buf[:16] = numbers().tobytes()
    assert begun.wait(30)
    running.cancel()
    client.unregister_system_shared_memory("r")
    until(lambda: not client.get_system_shared_memory_status().regions)
    assert bytes(16) == bytes(handle._mpsm_handle.buf[32:48])


def test_without_leave_nothing_can_be_registered(grpc_server, region):
    _, key = region(64)
    server = grpc_server(Graph("echo", {"x": ("FP32", [-1])}).to(echo).respond())
    with triton.InferenceServerClient(server.url) as client:
        assert not {"system_shared_memory", "cuda_shared_memory"} & set(client.get_server_metadata().extensions)
        for call in (
            lambda: client.register_system_shared_memory("r", key, 64),
            lambda: client.register_cuda_shared_memory("r", b64encode(bytes(64)), 0, 64),
            client.unregister_system_shared_memory,
            client.unregister_cuda_shared_memory,
        ):
            with pytest.raises(InferenceServerException, match="Client shared memory is disabled") as caught:
                call()
            assert "StatusCode.UNIMPLEMENTED" == caught.value.status()
        assert {} == dict(client.get_system_shared_memory_status().regions)


def test_what_can_be_used_is_in_the_metadata(client):
    assert "system_shared_memory" in client.get_server_metadata().extensions
