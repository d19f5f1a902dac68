"""Owns a plan's life: loads its steps, runs requests, stops."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import Any

from servinggraph.batching import Batcher
from servinggraph.context import Context
from servinggraph.errors import DeadlineExceeded, ServingGraphError, StepFailed
from servinggraph.executor.stretches import named, run_plan
from servinggraph.executor.wiring import router_operation, step_operation, wrapped
from servinggraph.interfaces import BatchPolicy, Handler, Operation, Router, Step
from servinggraph.plan import Plan, PlanNode

__all__ = ["Executor"]

logger = logging.getLogger("servinggraph.executor")


class Executor:
    """Runs one plan on the running event loop.

    Attributes:
        plan: the plan.
        batchers: batcher of each batched node, by node name; the empty name for the whole graph's.
        now: the clock of all deadlines, seconds.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.batchers: dict[str, Batcher] = {}
        self._steps: list[tuple[PlanNode, Step[Any]]] = [
            (node, node.work) for node in plan.every_node() if isinstance(node.work, Step)
        ]
        self._run: Handler = _not_started
        self.now = asyncio.get_running_loop().time

    async def start(self) -> None:
        """Load all steps, in threads side by side, and build the callable that runs requests.

        Raises:
            ServingGraphError: a step failed to load; names the node. All steps are unloaded again.
        """
        loads = [asyncio.to_thread(step.load, node.batch) for node, step in self._steps]
        results = await asyncio.gather(*loads, return_exceptions=True)
        for (node, _), result in zip(self._steps, results, strict=True):
            if isinstance(result, BaseException):
                await self.stop()
                if isinstance(result, ServingGraphError):
                    raise result.at(node.name)
                raise StepFailed(f"failed to load: {type(result).__name__}: {result}").at(node.name) from result
        policies = {node.name: result for (node, _), result in zip(self._steps, results, strict=True)}
        operations = {node.name: self._operation(node, policies) for node in self.plan.nodes}
        whole = run_plan(self.plan.nodes, operations, self.plan.answer)
        if self.plan.batch is not None:
            self.batchers[""] = Batcher(whole, self.plan.batch, self.plan.name)
            whole = self.batchers[""].operation()
        self._run = whole.handler

    async def stop(self) -> None:
        """Finish the batches that run, refuse what waits, unload all steps."""
        await asyncio.gather(*(batcher.close() for batcher in self.batchers.values()))
        for node, step in self._steps:
            try:
                await asyncio.to_thread(step.unload)
            except Exception:
                logger.exception("node '%s' failed to unload", node.name)

    async def run(self, value: Any, context: Context) -> Any:
        """Run one request.

        Args:
            value: the request's tensors.
            context: its identity and limits; the plan's own time limit narrows its deadline.

        Raises:
            ServingGraphError: with the node that failed.
        """
        seconds = self.plan.timeout_s
        if seconds is None and context.deadline is None:
            return await self._run(value, context)
        if seconds is not None:
            end = self.now() + seconds
            if context.deadline is None or end < context.deadline:
                context.deadline = end
        try:
            async with asyncio.timeout_at(context.deadline) as scope:
                return await self._run(value, context)
        except TimeoutError:
            if scope.expired():
                raise DeadlineExceeded("Request timeout expired") from None
            raise

    def _operation(self, node: PlanNode, policies: Mapping[str, Any]) -> Operation:
        """Return a node's finished operation; branches of routers first."""
        if isinstance(node.work, Router):
            branches = {short: self._branch(branch, policies) for short, branch in node.branches.items()}
            operation = router_operation(node.work, branches)
            policy = BatchPolicy() if node.batch is True else node.batch or None
            if policy is not None:
                batcher = Batcher(operation, policy, node.name)
                self.batchers[node.name] = batcher
                operation = batcher.operation()
        else:
            operation = step_operation(node, node.work, policies[node.name], self.batchers)
        return wrapped(node, operation)

    def _branch(self, node: PlanNode, policies: Mapping[str, Any]) -> Handler:
        operation = self._operation(node, policies)
        batcher = self.batchers.get(node.name)
        if batcher is not None and operation.call == batcher.submit:
            # A batcher names its node itself, and its future needs no task around it.
            return operation.call
        return named([(node.name, operation)]).handler


async def _not_started(value: Any, context: Context) -> Any:
    raise StepFailed("the graph is not started")
