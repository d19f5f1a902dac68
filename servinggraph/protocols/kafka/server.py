"""The Kafka front end: a stream for each graph with a `kafka:` block, begun and ended with the graph."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from servinggraph.kafka import KafkaOptions
from servinggraph.lifecycle import Serving
from servinggraph.protocols.kafka.quiet import quiet_aiokafka
from servinggraph.protocols.kafka.stream import Stream

__all__ = ["KafkaFrontEnd"]

logger = logging.getLogger("servinggraph.kafka")


class KafkaFrontEnd:
    """Serves over Kafka.

    Args:
        serving: the graphs, the slots, the limits.
        brokers: addresses instead of those of the graphs; empty for theirs.
    """

    def __init__(self, serving: Serving, brokers: str = "") -> None:
        self._serving = serving
        self._brokers = brokers
        self._streams: dict[str, Stream] = {}
        self._ending: set[asyncio.Task[None]] = set()
        self._grace_s = 30.0
        self._started = False
        self._noticing = False

    def describe(self) -> list[str]:
        """Return a line for each graph, for people: brokers, topics, promise."""
        return [stream.describe() for stream in self._streams.values()]

    async def start(self) -> None:
        """Begin to read for every graph that is ready; later ones follow when they are."""
        quiet_aiokafka()
        self._started = True
        self._serving.kafka = self.report
        self._serving.catalog.conditions.append(self._ready)
        self._serving.catalog.on_change(self._follow)

    async def stop(self, grace_s: float) -> None:
        """Read no more, let records in flight finish, write, commit, and leave the groups."""
        if not self._started:
            return
        self._started = False
        streams, self._streams = list(self._streams.values()), {}
        await asyncio.gather(*(stream.stop(grace_s) for stream in streams), *self._ending)
        self._serving.catalog.conditions.remove(self._ready)

    def report(self) -> list[dict[str, Any]]:
        """Return what can be told of each graph's topics, as plain values."""
        return [stream.report() for stream in self._streams.values()]

    def _ready(self) -> bool:
        return all(stream.ready for stream in self._streams.values())

    def _notice(self) -> None:
        """Have the health of the server looked at anew."""
        if self._started and not self._noticing:
            self._noticing = True
            try:
                self._serving.catalog.notice()
            finally:
                self._noticing = False

    def _follow(self) -> None:
        """Begin and end streams after a change of what is served."""
        if not self._started or self._noticing:
            return
        wanted: dict[str, KafkaOptions] = {}
        for graph in self._serving.catalog.graphs():
            if graph.ready and graph.plan.kafka is not None:  # of several versions the newest, which comes last
                wanted[graph.plan.name] = graph.plan.kafka
        for name, stream in list(self._streams.items()):
            if wanted.get(name) != stream.options and not self._serving.catalog.draining:
                del self._streams[name]
                task = asyncio.get_running_loop().create_task(stream.stop(self._grace_s), name=f"kafka-end-{name}")
                self._ending.add(task)
                task.add_done_callback(self._ending.discard)
        for name, options in wanted.items():
            if name in self._streams or self._serving.catalog.draining:
                continue
            other = next((each for each in self._streams.values() if _shares(each.options, options)), None)
            if other is not None:
                text = "graphs '%s' and '%s' read in the same group '%s': each gets a part of the records; not read for '%s'"
                logger.error(text, other.graph, name, options.input.group, name)
            else:
                self._streams[name] = Stream(self._serving, name, options, self._brokers, self._notice)
                self._streams[name].start()


def _shares(one: KafkaOptions, other: KafkaOptions) -> bool:
    """Tell whether two blocks would have each other's records."""
    return one.input.group == other.input.group and bool(set(one.input.topics) & set(other.input.topics))
