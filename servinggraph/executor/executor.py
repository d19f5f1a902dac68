"""Owns a plan's life: loads its steps, runs requests, stops."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from time import perf_counter_ns
from typing import Any, Protocol

from servinggraph.batching import Batcher
from servinggraph.concurrency import run_until
from servinggraph.context import Context, Meter
from servinggraph.errors import ServingGraphError, StepFailed, Unsupported
from servinggraph.executor.bodies import entered, entrance
from servinggraph.executor.cache import ResponseCache, cached
from servinggraph.executor.nested import nested_operation
from servinggraph.executor.streams import END, Streaming
from servinggraph.executor.stretches import named, run_plan
from servinggraph.executor.wiring import (
    at_once,
    counting,
    observer_operation,
    router_operation,
    selector_operation,
    step_operation,
    unshared,
    wrapped,
)
from servinggraph.interfaces import BatchPolicy, CachePolicy, Handler, Observer, Operation, Router, Selector, Step
from servinggraph.plan import Plan, PlanNode
from servinggraph.statistics import GraphStatistics, NodeStatistics

__all__ = ["Executor"]

logger = logging.getLogger("servinggraph.executor")


class Seat(Protocol):
    """A router's place: starts it with its state, stops it."""

    async def start(self) -> None: ...

    def let_go(self) -> None: ...

    async def stop(self) -> None: ...


