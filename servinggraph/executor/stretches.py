"""Stretches: nodes that simply follow one another, and the graph that stretches form.

A stretch is run by plain calls and awaits. Only where several stretches that wait for
something are ready at once does a request get tasks, in one TaskGroup.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping, Sequence
from time import perf_counter_ns
from typing import Any, Final

from servinggraph.context import Context
from servinggraph.errors import DeadlineExceeded, ServingGraphError, StepFailed
from servinggraph.executor.wiring import SLOW_STEP_NS, SlowSteps, as_failure, read_only, unshared
from servinggraph.interfaces import Operation
from servinggraph.plan import INPUTS, PlanNode
from servinggraph.statistics import NodeStatistics, code_of, is_late
from servinggraph.tracing import trace_alone, trace_failure

__all__ = ["Branching", "RunState", "named", "run_plan", "stretches_of", "takers_of"]

Runner = Callable[[Any, Context], Any]


def run_plan(
    nodes: Sequence[PlanNode], operations: Mapping[str, Operation], answer: str, statistics: Mapping[str, NodeStatistics]
) -> Operation:
    """Return one operation that runs all nodes and gives the answer's value.

    Args:
        nodes: in an order in which every node comes after its sources.
        operations: what each node does.
        answer: the node whose result is the answer.
        statistics: where each node is counted.
    """
    stretches = stretches_of(nodes, takers_of(nodes))
    if len(stretches) == 1:
        return named([(node.name, operations[node.name]) for node in stretches[0]], statistics)
    return Branching(stretches, operations, answer, statistics).operation()


def named(steps: Sequence[tuple[str, Operation]], statistics: Mapping[str, NodeStatistics]) -> Operation:
    """Return one operation that runs operations one after the other, counts them, and names the one that fails."""
    clock = asyncio.get_running_loop().time
    counted = [(name, operation, statistics[name]) for name, operation in steps]
    if any(operation.suspends for _, operation in steps):
        return Operation(_awaiting(counted, clock, statistics), suspends=True)
    return Operation(_plain(counted, clock, statistics), suspends=False)


Counted = Sequence[tuple[str, Operation, NodeStatistics]]


def _measure(counters: NodeStatistics) -> Callable[[int], None] | None:
    """Return what counts a duration by size, None where metrics are off."""
    return None if counters.durations is None else counters.durations.compute.add


def _plain(steps: Counted, clock: Callable[[], float], names: Collection[str]) -> Runner:
    """Return a plain callable that runs operations of which none suspends."""
    calls = [(name, operation.call, counters, _measure(counters)) for name, operation, counters in steps]
    report_slow = SlowSteps(names).report

    def run(value: Any, context: Context) -> Any:
        name = ""
        deadline = context.deadline
        trace = context.trace
        began = perf_counter_ns()
        try:
            for name, call, counters, measure in calls:
                if deadline is not None and clock() >= deadline:
                    raise DeadlineExceeded("Request timeout expired before it ran")
                value = call(value, context)
                now = perf_counter_ns()
                took = now - began
                counters.success += 1
                counters.busy_ns += took
                counters.last_ns = now
                if measure is not None:
                    measure(took)
                if trace is not None:
                    trace_alone(trace, name, began, now)
                if took > SLOW_STEP_NS:
                    report_slow(name, took)
                began = now
        except BaseException as error:
            counters.failed(perf_counter_ns() - began, code_of(error))
            if trace is not None:
                trace_failure(trace, name, began, error)
            if isinstance(error, ServingGraphError):
                error.at(name)
                raise
            if isinstance(error, KeyboardInterrupt):  # not the step's: somebody stops the process
                raise
            # Also CancelledError: nobody can cancel a plain call from outside.
            raise as_failure(error, name) from error
        return value

    return run


def _awaiting(steps: Counted, clock: Callable[[], float], names: Collection[str]) -> Runner:
    """Return an async callable that runs operations of which some suspend."""
    calls = [(name, operation.call, operation.suspends, counters, _measure(counters)) for name, operation, counters in steps]
    report_slow = SlowSteps(names).report

    async def run(value: Any, context: Context) -> Any:
        name = ""
        deadline = context.deadline
        trace = context.trace
        began = 0
        try:
            for name, call, suspends, counters, measure in calls:
                if deadline is not None and clock() >= deadline:
                    began = 0
                    raise DeadlineExceeded("Request timeout expired before it ran")
                if counters.batched:  # its batcher counts
                    began = 0 if trace is None else perf_counter_ns()
                    value = await call(value, context)
                    continue
                began = perf_counter_ns()
                value = call(value, context)
                if suspends:
                    value = await value
                now = perf_counter_ns()
                took = now - began
                counters.success += 1
                counters.busy_ns += took
                counters.last_ns = now
                if measure is not None:
                    measure(took)
                if trace is not None:
                    trace_alone(trace, name, began, now)
                if took > SLOW_STEP_NS and not suspends:
                    report_slow(name, took)
        except BaseException as error:
            if not counters.batched:
                code = code_of(error, late=is_late(deadline, clock()))
                counters.failed(perf_counter_ns() - began if began else 0, code)
            if trace is not None:
                trace_failure(trace, name, began, error)
            failure = _failure_of(error, name)
            try:
                if failure is error:
                    raise
                raise failure from error
            finally:
                del failure  # by its traceback it holds this frame, and with it the tensors
        return value

    return run


def _failure_of(error: BaseException, name: str) -> BaseException:
    """Return what a node's failure is to whoever waits for it."""
    if isinstance(error, ServingGraphError):
        return error.at(name)
    if isinstance(error, asyncio.CancelledError):
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            return error
        # Nobody cancelled this request: something that the step waited for was cancelled.
        return StepFailed("was cancelled from inside").at(name)
    if isinstance(error, KeyboardInterrupt | GeneratorExit):  # the process, or the event loop, is ending
        return error
    return as_failure(error, name)


