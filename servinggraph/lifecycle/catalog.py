"""What is served, and in which state: every version of every graph."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from servinggraph.context import Context
from servinggraph.errors import GraphNotFound, Unavailable
from servinggraph.executor import Executor
from servinggraph.interfaces import Handler
from servinggraph.lifecycle.answers import answer_body, answer_tensors
from servinggraph.lifecycle.control import Control, RouterSeat
from servinggraph.lifecycle.memory import resident_bytes
from servinggraph.lifecycle.metrics import Ledger
from servinggraph.lifecycle.sequencer import Sequencer
from servinggraph.measures import TrafficByProtocol
from servinggraph.plan import Plan
from servinggraph.tensors import TensorSpec

if TYPE_CHECKING:
    from servinggraph.lifecycle.sampling import Picker

__all__ = ["Catalog", "ServedGraph", "takes_the_same"]

logger = logging.getLogger("servinggraph.lifecycle")


@dataclass
class ServedGraph:
    """One version of one graph.

    Attributes:
        plan: the compiled graph.
        executor: runs its requests.
        seats: its routers by node name, to be read and changed while it serves.
        ready: True from the end of a successful load to the beginning of the stop.
        requests: requests that it answers now.
        tracer: picks requests to trace; None while none is to be traced.
        finish: makes the answer of what the last node gave: tensors, or a `Body` where the graph
            takes one.
        routed: True when the route or version that a request names decides inside the graph.
        sequences: keeps the order of its sequences; None where it declares none.
        run: runs one request: the executor's own, or that in its sequence's turn.
        stream: the same for any number of answers.
        door: None where a request can simply enter. Otherwise gives the graph that the request
            enters, with the request counted: a graph may have left memory, or been replaced
            while the request came in.
        closed: True from when its executor is stopped; until then a removed graph still takes
            requests that were read for it.
        traffic: where front ends count its requests; None where metrics are off.
        size_bytes: memory that it takes, an estimate; 0 where nothing can be said.
    """

    plan: Plan
    executor: Executor
    seats: Mapping[str, RouterSeat] = field(default_factory=dict)
    ready: bool = False
    requests: int = 0
    tracer: Picker | None = field(default=None, repr=False)
    finish: Callable[[Any, Mapping[str, TensorSpec] | None, str], Any] = field(init=False, repr=False)
    routed: bool = field(init=False, repr=False)
    sequences: Sequencer | None = field(init=False, default=None, repr=False)
    run: Handler = field(init=False, repr=False)
    stream: Callable[[Any, Context], AsyncGenerator[Any, None]] = field(init=False, repr=False)
    door: Callable[[ServedGraph, Context], Awaitable[ServedGraph]] | None = None
    closed: bool = False
    traffic: TrafficByProtocol | None = field(default=None, repr=False)
    size_bytes: int = 0
    _idle: asyncio.Event | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self.finish = answer_body if self.plan.body else answer_tensors
        self.routed = self.plan.routes or self.plan.versions != (self.plan.version,)
        self.run, self.stream = self.executor.run, self.executor.stream
        if self.plan.sequences is not None:
            self.sequences = Sequencer(self.plan, self.plan.sequences, self.executor.run, self.executor.stream)
            self.run, self.stream = self.sequences.run, self.sequences.stream

    def leave(self) -> None:
        """Note that a request has its answer."""
        self.requests -= 1
        if self.requests == 0 and self._idle is not None:
            self._idle.set()

    @property
    def idle(self) -> bool:
        """True when it answers no request and no sequence is under way: nobody would miss it."""
        return self.requests == 0 and not (self.sequences and len(self.sequences))

    async def stop(self) -> None:
        """End its sequences, finish the batches that run, refuse what waits, unload all steps."""
        if self.sequences is not None:
            self.sequences.close()
        await self.executor.stop()

    async def drained(self) -> None:
        """Return once it answers no request; the executor can then be stopped without refusing anybody."""
        self._idle = asyncio.Event()
        while self.requests:
            self._idle.clear()
            await self._idle.wait()


def takes_the_same(one: Plan, other: Plan) -> bool:
    """Tell whether a request that was read for one plan can be given to another."""
    read_by = ("inputs", "outputs", "body", "body_keys", "decoupled", "sequences")
    return all(getattr(one, name) == getattr(other, name) for name in read_by)


class Catalog:
    """All graphs that this process serves.

    Attributes:
        draining: True once the server was told to stop: not ready, but still answering.
        known: names that could be loaded; not found either, but in other words.
        policies: which versions of a graph are served: the latest so many, "all", or these.
        may_be_empty: True where graphs come and go: then a server without any is ready, too.
        conditions: what has to hold besides for the server to be ready, said by front ends.
    """

    def __init__(self, control: Control | None = None, ledger: Ledger | None = None) -> None:
        self._control = control or Control()
        self._ledger = ledger
        self._graphs: dict[str, dict[str, ServedGraph]] = {}
        self._listeners: list[Callable[[], None]] = []
        self._draining = False
        self.known: frozenset[str] = frozenset()
        self.policies: dict[str, int | str | tuple[int, ...]] = {}
        self.may_be_empty = False
        self.conditions: list[Callable[[], bool]] = []

    def made(self, plan: Plan) -> ServedGraph:
        """Return a graph that is not started yet."""
        seats = self._control.seats_of(plan)
        meter_of = None if self._ledger is None else self._ledger.meters(plan.name, plan.version)
        graph = ServedGraph(plan, Executor(plan, seats, meter_of), {seat.router.name: seat for seat in seats})
        if self._ledger is not None:
            graph.executor.statistics.measure()
            graph.traffic = self._ledger.traffic(plan.name, plan.version)
        return graph

    @property
    def draining(self) -> bool:
        """True once the server was told to stop; listeners are told of it."""
        return self._draining

    @draining.setter
    def draining(self, draining: bool) -> None:
        self._draining = draining
        self._changed()

    async def load(self, plans: Sequence[Plan]) -> None:
        """Load graphs side by side and serve them.

        Raises:
            ServingGraphError: one failed to load; those that did load are stopped again.
        """
        graphs = [self.made(plan) for plan in plans]
        for at, graph in enumerate(graphs):
            versions = self._graphs.setdefault(graph.plan.name, {})
            if graph.plan.version in versions:
                for added in graphs[:at]:
                    self._remove(added)
                raise Unavailable(f"graph '{graph.plan.name}' version {graph.plan.version} is there twice")
            versions[graph.plan.version] = graph
        before = resident_bytes()
        results = await asyncio.gather(*(graph.executor.start() for graph in graphs), return_exceptions=True)
        if len(graphs) == 1:  # of several side by side nobody can tell which one took what
            graphs[0].size_bytes = max(0, resident_bytes() - before)
        failures = [result for result in results if isinstance(result, BaseException)]
        for graph, result in zip(graphs, results, strict=True):
            graph.ready = result is None
        if failures:
            await self._stop([graph for graph in graphs if graph.ready])
            for graph in graphs:
                self._remove(graph)
            self._changed()
            raise failures[0]
        self._changed()

    async def end_sequences(self) -> None:
        """Let no sequence start any more, and return once none is under way."""
        sequencers = [graph.sequences for graph in self.graphs() if graph.sequences is not None]
        await asyncio.gather(*(sequencer.end() for sequencer in sequencers))

    def swap(self, add: Sequence[ServedGraph], remove: Sequence[ServedGraph]) -> None:
        """Serve `add`, whose executors run, in place of `remove`, in one step.

        A request that was read for a removed graph still enters it, or what took its place once it is closed.
        What is removed still answers what it has begun; stop its executor once it is `drained`.
        """
        for graph in remove:
            graph.ready = False
            graph.door = self._successor
            versions = self._graphs.get(graph.plan.name, {})
            if versions.get(graph.plan.version) is graph:
                self._remove(graph)
                if self._ledger is not None:
                    self._ledger.replaced(graph)
        for graph in add:
            graph.ready = True
            self._graphs.setdefault(graph.plan.name, {})[graph.plan.version] = graph
            if self._ledger is not None:
                self._ledger.taken_up(graph)
        self._changed()

    async def _successor(self, graph: ServedGraph, context: Context) -> ServedGraph:
        """Return a removed graph, or what took its place if the request that was read for it fits."""
        if not graph.closed:
            graph.requests += 1
            return graph
        successor = self.get(graph.plan.name, graph.plan.version)
        if not takes_the_same(graph.plan, successor.plan):
            raise Unavailable(f"model '{graph.plan.name}' was replaced by one with other tensors while the request came in")
        if successor.door is not None:
            return await successor.door(successor, context)
        successor.requests += 1
        return successor

    async def stop(self) -> None:
        """Stop all graphs: running batches end, what waits is refused, steps are unloaded."""
        await self._stop([graph for graph in self.graphs() if graph.ready])

    async def _stop(self, started: Sequence[ServedGraph]) -> None:
        for graph in started:
            graph.ready = False
        self._changed()
        results = await asyncio.gather(*(graph.stop() for graph in started), return_exceptions=True)
        for graph, result in zip(started, results, strict=True):
            if isinstance(result, BaseException):
                logger.error("graph '%s' did not stop cleanly: %s", graph.plan.name, result)

    def _remove(self, graph: ServedGraph) -> None:
        versions = self._graphs[graph.plan.name]
        del versions[graph.plan.version]
        if not versions:
            del self._graphs[graph.plan.name]

    def graphs(self) -> list[ServedGraph]:
        """Return every version of every graph, in order of name and version."""
        return [versions[version] for _, versions in sorted(self._graphs.items()) for version in sorted(versions, key=int)]

    def get(self, name: str, version: str = "") -> ServedGraph:
        """Return a graph.

        Args:
            name: the graph's name.
            version: its version; empty for the highest that is ready.

        Raises:
            GraphNotFound: no such graph, or not this version.
            Unavailable: it is there, but not ready.
        """
        versions = self._graphs.get(name)
        if versions is None:
            if name in self.known:
                raise GraphNotFound(f"Request for unknown model: '{name}' has no available versions")
            raise GraphNotFound(f"Request for unknown model: '{name}' is not found")
        if version:
            graph = versions.get(version) or self._taking(version, versions)
            if graph is None:
                hint = f"; there are {', '.join(self.versions(name))}" if any(one.routed for one in versions.values()) else ""
                raise GraphNotFound(f"Request for unknown model: '{name}' version {version} is not found{hint}")
            if not graph.ready:
                raise Unavailable(f"Request for unknown model: '{name}' version {version} is not at ready state")
            return graph
        ready = [number for number, graph in versions.items() if graph.ready]
        if not ready:
            raise Unavailable(f"Request for unknown model: '{name}' has no available versions")
        return versions[max(ready, key=int)]

    def versions(self, name: str) -> list[str]:
        """Return the versions of a graph that are ready, in order."""
        ready = [graph for graph in self._graphs.get(name, {}).values() if graph.ready]
        return sorted({version for graph in ready for version in graph.plan.versions}, key=int)

    def versions_of(self, graph: ServedGraph) -> set[str]:
        """Return the versions with which requests reach a graph: its own, and those that it takes apart and no other is."""
        others = self._graphs[graph.plan.name].keys() - {graph.plan.version}
        return {graph.plan.version, *graph.plan.versions} - others

    def _taking(self, version: str, graphs: Mapping[str, ServedGraph]) -> ServedGraph | None:
        """Return the newest graph inside of which a version is taken apart from others; None without one."""
        taking = [number for number, graph in graphs.items() if graph.routed and version in graph.plan.versions]
        return graphs[max(taking, key=int)] if taking else None

    @property
    def ready(self) -> bool:
        """True when every graph is ready, there is one (or `may_be_empty`), all `conditions` hold, and the server goes on."""
        graphs = self.graphs()
        loaded = (bool(graphs) or self.may_be_empty) and all(graph.ready for graph in graphs)
        return loaded and not self.draining and all(holds() for holds in self.conditions)

    def on_change(self, listener: Callable[[], None]) -> None:
        """Call `listener` now and after every change of what is served."""
        self._listeners.append(listener)
        listener()

    def notice(self) -> None:
        """Tell listeners that a condition has changed."""
        self._changed()

    def _changed(self) -> None:
        for listener in self._listeners:
            listener()
