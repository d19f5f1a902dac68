"""`infer`, `bench` and `top` against a server that runs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from servinggraph.cli import main
from servinggraph.cli.asking.target import TensorMeta
from servinggraph.cli.asking.values import tensors_from

ROOT = Path(__file__).parents[2]
SCANS = np.load(ROOT / "examples" / "digits" / "holdout.npz")["images"][:2]

DOUBLE = """\
graph: double
inputs: {x: {datatype: FP32, shape: [-1, 2]}, name: {datatype: BYTES, shape: [-1], optional: true}}
nodes:
  twice: {step: python, call: "asking_steps:twice", batch: {max_rows: 8}}
answer: twice
"""
BODY = """\
graph: body
inputs: body
nodes:
  count: {step: python, call: "asking_steps:count"}
answer: count
"""
GUARDED = """\
graph: guarded
inputs: {x: {datatype: FP32, shape: [-1, 2]}}
nodes:
  look: {step: python, call: "asking_steps:Guarded"}
answer: look
"""
STEPS = """\
import numpy as np
from servinggraph import InvalidRequest

def twice(value):
    if (value["x"] < 0).any():
        raise InvalidRequest("negative")
    return {"y": value["x"] * 2, **({"name": value["name"]} if "name" in value else {})}

def count(body):
    return {"count": len(body)}

class Guarded:
    def __call__(self, value, context):
        if context.headers.get("authorization") != "Bearer secret":
            raise InvalidRequest("who are you")
        return {"y": value["x"]}
"""


@pytest.fixture(scope="module")
def urls(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Addresses of a server with some graphs, by protocol."""
    folder = tmp_path_factory.mktemp("served")
    for name, text in {"double": DOUBLE, "body": BODY, "guarded": GUARDED}.items():
        (folder / name).mkdir()
        (folder / name / "graph.yaml").write_text(text)
        (folder / name / "asking_steps.py").write_text(STEPS)
    command = [sys.executable, "-m", "servinggraph", "serve", str(folder), "--http-port", "0", "--grpc-port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        found: dict[str, str] = {}
        seen = ""
        while len(found) < 2:
            line = process.stdout.readline()
            assert line, seen
            seen += line
            for protocol, scheme in (("HTTP", "http"), ("gRPC", "grpc")):
                if match := re.search(rf"{protocol} on (?:http://|grpc://)?([\d.]+:\d+)", line):
                    found[scheme] = f"{scheme}://{match[1]}"
        yield found
        process.terminate()
        process.stdout.read()


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.mark.parametrize("scheme", ["http", "grpc"])
def test_an_answer_is_printed_or_given_as_json(urls: dict[str, str], scheme: str) -> None:
    done = run("infer", urls[scheme], "double", "-i", "x=[[1, 2]]")
    assert 0 == done.exit_code, done.output
    assert re.search(r"y FP32 \[1, 2\]\n\[\[2\., 4\.\]\]", done.output)
    done = run("infer", urls[scheme], "double", "-i", "x=[[1, 2]]", "-i", 'name=["ä"]', "--json", "--id", "7")
    document = json.loads(done.output)
    assert ({"y": [[2.0, 4.0]], "name": ["ä"]}, "7") == (document["outputs"], document["id"])


def test_values_come_from_files_and_answers_go_to_them(urls: dict[str, str], tmp_path: Path) -> None:
    rows = np.arange(6, dtype=np.float32).reshape(3, 2)
    np.save(tmp_path / "x.npy", rows)
    np.savez(tmp_path / "x.npz", x=rows, other=rows)
    (tmp_path / "x.json").write_text(json.dumps(rows.tolist()))
    for name in ("x.npy", "x.npz", "x.json"):
        done = run("infer", urls["http"], "double", "-i", f"x=@{tmp_path / name}", "-o", f"y=@{tmp_path / 'y.npy'}")
        assert 0 == done.exit_code, done.output
        np.testing.assert_array_equal(rows * 2, np.load(tmp_path / "y.npy"))
        (tmp_path / "y.npy").unlink()


def test_a_program_gets_json_and_nothing_else_when_an_answer_goes_to_a_file(urls: dict[str, str], tmp_path: Path) -> None:
    place = tmp_path / "y.dat"
    done = run("infer", urls["http"], "double", "-i", "x=[[1, 2]]", "-o", f"y=@{place}", "--json")
    assert [[2.0, 4.0]] == json.loads(done.stdout)["outputs"]["y"]
    assert f"wrote {place}" in done.stderr
    assert [[2, 4]] == np.load(place).tolist()  # under the name that was given


def test_an_answer_that_cannot_be_written_is_printed_all_the_same(urls: dict[str, str], tmp_path: Path) -> None:
    asked = ("infer", urls["http"], "double", "-i", "x=[[1, 2]]", "-i", 'name=["a"]')
    done = run(*asked, "-o", f"y=@{tmp_path}/no/y.npy")
    assert (1, True) == (done.exit_code, "y FP32 [1, 2]" in done.stdout)
    assert f"cannot write {tmp_path}/no/y.npy: No such file or directory\n" == done.stderr
    done = run(*asked, "-o", f"name=@{tmp_path}/name.npy")
    assert (1, True) == (done.exit_code, "output 'name' is BYTES, which a .npy file cannot hold" in done.stderr)
    assert not (tmp_path / "name.npy").exists()


@pytest.mark.parametrize(("name", "content"), [("x.npy", b""), ("x.npz", b"PK\x03\x04"), ("x.npy", b"\x93NUMPY")])
def test_a_file_that_is_none_of_its_kind_is_named(urls: dict[str, str], tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    done = run("infer", urls["http"], "double", "-i", f"x=@{tmp_path / name}")
    assert (2, True) == (done.exit_code, f"cannot read {tmp_path / name}: " in done.output), done.output


def test_a_plot_that_cannot_be_drawn_is_refused_before_the_load(tmp_path: Path) -> None:
    for place, text in {tmp_path / "x.xyz": "ends with .png", tmp_path / "no" / "x.png": "there is no folder"}.items():
        done = run("bench", "http://127.0.0.1:1", "double", "--plot", place)
        assert (2, True) == (done.exit_code, text in done.output), done.output


def test_a_body_that_is_no_tensors_is_sent_as_it_is(urls: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text("[1, 2, 3]")
    for body in ("[1, 2, 3]", f"@{tmp_path / 'list.json'}"):
        done = run("infer", urls["http"], "body", "--body", body)
        assert (0, {"count": 3}) == (done.exit_code, json.loads(done.output))
    done = run("infer", urls["http"], "nobody", "--body", "[]")
    assert (1, True) == (done.exit_code, "nobody" in done.output)


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["double", "-i", "x=[[-1, 2]]"], 1, "negative"),
        (["doubl", "-i", "x=[[1, 2]]"], 1, "doubl"),
        (["double", "-i", "y=[[1, 2]]"], 2, "no input 'y'"),
        (["double", "-i", "x=[[1, 2, 3]]"], 2, r"shape \[1, 3\], the model takes \[-1, 2\]"),
        (["double", "-i", "x=[[1, 'a']]"], 2, "is no JSON"),
        (["double", "-i", 'x=[["a", "b"]]'], 2, "no array of numbers"),
        (["double", "-i", "name=[1]", "-i", "x=[[1, 2]]"], 2, "no texts"),
        (["double", "-i", "x=@nowhere.npy"], 2, "cannot read nowhere.npy"),
        (["double"], 1, "'?x'?"),
        (["body"], 2, "takes no tensors"),
    ],
)
def test_what_is_wrong_is_said(urls: dict[str, str], arguments: list[str], code: int, text: str) -> None:
    done = run("infer", urls["http"], *arguments)
    assert code == done.exit_code, done.output
    assert re.search(text, done.output), done.output


