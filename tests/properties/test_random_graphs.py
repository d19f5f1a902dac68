"""Every caller of any graph is answered exactly once, whatever goes wrong, and nothing is left behind."""

from __future__ import annotations

import asyncio
from itertools import product
from typing import Any

import numpy as np
import pytest
import random_graphs
import running
from hypothesis import event, given

from servinggraph.errors import DeadlineExceeded, LimitExceeded, ServingGraphError, StepFailed, Unavailable


class Run(running.Run):
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
            for told in str(answered[f"{node.name}.members"]).split("; "):
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
