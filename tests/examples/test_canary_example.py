"""The canary example as a user runs it: the server, traffic, a network that breaks on its way."""

import re
import select
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from servinggraph import Graph

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.timeout(240)
FOLDER = ROOT / "examples" / "canary"


@pytest.fixture
def example(tmp_path):
    """A copy, since the traffic makes a file in it."""
    for name in ("canary", "digits"):
        shutil.copytree(ROOT / "examples" / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path / "canary"


@pytest.fixture
def url(example, request):
    command = [Path(sys.executable).with_name("servinggraph"), "serve", example / "graph.yaml", "--http-port", "0"]
    shorter = [
        "--grpc-port",
        "off",
        "--set",
        f"nodes.score.hold={getattr(request, 'param', '500ms')}",
        "--set",
        "nodes.score.min_samples=20",
        "--set",
        "nodes.score.guardrails.slow.margin_ms=60000",  # which network it is that a machine makes wait is chance
    ]
    with (
        (example / "log").open("wb") as log,
        subprocess.Popen([*command, *shorter], stdout=subprocess.PIPE, stderr=log) as process,
    ):
        try:
            banner = b""
            while (found := re.search(rb"HTTP on (http://[^:]+:\d+)", banner)) is None:
                assert select.select([process.stdout], [], [], 60)[0], banner
                printed = process.stdout.read1()
                assert printed, (example / "log").read_text()
                banner += printed
            yield found[1].decode()
        finally:
            process.kill()


def traffic(example, url, *options):
    command = [sys.executable, example / "traffic.py", "--url", url, "--senders", "2", "--longest", "150", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert 0 == done.returncode, done.stderr
    return done.stdout


def test_a_good_network_takes_over_step_by_step(example, url):
    printed = traffic(example, url)

    assert ["10%", "25%", "50%"] == re.findall(r"canary: \{'stage': '(\d+%)'", printed)
    assert "'stage': '100%'" in printed
    assert "0 failed" in printed
    assert "'sure' is fine (confidence 0.9" in printed


@pytest.mark.parametrize("url", ["3s"], indirect=True)  # traffic.py looks four times a second, and must not miss a step
def test_a_network_that_breaks_on_its_way_is_rolled_back(example, url):
    printed = traffic(example, url, "--break-at", "25%")

    assert "now the new model breaks" in printed
    assert "-> {'stage': 'rolled_back', 'weights': {'tree': 1.0, 'mlp': 0.0}}" in printed
    assert "guardrail 'failures': error_rate" in printed
    assert not (example / "broken").exists()


def test_both_models_read_the_same_scans():
    with np.load(ROOT / "examples" / "digits" / "holdout.npz") as held_out, Graph.load(FOLDER / "graph.yaml").mock() as server:
        images, labels = held_out["images"], held_out["labels"]
        for stage, branch in (("10%", "tree"), ("100%", "mlp")):
            server.adjust("score", {"stage": stage})
            user = next(f"user-{n}" for n in range(1000) if ask(server, images[:1], f"user-{n}")[1] == branch)
            read, answered = ask(server, images, user)
            assert branch == answered
            assert np.mean(read == labels) > 0.96


def ask(server, images, user):
    reply = server.infer(image=images, headers={"x-user": user})
    return reply.outputs["label"], reply.parameters["score.variant"]
