"""pytest fixtures, there wherever servinggraph is installed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from servinggraph.testing.clock import ManualClock
    from servinggraph.testing.fakes import FakeModel
    from servinggraph.testing.mock import SyncMock

# Imports stand inside the fixtures: pytest loads this file in every project that has
# servinggraph installed, also where no test uses it.


@pytest.fixture
def mock_server() -> Iterator[Callable[..., SyncMock]]:
    """Return what starts a mock server that ends with the test: give it a graph or its file."""
    from servinggraph.builder import Graph

    with ExitStack() as stack:

        def start(graph: Any, **options: Any) -> SyncMock:
            loaded = graph if isinstance(graph, Graph) else Graph.load(graph)
            return stack.enter_context(loaded.mock(**options))

        yield start


@pytest.fixture
def manual_clock() -> ManualClock:
    """Return a clock that moves only when told; see `ManualClock`."""
    from servinggraph.testing.clock import ManualClock

    return ManualClock()


@pytest.fixture
def fake_model() -> type[FakeModel]:
    """Return `FakeModel`, a step that answers as told."""
    from servinggraph.testing.fakes import FakeModel

    return FakeModel
