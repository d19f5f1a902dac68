"""`servinggraph compare`, against a server that runs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from contextlib import contextmanager
from urllib.request import Request, urlopen

import numpy as np
import pytest
from click.testing import CliRunner

from servinggraph import Graph, routers
from servinggraph.cli import main
from servinggraph.cli.compare import report_text

GRAPH = """\
graph: test
inputs: {x: {datatype: FP32, shape: [-1]}}
nodes:
  same: {step: python, call: compare_test_steps:same}
  score:
    router: champion
    champion: old
    shadow: {max_loop_share: 1, timeout_ms: 60000}  # a busy machine must not look like a challenger that is slow
    branches:
      old: {step: python, call: compare_test_steps:old}
      new: {step: python, call: compare_test_steps:new}
      bad: {step: python, call: compare_test_steps:bad}
answer: score
"""
STEPS = """\
def same(value): return value
def old(value): return {"y": value["x"]}
def new(value): return {"y": value["x"].round()}
def bad(value): raise ValueError("out of memory")
"""


@contextmanager
def serving(folder):
    """Run a server that has answered some requests; gives its address."""
    (folder / "graph.yaml").write_text(GRAPH)
    (folder / "compare_test_steps.py").write_text(STEPS)
    command = [sys.executable, "-m", "servinggraph", "serve", "graph.yaml", "--http-port", "0", "--grpc-port", "off"]
    process = subprocess.Popen([*command, "--admin-token", "secret"], cwd=folder, stdout=subprocess.PIPE, text=True)
    try:
        banner = []
        assert any(banner.append(line) or "curl" in line for line in process.stdout)
        url = re.search(r"http://[\d.]+:\d+", "".join(banner))[0]
        for number in range(10):
            inputs = [{"name": "x", "datatype": "FP32", "shape": [2], "data": [1.0, number / 10]}]
            body = json.dumps({"id": f"r{number}", "inputs": inputs}).encode()
            urlopen(Request(f"{url}/v2/models/test/infer", body, {"content-type": "application/json"}), timeout=30).close()
        end = time.monotonic() + 120
        while not all(copies_ended(url)):
            assert time.monotonic() < end
            time.sleep(0.05)
        yield url
    finally:
        process.terminate()
        process.communicate(timeout=60)


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """Return the address of a server that has answered some requests."""
    with serving(tmp_path_factory.mktemp("compare")) as url:
        yield url


def copies_ended(url):
    found = json.loads(run(url, "test", "score", "--json").output)["report"]["challengers"]
    return [10 == one["answered"] + one["errors"]["failed"] for one in found.values()]


def run(*arguments):
    return CliRunner().invoke(main, ["compare", *arguments], env={"SERVINGGRAPH_ADMIN_TOKEN": "secret"})


def test_a_table_says_how_each_challenger_does(address):
    done = run(address, "test", "score")
    assert 0 == done.exit_code
    text = done.output
    assert "test, router score: champion old, 10 requests, of which it failed 0" in text
    assert "new beside old, 1 of the requests copied" in text
    assert "copies      10: 10 answered, 0 failed, 0 dropped" in text
    assert "agreement   10.00 % (1.79 % to 40.42 %)   1 of 10" in text
    assert "differ in   values of 'y' 9" in text
    assert "errors      100.00 % (72.25 % to 100.00 %)   10 of 10" in text
    assert "last error  score.bad: ValueError: out of memory" in text
    assert "examples" not in text


def test_examples_are_shown_when_asked_for(address):
    text = run(address, "test", "score", "--examples").output
    assert "9 examples of disagreements" in text
    assert 'r5  values of \'y\'\n      inputs      {"x":{"datatype":"FP32","shape":[2],"first":[1.0,0.5]}}' in text


def test_programs_get_json(address):
    found = json.loads(run(address, "test", "score", "--json").output)
    assert 10 == found["report"]["challengers"]["new"]["agreement"]["of"]
    assert "examples" not in found["report"]["challengers"]["new"]
    with_examples = json.loads(run(address, "test", "score", "--json", "--examples").output)
    assert 9 == len(with_examples["report"]["challengers"]["new"]["examples"])


@pytest.mark.parametrize(
    ("graph", "node", "text"),
    [
        ("test", "scroe", "graph 'test' has no router 'scroe'; did you mean 'score'?"),
        ("tset", "score", "'tset' is not found"),
    ],
)
def test_what_is_not_there_is_one_sentence(address, graph, node, text):
    done = run(address, graph, node)
    assert (1, True) == (done.exit_code, text in done.output)


def test_a_wrong_token_and_a_server_that_is_not_there_are_one_sentence(address):
    assert "/admin asks for 'Authorization: Bearer <token>'" in run(address, "test", "score", "--token", "wrong").output
    assert "cannot ask 127.0.0.1:1: " in run("http://127.0.0.1:1", "test", "score").output
    assert "is no address of a server" in run("localhost:8080", "test", "score").output


def test_promotion_names_who_and_why(tmp_path):
    with serving(tmp_path) as address:
        done = run(address, "test", "score", "--promote", "new", "--who", "ann", "--why", "as good, and smaller")
        assert (0, True) == (done.exit_code, done.output.endswith("champion is new now\n"))
        audit = Request(f"{address}/admin/audit", headers={"authorization": "Bearer secret"})
        with urlopen(audit, timeout=30) as response:
            (change,) = json.load(response)
        done = run(address, "test", "score", "--promote", "nwe")
    assert ("ann", "as good, and smaller", "new") == (change["who"], change["why"], change["after"]["champion"])
    assert (1, True) == (done.exit_code, "'nwe', which is no branch; did you mean 'new'" in done.output)


def test_a_report_without_any_request_can_be_shown():
    def same(value):
        return {"y": value["x"]}

    graph = Graph("g", {"x": ("FP32", [-1])})
    graph.to(routers.Champion({"a": same, "b": same}, "a"), "score").respond()
    with graph.mock() as server:
        found = server.request("GET", "/admin/graphs/g/routers/score").json()
        assert "agreement   -   0 of 0" in report_text("g", found, examples=True)
        server.infer(x=np.ones(1, np.float32))
