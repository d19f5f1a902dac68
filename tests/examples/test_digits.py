"""The digits example as a user runs it: a server process, every held-out scan, and two judges.

The judges are the same two ONNX models run by onnxruntime alone and averaged by numpy, and
what scikit-learn alone answered when the models were trained.
"""

import http.client
import json
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import urllib.request
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import tritonclient.http as triton

from servinggraph import Graph, ServingGraphError

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "digits"
GRAPH = EXAMPLE / "graph.yaml"
SIZES = [1, 2, 3, 5, 8, 13, 21, 34, 55, 100]  # rows of a request; the last is more than a batch holds
# ONNX Runtime adds in another order for another number of rows, so the last bits of a float32 may differ.
CLOSE = {"rtol": 1e-5, "atol": 1e-7}


@pytest.fixture(scope="module")
def held_out():
    with np.load(EXAMPLE / "holdout.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def alone(held_out):
    """What the two models answer without servinggraph: probabilities of each, and their mean."""
    pixels = held_out["images"].reshape(-1, 64).astype(np.float32) / 16
    sessions = {name: onnxruntime.InferenceSession(EXAMPLE / "models" / f"{name}.onnx") for name in ("tree", "mlp")}
    answers = {name: session.run(["probabilities"], {"pixels": pixels})[0] for name, session in sessions.items()}
    return {**answers, "mean": (answers["tree"] + answers["mlp"]) / 2}


@contextmanager
def serving(log):
    """Start the server on a free port; gives (process, port, what it printed)."""
    command = [Path(sys.executable).with_name("servinggraph"), "serve", "examples/digits/graph.yaml"]
    with (
        log.open("wb") as errors,
        subprocess.Popen(
            [*command, "--http-port", "0", "--grpc-port", "off"], cwd=ROOT, stdout=subprocess.PIPE, stderr=errors, text=True
        ) as process,
    ):
        try:
            banner = ""
            for line in process.stdout:
                banner += line
                if "curl" in line:
                    break
            found = re.search(r"HTTP on http://127\.0\.0\.1:(\d+)", banner)
            assert found, f"printed {banner!r} and {log.read_text()!r}"
            yield process, int(found[1]), banner
        finally:
            process.kill()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("digits") / "log") as running:
        yield running


@pytest.fixture(scope="module")
def port(server):
    return server[1]


def post(port, body, headers=None):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request("POST", "/v2/models/digits/infer", body, headers or {})
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    finally:
        connection.close()


def json_request(images, datatype="UINT8"):
    tensor = {"name": "image", "datatype": datatype, "shape": list(images.shape), "data": images.tolist()}
    return json.dumps({"inputs": [tensor]})


def pieces(count):
    """Cut the rows 0 to count into requests of various sizes."""
    slices, start = [], 0
    while start < count:
        size = SIZES[len(slices) % len(SIZES)]
        slices.append(slice(start, min(start + size, count)))
        start += size
    return slices


def over_json(port, images):
    def ask(rows):
        status, answer = post(port, json_request(images[rows]))
        assert status == 200, answer
        assert answer["parameters"] == {"score.members": "tree,mlp"}
        dtypes = {"INT64": np.int64, "FP32": np.float32}
        return {
            tensor["name"]: np.array(tensor["data"], dtypes[tensor["datatype"]]).reshape(tensor["shape"])
            for tensor in answer["outputs"]
        }

    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(ask, pieces(len(images))))


def over_binary(port, images):
    def start(client, rows):
        tensor = triton.InferInput("image", images[rows].shape, "UINT8")
        tensor.set_data_from_numpy(images[rows])
        return client.async_infer("digits", [tensor])

    with triton.InferenceServerClient(f"127.0.0.1:{port}", concurrency=16) as client:
        started = [start(client, rows) for rows in pieces(len(images))]
        results = [request.get_result() for request in started]
    return [{name: result.as_numpy(name) for name in ("label", "confidence", "probabilities")} for result in results]


