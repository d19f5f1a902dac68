"""`servinggraph build`: which files and packages of a graph an image has, however they lie on the disk of who builds it."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from click.testing import CliRunner

from servinggraph.cli import main

DIGITS = Path(__file__).parents[2] / "examples" / "digits"
INPUTS = "inputs: {x: {datatype: FP32, shape: [-1, 2]}}"
SAME = "def same(value):\n    return value\n"


def build(path, out, *arguments):
    return CliRunner().invoke(main, ["build", str(path), "--context-only", str(out), *map(str, arguments)])


def files_in(out):
    return sorted(str(file.relative_to(out / "files")) for file in (out / "files").rglob("*") if file.is_file())


def dockerfile(out):
    return (out / "Dockerfile").read_text()


def in_image(out):
    """Check what an image would hold where nothing else is, by what its Dockerfile says."""
    lines = dockerfile(out).splitlines()
    (place,) = (line.split()[-1].rstrip("/") for line in lines if line.startswith("COPY files/"))
    (command,) = (json.loads(line.removeprefix("RUN ")) for line in lines if line.startswith("RUN ["))
    search = next((json.loads(line.partition("=")[2]) for line in lines if line.startswith("ENV PYTHONPATH=")), "")
    moved = [word.replace(place, str(out / "files"), 1) for word in command[1:]]
    return subprocess.run(
        [sys.executable, "-m", "servinggraph", *moved],
        env={"PYTHONPATH": search.replace(place, str(out / "files"))},
        cwd=out / "files",
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


@pytest.fixture
def write(tmp_path):
    """Return what writes a file of the project; code that was loaded from there is forgotten."""

    def write(name, text):
        file = tmp_path / "project" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        return file

    before, path = set(sys.modules), list(sys.path)
    yield write
    sys.path[:] = path
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def graph(call, name="g", more=""):
    return f'graph: {name}\n{INPUTS}\n{more}nodes:\n  a: {{step: python, call: "{call}"}}\nanswer: a\n'


def test_a_virtual_environment_beside_the_graph_stays_out(write, out, monkeypatch):
    file = write("graph.yaml", graph("filed_one:same"))
    site = write(".venv/lib/python3.11/site-packages/filed_installed.py", "def later():\n    import filed_nowhere\n").parent
    write("filed_one.py", "import filed_installed\n" + SAME)
    monkeypatch.syspath_prepend(site)
    done = build(file, out)
    assert (0, ["filed_one.py", "graph.yaml"]) == (done.exit_code, files_in(out)), done.output
    assert "filed_nowhere" not in done.output


def test_a_graph_in_a_graph_brings_its_file_its_code_and_its_models(write, out):
    file = write(
        "outer/graph.yaml",
        f"graph: outer\n{INPUTS}\nnodes: {{a: {{step: graph, path: ../shared/inner.yaml}}}}\nanswer: a\n",
    )
    write("shared/inner.yaml", graph("filed_inner:same", "inner"))
    write("shared/filed_inner.py", "import filed_beside\n" + SAME)
    write("shared/filed_beside.py", "")
    write("shared/unused.yaml", "password: 1\n")
    done = build(file, out)
    assert 0 == done.exit_code, done.output
    assert ["outer/graph.yaml", "shared/filed_beside.py", "shared/filed_inner.py", "shared/inner.yaml"] == files_in(out)
    assert 0 == in_image(out).returncode


def test_labels_and_certificates_to_trust_come_along(write, out):
    labels = "outputs: {x: {datatype: FP32, shape: [-1, 2], labels: names/labels.txt}}\n"
    text = graph("filed_labels:same", more=labels).replace(
        "answer: a",
        "  t: {step: publish, topic: seen, brokers: '127.0.0.1:9', security: {protocol: ssl, ca: topic.pem}}\n"
        "  b: {step: v2, url: 'https://127.0.0.1:9', model: m, tls_ca: ca.pem, inputs: {x: {datatype: FP32, shape: [-1, 2]}},\n"
        "      outputs: {x: {datatype: FP32, shape: [-1, 2]}}}\nanswer: b\n"
        "kafka: {brokers: '127.0.0.1:9', security: {protocol: ssl, ca: certs/ca.pem, cert: certs/me.pem, key: certs/me.key},\n"
        "  input: {topics: [in], group: g}, output: {topic: out}}\n",
    )
    file = write("graph.yaml", text)
    write("filed_labels.py", SAME)
    for name in ("topic.pem", "certs/ca.pem", "certs/me.pem", "certs/me.key"):
        write(name, "")
    write("names/labels.txt", "no\nyes\n")
    write("key.pem", "")
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-keyout",
        "key.pem",
        "-out",
        "ca.pem",
        "-subj",
        "/CN=a",
    ]
    subprocess.run(command, cwd=file.parent, check=True, capture_output=True)
    done = build(file, out)
    assert 0 == done.exit_code, done.output
    taken = ["ca.pem", "certs/ca.pem", "filed_labels.py", "graph.yaml", "names/labels.txt", "topic.pem"]
    assert taken == files_in(out)
    assert 0 == in_image(out).returncode


def test_what_is_named_through_a_link_is_there_by_the_links_name(write, out, tmp_path):
    text = graph("filed_linked:same").replace("answer: a", "  b: {step: onnx, path: models/current.onnx}\nanswer: b")
    file = write("graph.yaml", text.replace(INPUTS, "inputs: {pixels: {datatype: FP32, shape: [-1, 64]}}"))
    real = write("code/v1.py", SAME)
    (file.parent / "filed_linked.py").symlink_to(real)
    store = tmp_path / "store"
    store.mkdir()
    shutil.copy(DIGITS / "models" / "mlp.onnx", store / "v3.onnx")
    (file.parent / "models").mkdir()
    (file.parent / "models" / "current.onnx").symlink_to(store / "v3.onnx")
    done = build(file, out)
    assert 0 == done.exit_code, done.output
    assert ["filed_linked.py", "graph.yaml", "models/current.onnx"] == files_in(out)
    assert (store / "v3.onnx").read_bytes() == (out / "files" / "models" / "current.onnx").read_bytes()
    assert 0 == in_image(out).returncode


def test_a_linked_folder_of_a_repository_keeps_its_name(write, out, tmp_path):
    real = write("../elsewhere/graph.yaml", graph("filed_far:same", "one"))
    write("../elsewhere/filed_far.py", SAME)
    folder = tmp_path / "project"
    folder.mkdir(exist_ok=True)
    (folder / "one").symlink_to(real.parent)
    done = build(folder, out)
    assert (0, ["one/filed_far.py", "one/graph.yaml"]) == (done.exit_code, files_in(out)), done.output
    assert 0 == in_image(out).returncode


def test_of_a_folder_of_graphs_only_what_is_served_is_taken(write, out, tmp_path):
    write("one/graph.yaml", graph("filed_one:same", "one"))
    write("one/filed_one.py", SAME)
    write("one/secrets.yaml", "password: 1\n")
    write("two/config.yaml", "versions: {latest: 1}\n")
    for number in ("1", "2"):
        write(f"two/{number}/graph.yaml", graph("filed_two:same", "two").replace("inputs", f'version: "{number}"\ninputs'))
        write(f"two/{number}/filed_two.py", SAME)
    done = build(tmp_path / "project", out)
    assert 0 == done.exit_code, done.output
    assert ["one/filed_one.py", "one/graph.yaml", "two/2/filed_two.py", "two/2/graph.yaml", "two/config.yaml"] == files_in(out)
    assert 0 == in_image(out).returncode


def test_code_that_python_finds_elsewhere_comes_along_and_is_found_in_the_image_too(write, out, monkeypatch):
    file = write("graphs/graph.yaml", graph("filed_fraud.steps:same"))
    write("src/filed_fraud/__init__.py", "")
    write("src/filed_fraud/steps.py", "import filed_tool\nfrom . import table\n" + SAME)
    write("src/filed_fraud/table.py", "")
    tools = write("tools/filed_tool.py", "").parent
    monkeypatch.syspath_prepend(file.parents[1] / "src")
    monkeypatch.syspath_prepend(tools)
    done = build(file, out)
    package = [f"src/filed_fraud/{name}.py" for name in ("__init__", "steps", "table")]
    assert (0, ["graphs/graph.yaml", *package, "tools/filed_tool.py"]) == (done.exit_code, files_in(out)), done.output
    assert 'ENV PYTHONPATH="/models/g/src:/models/g/tools"' in dockerfile(out)
    assert "" == done.stderr
    checked = in_image(out)
    assert 0 == checked.returncode, checked.stderr


def test_a_package_that_only_the_graph_names_is_pinned(write, out):
    build(write("graph.yaml", graph("hypothesis:given")), out)
    assert f"hypothesis=={version('hypothesis')}\n" == (out / "requirements.txt").read_text()


def test_a_package_is_pinned_although_a_module_of_a_package_is_called_like_it(write, out):
    file = write("graph.yaml", graph("filed_pack.steps:same"))
    write(
        "filed_pack/steps.py",
        "import hypothesis\nfrom filed_pack import util\nfrom filed_pack.sub import hypothesis as ours\n" + SAME,
    )
    write("filed_pack/util.py", "")
    write("filed_pack/sub/hypothesis.py", "")
    done = build(file, out)
    assert ["filed_pack/steps.py", "filed_pack/sub/hypothesis.py", "filed_pack/util.py", "graph.yaml"] == files_in(out)
    assert (f"hypothesis=={version('hypothesis')}\n", "") == ((out / "requirements.txt").read_text(), done.stderr)


def test_a_package_that_no_index_has_is_left_out_and_told(write, out, monkeypatch):
    file = write("graph.yaml", graph("filed_user:same"))
    write("filed_user.py", "import hypothesis\n" + SAME)

    class Elsewhere(importlib.metadata.PathDistribution):
        def read_text(self, filename):
            if filename == "direct_url.json" and self.metadata["Name"] == "hypothesis":
                return '{"url": "file:///somewhere", "dir_info": {}}'
            return super().read_text(filename)

    found = importlib.metadata.distribution
    monkeypatch.setattr("servinggraph.cli.image.code.distribution", lambda name: Elsewhere(found(name)._path))
    done = build(file, out)
    assert "filed_user.py imports 'hypothesis', and hypothesis was installed from a file or a repository" in done.output
    assert not (out / "requirements.txt").exists()


def test_code_that_cannot_be_parsed_is_named(write, out):
    file = write("graph.yaml", graph("filed_late:same"))
    write("filed_late.py", "def same(value):\n    import filed_broken\n    return value\n")
    write("filed_broken.py", "def (\n")
    done = build(file, out)
    assert (1, True) == (done.exit_code, "filed_broken.py, which the graph's code imports, cannot be read" in done.output)


def test_a_pattern_passes_over_hidden_files_unless_it_says_the_dot(write, out, tmp_path):
    file = write("graph.yaml", graph("filed_glob:same"))
    write("filed_glob.py", SAME)
    write(".env", "SECRET=1\n")
    write(".git/config", "token\n")
    write("data/table.csv", "1\n")
    write("data/.hidden", "1\n")
    assert 0 == build(file, out, "--include", "**/*").exit_code
    assert ["data/table.csv", "filed_glob.py", "graph.yaml"] == files_in(out)
    assert 0 == build(file, tmp_path / "told", "--include", "data/.hidden").exit_code
    assert "data/.hidden" in files_in(tmp_path / "told")
    done = build(file, tmp_path / "folder", "--include", "data")
    assert (1, True) == (done.exit_code, "finds no file in" in done.output and "write 'data/**/*'" in done.output)
    done = build(file, tmp_path / "absolute", "--include", "/etc/*")
    assert (1, True) == (done.exit_code, "'/etc/*' is absolute" in done.output)


def test_everybody_can_read_what_is_in_it_whatever_the_umask(write, out):
    file = write("graph.yaml", graph("filed_mask.deep.steps:same"))
    write("filed_mask/deep/steps.py", SAME)
    before = os.umask(0o077)
    try:
        assert 0 == build(file, out).exit_code
    finally:
        os.umask(before)
    modes = {oct(place.stat().st_mode & 0o777) for place in (out / "files").rglob("*") if place.is_dir()}
    assert {"0o755"} == modes


def test_a_graph_that_needs_the_environment_is_checked_where_that_is(write, out, tmp_path, monkeypatch):
    monkeypatch.setenv("FILED_MS", "50")
    file = write("graph.yaml", graph("filed_env:same").replace('same"', 'same", timeout_ms: "${FILED_MS}"'))
    write("filed_env.py", SAME)
    done = build(file, out)
    assert (0, True) == (done.exit_code, "environment must have FILED_MS" in done.output), done.output
    assert "RUN [" not in dockerfile(out)
    assert "# Not checked in here: FILED_MS" in dockerfile(out)
    assert "50" not in dockerfile(out)
    given = tmp_path / "given"
    done = build(file, given, "--set", "nodes.a.timeout_ms=70")
    assert (0, "") == (done.exit_code, done.stderr), done.output
    assert 'RUN ["servinggraph", "check", "/models/g/graph.yaml", "--set", "nodes.a.timeout_ms=70"]' in dockerfile(given)
    checked = in_image(given)
    assert 0 == checked.returncode, checked.stderr


def test_requirements_have_included_files_in_them_and_no_files_of_this_machine(write, out, tmp_path):
    file = write("graph.yaml", graph("filed_req:same"))
    write("filed_req.py", SAME)
    write(
        "requirements.txt", "-r more/base.txt\nscipy==1.16.0 \\\n    --hash=sha256:00\n--extra-index-url https://127.0.0.1:9\n"
    )
    write("more/base.txt", "hypothesis; python_version == '3.11'\n")
    done = build(file, out)
    assert "base.txt pins no version of hypothesis" in done.output
    expected = (
        "hypothesis; python_version == '3.11'\nscipy==1.16.0 \\\n    --hash=sha256:00\n--extra-index-url https://127.0.0.1:9\n"
    )
    assert expected == (out / "requirements.txt").read_text()
    for line in (
        "-e .",
        "./wheels/a-1-py3-none-any.whl",
        "-c limits.txt",
        "a @ file:///a.whl",
        "a-1-py3-none-any.whl",
        "--find-links=x",
    ):
        write("requirements.txt", f"# ours\n{line}\n")
        done = build(file, tmp_path / "refused")
        assert 1 == done.exit_code, line
        assert f"requirements.txt:2: '{line}' needs a file of this machine" in done.output
    for line in ("a @ https://127.0.0.1:9/a.whl", "https://127.0.0.1:9/a.whl", "-c https://127.0.0.1:9/limits.txt"):
        write("requirements.txt", f"{line}\n")
        assert 0 == build(file, tmp_path / line.replace("/", "_")).exit_code, line
    write("requirements.txt", "-r requirements.txt\n")
    assert "includes itself" in build(file, tmp_path / "refused").output
    write("requirements.txt", "-r gone.txt\n")
    assert "gone.txt" in build(file, tmp_path / "refused").output


def test_requirements_of_one_graph_among_several_are_told_to_be_unread(write, out, tmp_path):
    write("one/graph.yaml", graph("filed_one:same", "one"))
    write("one/filed_one.py", SAME)
    write("one/requirements.txt", "scipy==1.16.0\n")
    done = build(tmp_path / "project", out)
    assert f"one/requirements.txt is not read: for a folder of graphs it is {tmp_path}/project/requirements.txt" in done.output


def test_what_does_not_fit_with_the_server_ends_the_build(write, out):
    file = write("graph.yaml", graph("filed_old:same"))
    write("filed_old.py", SAME)
    write("requirements.txt", "numpy==1.26.4\n")
    assert 0 == build(file, out).exit_code
    install, check = (line for line in dockerfile(out).splitlines() if "/tmp/tools/bin/pip" in line)
    assert install.rstrip(" \\").endswith("install --no-cache-dir -r /opt/graph/requirements.txt")
    assert check.strip() == "&& /tmp/tools/bin/pip --python /opt/servinggraph/bin/python check \\"


def test_an_option_that_is_not_there_is_refused(write, out):
    file = write("graph.yaml", graph("filed_typo:same"))
    write("filed_typo.py", SAME)
    done = build(file, out, "--inclde", "*.csv")
    assert (2, True) == (done.exit_code, "No such option" in done.output and "--include" in done.output)
    done = build(file, out, "--", "--quiet")
    assert (2, True) == (done.exit_code, "'--quiet' is for an engine" in done.output)
    assert not out.exists()


def test_a_folder_that_cannot_be_written_is_one_line(write, tmp_path):
    file = write("graph.yaml", graph("filed_file:same"))
    write("filed_file.py", SAME)
    (tmp_path / "taken").write_text("")
    done = build(file, tmp_path / "taken" / "below")
    assert (1, 1) == (done.exit_code, len(done.output.splitlines())), done.output
