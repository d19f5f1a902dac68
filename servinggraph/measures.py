"""What is measured for metrics beside the counters of V2 statistics: durations by size, and what became of requests.

Plain integers, written on the event loop only. What is not measured has None in their place, decided
when a graph is made. Nothing here knows how they are shown; `lifecycle.metrics` reads them.

To count at once what came together is cheaper than to count each thing when it comes: what a busy server reads and changes once
for each request is not in the processor's caches any more, and takes several times as long as in a loop.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_left
from collections.abc import Callable
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

    def add_since(self, moments: list[int], until: int) -> None:
        """Count the durations from each of some moments, in ascending order, until one that is not before them."""
        # They lie so close together that few sizes are met: one look for each size, not for each moment.
        left, counts = len(moments), self.counts
        self.ns += left * until - sum(moments)
        size = bisect_left(BOUNDS_NS, until - moments[-1])
        while left:
            longer = bisect_left(moments, until - BOUNDS_NS[size], 0, left) if size < len(BOUNDS_NS) else 0
            counts[size] += left - longer
            left = longer
            size += 1


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

    def add_batch(self, arrivals: list[int], free: int, began: int, ended: int) -> None:
        """Count a batch, by moments: requests' arrivals, when the node had room again, the batch's begin and end."""
        self.compute.add(ended - began, len(arrivals))
        arrivals.sort()
        early = bisect_left(arrivals, free)
        # Who came before there was room waited in the queue until then, and from then on as long as all others of that kind;
        # who came later did not queue.
        if early:
            self.queue.add_since(arrivals[:early], free)
            self.batch_wait.add(began - free, early)
        if late := arrivals[early:]:
            self.queue.add(0, len(late))
            self.batch_wait.add_since(late, began)


Told = Callable[[int, str, int, str], None]


class Traffic:
    """What became of the requests to one version of a graph over one protocol; each counts once.

    Attributes:
        failures: requests that got no answer, by code of the error, `cancelled` where the caller left.
        told: takes each request as well: the moment, by `perf_counter_ns`, code, nanoseconds, id; None where nobody asks.
    """

    __slots__ = ("_decode", "_encode", "_turn", "_whole", "failures", "told")

    def __init__(self, told: Told | None = None) -> None:
        self.told = told
        self.failures: dict[str, int] = {}
        self._whole, self._decode, self._encode = Durations(), Durations(), Durations()
        self._turn: list[Context] = []

    @property
    def answered(self) -> int:
        """Requests that got their answer."""
        return sum(self.whole.counts)

    @property
    def whole(self) -> Durations:
        """Of answered ones: from when the request was there to when the answer can be sent."""
        self._count()
        return self._whole

    @property
    def decode(self) -> Durations:
        """Of that, from bytes to tensors."""
        self._count()
        return self._decode

    @property
    def encode(self) -> Durations:
        """Of that, from tensors to bytes."""
        self._count()
        return self._encode

    def succeeded(self, context: Context) -> None:
        """Count a request whose answer can be sent now: at the end of this turn of the event loop, or when somebody asks."""
        now = context.sent = perf_counter_ns()
        turn = self._turn
        if not turn:
            asyncio.get_running_loop().call_soon(self._count)
        turn.append(context)
        if self.told is not None:
            self.told(now, "ok", now - context.arrived, context.id)

    def _count(self) -> None:
        whole, decode, encode = self._whole.counts, self._decode.counts, self._encode.counts
        whole_ns = decode_ns = encode_ns = 0
        for context in self._turn:
            sent, arrived = context.sent, context.arrived
            ns = sent - arrived
            whole_ns += ns
            whole[bisect_left(BOUNDS_NS, ns)] += 1
            ns = context.run_began - arrived
            decode_ns += ns
            decode[0 if ns <= _FIRST else bisect_left(BOUNDS_NS, ns)] += 1
            ns = sent - context.run_ended
            encode_ns += ns
            encode[0 if ns <= _FIRST else bisect_left(BOUNDS_NS, ns)] += 1
        self._whole.ns += whole_ns
        self._decode.ns += decode_ns
        self._encode.ns += encode_ns
        self._turn.clear()

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
