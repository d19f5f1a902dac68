"""Shared memory of clients, through an unmodified tritonclient and by hand."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.http as triton
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


def echo(value):
    return {"y": value["x"]}


def add(a, b):
    return {"sum": a + b}


seen: list[np.ndarray[Any, Any]] = []
let_go = threading.Event()
begun = threading.Event()


def hold(value):
    begun.set()
    assert let_go.wait(30)
    return {"y": value["x"] * 2}


def keep(value):
    seen.append(value["x"])
    return {"y": value["x"]}


def look(value):
    seen.append(value["x"])
    return {"y": value["x"] + 1}


@pytest.fixture(scope="module")
def server(shared_server):
    graphs = [Graph(f"echo_{name}", {"x": (name, [-1, -1])}).to(echo).respond() for name in ARRAYS]
    graphs.append(Graph("add", {"a": ("FP32", [-1]), "b": ("FP32", [-1])}).to(add).respond())
    graphs.append(Graph("hold", {"x": ("FP32", [-1])}).to(hold, run="thread").respond())
    graphs.append(Graph("keep_BOOL", {"x": ("BOOL", [-1])}).to(keep).respond())
    graphs.append(Graph("look", {"x": ("FP32", [-1])}).to(look).respond())
    return shared_server(*graphs, allow_client_shm=True, max_shm_regions=8)


@pytest.fixture
def client(server):
    with triton.InferenceServerClient(server.url) as client:
        yield client
        client.unregister_system_shared_memory()


@pytest.fixture
def region() -> Iterator[Any]:
    """Return what makes a shared memory object: a size to (handle, key)."""
    made = []

    def make(byte_size: int) -> tuple[Any, str]:
        key = f"/servinggraph-test-{os.getpid()}-{next(NUMBERS)}"
        handle = shm.create_shared_memory_region("r", key, byte_size)
        made.append(handle)
        return handle, key

    before = set(SHM.iterdir())
    yield make
    for handle in made:
        shm.destroy_shared_memory_region(handle)
    assert set() == {path for path in set(SHM.iterdir()) - before if f"-{os.getpid()}-" in path.name}


def input_in(region: str, name: str, datatype: str, shape: list[int], byte_size: int, offset: int = 0) -> Any:
    tensor = triton.InferInput(name, shape, datatype)
    tensor.set_shared_memory(region, byte_size, offset)
    return tensor


def output_in(region: str, name: str, byte_size: int, offset: int = 0) -> Any:
    output = triton.InferRequestedOutput(name)
    output.set_shared_memory(region, byte_size, offset)
    return output


def an_input(name: str, array: np.ndarray[Any, Any], datatype: str, *, binary: bool = True) -> Any:
    tensor = triton.InferInput(name, list(array.shape), datatype)
    tensor.set_data_from_numpy(array, binary_data=binary)
    return tensor


def numbers(count: int = 4) -> np.ndarray[Any, Any]:
    return np.arange(1, count + 1, dtype="f4")


def refused(client: Any, model: str, inputs: list[Any], outputs: list[Any] | None = None) -> tuple[str, str]:
    with pytest.raises(InferenceServerException) as caught:
        client.infer(model, inputs, outputs=outputs)
    return caught.value.status(), caught.value.message()


@pytest.mark.parametrize("datatype", ARRAYS)
def test_a_request_through_shared_memory_gives_what_one_without_gives(client, region, datatype):
    array = ARRAYS[datatype]
    data = serialize_byte_tensor(array).item() if datatype == "BYTES" else array.tobytes()
    handle, key = region(4096)
    handle._mpsm_handle.buf[8 : 8 + len(data)] = data
    client.register_system_shared_memory("r", key, 4096)
    plain = client.infer(f"echo_{datatype}", [an_input("x", array, datatype)]).as_numpy("y")

    answer = client.infer(
        f"echo_{datatype}",
        [input_in("r", "x", datatype, [1, 3], len(data), 8)],
        outputs=[output_in("r", "y", 1000, 2048)],
    )

    assert {"name": "y", "datatype": datatype, "shape": [1, 3]} == answer.get_output("y")
    assert data == bytes(handle._mpsm_handle.buf[2048 : 2048 + len(data)])
    assert b"\0" == bytes(handle._mpsm_handle.buf[2048 + len(data) : 2049 + len(data)])
    if datatype != "BF16":  # the client hands BF16 back as FP32
        kind = np.object_ if datatype == "BYTES" else array.dtype
        got = shm.get_contents_as_numpy(handle, kind, [1, 3], 2048)
        assert plain.tolist() == got.tolist()
        del got


@pytest.mark.parametrize("binary", [True, False])
def test_tensors_in_shared_memory_and_in_the_body_go_together(client, region, binary):
    handle, key = region(64)
    shm.set_shared_memory_region(handle, [numbers()], 16)
    client.register_system_shared_memory("r", key, 48, 16)
    inputs = [an_input("b", numbers() * 10, "FP32", binary=binary), input_in("r", "a", "FP32", [4], 16)]
    for given in (inputs, inputs[::-1]):
        answer = client.infer("add", given, outputs=[triton.InferRequestedOutput("sum", binary_data=binary)])
        assert (numbers() * 11).tolist() == answer.as_numpy("sum").tolist()
    client.infer("add", inputs, outputs=[output_in("r", "sum", 16, 32)])
    got = shm.get_contents_as_numpy(handle, np.float32, [4], 48)
    assert (numbers() * 11).tolist() == got.tolist()
    del got


def test_an_input_is_a_read_only_view_of_the_region(client, region):
    handle, key = region(16)
    shm.set_shared_memory_region(handle, [numbers()])
    client.register_system_shared_memory("r", key, 16)
    seen.clear()
    client.infer("look", [input_in("r", "x", "FP32", [4], 16)])
    (array,) = seen
    assert not array.flags.writeable
    shm.set_shared_memory_region(handle, [numbers() * 3])
    assert (numbers() * 3).tolist() == array.tolist()
    seen.clear()


def test_a_boolean_that_was_checked_cannot_change_any_more(client, region):
    handle, key = region(16)
    handle._mpsm_handle.buf[:2] = b"\1\0"
    client.register_system_shared_memory("r", key, 16)
    client.infer("keep_BOOL", [input_in("r", "x", "BOOL", [2], 2)])
    handle._mpsm_handle.buf[:2] = b"\7\7"
    assert b"\1\0" == seen.pop().tobytes()
    status, text = refused(client, "keep_BOOL", [input_in("r", "x", "BOOL", [2], 2)])
    assert ("400", True) == (status, "neither 0 nor 1" in text), text


def test_regions_are_listed_and_unregistered(client, region):
    _, key = region(4096)
    client.register_system_shared_memory("one", key, 100)
    client.register_system_shared_memory("two", key, 64, 5)
    one = {"name": "one", "key": key, "offset": 0, "byte_size": 100}
    two = {"name": "two", "key": key, "offset": 5, "byte_size": 64}
    assert [one, two] == client.get_system_shared_memory_status()
    assert [two] == client.get_system_shared_memory_status("two")
    assert [] == client.get_cuda_shared_memory_status()
    client.unregister_system_shared_memory("one")
    client.unregister_system_shared_memory("one")  # is no error
    client.unregister_cuda_shared_memory()
    assert [two] == client.get_system_shared_memory_status()
    client.unregister_system_shared_memory()
    assert [] == client.get_system_shared_memory_status()
    with pytest.raises(InferenceServerException, match="Unable to find system shared memory region: 'two'") as caught:
        client.get_system_shared_memory_status("two")
    assert "404" == caught.value.status()
    with pytest.raises(InferenceServerException, match="Unable to find cuda shared memory region: 'two'"):
        client.get_cuda_shared_memory_status("two")


def test_a_region_of_the_other_kind_is_said_to_be_one(client, region):
    _, key = region(64)
    client.register_system_shared_memory("r", key, 64)
    with pytest.raises(InferenceServerException, match="'r' is registered as system shared memory, not CUDA shared memory"):
        client.get_cuda_shared_memory_status("r")
    client.unregister_cuda_shared_memory("r")
    assert 1 == len(client.get_system_shared_memory_status())


@pytest.mark.parametrize(
    "key, offset, byte_size, reason",
    [
        ("/servinggraph-there-is-none", 0, 8, r"Unable to open shared memory region: '/servinggraph-there-is-none' \(No such file"),
        ("///KEY", 0, 8, "Unable to open shared memory region"),
        ("//KEY", 0, 8, "Unable to open shared memory region"),
        ("/../etc/passwd", 0, 8, "Unable to open shared memory region"),
        ("..", 0, 8, "Unable to open shared memory region"),
        ("/.", 0, 8, "Unable to open shared memory region"),
        ("a\0b", 0, 8, "Unable to open shared memory region"),
        ("x" * 300, 0, 8, "Unable to open shared memory region"),
        ("/triton_python_backend_shm_region_1", 0, 8, "contains the reserved prefix 'triton_python_backend_shm_region_'"),
        ("triton_python_backend_shm_region_1", 0, 8, "contains the reserved prefix"),
        ("KEY", 0, 65, r"Invalid offset \+ byte size for shared memory region: 'r'"),
        ("KEY", 64, 1, r"Invalid offset \+ byte size for shared memory region"),
        ("KEY", 1, 64, r"Invalid offset \+ byte size for shared memory region"),
        ("KEY", 2**64 - 1, 2, r"Invalid offset \+ byte size for shared memory region"),
        ("KEY", 2**64 - 8, 8, r"Invalid offset \+ byte size for shared memory region"),
        ("KEY", 0, 2**64 - 1, r"Invalid offset \+ byte size for shared memory region"),
        ("KEY", 2**63 - 1, 1, r"Invalid offset \+ byte size for shared memory region"),
        ("KEY", 0, 0, "'byte_size' is 0"),
        ("KEY", 0, 2**70, "Unable to parse 'byte_size'"),
        ("KEY", -1, 8, "Unable to parse 'offset'"),
    ],
)  # fmt: skip
def test_a_region_that_cannot_be_is_refused(client, region, key, offset, byte_size, reason):
    _, real = region(64)
    key = key.replace("KEY", real.removeprefix("/"))
    with pytest.raises(InferenceServerException, match=reason) as caught:
        client.register_system_shared_memory("r", key, byte_size, offset)
    assert "400" == caught.value.status()
    assert [] == client.get_system_shared_memory_status()


@pytest.mark.parametrize(
    "body, reason",
    [
        ({}, "'key'"),
        ({"key": 3, "byte_size": 8}, "'key'"),
        ({"key": "k"}, "'byte_size'"),
        ({"key": "k", "byte_size": "8"}, "'byte_size'"),
        ({"key": "k", "byte_size": 8.5}, "'byte_size'"),
        ({"key": "k", "byte_size": True}, "'byte_size'"),
        ({"key": "k", "byte_size": 8, "offset": None}, "'offset'"),
        (b"[1]", "expected an object"),
        (b"{", "failed to parse the request JSON buffer"),
    ],
)
def test_a_registration_that_lacks_something_is_refused(server, body, reason):
    answer = server.post("/v2/systemsharedmemory/region/r/register", body)
    assert (400, True) == (answer.status, reason in answer.error), answer.error


def test_a_name_is_taken_once(client, region):
    _, key = region(64)
    client.register_system_shared_memory("r", key, 8)
    with pytest.raises(InferenceServerException, match="shared memory region 'r' already in manager") as caught:
        client.register_system_shared_memory("r", key, 8)
    assert "400" == caught.value.status()


def test_more_regions_than_the_limit_are_refused(client, region):
    _, key = region(64)
    for number in range(8):
        client.register_system_shared_memory(str(number), key, 8)
    with pytest.raises(InferenceServerException, match="'max_shm_regions' = 8") as caught:
        client.register_system_shared_memory("one too many", key, 8)
    assert "503" == caught.value.status()


@pytest.mark.parametrize(
    "byte_size, offset, reason",
    [
        (16, 52, "Invalid offset + byte size for shared memory region: 'r'"),
        (16, 64, "Invalid offset for shared memory region: 'r'"),
        (16, 2**64 - 8, "Invalid offset for shared memory region: 'r'"),
        (2**64 - 1, 8, "Invalid offset + byte size for shared memory region: 'r'"),
        (16, -1, "'shared_memory_offset' of"),
        (12, 0, "Expected 16, got 12"),
        (20, 0, "Expected 16, got 20"),
    ],
)  # fmt: skip
def test_an_input_out_of_range_is_refused(client, region, byte_size, offset, reason):
    _, key = region(128)
    client.register_system_shared_memory("r", key, 64)
    tensor = triton.InferInput("x", [4], "FP32")
    tensor._parameters = {"shared_memory_region": "r", "shared_memory_byte_size": byte_size, "shared_memory_offset": offset}
    status, text = refused(client, "look", [tensor])
    assert ("400", True) == (status, reason in text), text


@pytest.mark.parametrize(
    "byte_size, offset, status, reason",
    [
        (16, 52, "400", "Invalid offset + byte size for shared memory region: 'r'"),
        (16, 65, "400", "Invalid offset for shared memory region: 'r'"),
        (15, 0, "400", "shared memory size specified with the request for output 'y' (15 bytes) should be at least 16 bytes"),
    ],
)  # fmt: skip
def test_an_output_out_of_range_is_refused_and_nothing_written(client, region, byte_size, offset, status, reason):
    handle, key = region(128)
    client.register_system_shared_memory("r", key, 64)
    got, text = refused(client, "look", [an_input("x", numbers(), "FP32")], [output_in("r", "y", byte_size, offset)])
    assert (status, True) == (got, reason in text), text
    assert bytes(128) == bytes(handle._mpsm_handle.buf[:128])


def test_an_unknown_region_is_not_found(client):
    status, text = refused(client, "look", [input_in("nope", "x", "FP32", [4], 16)])
    assert ("404", "Unable to find shared memory region: 'nope'") == (status, text)
    status, text = refused(client, "look", [an_input("x", numbers(), "FP32")], [output_in("nope", "y", 16)])
    assert ("404", "Unable to find shared memory region: 'nope'") == (status, text)


@pytest.mark.parametrize(
    "parameters, more, reason",
    [
        ({"shared_memory_region": "r"}, {}, "'shared_memory_byte_size' of input 'x'"),
        ({"shared_memory_region": 3, "shared_memory_byte_size": 16}, {}, "'shared_memory_region' of input 'x'"),
        ({"shared_memory_region": "", "shared_memory_byte_size": 16}, {}, "'shared_memory_region' of input 'x'"),
        ({"shared_memory_region": "r", "shared_memory_byte_size": 16}, {"data": [1, 2, 3, 4]}, "sets 'data' and"),
        (
            {"shared_memory_region": "r", "shared_memory_byte_size": 16, "binary_data_size": 16},
            {},
            "sets 'binary_data_size' and",
        ),
    ],
)
def test_a_reference_that_makes_no_sense_is_refused(server, client, region, parameters, more, reason):
    _, key = region(64)
    client.register_system_shared_memory("r", key, 64)
    tensor = {"name": "x", "datatype": "FP32", "shape": [4], "parameters": parameters, **more}
    answer = server.post("/v2/models/look/infer", {"inputs": [tensor]})
    assert (400, True) == (answer.status, reason in answer.error), answer.error


def test_elements_of_bytes_that_run_past_the_end_are_refused(client, region):
    handle, key = region(64)
    handle._mpsm_handle.buf[:8] = (100).to_bytes(4, "little") + b"abcd"
    client.register_system_shared_memory("r", key, 64)
    status, text = refused(client, "echo_BYTES", [input_in("r", "x", "BYTES", [1, 1], 8)])
    assert ("400", True) == (status, "incomplete string data" in text), text


def test_what_the_client_has_cut_off_is_refused(client, region):
    _, key = region(8192)
    client.register_system_shared_memory("r", key, 8192)
    os.truncate("/dev/shm" + key, 4096)
    status, text = refused(client, "look", [input_in("r", "x", "FP32", [4], 16)])
    assert ("400", True) == (status, "has only 4096 bytes by now" in text), text
    status, text = refused(client, "look", [an_input("x", numbers(), "FP32")], [output_in("r", "y", 16, 4096)])
    assert ("400", True) == (status, "has only 4096 bytes by now" in text), text


def test_a_region_that_is_unregistered_during_an_inference_goes_when_that_ends(client, server, region, until):
    handle, key = region(64)
    shm.set_shared_memory_region(handle, [numbers()])
    client.register_system_shared_memory("r", key, 64)
    let_go.clear()
    begun.clear()
    with triton.InferenceServerClient(server.url) as other:
        running = other.async_infer("hold", [input_in("r", "x", "FP32", [4], 16)], outputs=[output_in("r", "y", 16, 32)])
        assert begun.wait(30)
        client.unregister_system_shared_memory("r")
        assert ["r"] == [entry["name"] for entry in client.get_system_shared_memory_status()]
        status, _ = refused(client, "look", [input_in("r", "x", "FP32", [4], 16)])
        assert "404" == status
        let_go.set()
        running.get_result()
    got = shm.get_contents_as_numpy(handle, np.float32, [4], 32)
    assert (numbers() * 2).tolist() == got.tolist()
    del got
    until(lambda: not client.get_system_shared_memory_status())


CLIENT_THAT_DIES = """
import os, sys
import tritonclient.http as triton, tritonclient.utils.shared_memory as shm
from multiprocessing import shared_memory
handle = shm.create_shared_memory_region("r", sys.argv[2], 64)
triton.InferenceServerClient(sys.argv[1]).register_system_shared_memory("gone", sys.argv[2], 64)
shm.destroy_shared_memory_region(handle)
os._exit(0)
"""


def test_a_region_of_a_client_that_vanished_can_be_unregistered(client, server):
    key = f"/servinggraph-test-{os.getpid()}-vanished"
    subprocess.run([sys.executable, "-c", CLIENT_THAT_DIES, server.url, key], check=True, timeout=120)
    assert not Path(f"/dev/shm{key}").exists()
    assert ["gone"] == [entry["name"] for entry in client.get_system_shared_memory_status()]
    answer = client.infer("look", [input_in("gone", "x", "FP32", [4], 16)])  # still mapped: zeros
    assert [1, 1, 1, 1] == answer.as_numpy("y").tolist()
    seen.clear()
    client.unregister_system_shared_memory("gone")
    assert [] == client.get_system_shared_memory_status()


def test_the_server_leaves_nothing_behind_and_takes_nothing_away(http_server, region):
    """Attaching must not make the object the server's: it is there after the server, and gone after the client."""
    handle, key = region(64)
    server = http_server(Graph("look", {"x": ("FP32", [-1])}).to(look).respond(), allow_client_shm=True)
    with triton.InferenceServerClient(server.url) as client:
        client.register_system_shared_memory("r", key, 64)
        client.infer("look", [input_in("r", "x", "FP32", [4], 16)])
        seen.clear()
    server.stop()
    assert Path(f"/dev/shm{key}").exists()
    assert 64 == len(bytes(handle._mpsm_handle.buf[:64]))


