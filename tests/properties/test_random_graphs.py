"""Every caller of any graph is answered exactly once, whatever goes wrong, and nothing is left behind."""

from __future__ import annotations

import asyncio
import gc
import importlib.util
import sys
from itertools import product
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
import pytest
from hypothesis import event, given

from servinggraph.context import Context
from servinggraph.errors import DeadlineExceeded, LimitExceeded, ServingGraphError, StepFailed, Unavailable
from servinggraph.executor import Executor
from servinggraph.lifecycle import Admission
from servinggraph.testing import ManualClock


def _beside(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


random_graphs = _beside("random_graphs")

_STUCK_S = 20.0


class Run:
    """One case on the manual clock."""

    def __init__(self, case: Any) -> None:
        self.case = case
        self.clock = ManualClock()
        self.release = random_graphs.Release()
        self.unhandled: list[Any] = []
        self.admission = Admission(1000)
        self.contexts: dict[int, Context] = {}
        self.outcomes: dict[int, Any] = {}

    def start(self) -> None:
        self.clock.run(self._all())
        gc.collect(1)

    async def _all(self) -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, what: self.unhandled.append(what))
        executor = Executor(random_graphs.graph_of(self.case, self.release).compile())
        await executor.start()
        tasks = {caller.number: asyncio.ensure_future(self._caller(executor, caller)) for caller in self.case.callers}
        try:
            await self.clock.advance(0.1)
            await self._until(lambda: all(task.done() for task in tasks.values()) or self.case.has("hang"), "a caller waits")
        finally:
            self.release.event.set()
        await self._until(lambda: all(task.done() for task in tasks.values()), "a caller waits")
        for number, task in tasks.items():
            self.outcomes[number] = task.exception() if not task.cancelled() and task.exception() else task
        await self._until(lambda: self.admission.in_flight == 0, "a slot is not given back")
        for batcher in executor.batchers.values():
            await self._until(lambda batcher=batcher: batcher.queued == batcher.running == 0, "a batcher is not empty")
        left = asyncio.all_tasks() - {asyncio.current_task()}
        assert not left, left
        await executor.stop()

    async def _until(self, condition: Any, otherwise: str) -> None:
        end = monotonic() + _STUCK_S
        while not condition():
            assert monotonic() < end, otherwise
            await self.clock.advance(0.005)

    async def _caller(self, executor: Executor, caller: Any) -> Any:
        await asyncio.sleep(caller.starts_at / 1e3)
        request = asyncio.ensure_future(self._request(executor, caller))
        if caller.cancel_ms is not None:
            await asyncio.wait([request], timeout=caller.cancel_ms / 1e3)
            request.cancel()
        return await request

    async def _request(self, executor: Executor, caller: Any) -> Any:
        deadline = None if caller.deadline_ms is None else self.clock.time() + caller.deadline_ms / 1e3
        context = self.contexts[caller.number] = Context(str(caller.number), deadline=deadline, priority=caller.priority)
        rows = np.array(caller.rows, float)
        self.admission.enter()
        try:
            return await executor.run({"x": np.stack([np.full(len(rows), float(caller.number)), rows], axis=1)}, context)
        finally:
            context.when_idle(self.admission.leave)

    def check(self) -> None:
        assert [] == self.unhandled
        for caller in self.case.callers:
            outcome = self.outcomes[caller.number]
            if isinstance(outcome, asyncio.Task):
                if outcome.cancelled():
                    assert caller.cancel_ms is not None, "cancelled, and nobody did"
                    event("cancelled")
                else:
                    self._check_answer(caller, outcome.result())
                    event("answered")
            else:
                self._check_error(caller, outcome)
                event(type(outcome).__name__)

    def _check_answer(self, caller: Any, result: Any) -> None:
        answered = self.contexts[caller.number].response_parameters
        (array,) = result.values()
        np.testing.assert_allclose(array[:, 0], caller.number, rtol=1e-9)
        # Pieces of a large request may have been answered by different members: then the parameter names all of them.
        choices = product(*([(name, choice) for choice in str(told).split("; ")] for name, told in answered.items()))
        right = [
            np.isclose(array[:, 1], random_graphs.expected(self.case, caller, dict(choice)), rtol=1e-9) for choice in choices
        ]
        assert np.any(right, axis=0).all(), array
        for node in self.case.nodes:
            if node.combine is None:
                assert not self._must_fail(node.works[0], caller), f"{node.name} had to fail"
                continue
            for told in str(answered[f"{node.name}.answered"]).split("; "):
                members = told.split(",")
                assert len(members) >= (node.quorum or len(node.works))
                for work in node.works:
                    is_in = work.name.rpartition(".")[2] in members
                    assert not (is_in and self._must_fail(work, caller)), f"{work.name} had to fail"
                    assert is_in or self._may_fail(work, caller), f"{work.name} is missing without a reason"

    def _check_error(self, caller: Any, error: Any) -> None:
        assert isinstance(error, ServingGraphError), repr(error)
        case = self.case
        if isinstance(error, DeadlineExceeded):
            limited = case.timeout_ms is not None or any(work.timeout_ms is not None for work in case.works)
            assert caller.deadline_ms is not None or limited, str(error)
            return
        policies = [case.batch, *(node.batch for node in case.nodes), *(work.batch for work in case.works)]
        if isinstance(error, LimitExceeded):
            assert any(policy and "max_queue" in policy for policy in policies)
            return
        if isinstance(error, Unavailable):
            quorum = any(node.quorum for node in case.nodes)
            assert quorum or any(policy and policy.get("on_timeout") == "reject" for policy in policies), str(error)
            return
        assert isinstance(error, StepFailed), repr(error)
        assert error.node is not None
        assert any(self._may_fail(work, caller) for work in case.works), f"failed without a reason: {error}"

    def _must_fail(self, work: Any, caller: Any) -> bool:
        return work.faults.get(caller.number) in random_graphs.FAILING and bool(caller.rows)

    def _may_fail(self, work: Any, caller: Any) -> bool:
        """Tell whether a work may fail this caller: for its own fault, a limit, or company that is not kept apart."""
        if work.faults.get(caller.number) in random_graphs.FAILING:
            return True
        policies = [work.batch, self.case.batch, *(node.batch for node in self.case.nodes if work in node.works)]
        for policy in policies:
            if policy and (not policy.get("isolate", True) or "max_queue" in policy or "queue_timeout_ms" in policy):
                return True
        return work.timeout_ms is not None


@pytest.mark.slow
@pytest.mark.timeout(3600)
@given(case=random_graphs.cases())
def test_every_caller_is_answered_once_and_nothing_is_left_behind(case: Any) -> None:
    run = Run(case)
    run.start()
    run.check()
