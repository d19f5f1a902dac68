"""Streams: graphs in which generators give any number of values, one after the other.

The generators of a graph stand one behind the other (the compiler sees to it), and cut it into
segments: what comes before the first runs once, what comes behind one runs once for each of its
items. Nothing runs ahead: the next item is made when the reader asks for the next answer.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final

from servinggraph.concurrency import aclose_generator, close_generator
from servinggraph.context import Context, ParameterValue
from servinggraph.executor.stretches import Branching, RunState, named, stretches_of, takers_of
from servinggraph.executor.wiring import limited, mapping_of, output_check, read_only, unshared, whole_rows
from servinggraph.interfaces import Operation
from servinggraph.plan import INPUTS, PlanNode
from servinggraph.statistics import NodeStatistics

__all__ = ["END", "StreamRun", "Streaming"]

logger = logging.getLogger("servinggraph.executor")

END: Final = object()
"""Stands for the answer behind the last one."""

Values = dict[str, Any]
"""Results that a stream goes on to use, by the node that gave them."""

Counters = Mapping[str, NodeStatistics]

Segment = Callable[[Values, Context], Awaitable[Any]]


class _Opened:
    """A generator at work."""

    __slots__ = ("iterator", "node", "parameters", "suspends", "value")

    def __init__(self, node: str, iterator: Any, value: Any, *, suspends: bool) -> None:
        self.node = node
        self.iterator = iterator
        self.value = value
        self.suspends = suspends
        self.parameters: dict[str, ParameterValue] = {}

    async def close(self) -> None:
        if self.suspends:
            await aclose_generator(self.iterator)
        else:
            close_generator(self.iterator)


class StreamRun:
    """One request on its way through a graph with generators.

    Attributes:
        values: results that are still used.
        opened: the generators at work, outer ones first.
        begun: True once the first segment has run.
    """

    __slots__ = ("begun", "opened", "values")

    def __init__(self, values: Values) -> None:
        self.values = values
        self.opened: list[_Opened] = []
        self.begun = False

    async def close(self) -> None:
        """End the generators, inner ones first; what they raise then is logged, since nobody waits for it any more."""
        cancelled: asyncio.CancelledError | None = None
        while self.opened:
            opened = self.opened.pop()
            try:
                await opened.close()
            except KeyboardInterrupt:
                raise
            except asyncio.CancelledError as error:
                cancelled = error
            except BaseException:
                logger.exception("node '%s' failed while its stream was closed", opened.node)
        task = asyncio.current_task()
        if cancelled is not None and task is not None and task.cancelling():
            raise cancelled


class Streaming:
    """Runs a graph with generators.

    Args:
        nodes: in an order in which every node comes after its sources.
        operations: what each node does.
        answer: the node whose result is the answer.
        statistics: where each node is counted; a generator for each request, and its items apart.
    """

    def __init__(
        self, nodes: Sequence[PlanNode], operations: Mapping[str, Operation], answer: str, statistics: Counters
    ) -> None:
        # How many generators a result comes behind; and, of each node, the segment in which it runs.
        level = {INPUTS: 0}
        runs_in: dict[str, int] = {}
        for node in nodes:
            runs_in[node.name] = max(level[source] for source in node.sources)
            level[node.name] = runs_in[node.name] + node.streams
        takers = takers_of(nodes)
        later = {source for node in nodes for source in node.sources if runs_in[node.name] > level[source]}
        self._shared = later | {name for name, times in takers.items() if times > 1}
        self._generators = [node.name for node in nodes if node.streams]
        self._pulls: list[Operation] = []
        calls = dict(operations)
        for node in nodes:
            if node.streams:
                calls[node.name], pull = _open_and_pull(node, operations[node.name])
                items = statistics[node.name].items = NodeStatistics()
                self._pulls.append(named([(node.name, pull)], {node.name: items}))
        self._segments: list[Segment | None] = []
        for number, result in enumerate([*self._generators, answer]):
            inside = [node for node in nodes if runs_in[node.name] == number]
            made = {node.name for node in inside}
            given = list(dict.fromkeys(source for node in inside for source in node.sources if source not in made))
            self._segments.append(
                _segment(inside, calls, result, given, takers, later, self._shared, statistics) if inside else None
            )

    def begin(self, value: Any) -> StreamRun:
        """Return a request that has not yet run at all."""
        return StreamRun({INPUTS: read_only(value) if INPUTS in self._shared else value})

    async def advance(self, run: StreamRun, context: Context) -> Any:
        """Return the next answer, or `END`.

        What is in the context's response parameters then belongs to this answer: those of
        the nodes that ran for it, and of those before all answers.
        """
        if not run.begun:
            run.begun = True
            first = self._segments[0]
            assert first is not None  # the first generator is in it
            self._open(run, await first(run.values, context), context)
        parameters = context.response_parameters
        while run.opened:
            depth = len(run.opened)
            opened = run.opened[-1]
            if parameters != opened.parameters:
                parameters.clear()
                parameters.update(opened.parameters)
            pull = self._pulls[depth - 1]
            item = await pull.call(opened, context) if pull.suspends else pull.call(opened, context)
            if item is END:
                run.opened.pop()
                continue
            segment = self._segments[depth]
            if segment is None:
                return item
            run.values[opened.node] = read_only(item) if opened.node in self._shared else item
            result = await segment(run.values, context)
            if depth == len(self._pulls):
                return result
            self._open(run, result, context)
        return END

    def _open(self, run: StreamRun, opened: _Opened, context: Context) -> None:
        opened.parameters = dict(context.response_parameters)
        run.opened.append(opened)


def _open_and_pull(node: PlanNode, operation: Operation) -> tuple[Operation, Operation]:
    """Return what begins a generator, and what takes its next item or `END`, each item by itself checked and renamed."""
    call, suspends = operation.call, operation.suspends
    check = None if node.outputs is None else output_check(node.name, node.outputs)
    mapping = mapping_of(node)

    def begin(value: Any, context: Context) -> _Opened:
        inside = value if mapping is None else mapping[0](value)
        return _Opened(node.name, call(inside, context), value, suspends=suspends)

    def finished(opened: _Opened, item: Any) -> Any:
        item = whole_rows(item)
        if check is not None:
            item = check(item)
        return item if mapping is None else mapping[1](opened.value, item)

    def take(opened: _Opened, context: Context) -> Any:
        item = next(opened.iterator, END)
        return item if item is END else finished(opened, item)

    async def wait(opened: _Opened, context: Context) -> Any:
        try:
            item = await opened.iterator.__anext__()
        except StopAsyncIteration:
            return END
        return finished(opened, item)

    pull = Operation(wait, suspends=True) if suspends else Operation(take, suspends=False)
    return Operation(begin, suspends=False), pull if node.timeout_s is None else limited(pull, node.timeout_s)


def _segment(
    nodes: Sequence[PlanNode],
    operations: Mapping[str, Operation],
    result: str,
    given: Sequence[str],
    takers: Mapping[str, int],
    later: set[str],
    shared: set[str],
    statistics: Counters,
) -> Segment:
    """Return what runs nodes of one segment and gives the result of one of them; those that are used later join the values."""
    stretches = stretches_of(nodes, takers)
    if len(stretches) > 1 or len(stretches[0][0].sources) > 1:
        kept = [node.name for node in nodes if node.name in later and node.name != result]
        inside = [name for name in shared if name in given or name in kept]
        return _Segment(stretches, operations, result, given, inside, kept, statistics).operation().handler
    line = named([(node.name, operations[node.name]) for node in stretches[0]], statistics)
    (source,) = given
    call = line.handler
    if source in shared:
        return lambda values, context: call(unshared(values[source]), context)
    return lambda values, context: call(values[source], context)


class _SegmentState(RunState):
    """The state of one run of a segment."""

    __slots__ = ("values",)

    values: Values


class _Segment(Branching):
    """Nodes that fork or join between two generators, or behind the last."""

    def __init__(
        self,
        stretches: list[list[PlanNode]],
        operations: Mapping[str, Operation],
        result: str,
        given: Sequence[str],
        shared: Sequence[str],
        kept: Sequence[str],
        statistics: Counters,
    ) -> None:
        super().__init__(stretches, operations, result, statistics, given, shared)
        self._given = given
        self._kept = {self._number_of[name]: name for name in kept}

    def _begin(self, value: Values, context: Context) -> RunState:
        results = [*self._nothing, *(value[name] for name in self._given)]
        state = _SegmentState(results, self._waiting.copy(), context)
        state.values = value
        return state

    def _store(self, request: RunState, index: int, result: Any) -> None:
        super()._store(request, index, result)
        name = self._kept.get(index)
        if name is not None:
            assert isinstance(request, _SegmentState)
            request.values[name] = request.results[index]