@pytest.mark.parametrize("ask", [over_json, over_binary])
def test_every_held_out_scan_is_answered_as_the_models_alone_answer_it(ask, port, held_out, alone):
    replies = ask(port, held_out["images"])

    joined = {name: np.concatenate([reply[name] for reply in replies]) for name in replies[0]}
    assert {name: array.dtype.name for name, array in joined.items()} == {
        "label": "int64",
        "confidence": "float32",
        "probabilities": "float32",
    }
    np.testing.assert_array_equal(joined["label"], alone["mean"].argmax(axis=1))
    np.testing.assert_allclose(joined["probabilities"], alone["mean"], **CLOSE)
    np.testing.assert_allclose(joined["confidence"], alone["mean"].max(axis=1), **CLOSE)
    # scikit-learn computes in double precision, the exported models in single.
    np.testing.assert_array_equal(joined["label"], held_out["probabilities"].argmax(axis=1))
    np.testing.assert_allclose(joined["probabilities"], held_out["probabilities"], rtol=1e-3, atol=2e-6)
    assert np.mean(joined["label"] == held_out["labels"]) >= 0.96


def test_the_sample_is_the_first_held_out_scan(port, held_out):
    body = (EXAMPLE / "sample.json").read_bytes()
    np.testing.assert_array_equal(json.loads(body)["inputs"][0]["data"], held_out["images"][:1])

    status, answer = post(port, body)

    assert status == 200
    assert answer["outputs"][0] == {
        "name": "label",
        "datatype": "INT64",
        "shape": [1],
        "data": [int(held_out["labels"][0])],
    }


@pytest.mark.skipif(not shutil.which("curl"), reason="curl is not installed")
def test_the_printed_curl_line_works(server, held_out):
    line = next(line for line in server[2].splitlines() if "curl" in line)
    assert "@examples/digits/sample.json" in line

    reply = subprocess.run(shlex.split(line), cwd=ROOT, capture_output=True, check=True, timeout=120)

    assert json.loads(reply.stdout)["outputs"][0]["data"] == [held_out["labels"][0]]


def test_metadata_is_complete(port):
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/models/digits", timeout=30) as reply:
        metadata = json.load(reply)

    assert metadata["inputs"] == [{"name": "image", "datatype": "UINT8", "shape": [-1, 8, 8]}]
    assert metadata["outputs"] == [
        {"name": "label", "datatype": "INT64", "shape": [-1]},
        {"name": "confidence", "datatype": "FP32", "shape": [-1]},
        {"name": "probabilities", "datatype": "FP32", "shape": [-1, 10]},
    ]


def with_pixel(value, dtype=np.uint8):
    images = np.zeros((3, 8, 8), dtype)
    images[2, 4, 5] = value
    return images


@pytest.mark.parametrize(
    ("images", "datatype", "message"),
    [
        (
            with_pixel(17),
            "UINT8",
            "node 'prepare': pixels of 'image' go from 0 to 16, but there is 17 in row 4, column 5 of scan 2",
        ),
        (np.zeros((0, 8, 8), np.uint8), "UINT8", "node 'prepare': 'image' holds no scan"),
        (with_pixel(-1, int), "UINT8", "is -1, out of range for UINT8"),
        (np.zeros((1, 64), np.uint8), "UINT8", "Expected [-1,8,8], got [1,64]"),
        (with_pixel(1, np.float32), "FP32", "data-type is 'FP32', but model 'digits' expects 'UINT8'"),
    ],
)
def test_bad_input_is_a_400_that_says_what_is_wrong(port, images, datatype, message):
    status, answer = post(port, json_request(images, datatype))

    assert status == 400
    assert message in answer["error"]


def test_sigterm_ends_the_server_cleanly(tmp_path, held_out):
    with serving(tmp_path / "log") as (process, port, _), ThreadPoolExecutor(8) as pool:
        body = json_request(held_out["images"])
        asked = [pool.submit(post, port, body) for _ in range(8)]
        wait(asked, 60, FIRST_COMPLETED)
        process.send_signal(signal.SIGTERM)

        assert process.wait(60) == 0
        for future in asked:
            # Who came too late finds the door closed; nobody is left waiting, or answered in part.
            try:
                status, answer = future.result(60)
            except ConnectionError:
                continue
            assert status in {200, 503}, answer
        with pytest.raises(ConnectionRefusedError):
            post(port, body)
    assert "Traceback" not in (tmp_path / "log").read_text()