@pytest.mark.parametrize("command", ["infer", "bench"])
def test_a_server_that_is_not_there_is_said(command: str) -> None:
    done = run(command, "http://127.0.0.1:1", "double", "-i", "x=[[1, 2]]")
    assert (1, True) == (done.exit_code, "127.0.0.1:1 double: " in done.output)
    assert 2 == run(command, "ftp://127.0.0.1", "double").exit_code


def test_pictures_become_pixels_of_the_shape_that_the_model_takes(tmp_path: Path) -> None:
    from PIL import Image

    Image.fromarray(SCANS[0]).save(tmp_path / "scan.png")
    Image.fromarray(np.zeros((4, 5, 3), np.uint8)).save(tmp_path / "colours.png")
    grey, colours = TensorMeta("image", "UINT8", (-1, 8, 8)), TensorMeta("image", "FP32", (-1, 3, 4, 5))
    found = tensors_from([f"@{tmp_path / 'scan.png'}"], [grey])["image"]
    np.testing.assert_array_equal(SCANS[:1], found)
    assert (1, 3, 4, 5) == tensors_from([f"image=@{tmp_path / 'colours.png'}"], [colours])["image"].shape
    with pytest.raises(Exception, match="resize it"):
        tensors_from([f"image=@{tmp_path / 'colours.png'}"], [grey])


def test_numbers_that_a_datatype_cannot_hold_are_refused() -> None:
    wanted = [TensorMeta("x", "UINT8", (-1,))]
    assert [1, 255] == tensors_from(["[1, 255]"], wanted)["x"].tolist()
    for value in ("[256]", "[-1]", "[1.5]"):
        with pytest.raises(Exception, match="x: "):
            tensors_from([f"x={value}"], wanted)


