"""The command line, as a person at a terminal meets it."""

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from servinggraph.cli import main

COMMAND = [sys.executable, "-m", "servinggraph"]

GRAPH = """\
graph: echo
inputs:
  x: {datatype: FP32, shape: [-1, 2]}
nodes:
  same: {step: python, call: cli_test_steps:same}
answer: same
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "graph.yaml").write_text(GRAPH)
    (tmp_path / "cli_test_steps.py").write_text("def same(value): return value\n")
    yield tmp_path
    sys.modules.pop("cli_test_steps", None)


def run(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


class Served:
    """A `servinggraph serve` process that has printed its banner."""

    def __init__(self, *arguments):
        self.process = subprocess.Popen(
            [*COMMAND, "serve", *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.banner = ""
        for line in self.process.stdout:
            self.banner += line
            if "curl" in line:
                break

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()


def test_serve_prints_what_where_and_a_curl_line_that_works(folder):
    with Served("graph.yaml", "--http-port", "0", "--grpc-port", "off") as served:
        assert "echo  version 1  (graph.yaml)" in served.banner
        assert re.search(r"same +python cli_test_steps:same \(inline\)", served.banner)
        assert re.search(r"HTTP on http://127.0.0.1:\d+", served.banner)
        line = next(line for line in served.banner.splitlines() if "curl" in line)
        answer = json.loads(subprocess.check_output(shlex.split(line), text=True))
        assert "echo" == answer["model_name"]
        assert {"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [0.0, 0.0]} == answer["outputs"][0]


@pytest.mark.parametrize("name", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_with_0(folder, name):
    with Served("graph.yaml", "--http-port", "0", "--grpc-port", "off") as served:
        served.process.send_signal(name)
        assert 0 == served.process.wait(60)


def test_a_banner_that_cannot_be_printed_keeps_nobody_from_serving(folder, free_port):
    port = free_port()
    command = [*COMMAND, "serve", "graph.yaml", "--http-port", str(port), "--grpc-port", "off"]
    with Path("/dev/full").open("w") as full:
        process = subprocess.Popen(command, stdout=full, stderr=subprocess.PIPE, text=True)
    try:
        end = time.monotonic() + 120
        while 0 != run("health", f"http://127.0.0.1:{port}").exit_code:
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.05)
    finally:
        process.terminate()
        _, log = process.communicate(timeout=60)
    assert "stopped" in log


def fails(*arguments):
    done = subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, text=True, timeout=120, check=False)
    assert 0 != done.returncode
    assert "Traceback" not in done.stderr
    return done.stderr


def test_a_port_in_use_is_one_sentence(folder):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"cannot listen on 127.0.0.1 port {port} (http): Address already in use" in fails(
            "serve", "graph.yaml", "--http-port", port, "--grpc-port", "off", "--log-level", "error"
        )


def test_a_missing_file_is_one_sentence(folder):
    assert "there is no file or folder 'nope.yaml'\n1 problem: not served\n" == fails("serve", "nope.yaml")


def test_a_broken_graph_prints_its_problems(folder):
    (folder / "graph.yaml").write_text(GRAPH.replace("answer: same", "answer: sane").replace("step: python", "step: pithon"))
    printed = fails("serve", "graph.yaml")
    assert "graph.yaml:5: node 'same': unknown step 'pithon'; did you mean 'python'?" in printed
    assert "graph.yaml:6: 'answer' names 'sane', which is no node; did you mean 'same'?" in printed
    assert "2 problems: not served" in printed


def test_a_step_that_fails_to_load_is_one_sentence(folder):
    (folder / "cli_test_steps.py").write_text(
        "class same:\n    def load(self): raise OSError('no weights')\n    def __call__(self, value): return value\n"
    )
    assert "node 'same': failed to load: OSError: no weights" in fails(
        "serve", "graph.yaml", "--http-port", "0", "--grpc-port", "off"
    )


def test_an_option_out_of_range_names_the_option(folder):
    assert "--max-in-flight 0: expected greater than or equal to 1" in fails("serve", "graph.yaml", "--max-in-flight", "0")
    assert "--http-port tcp" in fails("serve", "graph.yaml", "--http-port", "tcp")


def test_a_front_end_that_is_not_installed_is_said(folder):
    (folder / "grpc.py").write_text("raise ModuleNotFoundError(\"No module named 'grpc'\", name='grpc')\n")
    done = subprocess.run(
        [*COMMAND, "serve", "graph.yaml", "--http-port", "0", "--grpc-port", "0"],
        env={**os.environ, "PYTHONPATH": str(folder)}, capture_output=True, text=True, check=False,
    )  # fmt: skip

    assert 1 == done.returncode
    assert done.stderr.startswith("--grpc-port 0: ")
    assert done.stderr.endswith("pip install 'servinggraph[grpc]'\n")


def test_no_front_end_at_all_is_refused(folder):
    assert "every front end is off" in fails("serve", "graph.yaml", "--http-port", "off", "--grpc-port", "off")


def test_logs_can_be_json(folder):
    done = subprocess.Popen(
        [*COMMAND, "serve", "graph.yaml", "--http-port", "0", "--grpc-port", "off", "--log-format", "json"],
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        entry = json.loads(done.stderr.readline())
        assert "info" == entry["level"]
        assert "serving ['echo/1']" in entry["message"]
    finally:
        done.kill()
        done.communicate()


def test_set_reaches_into_the_file(folder):
    result = run("check", "graph.yaml", "--set", "nodes.same.timeout_ms=soon")
    assert 1 == result.exit_code
    assert "node 'same': 'timeout_ms': expected a number, got 'soon' (set by --set nodes.same.timeout_ms=soon)" in result.output


def test_a_folder_of_graphs_is_served_together_and_clashes_are_refused(folder):
    (folder / "other").mkdir()
    text = GRAPH.replace("graph: echo", "graph: other")
    (folder / "other" / "graph.yaml").write_text(text)
    (folder / "other" / "cli_test_steps.py").write_text("def same(value): return value\n")  # a module of its own
    assert "echo version 1: 1 nodes, fine\nother version 1: 1 nodes, fine\n" == run("check", folder).output
    (folder / "other" / "graph.yaml").write_text(text.replace("graph: other", "graph: echo"))
    assert "1: 'graph: echo', but a graph is called like its folder, 'other': change one" in run("check", folder).output
    (folder / "other" / "graph.yaml").write_text(text)
    (folder / "again.yaml").write_text(GRAPH)
    assert "graph 'echo' version 1 is in" in run("check", folder).output
    (folder / "empty").mkdir()
    assert "holds no graph: expected *.yaml, */graph.yaml, */1/graph.yaml or *.onnx" in run("check", folder / "empty").output


def test_a_bare_model_is_served_under_its_file_name(folder):
    import onnx
    from onnx import TensorProto, helper

    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "x"], ["y"])],
        "g",
        [info("x", TensorProto.FLOAT, ["N", 2])],
        [info("y", TensorProto.FLOAT, ["N", 2])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 9
    onnx.save(model, "double.onnx")
    assert "double version 1: 1 nodes, fine\n" == run("check", "double.onnx").output
    with Served("double.onnx", "--http-port", "0", "--grpc-port", "off", "--set", "nodes.model.batch.max_rows=4") as served:
        assert re.search(r"model +onnx double.onnx on cpu \((inline|thread)\)", served.banner)
    assert "there is no file 'gone.onnx'" in run("check", "gone.onnx").output


def test_plot_draws_svg_and_mermaid(folder):
    assert 0 == run("plot", "graph.yaml", "-o", "graph.svg").exit_code
    assert "<svg" in Path("graph.svg").read_text()
    assert 0 == run("plot", "graph.yaml", "-o", "graph.mmd").exit_code
    assert Path("graph.mmd").read_text() == run("plot", "graph.yaml").output
    assert "inputs --> same" in Path("graph.mmd").read_text()
    assert "Graphviz cannot write 'graph.xyz'" in run("plot", "graph.yaml", "-o", "graph.xyz").output


def test_plot_without_graphviz_says_what_to_install(folder, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert "apt install graphviz" in run("plot", "graph.yaml", "-o", "graph.svg").output


def test_schema_and_version_print(folder):
    assert "https://json-schema.org" in run("schema").output
    assert "servinggraph " in run("version").output
    assert "onnxruntime " in run("version").output


def test_init_makes_a_project_whose_own_test_passes(folder):
    assert 0 == run("init", "my-graph").exit_code
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"],
        cwd="my-graph", capture_output=True, text=True, env=environment, timeout=150, check=False,
    )  # fmt: skip
    assert "1 passed" in done.stdout, done.stdout + done.stderr
    assert "is there and not empty" in run("init", "my-graph").output
    done = subprocess.run([*COMMAND, "check", "graph.yaml"], cwd="my-graph", capture_output=True, text=True, check=False)
    assert "my-graph version 1: 2 nodes, fine\n" == done.stdout


@pytest.mark.parametrize(
    ("name", "graph", "call"),
    [
        ("123", '"123"', "graph_123"),
        ("yes", '"yes"', "yes"),
        ("null", '"null"', "null"),
        ("numpy", "numpy", "graph_numpy"),
        ("json", "json", "graph_json"),
        ("class", "class", "graph_class"),
        ("test_graph", "test_graph", "graph_test_graph"),
    ],
)
def test_init_finds_names_that_work(folder, name, graph, call):
    done = run("init", name)
    assert 0 == done.exit_code, done.output
    text = Path(name, "graph.yaml").read_text()
    assert f"graph: {graph}\n" in text
    assert f"call: {call}.steps:clean" in text
    assert f"{name} version 1: 2 nodes, fine\n" == run("check", f"{name}/graph.yaml").output


def test_init_fills_the_folder_that_it_is_called_in(folder, monkeypatch):
    Path("here").mkdir()
    monkeypatch.chdir("here")
    assert 0 == run("init", ".").exit_code
    assert "graph: here\n" in Path("graph.yaml").read_text()


def test_init_says_why_it_cannot(folder):
    Path("file").touch()
    for name, code, text in [
        ("", 2, "NAME is empty"),
        ("my graph", 2, "graph name 'my graph' is not URL-safe"),
        ("file", 1, "cannot make 'file': Not a directory"),
        ("file/x", 1, "cannot make 'file/x': Not a directory"),
    ]:
        done = run("init", name)
        assert (code, True) == (done.exit_code, text in done.output), done.output
    assert not Path("my graph").exists()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--otel", "on", "--otel-endpoint", "collector:4318"], "--otel-endpoint collector:4318: expected http://host:4318"),
        (["--access-log", "no/access.log"], "--access-log no/access.log: No such file or directory"),
    ],
)
def test_where_nothing_can_go_is_refused_at_the_start(folder, options, text):
    done = run("serve", "graph.yaml", "--http-port", "0", "--grpc-port", "off", *options)
    assert (1, f"{text}\n") == (done.exit_code, done.output)


@pytest.mark.parametrize("option", ["--http-port", "--grpc-port", "--metrics-port"])
def test_a_port_beyond_all_ports_is_refused(folder, option):
    done = run("serve", "graph.yaml", option, "65536")
    assert (2, True) == (done.exit_code, f"{option} 65536: expected less than or equal to 65535" in done.output)


def test_plot_says_where_it_cannot_write(folder):
    for name in ("no/graph.svg", "no/graph.mmd"):
        done = run("plot", "graph.yaml", "-o", name)
        assert (1, f"cannot write {name}: No such file or directory\n") == (done.exit_code, done.output)


@pytest.mark.parametrize("command", ["serve", "check", "plot", "schema", "version", "init"])
def test_every_command_explains_itself(command):
    assert "Usage:" in run(command, "--help").output


def test_a_signal_while_a_graph_loads_ends_it_at_once(folder):
    (folder / "cli_test_steps.py").write_text(
        "import time, sys\n"
        "class same:\n    def load(self): print('loading', file=sys.stderr, flush=True); time.sleep(600)\n"
        "    def __call__(self, value): return value\n"
    )
    process = subprocess.Popen(
        [*COMMAND, "serve", "graph.yaml", "--http-port", "0", "--grpc-port", "off"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert "loading\n" == process.stderr.readline()
        process.send_signal(signal.SIGTERM)
        assert 0 == process.wait(60)
    finally:
        process.kill()
        process.communicate()


def test_connections_are_bounded(folder):
    with Served("graph.yaml", "--http-port", "0", "--grpc-port", "off", "--max-connections", "2") as served:
        port = int(re.search(r"HTTP on http://127.0.0.1:(\d+)", served.banner)[1])
        address = ("127.0.0.1", port)
        with socket.create_connection(address), socket.create_connection(address), socket.create_connection(address) as third:
            third.settimeout(60)
            answer = third.recv(4096).decode()
        assert answer.startswith("HTTP/1.1 503 Service Unavailable")
        assert "(limit 'max_connections')" in answer