def takers_of(nodes: Sequence[PlanNode]) -> dict[str, int]:
    """Return how many nodes take each node's result."""
    takers: dict[str, int] = {}
    for node in nodes:
        for name in node.sources:
            takers[name] = takers.get(name, 0) + 1
    return takers


def stretches_of(nodes: Sequence[PlanNode], takers: Mapping[str, int]) -> list[list[PlanNode]]:
    """Cut the graph where data forks or joins; what lies between is a stretch."""
    stretches: list[list[PlanNode]] = []
    ending: dict[str, list[PlanNode]] = {}
    for node in nodes:
        before = ending.get(node.sources[0]) if len(node.sources) == 1 else None
        if before is not None and takers[node.sources[0]] == 1:
            before.append(node)
            ending[node.name] = before
        else:
            stretch = [node]
            stretches.append(stretch)
            ending[node.name] = stretch
    return stretches


_MISSING: Final = object()
"""Stands for the result of a stretch that has not run."""


class RunState:
    """The state of one request in a branching graph."""

    __slots__ = ("context", "group", "results", "waiting")

    def __init__(self, results: list[Any], waiting: list[int], context: Context) -> None:
        self.results = results
        self.waiting = waiting
        self.context = context
        self.group: asyncio.TaskGroup | None = None


class Branching:
    """Runs stretches as their inputs become ready.

    The task that finishes a stretch goes on with one that this made ready; only further
    ones that suspend become tasks of their own.

    Args:
        stretches: in an order in which each comes after its sources.
        operations: what each node does.
        answer: the node whose result is the answer.
        statistics: where each node is counted.
        given: names of the values that are there from the beginning.
        shared: names of values that others take as well, besides these stretches.
    """

    def __init__(
        self,
        stretches: list[list[PlanNode]],
        operations: Mapping[str, Operation],
        answer: str,
        statistics: Mapping[str, NodeStatistics],
        given: Sequence[str] = (INPUTS,),
        shared: Collection[str] = (),
    ) -> None:
        number_of = {stretch[-1].name: index for index, stretch in enumerate(stretches)}
        joined = [named([(node.name, operations[node.name]) for node in stretch], statistics) for stretch in stretches]
        self._calls: list[Runner] = [operation.call for operation in joined]
        self._suspends = [operation.suspends for operation in joined]
        # What is given are the results behind the last stretch; it is all there at once, so it counts as one.
        self._inputs_at = len(stretches)
        number_of |= {name: self._inputs_at + index for index, name in enumerate(given)}
        sources = [[number_of[name] for name in stretch[0].sources] for stretch in stretches]
        self._targets: list[list[int]] = [[] for _ in range(len(stretches) + 1)]
        self._waiting: list[int] = []
        for index, numbers in enumerate(sources):
            awaited = {min(number, self._inputs_at) for number in numbers}
            self._waiting.append(len(awaited))
            for number in awaited:
                self._targets[number].append(index)
        taken = [sum(number in numbers for numbers in sources) for number in range(len(stretches) + len(given))]
        self._forks = [times > 1 for times in taken]
        for name in shared:
            self._forks[number_of[name]] = True
        self._number_of = number_of
        self._nothing = [_MISSING] * len(stretches)
        self._collect = [
            _collector(stretch[0], numbers, self._forks) for stretch, numbers in zip(stretches, sources, strict=True)
        ]
        self._answer = answer
        self._answer_at = number_of[answer]
        self._parallel = self._may_overlap(sources)

    def operation(self) -> Operation:
        if not any(self._suspends):
            return Operation(self._run_plain, suspends=False)
        return Operation(self._run_parallel if self._parallel else self._run_in_order, suspends=True)

    def _may_overlap(self, sources: list[list[int]]) -> bool:
        """Tell whether two stretches that suspend can be under way at once: neither comes after the other."""
        ancestors: list[set[int]] = []
        for numbers in sources:
            ancestors.append({a for n in numbers if n < self._inputs_at for a in (*ancestors[n], n)})
        suspending = [index for index, suspends in enumerate(self._suspends) if suspends]
        return any(a not in ancestors[b] for i, b in enumerate(suspending) for a in suspending[:i])

    def _begin(self, value: Any, context: Context) -> RunState:
        request = RunState([_MISSING] * len(self._targets), self._waiting.copy(), context)
        request.results[self._inputs_at] = read_only(value) if self._forks[self._inputs_at] else value
        return request

    def _run_plain(self, value: Any, context: Context) -> Any:
        request = self._begin(value, context)
        # Stretches are in topological order already.
        for index, call in enumerate(self._calls):
            self._store(request, index, call(self._collect[index](request.results), context))
        return request.results[self._answer_at]

    async def _run_in_order(self, value: Any, context: Context) -> Any:
        request = self._begin(value, context)
        for index, call in enumerate(self._calls):
            result = call(self._collect[index](request.results), context)
            self._store(request, index, await result if self._suspends[index] else result)
        return request.results[self._answer_at]

    async def _run_parallel(self, value: Any, context: Context) -> Any:
        request = self._begin(value, context)
        try:
            async with asyncio.TaskGroup() as group:
                request.group = group
                await self._walk(request, *self._ready_after(request, self._inputs_at))
        except BaseExceptionGroup as group_error:
            first = _first(group_error)
            raise first from first.__cause__
        answer = request.results[self._answer_at]
        if answer is _MISSING:
            # A step cancelled the task it ran in: a group takes that for a normal end.
            raise StepFailed("a node before it was cancelled from inside").at(self._answer)
        return answer

    async def _walk(self, request: RunState, plain: list[int], follow: int | None) -> None:
        """Run stretches until none is ready that no other task has taken on."""
        while True:
            if plain:
                index = plain.pop()
                result = self._calls[index](self._collect[index](request.results), request.context)
            elif follow is not None:
                index, follow = follow, None
                result = await self._calls[index](self._collect[index](request.results), request.context)
            else:
                return
            self._store(request, index, result)
            plain_now, next_one = self._ready_after(request, index)
            plain.extend(plain_now)
            if next_one is not None:
                if follow is None:
                    follow = next_one
                else:
                    self._spawn(request, next_one)

    def _ready_after(self, request: RunState, index: int) -> tuple[list[int], int | None]:
        """Return what a finished stretch made ready: those that do not suspend, and one that does."""
        plain: list[int] = []
        follow: int | None = None
        for target in self._targets[index]:
            request.waiting[target] -= 1
            if request.waiting[target]:
                continue
            if not self._suspends[target]:
                plain.append(target)
            elif follow is None:
                follow = target
            else:
                self._spawn(request, target)
        return plain, follow

    def _spawn(self, request: RunState, index: int) -> None:
        assert request.group is not None
        request.group.create_task(self._walk(request, [], index))

    def _store(self, request: RunState, index: int, result: Any) -> None:
        request.results[index] = read_only(result) if self._forks[index] else result


def _collector(node: PlanNode, numbers: list[int], forks: list[bool]) -> Callable[[list[Any]], Any]:
    """Return what makes a node's value of its sources' results."""
    if len(numbers) == 1:
        (only,) = numbers
        if forks[only]:
            return lambda results: unshared(results[only])
        return lambda results: results[only]
    # In a graph that is a node of another the nodes go by their own names, too.
    pairs = [(source.rpartition(".")[2], number) for source, number in zip(node.sources, numbers, strict=True)]

    def collect(results: list[Any]) -> dict[str, Any]:
        merged: dict[str, Any] = {}
        giver: dict[str, str] = {}
        for source, number in pairs:
            result = results[number]
            # What is no mapping of tensors goes by the name of the node that gave it.
            for name, tensor in result.items() if isinstance(result, Mapping) else ((source, result),):
                if name in merged:
                    text = f"'{giver[name]}' and '{source}' both give '{name}': rename one with 'rename: {{outputs: ...}}'"
                    raise StepFailed(text).at(node.name)
                merged[name] = tensor
                giver[name] = source
        return merged

    return collect


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """Return the failure that came first; the others are what its cancellation left."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
