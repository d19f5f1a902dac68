"""Routers and guards inside each other: every caller answered once, with an answer that there may be; no limit exceeded."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest
import random_flows
import running
from hypothesis import event, given

from servinggraph.errors import ServingGraphError


class Run(running.Run):
    def check(self) -> None:
        assert [] == self.unhandled
        for caller in self.case.callers:
            outcome = self.outcomes[caller.number]
            expected = random_flows.outcomes(self.case.flow, caller.number, tuple(float(row) for row in caller.rows))
            if not isinstance(outcome, asyncio.Task):
                self._check_error(caller, outcome, expected)
            elif outcome.cancelled():
                assert caller.cancel_ms is not None, "cancelled, and nobody did"
                event("cancelled")
            else:
                (array,) = outcome.result().values()
                assert {float(caller.number)} == {round(who, 6) for who in array[:, 0].tolist()}, "somebody else's rows"
                got = array[:, 1]
                assert any(len(got) == len(answer) and np.allclose(got, answer, 0, 1e-6) for answer in expected.answers), got
                event("answered")
        for flow in self.case.flow.every():
            event(flow.kind)
            self._check_limits(flow)

    def _check_error(self, caller: Any, error: Any, expected: random_flows.Outcomes) -> None:
        assert isinstance(error, ServingGraphError), repr(error)
        event(str(error.code.value))
        if error.code.value == "deadline_exceeded" and caller.deadline_ms is not None:
            return
        assert error.code.value in expected.errors, f"failed without a reason: {error!r}"

    def _check_limits(self, flow: random_flows.Flow) -> None:
        seen, guards = flow.seen, flow.guards
        calls = len(seen.times)
        if retry := guards.get("retry"):
            retries = calls - seen.entries
            assert calls <= seen.entries * retry["attempts"]
            assert retries <= retry["burst"] + retry["budget"] * seen.entries + 1e-6, "more retries than the budget has"
            event("retried" if retries > 0 else "not retried")
        elif guards:
            assert calls <= seen.entries
        if "max_concurrency" in guards and flow.kind == "step":
            assert seen.most <= guards["max_concurrency"]["limit"]
        # Calls that wait for a place after they were let through begin in bunches, and a thread has no clock.
        if (limit := guards.get("rate_limit")) and flow.mode != "thread" and "max_concurrency" not in guards:
            for first in range(calls):
                for last in range(first, calls):
                    allowed = limit["burst"] + limit["per_s"] * (seen.times[last] - seen.times[first])
                    assert last - first + 1 <= allowed + 1e-6, "more calls than the rate allows"


@pytest.mark.slow
@pytest.mark.timeout(3600)
@given(case=random_flows.cases())
def test_routers_and_guards_inside_each_other_answer_every_caller_once(case: Any) -> None:
    run = Run(case)
    run.start()
    run.check()