def test_without_leave_nothing_can_be_registered(http_server, region):
    _, key = region(64)
    server = http_server(Graph("look", {"x": ("FP32", [-1])}).to(look).respond())
    with triton.InferenceServerClient(server.url) as client:
        assert not {"system_shared_memory", "cuda_shared_memory"} & set(client.get_server_metadata()["extensions"])
        for call in (
            lambda: client.register_system_shared_memory("r", key, 64),
            lambda: client.register_cuda_shared_memory("r", b"AAAA", 0, 64),
            lambda: client.unregister_system_shared_memory("r"),
            client.unregister_system_shared_memory,
            client.unregister_cuda_shared_memory,
        ):
            with pytest.raises(InferenceServerException, match="Client shared memory is disabled") as caught:
                call()
            assert "501" == caught.value.status()
        assert [] == client.get_system_shared_memory_status()
        assert [] == client.get_cuda_shared_memory_status()
        status, text = refused(client, "look", [input_in("r", "x", "FP32", [4], 16)])
        assert ("404", "Unable to find shared memory region: 'r'; client shared memory is disabled") == (status, text)


def test_what_can_be_used_is_in_the_metadata(client):
    assert "system_shared_memory" in client.get_server_metadata()["extensions"]


GRAPH = """
graph: double
inputs: {x: {datatype: FP32, shape: [-1]}}
nodes: {double: {step: python, call: "double_steps:double"}}
answer: double
"""


