"""`servinggraph init`: a small project that works at once."""

from __future__ import annotations

import keyword
import re
import shlex
import sys
from importlib.util import find_spec
from pathlib import Path

import click

__all__ = ["init"]

_GRAPH = """\
# yaml-language-server: $schema=graph.schema.json
graph: {name}
inputs:
  text: {{datatype: BYTES, shape: [-1]}}
nodes:
  clean: {{step: python, call: {module}.steps:clean}}
  score: {{step: python, call: {module}.steps:Score, init: {{threshold: 0.5}}, batch: {{max_rows: 64}}}}
answer: score
"""

_STEPS = '''\
"""The steps of the graph. Put your model in `Score`, or use a step of kind onnx."""

import numpy as np

from servinggraph import signature


@signature(outputs={"text": ("BYTES", [-1])})
def clean(value):
    """Trim and lower each text; elements arrive as bytes."""
    texts = [item.decode().strip().lower().encode() for item in value["text"]]
    return {"text": np.array(texts, dtype=object)}


@signature(inputs={"text": ("BYTES", [-1])}, outputs={"score": ("FP32", [-1]), "good": ("BOOL", [-1])})
class Score:
    """A step with state: constructed once, called for each batch of requests."""

    def __init__(self, threshold):
        self.threshold = threshold

    def load(self):
        self.good_words = {b"good", b"great", b"fine"}

    def __call__(self, value):
        words = [item.split() for item in value["text"]]
        shares = [sum(word in self.good_words for word in row) / max(len(row), 1) for row in words]
        score = np.array(shares, dtype=np.float32)
        return {"score": score, "good": score >= self.threshold}
'''

_TEST = '''\
"""Tests of the graph, without a port. The fixture comes with servinggraph."""

import numpy as np


def test_good_words_score_high(mock_server):
    server = mock_server("graph.yaml")
    reply = server.infer(text=np.array([b"  Great", b"bad and worse"], dtype=object))
    assert reply.outputs["good"].tolist() == [True, False]
'''

_README = """\
# {name}

    pip install 'servinggraph[onnx,test]'
    servinggraph serve graph.yaml        # prints a curl line to try
    pytest
"""


@click.command()
@click.argument("name")
def init(name: str) -> None:
    """Make a folder NAME with a small graph, its steps and a test."""
    import orjson

    from servinggraph.compiler import json_schema
    from servinggraph.spec.model import name_problem

    if not name:
        raise click.UsageError("NAME is empty: give the folder to make")
    folder = Path(name)
    graph = folder.resolve().name  # "." has a name, too
    if problem := name_problem(graph, "graph"):
        raise click.UsageError(f"the graph is named after its folder: {problem}")
    module = _module(graph)
    files = {
        "graph.yaml": _GRAPH.format(name=_in_yaml(graph), module=module),
        f"{module}/__init__.py": "",
        f"{module}/steps.py": _STEPS,
        "test_graph.py": _TEST,
        "README.md": _README.format(name=graph),
        "graph.schema.json": orjson.dumps(json_schema(), option=orjson.OPT_INDENT_2).decode() + "\n",
    }
    try:
        if folder.exists() and any(folder.iterdir()):
            click.echo(f"folder '{name}' is there and not empty: nothing was written", err=True)
            sys.exit(1)
        for path, text in files.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(text, encoding="utf-8")
    except OSError as error:
        click.echo(f"cannot make '{name}': {error.strerror}", err=True)
        sys.exit(1)
    click.echo(f"made {folder}: cd {shlex.quote(str(folder))} && servinggraph serve graph.yaml")


def _module(graph: str) -> str:
    """Return a name for the module of a graph's steps, which is nobody else's: a project `test` must not hide Python's."""
    module = re.sub(r"[^a-z0-9_]", "_", graph.lower())
    if module[0].isdigit() or keyword.iskeyword(module) or module == "test_graph" or _is_there(module):
        return f"graph_{module}"
    return module


def _is_there(module: str) -> bool:
    found = None if module in sys.modules else find_spec(module)
    return module in sys.modules or (found is not None and found.origin is not None)


def _in_yaml(name: str) -> str:
    """Return a name as YAML has it: in quotes where it would be a number, or true, or nothing."""
    import yaml

    return name if yaml.safe_load(name) == name else f'"{name}"'
