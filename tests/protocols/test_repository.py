"""Index, load and unload by Triton's own clients, over HTTP and gRPC, and requests while graphs come and go."""

from __future__ import annotations

import base64
import json
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http
from tritonclient.utils import InferenceServerException

from servinggraph.lifecycle import RepositorySettings

GRAPH = "inputs: {x: {datatype: FP32, shape: [-1]}}\nnodes:\n  n: {step: python, call: 'steps:work'}\nanswer: n\n"
TWO_STEPS = (
    "inputs: {x: {datatype: FP32, shape: [-1]}}\nnodes:\n  n: {step: python, call: 'steps:work', keep: all}\n"
    "  m: {step: python, call: 'steps:again'}\nanswer: m\n"
)
WAITS = "import asyncio, pathlib\nasync def work(value):\n    here = pathlib.Path(__file__).parent\n    with (here / 'began').open('a') as file:\n        file.write('.')\n    while not (here / 'go').exists():\n        await asyncio.sleep(0.002)\n    return {'y': value['x']}\n"


def answering(number):
    return f"def work(value):\n    return {{'y': value['x'] * 0 + {number}}}\n"


def write(folder: Path, code: str, graph: str = GRAPH) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "steps.py").write_text(code)
    (folder / "graph.yaml").write_text(graph)
    return folder


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "repository"
    write(folder / "a" / "1", answering(1))
    write(folder / "a" / "2", answering(2))
    write(folder / "b", answering(7))
    (folder / "a" / "config.yaml").write_text("versions: all\n")
    return folder


@pytest.fixture(params=["http", "grpc"])
def wire(request):
    return request.param


@pytest.fixture
def opened(wire, folder, http_server, grpc_server):
    """Return what opens the folder behind the wire, with a client of it."""
    clients = []

    def start(mode="explicit", load=("*",), **settings):
        kept = RepositorySettings(folder=folder, mode=mode, load=load if mode == "explicit" else (), **settings)
        server = (http_server if wire == "http" else grpc_server)(repository=kept)
        library = tritonclient.http if wire == "http" else tritonclient.grpc
        client = library.InferenceServerClient(server.url)
        clients.append(client)
        return server, client

    yield start
    for client in clients:
        client.close()


def index_of(client):
    index = client.get_model_repository_index()
    if not isinstance(index, list):
        index = [{"name": m.name, "version": m.version, "state": m.state, "reason": m.reason} for m in index.models]
    return {(line["name"], line["version"]): (line["state"], line["reason"]) for line in index}


def ask(client, name, version=""):
    library = tritonclient.http if isinstance(client, tritonclient.http.InferenceServerClient) else tritonclient.grpc
    tensor = library.InferInput("x", [1], "FP32")
    tensor.set_data_from_numpy(np.zeros(1, np.float32))
    answer = client.infer(name, [tensor], version)
    response = answer.get_response()
    said = response["model_version"] if isinstance(response, dict) else response.model_version
    return said, float(answer.as_numpy("y")[0])


def test_graphs_are_listed_loaded_and_unloaded(opened):
    server, client = opened(load=())
    assert {("a", ""): ("UNAVAILABLE", "not loaded"), ("b", ""): ("UNAVAILABLE", "not loaded")} == index_of(client)
    assert client.is_server_ready()
    client.load_model("a")
    assert ("READY", "") == index_of(client)["a", "1"]
    assert client.is_model_ready("a", "2")
    assert ("2", 2.0) == ask(client, "a")
    assert ("1", 1.0) == ask(client, "a", "1")
    client.unload_model("a")
    client.unload_model("a", unload_dependents=True)
    client.unload_model("nobody")
    assert not client.is_model_ready("a")
    with pytest.raises(InferenceServerException, match="'a' has no available versions"):
        ask(client, "a")
    assert client.is_server_ready()


def test_a_load_takes_a_configuration_and_files(opened, folder):
    server, client = opened()
    client.load_model("a", config=json.dumps({"version_policy": {"specific": {"versions": [1]}}}))
    assert ("1", 1.0) == ask(client, "a")
    assert [1] == [int(number) for number in configuration(client, "a")["version_policy"]["specific"]["versions"]]
    files = {"file:5/graph.yaml": GRAPH.encode(), "file:5/steps.py": answering(9).encode()}
    client.load_model("a", config="{}", files=files)
    assert ("5", 9.0) == ask(client, "a")
    with pytest.raises(InferenceServerException, match="version 1 is not found"):
        ask(client, "a", "1")
    client.load_model("a")
    assert ("2", 2.0) == ask(client, "a")
    assert "specific" not in configuration(client, "a")["version_policy"]


def configuration(client, name):
    if isinstance(client, tritonclient.grpc.InferenceServerClient):
        return client.get_model_config(name, as_json=True)["config"]
    return client.get_model_config(name)


