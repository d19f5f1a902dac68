"""A server that changes what it counts every 10 to 20 ms, and notes how long its requests took meanwhile.

Two servers side by side differ by a percent or two for reasons of their own, such as where their memory lies, and the machine
is another from second to second. Slices of one process that follow upon each other share all that: what is left is the cost.
It is that of a real server, where all else that a request does has driven the counters out of the processor's caches; in a loop
without sockets the same takes a third of the time. Run by overhead.py.

usage: python overhead_switched.py PORT MODEL OUT  ->  when stopped, JSON in OUT: microseconds a request by way, for each round
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
from pathlib import Path
from time import perf_counter

from servinggraph.lifecycle import read_graphs
from servinggraph.server import Server, ServerOptions, new_event_loop

WAYS = ("nothing", "nothing again", "metrics")
LEAST_REQUESTS = 20
"""Of a slice that counts: there is no load before the load test, nor after it."""


class Switch:
    """Changes what a server with one graph counts.

    Attributes:
        rounds: microseconds a request of each way, one list for each round in which all ways had their slice.
    """

    def __init__(self, server: Server) -> None:
        (self._graph,) = server.serving.catalog.graphs()
        self._statistics = self._graph.executor.statistics
        self._traffic = self._graph.traffic
        self._durations = [(node, node.durations) for node in self._statistics.nodes.values()]
        self._loop = asyncio.get_running_loop()
        self._due: list[str] = []
        self._round: dict[str, float] = {}
        self._way = ""
        self._began, self._count = 0.0, 0
        self.rounds: list[list[float]] = []
        self._next()

    def _next(self) -> None:
        requests = self._statistics.requests.success - self._count
        if requests >= LEAST_REQUESTS:
            self._round[self._way] = (perf_counter() - self._began) / requests * 1e6
        if not self._due:
            if len(self._round) == len(WAYS):
                self.rounds.append([self._round[way] for way in WAYS])
            self._round = {}
            self._due = random.sample(WAYS, len(WAYS))
        self._way = self._due.pop()
        on = not self._way.startswith("nothing")
        self._graph.traffic = self._traffic if on else None
        for node, durations in self._durations:
            node.durations = durations if on else None
        self._began, self._count = perf_counter(), self._statistics.requests.success
        self._loop.call_later(random.uniform(0.01, 0.02), self._next)


def main() -> None:
    """Serve until stopped."""
    port, model, out = sys.argv[1:]
    made: list[Switch] = []

    async def serve() -> None:
        options = ServerOptions(http_port=int(port), grpc_port="off")
        await Server(read_graphs(Path(model), ()), options, lambda server: made.append(Switch(server))).run()

    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(serve())
    Path(out).write_text(json.dumps(made[0].rounds), encoding="utf-8")


if __name__ == "__main__":
    main()