@pytest.mark.parametrize(("datatype", "most"), [("FP16", 65504.0), ("FP32", 3.4e38), ("BF16", 3.3e38)])
def test_numbers_beyond_a_datatype_do_not_become_infinite(tmp_path: Path, datatype: str, most: float) -> None:
    wanted = [TensorMeta("x", datatype, (-1,))]
    assert np.isfinite(tensors_from([f"[{most}]"], wanted)["x"].astype("f8")).all()
    with pytest.raises(Exception, match=f"x: has values that {datatype} cannot hold"):
        tensors_from([f"[{most * 2}]"], wanted)
    np.save(tmp_path / "x.npy", np.array([np.inf, np.nan]))  # as they were
    assert np.isinf(tensors_from([f"@{tmp_path}/x.npy"], wanted)["x"].astype("f8")).tolist() == [True, False]


@pytest.mark.parametrize("scheme", ["http", "grpc"])
@pytest.mark.parametrize("more", [[], ["--rate", "100"]])
def test_a_load_is_counted_and_drawn(urls: dict[str, str], scheme: str, more: list[str], tmp_path: Path) -> None:
    drawn = tmp_path / "latency.png"
    for seconds in (0.5, 2, 10):  # a machine that stands still has little time for many requests
        done = run("bench", urls[scheme], "double", "-c", 4, "-d", seconds, "--warmup", 0.1, "--json", "--plot", drawn, *more)
        document = json.loads(done.output)
        assert {} == document["errors"]
        if document["requests"] > 5:
            break
    assert 0 == done.exit_code, done.output
    assert 0 < document["latency_ms"]["p50"] <= document["latency_ms"]["p99"] <= document["latency_ms"]["max"]
    assert document["requests"] > 5
    if more:
        assert document["requests"] <= 100 * seconds + 1
    assert drawn.read_bytes().startswith(b"\x89PNG")


def test_a_load_of_bodies(urls: dict[str, str]) -> None:
    done = run("bench", urls["http"], "body", "--body", "[1, 2]", "-c", 2, "-d", 2, "--warmup", 0, "--json")
    assert (0, {}) == (done.exit_code, json.loads(done.output)["errors"])
    done = run("bench", urls["http"], "nobody", "--body", "[1, 2]", "-d", 0.2)
    assert (1, True) == (done.exit_code, "[404]" in done.output)
    assert 2 == run("bench", urls["grpc"], "body", "--body", "[1, 2]").exit_code


@pytest.mark.parametrize("scheme", ["http", "grpc"])
def test_headers_go_along_with_each_request_of_a_load(urls: dict[str, str], scheme: str) -> None:
    done = run("bench", urls[scheme], "guarded", "-d", 0.2, "--warmup", 0)
    assert (1, True) == (done.exit_code, "who are you" in done.output), done.output
    sent = ("--header", "Authorization=Bearer secret")
    done = run("bench", urls[scheme], "guarded", "-c", 2, "-d", 1, "--warmup", 0, "--json", *sent)
    assert (0, {}) == (done.exit_code, json.loads(done.output)["errors"]), done.output


def test_a_given_header_replaces_one_of_the_loads_own_whatever_its_case() -> None:
    seen: list[list[str] | None] = []

    class Recorder(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            seen.append(self.headers.get_all("content-type"))
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Recorder) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        given = ("--body", "[1]", "--header", "content-type=application/x-own", "-c", 1, "-d", 1, "--warmup", 0)
        done = run("bench", f"http://127.0.0.1:{server.server_port}", "any", *given)
        server.shutdown()
    assert 0 == done.exit_code, done.output
    assert [["application/x-own"]] == [list(kinds) for kinds in {tuple(kinds or ()) for kinds in seen}]


def test_a_load_that_fails_says_with_what(urls: dict[str, str]) -> None:
    done = run("bench", urls["http"], "double", "-i", "x=[[-1, 1]]", "-d", 0.2)
    assert (1, True) == (done.exit_code, "negative" in done.output)


def test_top_shows_each_node_and_the_rates_between_two_looks(urls: dict[str, str]) -> None:
    command = [sys.executable, "-m", "servinggraph", "bench", urls["http"], "double", "-d", "150", "--warmup", "0", "-c", "2"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as load:
        end = time.monotonic() + 120
        while time.monotonic() < end:
            done = run("top", urls["http"], "--once", "-n", 0.3, "--graph", "double")
            assert 0 == done.exit_code, done.output
            rate = re.search(r"^\s*twice\s+([\d.,]+)", done.output, re.MULTILINE)
            assert rate is not None, done.output
            if float(rate[1].replace(",", "")) > 0:
                break
        else:
            raise AssertionError(done.output)
        load.terminate()
    assert "double version 1" in done.output
    assert "body version" not in done.output


def test_top_says_when_there_are_no_metrics() -> None:
    done = run("top", "http://127.0.0.1:1", "--once")
    assert (1, True) == (done.exit_code, "/metrics: " in done.output)
