"""The images, built and run for real: `make image-test`."""

from __future__ import annotations

import http.client
import json
import threading
import time
import urllib.error
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc as grpcclient
import tritonclient.http as httpclient
from images import buildah, image_config

from servinggraph import Graph

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.timeout(300)  # a container is a copy of all its files, on a disk that others use
BARE, DIGITS = "localhost/servinggraph-test", "localhost/digits-test"
SCANS = np.load(ROOT / "examples" / "digits" / "holdout.npz")["images"][:4]


@pytest.fixture(scope="module")
def expected():
    """What the graph answers without an image and without a port."""
    with Graph.load(ROOT / "examples" / "digits" / "graph.yaml").mock() as server:
        return server.infer(image=SCANS).outputs


def check(outputs, expected):
    assert outputs
    for name, array in outputs.items():
        np.testing.assert_allclose(array, expected[name], rtol=1e-5)


def over_http(address):
    with httpclient.InferenceServerClient(address) as client:
        return asked(client, httpclient)


def over_grpc(address):
    with grpcclient.InferenceServerClient(address) as client:
        return asked(client, grpcclient)


def asked(client, package):
    tensor = package.InferInput("image", list(SCANS.shape), "UINT8")
    tensor.set_data_from_numpy(SCANS)
    return client.infer("digits", [tensor])


def test_a_graphs_image_answers_as_the_graph_does_over_http_and_grpc(start, expected):
    running = start(DIGITS)
    names = list(expected)
    check({name: over_http(running.http).as_numpy(name) for name in names}, expected)
    check({name: over_grpc(running.grpc).as_numpy(name) for name in names}, expected)


def test_it_runs_as_nobody_in_particular_on_a_root_that_cannot_be_written(start):
    running = start(DIGITS)
    assert {"10001"} == set(running.status("Uid").split()) == set(running.status("Gid").split())
    assert 0 == int(running.status("CapEff"), 16)
    for folder in ("/", "/tmp", "/models", "/opt/servinggraph"):
        assert running.run("touch", f"{folder}/written").returncode, folder
    over_http(running.http)


def test_it_runs_as_any_user_without_a_name_or_a_home(start, expected):
    running = start(DIGITS, user="1000650000:0")
    assert {"1000650000"} == set(running.status("Uid").split())
    check({name: over_http(running.http).as_numpy(name) for name in expected}, expected)


def test_the_bare_image_serves_what_is_mounted_at_models_by_its_default_command(start, tmp_path, expected):
    folder = tmp_path / "digits"
    (folder / "models").mkdir(parents=True)
    for name in ("graph.yaml", "digits_steps.py", "models/mlp.onnx", "models/tree.onnx"):
        (folder / name).write_bytes((ROOT / "examples" / "digits" / name).read_bytes())
    for place in (tmp_path, folder, folder / "models"):
        place.chmod(0o755)
    assert ["serve", "/models", "--host", "0.0.0.0"] == image_config(BARE)["Cmd"]
    running = start(BARE, None, {tmp_path: "/models"})
    check({name: over_http(running.http).as_numpy(name) for name in expected}, expected)


def test_its_health_check_tells_a_server_that_answers_from_one_that_does_not(start):
    running = start(DIGITS)
    assert ["CMD", "servinggraph", "health"] == image_config(DIGITS)["Healthcheck"]["Test"]
    assert 0 == running.run("servinggraph", "health", f"http://{running.http}").returncode
    assert 1 == running.run("servinggraph", "health", "http://127.0.0.1:1").returncode


def test_there_is_no_compiler_and_no_pip_of_the_servers_in_it(start):
    running = start(DIGITS)
    folders = ("usr/bin", "usr/local/bin", "bin", "opt/servinggraph/bin")
    there = {file.name for folder in folders for file in (running.root / folder).iterdir()}
    assert not there & {"cc", "gcc", "g++", "clang", "tcc", "ld", "as", "make", "go", "rustc", "cargo", "pip", "pip3"}
    assert {"servinggraph", "python3"} <= there


def test_versions_are_those_of_the_lock_file(start):
    running = start(BARE, ["serve", "/models", "--model-control", "explicit"])
    lines = (ROOT / "requirements" / "lock.txt").read_text().splitlines()
    lock = {name.lower(): version for name, _, version in (line.partition("==") for line in lines) if version}
    code = "from importlib.metadata import distributions as d; print(*(f\"{x.metadata['Name']}=={x.version}\" for x in d()))"
    installed = running.run("/opt/servinggraph/bin/python", "-c", code).stdout.split()
    found = {name.lower(): version for name, _, version in (entry.partition("==") for entry in installed)}
    assert {"numpy", "onnxruntime", "grpcio", "starlette"} <= found.keys()
    assert {} == {name: (v, lock[name]) for name, v in found.items() if name in lock and lock[name].split(" ")[0] != v}


def test_sigterm_under_load_loses_nothing(start):
    running = start(DIGITS, ["serve", "/models/digits/graph.yaml", "--shutdown-delay-s", "20"])
    body = json.dumps(
        {"inputs": [{"name": "image", "datatype": "UINT8", "shape": list(SCANS.shape), "data": SCANS.ravel().tolist()}]}
    )
    stop, counts, failures = threading.Event(), [0] * 8, []

    def ask(number):
        host, port = running.http.split(":")
        with closing(http.client.HTTPConnection(host, int(port), timeout=30)) as connection:
            while not stop.is_set():
                try:
                    connection.request("POST", "/v2/models/digits/infer", body, {"Content-Type": "application/json"})
                    answer = connection.getresponse()
                    text = answer.read()
                except (OSError, http.client.HTTPException) as error:
                    failures.append(repr(error))
                    return
                if answer.status != 200:
                    failures.append((answer.status, text))
                counts[number] += 1

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(counts))]
    for thread in threads:
        thread.start()
    end = time.monotonic() + 120
    while min(counts) < 6 and not failures:
        assert time.monotonic() < end, counts
        time.sleep(0.01)

    def look_until_refused():
        while time.monotonic() < end:
            running.get("/v2/health/ready")

    running.process.terminate()
    with pytest.raises(urllib.error.HTTPError):
        look_until_refused()
    time.sleep(0.5)  # a load balancer that has seen it takes a while to send nothing more
    stop.set()
    for thread in threads:
        thread.join()
    assert 0 == running.process.wait(60)
    assert [] == failures


def test_figures_for_the_record(start, capsys):
    """Print size, its division and the start time; MEASURED.md has them."""
    running = start(DIGITS)
    sizes = {}
    for name, folder in {"Debian, Python": "usr", "packages": "opt/servinggraph", "graph": "models"}.items():
        files = [file for file in (running.root / folder).rglob("*") if file.is_file() and not file.is_symlink()]
        sizes[name] = sum(file.stat().st_size for file in files) / 1e6
    site = next((running.root / "opt/servinggraph/lib").glob("python3*/site-packages"))
    packages = {
        folder.name: sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6
        for folder in site.iterdir() if folder.is_dir()
    }  # fmt: skip
    largest = sorted(packages.items(), key=lambda item: -item[1])[:6]
    assert sum(sizes.values()) > 50
    with capsys.disabled():
        print("\n" + ", ".join(f"{name} {size:.0f} MB" for name, size in sizes.items()))
        print("largest packages: " + ", ".join(f"{name} {size:.0f} MB" for name, size in largest))
        print(f"ready after {running.started_s:.2f} s")
        print(buildah("images", "--format", "{{.Name}} {{.Size}}"))
