"""The bandit example: the better way to prepare a scan wins, in the simulation and over HTTP."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np

from servinggraph import Graph

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "bandit"
DIGITS = ROOT / "examples" / "digits"


def test_the_simulation_converges_to_the_best_variant():
    command = [sys.executable, str(EXAMPLE / "simulate.py")]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=150).stdout
    shares = [list(map(int, re.findall(r"(\d+)%", line))) for line in printed.splitlines() if re.match(r" *\d+-\d+ ", line)]
    assert 8 == len(shares)
    assert all(97 <= sum(row) <= 103 for row in shares)
    assert np.mean([row[0] for row in shares[4:]]) > 75  # the last thousand requests
    assert np.mean([row[2] for row in shares[4:]]) < 10
    assert "best: " in printed


def test_the_lines_of_the_readme_work():
    with Graph.load(EXAMPLE / "graph.yaml").mock() as server:
        sample = json.loads((DIGITS / "sample.json").read_text())
        answer = server.request("POST", "/v2/models/reader/infer", json.dumps({"id": "scan-1", **sample}).encode()).json()
        body = b'{"id": "scan-1", "truth": {"label": [1]}}'
        assert {"routers": {"read": "taken"}} == server.request("POST", "/v2/models/reader/feedback", body).json()
        router = server.request("GET", "/admin/graphs/reader/routers/read").json()
    variant = answer["parameters"]["read.variant"]
    labels = {output["name"]: output["data"] for output in answer["outputs"]}["label"]
    assert (1, float(labels == [1])) == tuple(router["report"]["rewards"][variant][name] for name in ("count", "mean"))


def test_every_variant_reads_scans_as_said():
    with np.load(DIGITS / "holdout.npz") as held_out:
        images, labels = held_out["images"], held_out["labels"]
    right = {}
    for name in ("shades", "ink_or_paper", "coarse"):
        with Graph.load(EXAMPLE / "graph.yaml").mock() as server:
            server.adjust("read", {"enabled": {other: other == name for other in ("shades", "ink_or_paper", "coarse")}})
            right[name] = (server.infer(image=images).outputs["label"] == labels).mean()
    assert {"shades": 0.976, "ink_or_paper": 0.898, "coarse": 0.735} == {name: round(share, 3) for name, share in right.items()}
