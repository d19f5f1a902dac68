"""What every front end is given: the graphs, the slots, and what they share besides."""

from __future__ import annotations

import asyncio

from servinggraph.interfaces import FrontEndOptions
from servinggraph.lifecycle.admission import Admission
from servinggraph.lifecycle.catalog import Catalog
from servinggraph.lifecycle.failures import FailureLog
from servinggraph.lifecycle.shared_memory import SharedMemory

__all__ = ["Serving"]


class Serving:
    """One server's state, shared by its front ends. Made on the running event loop.

    Attributes:
        options: limits and names.
        catalog: the graphs.
        admission: slots for requests in flight.
        failures: where failures of graphs are logged.
        memory: shared memory regions of clients.
    """

    def __init__(self, options: FrontEndOptions | None = None) -> None:
        self.options = options or FrontEndOptions()
        self.catalog = Catalog()
        self.admission = Admission(self.options.max_in_flight)
        self.memory = SharedMemory(allowed=self.options.allow_client_shm, limit=self.options.max_shm_regions)
        self.failures = FailureLog(asyncio.get_running_loop().time)