def test_what_goes_wrong_has_tritons_words_and_status(opened, wire, folder):
    server, client = opened()
    cases = [
        (lambda: client.load_model("nope"), "failed to load 'nope', failed to poll from model repository", "500", "INTERNAL"),
        (lambda: client.load_model("..", config="{}"), "must not contain path traversal characters", "400", "INVALID_ARGUMENT"),
        (lambda: client.load_model("a", config="{}", files={"file:1/../x": b""}), "path traversal", "400", "INVALID_ARGUMENT"),
        (
            lambda: client.load_model("a", config='{"instance_group": 1}'),
            "'instance_group' has no meaning",
            "400",
            "INVALID_ARGUMENT",
        ),
    ]
    for call, text, status, code in cases:
        with pytest.raises(InferenceServerException, match=text) as caught:
            call()
        assert (status if wire == "http" else f"StatusCode.{code}") == caught.value.status()
    write(folder / "b", "1/0\n")
    with pytest.raises(InferenceServerException, match="'b', what was loaded before serves on: .*ZeroDivisionError") as caught:
        client.load_model("b")
    assert str(folder) not in str(caught.value)
    assert ("1", 7.0) == ask(client, "b")
    state, reason = index_of(client)["b", "1"]
    assert "READY" == state
    assert "ZeroDivisionError" in reason


@pytest.mark.parametrize("mode", ["none", "poll"])
def test_without_the_explicit_mode_nothing_can_be_loaded(opened, wire, mode):
    server, client = opened(mode)
    for change in (client.load_model, client.unload_model):
        with pytest.raises(InferenceServerException, match="explicit model load / unload is not allowed if polling") as caught:
            change("a")
        assert ("503" if wire == "http" else "StatusCode.UNAVAILABLE") == caught.value.status()
    assert ("2", 2.0) == ask(client, "a")


def test_an_unload_of_a_busy_graph_loses_no_answer(opened, folder, until):
    busy = write(folder / "busy", WAITS)
    server, client = opened()
    with ThreadPoolExecutor(8) as pool:
        library = tritonclient.http if isinstance(client, tritonclient.http.InferenceServerClient) else tritonclient.grpc
        clients = [library.InferenceServerClient(server.url) for _ in range(8)]

        def one(client):
            tensor = library.InferInput("x", [1], "FP32")
            tensor.set_data_from_numpy(np.ones(1, np.float32))
            return float(client.infer("busy", [tensor]).as_numpy("y")[0])

        asking = [pool.submit(one, client) for client in clients]
        until(lambda: (busy / "began").exists() and 8 == len((busy / "began").read_text()))
        client.unload_model("busy")
        assert ("UNLOADING", "") == index_of(client)["busy", "1"]
        with pytest.raises(InferenceServerException, match="no available versions"):
            ask(client, "busy")
        (busy / "go").touch()
        assert [1.0] * 8 == [answer.result() for answer in asking]
        until(lambda: index_of(client)["busy", "1"] == ("UNAVAILABLE", "unloaded"))
        for other in clients:
            other.close()


def test_requests_go_on_while_graphs_are_reloaded_once_with_a_broken_file(opened, wire, folder, until):
    """The recorded run of this, larger, is in tests/protocols/load_under_fire.md."""
    code = "N = {n}\ndef work(value):\n    return {{'one': value['x'] * 0 + N}}\ndef again(value):\n    return {{'y': value['one'], 'z': value['x'] * 0 + N}}\n"
    fire = write(folder / "fire", code.format(n=0), TWO_STEPS)
    server, client = opened()
    library = tritonclient.http if wire == "http" else tritonclient.grpc
    seen: list[tuple[float, float]] = []
    stop = threading.Event()

    def hammer():
        tensor = library.InferInput("x", [1], "FP32")
        tensor.set_data_from_numpy(np.zeros(1, np.float32))
        with library.InferenceServerClient(server.url) as own:
            while not stop.is_set():
                answer = own.infer("fire", [tensor])
                seen.append((float(answer.as_numpy("y")[0]), float(answer.as_numpy("z")[0])))

    with ThreadPoolExecutor(4) as pool:
        hammering = [pool.submit(hammer) for _ in range(4)]
        for number in range(1, 7):
            if number == 3:
                (fire / "graph.yaml").write_text("graph: [")
                with pytest.raises(InferenceServerException, match="serves on"):
                    client.load_model("fire")
                (fire / "graph.yaml").write_text(TWO_STEPS)
            (fire / "steps.py").write_text(code.format(n=number))
            client.load_model("fire")
            reached = len(seen) + 20
            until(lambda reached=reached: len(seen) >= reached or any(task.done() for task in hammering))
        stop.set()
        for task in hammering:
            task.result()
        assert ("1", 6.0) == ask(client, "fire")
    assert all(first == second for first, second in seen)
    assert set(range(7)) >= {int(first) for first, _ in seen}
    assert 6.0 in {first for first, _ in seen}


