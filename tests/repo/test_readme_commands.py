"""Every command of the README is run, in a folder as its reader would have one. `make` is what runs this; images are built elsewhere."""

from __future__ import annotations

import asyncio
import re
import shlex
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
DIGITS = ROOT / "examples" / "digits"
COMMAND = [sys.executable, "-m", "servinggraph"]
PATIENCE_S = 120

LINES = [
    line.partition("  #")[0].strip()
    for block in re.findall(r"^```sh\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    for line in block.splitlines()
    if line.startswith("servinggraph")
]
ELSEWHERE = ("servinggraph build examples/digits/graph.yaml -t",)
"""Run with a real builder by deploy/docker/test_image.py."""


def snippet(name: str) -> str:
    """Return the YAML of the README that defines a graph."""
    found = re.search(rf"^```yaml\n(graph: {name}\n.*?)^```", README, re.MULTILINE | re.DOTALL)
    assert found is not None
    return found[1]


def a_graph(folder: Path, text: str) -> Path:
    folder.mkdir(parents=True)
    (folder / "graph.yaml").write_text(text)
    shutil.copy(DIGITS / "digits_steps.py", folder)
    shutil.copytree(DIGITS / "models", folder / "models")
    return folder


@contextmanager
def serving(words: list[str], folder: Path, http: int, grpc: int) -> Iterator[dict[str, str]]:
    """Run a server until the end of the block, and give its addresses by scheme once it is ready."""
    # The last of several equal options counts.
    command = [*COMMAND, *words, "--http-port", str(http), "--grpc-port", str(grpc)]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            end = time.monotonic() + PATIENCE_S
            while True:
                with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{http}/v2/health/ready", timeout=5):
                    break
                assert process.poll() is None, process.stdout.read()
                assert time.monotonic() < end, "it is not ready"
                time.sleep(0.05)
            yield {"http": f"http://127.0.0.1:{http}", "grpc": f"grpc://127.0.0.1:{grpc}"}
        finally:
            process.terminate()
            said = process.stdout.read()
        assert 0 == process.wait(PATIENCE_S), said


@pytest.fixture(scope="module")
def addresses(tmp_path_factory: pytest.TempPathFactory, free_port: Any) -> Iterator[dict[str, str]]:
    """A server with the graphs that commands ask for."""
    folder = tmp_path_factory.mktemp("served")
    a_graph(folder / "digits", (DIGITS / "graph.yaml").read_text())
    a_graph(folder / "shadow", snippet("shadow"))
    with serving(["serve", str(folder)], folder, free_port(), free_port()) as found:
        yield found


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A folder with what the commands name."""
    from PIL import Image

    folder = a_graph(tmp_path / "here", snippet("digits"))
    (folder / "examples").symlink_to(ROOT / "examples")
    Image.fromarray(np.load(DIGITS / "holdout.npz")["images"][0]).save(folder / "scan.png")
    (folder / "sample.json").write_text("{}")
    pair = ["-keyout", "server.key", "-out", "server.pem", "-days", "2", "-subj", "/CN=localhost"]
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", *pair], cwd=folder, check=True, capture_output=True
    )
    return folder


def shortened(words: list[str]) -> list[str]:
    """Make a command end soon that would go on."""
    if words[0] == "top":
        return [*words, "--once", "-n", "0.2"]
    if words[0] == "bench":
        kept = [word for at, word in enumerate(words) if "-d" not in (word, words[at - 1])]
        return [*kept, "-d", "2", "--warmup", "0"]
    return words


@pytest.mark.parametrize(
    "line", [line for line in LINES if not line.startswith(("servinggraph serve", "servinggraph kafka", *ELSEWHERE))]
)
def test_a_command_does_its_work(line: str, here: Path, addresses: dict[str, str]) -> None:
    line, _, into = line.partition(" > ")
    for scheme, port in (("http", 8080), ("grpc", 8081)):
        line = line.replace(f"{scheme}://127.0.0.1:{port}", addresses[scheme])
    words = shortened(shlex.split(line)[1:])
    done = subprocess.run([*COMMAND, *words], cwd=here, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert 0 == done.returncode, done.stdout + done.stderr
    if into:
        (here / into).write_text(done.stdout)
    for name in ("latency.png", "graph.svg", "my-graph", "build-me"):
        assert name not in words or (here / name).exists()


@pytest.mark.parametrize("line", [line for line in LINES if line.startswith("servinggraph serve")])
def test_a_server_starts_as_told_and_ends_when_told(line: str, here: Path, free_port: Any) -> None:
    with serving(shlex.split(line)[1:], here, free_port(), free_port()):
        pass


def test_records_are_sent_and_dead_letters_replayed(kafka_process: Any, here: Path) -> None:
    lines = [line for line in LINES if line.startswith("servinggraph kafka")]
    assert lines
    for topic in {word for line in lines for word in line.split() if word.startswith("tx-")}:
        asyncio.run(kafka_process.create_topics({topic: 1}))
    for line in lines:
        words = shlex.split(line.replace("127.0.0.1:9092", kafka_process.address))[1:]
        done = subprocess.run([*COMMAND, *words], cwd=here, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
        assert 0 == done.returncode, done.stdout + done.stderr


def test_every_command_is_here_or_elsewhere() -> None:
    assert len(LINES) > 15
    assert all(any(line.startswith(prefix) for line in LINES) for prefix in ELSEWHERE)
