"""What tests of graphs need: a server without ports, fakes, a clock that stands still.

With pytest the fixtures of `servinggraph.testing.plugin` are there without an import.
"""

from servinggraph.testing.clock import ManualClock
from servinggraph.testing.fakes import FakeModel, FakeStream
from servinggraph.testing.mock import AsyncMock, HttpReply, MockServer, SyncMock

__all__ = ["AsyncMock", "FakeModel", "FakeStream", "HttpReply", "ManualClock", "MockServer", "SyncMock"]