@pytest.mark.parametrize(
    ("path", "body", "status", "text"),
    [
        ("index", b'{"ready": 1}', 400, "'ready' is true or false"),
        ("index", b"[1", 400, "failed to parse the request JSON buffer"),
        ("index", b"[1]", 400, "expected an object, got list"),
        ("models/a/load", b'{"parameters": 1}', 400, "'parameters' is an object"),
        ("models/a/load", b'{"parameters": {"config": 1}}', 400, "load parameter 'config' is text"),
        ("models/a/load", b'{"parameters": {"config": "{}", "file:1/x": "not base64!"}}', 400, "'file:1/x' is not base64"),
        ("models/a/load", b'{"parameters": {"color": "red"}}', 400, "unrecognized load parameter 'color'"),
        ("models/a/unload", b'{"parameters": {"color": "red"}}', 400, "unrecognized unload parameter 'color'"),
        ("models/a/unload", b'{"parameters": {"unload_dependents": 1}}', 400, "'unload_dependents' is true or false"),
        ("models/a/load", b" " * 5000, 413, "limit 'max_body_bytes'"),
    ],
)
def test_wrong_http_requests_are_told_what_was_expected(http_server, folder, path, body, status, text):
    server = http_server(repository=RepositorySettings(folder=folder, mode="explicit", load=("*",)), max_body_bytes=4096)
    answer = server.post(f"/v2/repository/{path}", body)

    assert status == answer.status
    assert text in answer.error


def test_over_http_bodies_may_be_empty_and_a_repository_may_be_named(http_server, folder):
    server = http_server(repository=RepositorySettings(folder=folder, mode="explicit"))
    for prefix in ("/v2/repository", "/v2/repository/mine"):
        assert 200 == server.post(f"{prefix}/models/b/load", b"").status
        lines = server.post(f"{prefix}/index", b"").json()
        assert {"name": "b", "version": "1", "state": "READY", "reason": ""} in lines
        assert [lines[-1]] == server.post(f"{prefix}/index", {"ready": True}).json()
        assert 200 == server.post(f"{prefix}/models/b/unload", b"").status
    assert 405 == server.get("/v2/repository/index").status


def test_a_graph_that_is_replaced_while_a_body_comes_in_answers_as_the_new_one(http_server, folder, until):
    (folder / "a" / "config.yaml").write_text("versions: {latest: 1}\n")
    server = http_server(repository=RepositorySettings(folder=folder, mode="explicit", load=("*",)))
    body = json.dumps({"inputs": [{"name": "x", "datatype": "FP32", "shape": [1], "data": [0]}]}).encode()
    connections = [server.connect() for _ in range(2)]
    paths = ("/v2/models/a/infer", "/v2/models/b/infer")
    for connection, path in zip(connections, paths, strict=True):
        connection.send(f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body[:5])
    until(lambda: server.in_flight == 2)
    write(folder / "a" / "3", answering(3))
    assert 200 == server.post("/v2/repository/models/a/load", b"").status
    assert 200 == server.post("/v2/repository/models/b/unload", b"").status
    for connection in connections:
        connection.send(body[5:])
    answers = [connection.answer() for connection in connections]
    for connection in connections:
        connection.close()
    assert ("3", [3.0]) == (answers[0].json()["model_version"], answers[0].json()["outputs"][0]["data"])
    assert (503, "Request for unknown model: 'b' was unloaded") == (answers[1].status, answers[1].error)


def test_files_over_http_are_base64(http_server, folder):
    server = http_server(repository=RepositorySettings(folder=folder, mode="explicit"))
    files = {"file:1/graph.yaml": GRAPH.encode(), "file:1/steps.py": answering(4).encode()}
    parameters = {"config": "{}", **{name: base64.b64encode(content).decode() for name, content in files.items()}}
    assert 200 == server.post("/v2/repository/models/new/load", {"parameters": parameters}).status
    assert 200 == server.get("/v2/models/new/versions/1/ready").status


def test_files_of_a_load_that_have_no_place_on_this_machine_are_refused_with_what_it_takes(
    http_server, folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    server = http_server(repository=RepositorySettings(folder=folder, mode="explicit"))
    files = {"file:1/graph.yaml": base64.b64encode(GRAPH.encode()).decode()}
    answer = server.post("/v2/repository/models/new/load", {"parameters": {"config": "{}", **files}})
    assert 503 == answer.status
    assert "failed to load 'new', the server has no folder for its files (No such file or directory)" in answer.error
    assert "/tmp, or where TMPDIR says" in answer.error
