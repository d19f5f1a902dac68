"""`servinggraph build`: what an image of a graph holds, and what stands in the way of one. Building for real is deploy/docker."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper, save

from servinggraph.cli import main

ROOT = Path(__file__).parents[2]

GRAPH = """\
graph: built
inputs: {x: {datatype: FP32, shape: [-1, 2]}}
nodes:
  same: {step: python, call: "build_steps.first:same"}
answer: same
"""


def run(*arguments):
    return CliRunner().invoke(main, ["build", *map(str, arguments)])


def files_in(context):
    return sorted(str(file.relative_to(context / "files")) for file in (context / "files").rglob("*") if file.is_file())


@pytest.fixture
def project(tmp_path):
    folder = tmp_path / "project"
    package = folder / "build_steps"
    package.mkdir(parents=True)
    (folder / "graph.yaml").write_text(GRAPH)
    (package / "__init__.py").write_text("")
    (package / "first.py").write_text("from . import second\ndef same(value):\n    import build_late\n    return value\n")
    (package / "second.py").write_text("import json, numpy, hypothesis\n")
    (folder / "build_late.py").write_text("from build_steps.third import nothing\n")
    (package / "third.py").write_text("nothing = None\n")
    (folder / "train.py").write_text("import sklearn\n")
    (folder / ".env").write_text("SECRET=1\n")
    (folder / "data.csv").write_text("1,2\n")
    yield folder
    for name in [name for name in sys.modules if "build_" in name and "steps" in name]:
        del sys.modules[name]


def test_the_context_has_the_graph_the_code_that_it_imports_and_nothing_else(project, tmp_path):
    done = run(project / "graph.yaml", "--context-only", tmp_path / "out")
    assert 0 == done.exit_code, done.output
    package = [f"build_steps/{name}.py" for name in ("__init__", "first", "second", "third")]
    assert ["build_late.py", *package, "graph.yaml"] == files_in(tmp_path / "out")


def test_packages_are_pinned_to_what_is_installed_and_those_of_the_base_are_left_out(project, tmp_path):
    from importlib.metadata import version

    run(project / "graph.yaml", "--context-only", tmp_path / "out")
    assert f"hypothesis=={version('hypothesis')}\n" == (tmp_path / "out" / "requirements.txt").read_text()
    assert "requirements.txt" in (tmp_path / "out" / "Dockerfile").read_text()


def test_a_requirements_file_is_used_as_it_is_and_what_it_does_not_pin_is_told(project, tmp_path):
    (project / "requirements.txt").write_text("# ours\nscipy\ntorch==2.9.0\n")
    done = run(project / "graph.yaml", "--context-only", tmp_path / "out")
    assert "pins no version of scipy" in done.output
    assert "# ours\nscipy\ntorch==2.9.0\n" == (tmp_path / "out" / "requirements.txt").read_text()


def test_an_import_that_is_not_installed_is_told(project, tmp_path):
    (project / "build_steps" / "third.py").write_text("def f():\n    import no_such_package_here\n")
    done = run(project / "graph.yaml", "--context-only", tmp_path / "out")
    assert "third.py imports 'no_such_package_here', which is not installed here" in done.output


def test_further_files_are_included_by_pattern_and_a_pattern_that_finds_nothing_is_refused(project, tmp_path):
    done = run(project / "graph.yaml", "--include", "*.csv", "--context-only", tmp_path / "out")
    assert 0 == done.exit_code
    assert "data.csv" in files_in(tmp_path / "out")
    done = run(project / "graph.yaml", "--include", "*.parquet", "--context-only", tmp_path / "other")
    assert (1, True) == (done.exit_code, "'*.parquet' finds no file" in done.output)


def a_model(path, external=""):
    weight = helper.make_tensor("w", TensorProto.FLOAT, [2], np.array([1, 2], np.float32).tobytes(), raw=True)
    node = helper.make_node("Mul", ["x", "w"], ["y"])
    shape = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 2]) for name in ("x", "y")]
    model = helper.make_model(
        helper.make_graph([node], "g", shape[:1], shape[1:], [weight]),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    if not external:
        save(model, path)
        return
    save(model, path, save_as_external_data=True, location=external, size_threshold=0)


def test_models_beside_and_above_the_graph_keep_their_places_with_their_external_data(tmp_path):
    folder = tmp_path / "graphs" / "one"
    folder.mkdir(parents=True)
    a_model(tmp_path / "models" / "above.onnx", external="above.weights")
    a_model(folder / "beside.onnx")
    (tmp_path / "models" / "unused.onnx").write_bytes(b"")
    nodes = "{a: {step: onnx, path: ../../models/above.onnx}, b: {step: onnx, path: beside.onnx, rename: {inputs: {y: x}}}}"
    (folder / "graph.yaml").write_text(
        f"graph: m\ninputs: {{x: {{datatype: FP32, shape: [-1, 2]}}}}\nnodes: {nodes}\nanswer: b\n"
    )
    done = run(folder / "graph.yaml", "--context-only", tmp_path / "out")
    assert 0 == done.exit_code, done.output
    expected = ["graphs/one/beside.onnx", "graphs/one/graph.yaml", "models/above.onnx", "models/above.weights"]
    assert expected == files_in(tmp_path / "out")
    assert '"/models/m/graphs/one/graph.yaml"' in (tmp_path / "out" / "Dockerfile").read_text()
    done = run(tmp_path / "out" / "files" / "graphs" / "one" / "graph.yaml", "--context-only", tmp_path / "again")
    assert 0 == done.exit_code, "what was written can be served"


def test_an_absolute_path_is_refused(tmp_path):
    a_model(tmp_path / "model.onnx")
    graph = f"graph: a\ninputs: {{x: {{datatype: FP32, shape: [-1, 2]}}}}\nnodes: {{a: {{step: onnx, path: {tmp_path}/model.onnx}}}}\nanswer: a\n"
    (tmp_path / "graph.yaml").write_text(graph)
    done = run(tmp_path / "graph.yaml", "--context-only", tmp_path / "out")
    assert (1, True) == (done.exit_code, "absolute path" in done.output), done.output


def test_a_folder_of_graphs_is_served_as_a_folder(tmp_path):
    done = run(ROOT / "examples" / "repository" / "graphs", "--context-only", tmp_path / "out")
    assert 0 == done.exit_code, done.output
    assert {"outliers/config.yaml", "outliers/1/steps.py", "outliers/2/graph.yaml"} <= set(files_in(tmp_path / "out"))
    assert 'CMD ["serve", "/models", "--host", "0.0.0.0"]' in (tmp_path / "out" / "Dockerfile").read_text()


def test_what_cannot_be_served_is_not_built(project, tmp_path):
    (project / "graph.yaml").write_text(GRAPH.replace("same\n", "sam\n"))
    done = run(project / "graph.yaml", "--context-only", tmp_path / "out")
    assert 1 == done.exit_code
    assert "graph.yaml:5" in done.output
    assert not (tmp_path / "out").exists()


def test_a_context_is_written_to_an_empty_folder_only(project, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("")
    done = run(project / "graph.yaml", "--context-only", tmp_path / "out")
    assert (1, True) == (done.exit_code, "is not empty: nothing was written" in done.output)


def test_it_wants_a_name_or_a_folder_and_not_both(project, tmp_path):
    assert 2 == run(project / "graph.yaml").exit_code
    assert 2 == run(project / "graph.yaml", "-t", "x", "--context-only", tmp_path / "out").exit_code


def an_engine(folder, name, info=0, status=0):
    folder.mkdir(exist_ok=True)
    script = folder / name
    script.write_text(f'#!/bin/sh\n[ "$1" = info ] && exit {info}\necho "$@" > {folder}/{name}.asked\nexit {status}\n')
    script.chmod(0o755)


def test_the_first_engine_that_answers_builds_with_what_stands_behind_two_dashes(project, tmp_path, monkeypatch):
    an_engine(tmp_path / "bin", "docker", info=1)
    an_engine(tmp_path / "bin", "podman")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    done = run(project / "graph.yaml", "-t", "built:1", "--", "--build-arg", "A=b")
    assert 0 == done.exit_code, done.output
    assert (tmp_path / "bin" / "podman.asked").read_text().startswith("build --format docker -t built:1 --build-arg A=b -f ")
    assert not (tmp_path / "bin" / "docker.asked").exists()


def test_a_build_that_fails_ends_with_its_status_and_says_where_the_base_comes_from(project, tmp_path, monkeypatch):
    an_engine(tmp_path / "bin", "docker", status=125)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    done = run(project / "graph.yaml", "-t", "built:1")
    assert 125 == done.exit_code
    assert "deploy/docker/Dockerfile of the repository makes servinggraph:" in done.stderr
    done = run(project / "graph.yaml", "-t", "built:1", "--base", "mine:1")
    assert (125, "") == (done.exit_code, done.stderr)


def test_without_an_engine_it_says_what_there_could_be(project, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    done = run(project / "graph.yaml", "-t", "built:1")
    assert (1, True) == (done.exit_code, "docker, podman, buildah, and none is installed" in done.output)
    an_engine(tmp_path, "docker", info=1)
    done = run(project / "graph.yaml", "-t", "built:1", "--engine", "docker")
    assert (1, True) == (done.exit_code, "does not answer 'docker info'" in done.output)
    assert "--context-only" in done.output


def test_an_engine_that_never_answers_is_none(project, tmp_path, monkeypatch):
    monkeypatch.setattr("servinggraph.cli.image.engines.ANSWER_S", 0.05)
    script = tmp_path / "docker"
    script.write_text("#!/bin/sh\nexec /bin/sleep 60\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    done = run(project / "graph.yaml", "-t", "built:1")
    assert (1, True) == (done.exit_code, "does not answer 'docker info'" in done.output), done.output


def test_health_says_what_it_asked_and_why_it_failed():
    done = CliRunner().invoke(main, ["health", "http://127.0.0.1:1"])
    assert (1, True) == (done.exit_code, "http://127.0.0.1:1/v2/health/ready: " in done.output)
    assert 2 == CliRunner().invoke(main, ["health", "file:///etc/passwd"]).exit_code


def test_onnx_runtime_reports_nothing_to_its_makers():
    __import__("servinggraph.steps.onnx")
    assert "1" == os.environ["ORT_DISABLE_TELEMETRY"]
