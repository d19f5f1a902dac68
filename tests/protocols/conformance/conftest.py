"""The `front_end` fixture: every test of this folder runs once through each."""

import importlib.util
import sys
from pathlib import Path

import pytest

# By path: tests are imported with importlib, which gives files of a folder no common package.
_SPEC = importlib.util.spec_from_file_location("conformance_front_ends", Path(__file__).with_name("front_ends.py"))
front_ends = importlib.util.module_from_spec(_SPEC)
sys.modules[_SPEC.name] = front_ends
_SPEC.loader.exec_module(front_ends)


@pytest.fixture(params=front_ends.FRONT_ENDS)
def front_end(request):
    """Return a way to reach a graph: `async with front_end.open(graph, **limits) as client`."""
    return front_ends.FRONT_ENDS[request.param]


@pytest.fixture
def same():
    """Return what compares arrays bit by bit."""
    return front_ends.same


@pytest.fixture
def anyio_backend():
    return "asyncio"
