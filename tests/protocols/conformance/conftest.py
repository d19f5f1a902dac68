"""The `front_end` fixture: every test of this folder runs once through each."""

import importlib.util
import sys
from pathlib import Path

import pytest


# By path: tests are imported with importlib, which gives files of a folder no common package.
def _module(name):
    spec = importlib.util.spec_from_file_location(f"conformance_{name}", Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


front_ends = _module("front_ends")
streaming_front_ends = _module("streaming_front_ends")


@pytest.fixture(params=front_ends.FRONT_ENDS)
def front_end(request):
    """Return a way to reach a graph: `async with front_end.open(graph, **limits) as client`."""
    chosen = front_ends.FRONT_ENDS[request.param]
    if getattr(chosen, "needs_kafka", False):
        chosen.broker = request.getfixturevalue("kafka")
    return chosen


@pytest.fixture(params=streaming_front_ends.STREAMING)
def streaming(request):
    """Return a way to a graph with any number of answers: `async with streaming.open(graph, **limits) as client`."""
    return streaming_front_ends.STREAMING[request.param]


@pytest.fixture
def failed():
    """Return what a request that failed raises."""
    return streaming_front_ends.Failed


@pytest.fixture
def same():
    """Return what compares arrays bit by bit."""
    return front_ends.same


@pytest.fixture
def anyio_backend():
    return "asyncio"