class Executor:
    """Runs one plan on the running event loop.

    Args:
        plan: the plan.
        seats: what starts and stops its routers.
        meter_of: gives what a node's step counts to; by default nobody asks.

    Attributes:
        plan: the plan.
        batchers: batcher of each batched node, by node name; the empty name for the whole graph's.
        caches: kept answers of each node with `cache`, by node name; the empty name for the whole graph's.
        statistics: counters of the graph and its nodes.
        max_rows: rows that one run of the graph may have, known once it is started; 0 where requests
            are no batches: the first axis of some input or output is fixed, or no node is batched.
        now: the clock of all deadlines, seconds.
    """

    def __init__(self, plan: Plan, seats: Sequence[Seat] = (), meter_of: Callable[[str], Meter | None] | None = None) -> None:
        self.plan = plan
        self._seats = seats
        self._meter_of = meter_of or (lambda node: None)
        self.batchers: dict[str, Batcher] = {}
        self.caches: dict[str, ResponseCache] = {}
        self.statistics = GraphStatistics({node.name: NodeStatistics() for node in plan.every_node()})
        self._steps: list[tuple[PlanNode, Step[Any]]] = [
            (node, node.work) for node in plan.every_node() if isinstance(node.work, Step)
        ]
        self.max_rows = 0
        self._seated: list[Seat] = []
        self._run: Handler = _not_started
        self._suspends = False
        self._streaming: Streaming | None = None
        self._enter = entrance(plan)
        self._loop = asyncio.get_running_loop()
        self.now = self._loop.time

    async def start(self) -> None:
        """Load all steps, in threads side by side, and build the callable that runs requests.

        Raises:
            ServingGraphError: a step failed to load; names the node. All steps are unloaded again.
        """
        loads = [asyncio.to_thread(_loaded, node, step, self.statistics.nodes[node.name]) for node, step in self._steps]
        began = perf_counter_ns()
        try:
            results = await asyncio.gather(*loads, return_exceptions=True)
            failure = next((result for result in results if isinstance(result, BaseException)), None)
            if failure is not None:
                raise failure
            self._build({node.name: policy for (node, _), policy in zip(self._steps, results, strict=True)})
            for seat in self._seats:
                self._seated.append(seat)
                await seat.start()
        except BaseException:
            await self.stop()
            raise
        self.statistics.requests.load_ns = perf_counter_ns() - began

    def _build(self, policies: Mapping[str, Any]) -> None:
        """Make the callable that runs requests of what the steps' loads have given."""
        operations = {node.name: self._operation(node, policies) for node in self.plan.nodes}
        if self.plan.decoupled:
            self._streaming = Streaming(self.plan.nodes, operations, self.plan.answer, self.statistics.nodes)
            self._run = _one_answer_only
            return
        first = self.plan.nodes[0]
        if len(operations) == 1 and self._is_bare_batcher(first, operations[first.name]):
            whole = operations[first.name]  # it names its errors and looks at the deadline itself
        else:
            whole = run_plan(self.plan.nodes, operations, self.plan.answer, self.statistics.nodes)
        if self.plan.batch is not None:
            self.batchers[""] = Batcher(whole, self.plan.batch, self.plan.name, None, self.statistics.of_whole_requests())
            whole = self.batchers[""].operation()
        whole = self._kept("", self.plan.cache, self.statistics.requests)(whole)
        self._run = entered(self._enter, whole.handler) if self.plan.body else whole.handler
        self._suspends = whole.suspends
        self.max_rows = self._rows_of_a_run()
        self.statistics.counts_rows = self.max_rows > 0

    def _rows_of_a_run(self) -> int:
        tensors = [*self.plan.inputs.values(), *(self.plan.outputs or {}).values()]
        if not self.plan.inputs or any(not spec.shape or spec.shape[0] != -1 for spec in tensors):
            return 0
        return min((batcher.policy.max_rows for batcher in self.batchers.values()), default=0)

    async def stop(self) -> None:
        """Finish the batches that run, refuse what waits, unload all steps."""
        for seat in self._seated:
            seat.let_go()
        try:
            await asyncio.gather(*(batcher.close() for batcher in self.batchers.values()))
            await self._unseat()
        finally:  # also when that takes too long and is cancelled
            for node, step in self._steps:
                try:
                    await asyncio.to_thread(_unloaded, step)
                except Exception:
                    logger.exception("node '%s' failed to unload", node.name)

    async def _unseat(self) -> None:
        while self._seated:
            try:
                await self._seated.pop().stop()
            except Exception:
                logger.exception("a router of graph '%s' did not stop cleanly", self.plan.name)

    async def run(self, value: Any, context: Context) -> Any:
        """Run one request.

        Args:
            value: the request's tensors; a `Body` for a graph with `inputs: body`.
            context: its identity and limits; the plan's own time limit narrows its deadline.

        Raises:
            Unsupported: the plan is decoupled: use `stream`.
            ServingGraphError: with the node that failed.
        """
        seconds = self.plan.timeout_s
        if seconds is not None:
            end = self.now() + seconds
            if context.deadline is None or end < context.deadline:
                context.deadline = end
        try:
            if context.deadline is None or not self._suspends:  # plain calls cannot be interrupted: they look at the deadline
                return await self._run(value, context)
            return await run_until(context.deadline, self._loop, self._run, value, context, "Request timeout expired")
        except BaseException:
            context.abandon()  # what still runs for it, in a thread say, runs in vain
            raise
        finally:
            context.answered()

    async def stream(self, value: Any, context: Context) -> AsyncGenerator[Any, None]:
        """Run one request that may have any number of answers; see `run`.

        An answer is made when it is asked for. Between two answers the event loop gets its
        turn. Close this (`aclosing`) unless it has ended: only then do its generators end.
        """
        streaming = self._streaming
        if streaming is None:
            yield await self.run(value, context)
            return
        if self.plan.timeout_s is not None:
            end = self.now() + self.plan.timeout_s
            context.deadline = end if context.deadline is None else min(end, context.deadline)
        run = streaming.begin(self._enter(value) if self.plan.body else value)
        loop = self._loop
        try:
            while True:
                task = asyncio.current_task(loop)
                assert task is not None
                asked = task.cancelling()
                if context.deadline is None:
                    answer = await streaming.advance(run, context)
                else:
                    late = "Request timeout expired"
                    answer = await run_until(context.deadline, loop, streaming.advance, run, context, late)
                if task.cancelling() > asked:  # a generator that caught its cancellation would never end
                    raise asyncio.CancelledError
                if answer is END:
                    return
                context.answered()
                yield answer
                # Plain generators with a fast reader would never let anybody else run.
                await asyncio.sleep(0)
        except BaseException:
            context.abandon()
            raise
        finally:
            context.answered()
            await run.close()

    def _operation(self, node: PlanNode, policies: Mapping[str, Any]) -> Operation:
        """Return a node's finished operation; branches of routers first."""
        if node.streams:
            assert isinstance(node.work, Step)
            return counting(node.work, self._meter_of(node.name))  # what else its definition asks for is done to each item
        statistics = self.statistics.nodes[node.name]
        if node.graph is not None:
            operations = {inner.name: self._operation(inner, policies) for inner in node.graph.nodes}
            whole = run_plan(node.graph.nodes, operations, node.graph.answer, self.statistics.nodes)
            operation = self._batched(nested_operation(node.graph, whole), node, policies[node.name])
        elif isinstance(node.work, Router):
            branches = {short: self._branch(branch, policies) for short, branch in node.branches.items()}
            if isinstance(node.work, Selector) and type(node.work).route is Selector.route:
                operation = selector_operation(node.work, branches, self._loop)
            elif isinstance(node.work, Observer) and type(node.work).route is Observer.route:
                operation = observer_operation(node.work, branches, self._loop)
            else:
                operation = router_operation(node.work, {short: self._handler(branch) for short, branch in branches.items()})
            operation = self._batched(operation, node, BatchPolicy() if node.batch is True else node.batch or None)
        else:
            operation = counting(node.work, self._meter_of(node.name))
            operation = step_operation(node, operation, node.work, policies[node.name], self.batchers, statistics)
        return wrapped(node, operation, statistics, self._kept(node.name, node.cache, statistics))

    def _batched(self, operation: Operation, node: PlanNode, policy: BatchPolicy | None) -> Operation:
        """Return the operation of a node that is no single step, batched if there is a policy."""
        if policy is None:
            return operation
        batcher = self.batchers[node.name] = Batcher(operation, policy, node.name, None, self.statistics.nodes[node.name])
        return batcher.operation()

    def _kept(self, name: str, policy: CachePolicy | None, statistics: NodeStatistics) -> Callable[[Operation], Operation]:
        """Return what puts the cache that a policy asks for in front of an operation."""
        if policy is None:
            return lambda operation: operation
        cache = self.caches[name] = ResponseCache(policy, self.now)
        return lambda operation: cached(operation, cache, statistics)

    def _is_bare_batcher(self, node: PlanNode, operation: Operation) -> bool:
        """Tell whether an operation is a batcher's own, with nothing wrapped around it."""
        batcher = self.batchers.get(node.name)
        return batcher is not None and operation.call == batcher.submit

    def _branch(self, node: PlanNode, policies: Mapping[str, Any]) -> Operation:
        operation = self._operation(node, policies)
        # A batcher names its node itself, and its future needs no task around it.
        bare = self._is_bare_batcher(node, operation)
        return operation if bare else named([(node.name, operation)], self.statistics.nodes)

    def _handler(self, branch: Operation) -> Handler:
        """Return a branch's handler: its router gives all branches the same value, and each may change its own mapping."""
        if not branch.suspends:
            return at_once(branch, self._loop)
        call = branch.call
        return lambda value, context: call(unshared(value), context)


def _loaded(node: PlanNode, step: Step[Any], statistics: NodeStatistics) -> BatchPolicy | None:
    """Load a step; whatever it raises becomes an error that names it and that a future can hold."""
    began = perf_counter_ns()
    try:
        policy = step.load(node.joined or node.batch)
        statistics.load_ns = perf_counter_ns() - began
        return None if node.joined else policy
    except ServingGraphError as error:
        raise error.at(node.name) from error.__cause__
    except BaseException as error:
        raise StepFailed.because_of(error, "failed to load: ").at(node.name) from error


def _unloaded(step: Step[Any]) -> None:
    try:
        step.unload()
    except BaseException as error:  # a task would let SystemExit through to the event loop, and StopIteration be lost
        raise StepFailed.because_of(error) from error


async def _one_answer_only(value: Any, context: Context) -> Any:
    raise Unsupported("the graph gives any number of answers (it is decoupled), and this call takes exactly one")


async def _not_started(value: Any, context: Context) -> Any:
    raise StepFailed("the graph is not started")
