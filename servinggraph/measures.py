"""What is measured for metrics beside the counters of V2 statistics: durations by size, and what became of requests.

Plain integers, written on the event loop only. What is not measured has None in their place, decided
when a graph is made. Nothing here knows how they are shown; `lifecycle.metrics` reads them.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable
from time import perf_counter_ns
from typing import Final

from servinggraph.context import Context

__all__ = ["BOUNDS_NS", "Durations", "NodeDurations", "Traffic", "TrafficByProtocol"]

BOUNDS_NS: Final = (
    50_000, 100_000, 250_000, 500_000,
    1_000_000, 2_500_000, 5_000_000, 10_000_000, 25_000_000, 50_000_000, 100_000_000, 250_000_000, 500_000_000,
    1_000_000_000, 2_500_000_000, 5_000_000_000, 10_000_000_000, 30_000_000_000, 60_000_000_000,
)  # fmt: skip
"""Upper bounds of the sizes by which durations are counted: 50 us to a minute."""


_FIRST: Final = BOUNDS_NS[0]


class Durations:
    """How many durations there were of each size, and their sum.

    Attributes:
        counts: by size, as `BOUNDS_NS` has them; the last is for longer ones.
        ns: the sum.
    """

    __slots__ = ("counts", "ns")

    def __init__(self) -> None:
        self.counts = [0] * (len(BOUNDS_NS) + 1)
        self.ns = 0

    def add(self, ns: int, times: int = 1) -> None:
        """Count a duration, or several equal ones."""
        self.counts[0 if ns <= _FIRST else bisect_left(BOUNDS_NS, ns)] += times
        self.ns += ns * times


class NodeDurations:
    """Where the time of answered requests goes in one node.

    Attributes:
        queue: of a batched node: until it had room for a batch.
        batch_wait: of a batched node: with room, until the batch was full enough to begin.
        compute: from joining to splitting; a request in a batch has the batch's.
    """

    __slots__ = ("batch_wait", "compute", "queue")

    def __init__(self) -> None:
        self.queue = Durations()
        self.batch_wait = Durations()
        self.compute = Durations()

    def waited(self, arrivals: Iterable[int], free: int, began: int) -> None:
        """Count the waits for a batch, by moments: requests' arrivals, when the node had room again, the batch's begin."""
        # Who came before there was room waited in the queue until then, and from then on as long as all others of that kind;
        # who came later did not queue. So each costs one look for its size.
        counts, early, ns, late = self.queue.counts, 0, 0, 0
        for arrived in arrivals:
            if arrived < free:
                early += 1
                queued = free - arrived
                ns += queued
                counts[bisect_left(BOUNDS_NS, queued)] += 1
            else:
                late += 1
                self.batch_wait.add(began - arrived)
        self.queue.ns += ns
        if late:
            counts[0] += late
        if early:
            self.batch_wait.add(began - free, early)


Told = Callable[[int, str, int, str], None]


class Traffic:
    """What became of the requests to one version of a graph over one protocol; each counts once.

    Attributes:
        answered: requests that got their answer.
        failures: those that did not, by code of the error, `cancelled` where the caller left.
        whole: of answered ones: from when the request was there to when the answer can be sent.
        decode: of that, from bytes to tensors.
        encode: of that, from tensors to bytes.
        told: takes each request as well: the moment, by `perf_counter_ns`, code, nanoseconds, id; None where nobody asks.
    """

    __slots__ = ("answered", "decode", "encode", "failures", "told", "whole")

    def __init__(self, told: Told | None = None) -> None:
        self.told = told
        self.answered = 0
        self.failures: dict[str, int] = {}
        self.whole, self.decode, self.encode = Durations(), Durations(), Durations()

    def succeeded(self, context: Context) -> None:
        """Count a request whose answer can be sent now."""
        # `Durations.add` three times, without the calls: every request pays for this.
        now = perf_counter_ns()
        arrived = context.arrived
        self.answered += 1
        part, ns = self.whole, now - arrived
        part.counts[bisect_left(BOUNDS_NS, ns)] += 1
        part.ns += ns
        part, ns = self.decode, context.run_began - arrived
        part.counts[0 if ns <= _FIRST else bisect_left(BOUNDS_NS, ns)] += 1
        part.ns += ns
        part, ns = self.encode, now - context.run_ended
        part.counts[0 if ns <= _FIRST else bisect_left(BOUNDS_NS, ns)] += 1
        part.ns += ns
        if self.told is not None:
            self.told(now, "ok", now - arrived, context.id)

    def failed(self, code: str, context: Context | None = None) -> None:
        """Count a request that is not answered."""
        self.failures[code] = self.failures.get(code, 0) + 1
        if self.told is not None:
            now = perf_counter_ns()
            arrived = 0 if context is None else context.arrived
            self.told(now, code, now - arrived if arrived else 0, "" if context is None else context.id)


class TrafficByProtocol(dict[str, Traffic]):
    """The traffic of one version of a graph, by protocol; there from the first request on.

    Args:
        told: gives what takes each request of a protocol; see `Traffic`.
    """

    def __init__(self, told: Callable[[str], Told] | None = None) -> None:
        super().__init__()
        self._told = told

    def __missing__(self, protocol: str) -> Traffic:
        traffic = self[protocol] = Traffic(None if self._told is None else self._told(protocol))
        return traffic