def test_a_server_process_that_ends_leaves_the_object_alone_and_nothing_else_behind(tmp_path, region):
    (tmp_path / "double_steps.py").write_text('def double(value):\n    return {"y": value["x"] * 2}\n')
    (tmp_path / "graph.yaml").write_text(GRAPH)
    handle, key = region(64)
    shm.set_shared_memory_region(handle, [numbers()])
    command = ["serve", "graph.yaml", "--http-port", "0", "--grpc-port", "off", "--allow-client-shm"]
    with subprocess.Popen(
        [sys.executable, "-m", "servinggraph", *command],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as server:  # fmt: skip
        assert server.stdout is not None
        url = next(line.rpartition("//")[2].strip() for line in server.stdout if "HTTP on" in line)
        with triton.InferenceServerClient(url) as client:
            client.register_system_shared_memory("r", key, 64)
            client.infer("double", [input_in("r", "x", "FP32", [4], 16)], outputs=[output_in("r", "y", 16, 32)])
        server.terminate()
        _, complaints = server.communicate(timeout=60)
    assert (0, False) == (server.returncode, "resource_tracker" in complaints), complaints
    assert Path(f"/dev/shm{key}").exists()
    got = shm.get_contents_as_numpy(handle, np.float32, [4], 32)
    assert (numbers() * 2).tolist() == got.tolist()
    del got