@pytest.fixture
def beside_the_example(monkeypatch):
    """Import digits_steps the way a graph file in that folder does."""
    monkeypatch.syspath_prepend(EXAMPLE)


def test_mock_answers_as_the_models_alone(held_out, alone):
    with Graph.load(GRAPH).mock() as server:
        outputs = server.infer(image=held_out["images"]).outputs

    np.testing.assert_array_equal(outputs["label"], alone["mean"].argmax(axis=1))
    np.testing.assert_allclose(outputs["probabilities"], alone["mean"], **CLOSE)


def test_a_fake_stands_in_for_a_branch(fake_model, held_out, alone):
    certain = np.eye(10, dtype=np.float32)[[7]]
    tree = fake_model({"probabilities": certain})

    with Graph.load(GRAPH).mock(replace={"score.tree": tree}) as server:
        reply = server.infer(image=held_out["images"][:20])

    np.testing.assert_allclose(reply.outputs["probabilities"], (certain + alone["mlp"][:20]) / 2, **CLOSE)
    (asked,) = tree.calls
    np.testing.assert_array_equal(asked["pixels"], held_out["images"][:20].reshape(-1, 64) / np.float32(16))


def test_a_branch_that_fails_is_named(fake_model, held_out):
    broken = fake_model(error=RuntimeError("no trees today"))

    with (
        Graph.load(GRAPH).mock(replace={"score.tree": broken}) as server,
        pytest.raises(ServingGraphError, match=r"node 'score\.tree': .*no trees today"),
    ):
        server.infer(image=held_out["images"][:1])


@pytest.mark.parametrize("folder", ["root", "example", "elsewhere"])
def test_python_and_yaml_make_the_same_graph(folder, beside_the_example, monkeypatch, tmp_path):
    monkeypatch.chdir({"root": ROOT, "example": EXAMPLE, "elsewhere": tmp_path}[folder])

    built = runpy.run_path(str(EXAMPLE / "graph.py"))["build"]()

    assert built == Graph.load(GRAPH)
    built.save(tmp_path / "saved.yaml")
    assert Graph.load(tmp_path / "saved.yaml") == built
    if folder == "example":
        assert built.to_dict() == Graph.load(GRAPH).to_dict()


def test_graph_py_reads_the_sample(held_out):
    command = [sys.executable, "examples/digits/graph.py"]

    reply = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=150)

    assert reply.stdout.startswith(f"digit {held_out['labels'][0]}, probability 0.9")


def test_prepare_takes_any_integers(beside_the_example, held_out):
    from digits_steps import prepare

    from servinggraph import InvalidRequest

    for dtype in (np.uint8, np.int8, np.int32, np.int64, np.uint64):
        pixels = prepare({"image": held_out["images"].astype(dtype)})["pixels"]
        assert (pixels.dtype, pixels.shape) == (np.float32, (540, 64))
        assert (pixels.min(), pixels.max()) == (0, 1)
    with pytest.raises(InvalidRequest, match="-1 in row 4, column 5 of scan 2"):
        prepare({"image": with_pixel(-1, np.int32)})


@pytest.mark.slow
def test_training_again_gives_models_as_good(tmp_path, held_out):
    command = [sys.executable, "examples/digits/train.py", str(tmp_path)]

    subprocess.run(command, cwd=ROOT, capture_output=True, check=True, timeout=150)

    with np.load(tmp_path / "holdout.npz") as again:
        np.testing.assert_array_equal(again["images"], held_out["images"])
        # Not equal to the last bit: another processor may add in another order while it trains.
        assert np.mean(again["probabilities"].argmax(axis=1) == again["labels"]) >= 0.96
    assert (tmp_path / "sample.json").read_text() == (EXAMPLE / "sample.json").read_text()
    for name in ("tree", "mlp"):
        for folder in (tmp_path, EXAMPLE):
            assert (folder / "models" / f"{name}.onnx").stat().st_size < 1_000_000
