"""Any ensemble, on any tensors, with any weights and failures: its answer is the definition's, or an error.

The definition is written down here a second time, in numpy with 64 bits, from the options and from what
each member does and when: who takes part, with what weight, and what the rule makes of that.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import event, given, strategies as st

from servinggraph import Graph, routers, steps
from servinggraph.context import Context
from servinggraph.errors import ServingGraphError, StepFailed, Unavailable
from servinggraph.executor import Executor
from servinggraph.testing import ManualClock

RULES = ("mean", "weighted_mean", "median", "trimmed_mean", "max", "vote", "soft_vote", "stacking", "function")
LABELS = ("vote",)


@dataclass(frozen=True)
class Member:
    """What a member does: gives `array` or fails, after `after` seconds; None at once, by a plain call."""

    array: np.ndarray
    fails: bool
    after: int | None


@dataclass(frozen=True)
class Case:
    rule: str
    members: dict[str, Member]
    options: dict[str, Any]
    defaults: dict[str, float]


@st.composite
def cases(draw: Any) -> Case:
    rule = draw(st.sampled_from(RULES))
    names = "abcde"[: draw(st.integers(1, 5))]
    shape = draw(st.sampled_from([(1, 2), (3, 2), (2, 1)]))
    dtype = draw(st.sampled_from(["i4", "i8"] if rule in LABELS else ["f4", "f8"]))
    numbers = st.integers(-3, 3) if rule in LABELS else st.integers(-8, 8).map(lambda number: number / 4)
    # Distinct moments, so that who is in time does not hang on the order within one turn of the loop.
    moments = draw(st.permutations(range(1, 6)))
    at_once = draw(st.booleans())
    members = {
        name: Member(
            np.array(draw(st.lists(numbers, min_size=shape[0] * shape[1], max_size=shape[0] * shape[1])), dtype).reshape(shape),
            draw(st.integers(0, 3)) == 0,
            None if at_once else moment,
        )
        for name, moment in zip(names, moments, strict=False)
    }
    options: dict[str, Any] = {}
    if rule == "weighted_mean" or (rule in ("vote", "soft_vote") and draw(st.booleans())):
        weights = draw(st.lists(st.sampled_from([0, 1, 1, 2, 0.5]), min_size=len(names), max_size=len(names)).filter(any))
        options["weights"] = dict(zip(names, weights, strict=True))
    if rule == "trimmed_mean":
        options["trim"] = draw(st.sampled_from([0.1, 0.2, 0.25, 0.4]))
    if rule == "vote":
        options["ties"] = draw(st.sampled_from(["smallest", "first"]))
    policies = ["fail", "default"] if rule == "stacking" else ["fail", "reweight", "default"]
    policy = options["on_failure"] = draw(st.sampled_from(policies))
    quorum = draw(st.integers(1, len(names)))
    hedged = not (rule == "stacking" and policy == "fail") and draw(st.booleans())
    if hedged:
        options |= {"quorum": quorum, "wait": "quorum"}
    elif policy != "fail" and draw(st.booleans()):
        options["quorum"] = quorum
    defaults = {}
    if policy == "default":
        defaults = {name: draw(numbers) for name in names if draw(st.integers(0, 3))}
        options["defaults"] = {name: {"y": number} for name, number in defaults.items()}
    return Case(rule, members, options, defaults)


def expected(case: Case) -> tuple[dict[str, Any], list[str], list[str]] | str:
    """Return the answer's tensors, who answered, and for whom a default stood in; or why there is no answer."""
    options, members = case.options, case.members
    policy = options["on_failure"]
    quorum = options.get("quorum", len(members) if policy == "fail" else 1)
    hedged = options.get("wait") == "quorum"
    may_miss = {"fail": set(), "reweight": set(members), "default": set(case.defaults)}[policy]
    may_be_late = may_miss if policy == "default" else set(members)
    answered: list[str] = []
    left = set(members)
    for moment in sorted({member.after or 0 for member in members.values()}):
        now = [name for name in members if (members[name].after or 0) == moment]
        for name in now:
            left.discard(name)
            if not members[name].fails:
                answered.append(name)
            elif name not in may_miss:
                return f"{name} failed"
        if hedged and len(answered) >= quorum and left <= may_be_late:
            break
    if len(answered) < quorum:
        return "no quorum"
    missing = [name for name in members if name not in answered] if policy == "default" else []
    part = [name for name in members if name in answered or name in missing]
    like = members[answered[0]].array
    arrays = [members[n].array.astype("f8") if n in answered else np.full(like.shape, case.defaults[n], "f8") for n in part]
    weights = np.array([options.get("weights", {}).get(name, 1.0) for name in part])
    if not weights.any():
        return "weight 0"
    return combined(case, arrays, weights / weights.sum()), [name for name in members if name in answered], missing


def combined(case: Case, arrays: list[np.ndarray], shares: np.ndarray) -> dict[str, Any]:
    stack = np.stack(arrays)
    mean = np.tensordot(shares, stack, 1)
    if case.rule == "median":
        return {"y": np.median(stack, axis=0)}
    if case.rule == "max":
        return {"y": stack.max(axis=0)}
    if case.rule == "trimmed_mean":
        cut = int(case.options["trim"] * len(arrays) + 1e-9)
        return {"y": np.sort(stack, axis=0)[cut : len(arrays) - cut].mean(axis=0)}
    if case.rule in ("stacking", "function"):
        return {"y": stack.sum(axis=0)}
    if case.rule == "soft_vote":
        return {"y": mean, "label": np.round(mean, 9).argmax(axis=-1)}
    if case.rule == "vote":
        elected = np.zeros(arrays[0].shape)
        for place in np.ndindex(elected.shape):
            votes: Counter[float] = Counter()
            for array, share in zip(arrays, shares, strict=True):
                votes[float(array[place])] += share
            most = max(votes.values())
            winners = [label for label in votes if abs(votes[label] - most) < 1e-9]
            elected[place] = min(winners) if case.options["ties"] == "smallest" else winners[0]
        return {"y": elected}
    return {"y": mean}


def member_of(member: Member) -> Any:
    def at_once(value: Any) -> Any:
        if member.fails:
            raise ValueError("injected")
        return {"y": member.array}

    if member.after is None:
        return at_once

    async def later(value: Any) -> Any:
        await asyncio.sleep(member.after)
        return at_once(value)

    return later


def graph_of(case: Case) -> Graph:
    datatype = {"f4": "FP32", "f8": "FP64", "i4": "INT32", "i8": "INT64"}
    branches: dict[str, Any] = {
        name: steps.Python(
            member_of(member), outputs={"y": (datatype[member.array.dtype.str[1:]], [-1, member.array.shape[1]])}
        )
        for name, member in case.members.items()
    }
    options = dict(case.options)
    combine: Any = case.rule
    if case.rule == "function":
        combine = lambda members: {"y": sum(tensors["y"] for tensors in members.values())}  # noqa: E731
    if case.rule == "stacking":
        branches["final"] = lambda value: {"y": sum(value[f"{name}.y"] for name in case.members)}
        options["stacker"] = "final"
    graph = Graph("g", inputs={"x": ("FP32", [-1, 1])})
    return graph.to(routers.Ensemble(branches, combine=combine, **options), name="n").respond()


@pytest.mark.timeout(3600)
@given(cases())
def test_an_answer_is_the_definitions_or_an_error(case: Case) -> None:
    clock = ManualClock()
    context = Context()
    rows = next(iter(case.members.values())).array.shape[0]

    async def run() -> Any:
        executor = Executor(graph_of(case).compile())
        await executor.start()
        request = asyncio.ensure_future(executor.run({"x": np.zeros((rows, 1), "f4")}, context))
        for _ in range(6):
            await clock.advance(1)
        assert request.done(), "nobody was answered"
        await executor.stop()
        await clock.settle()
        assert asyncio.all_tasks() == {asyncio.current_task()}, "a member runs on"
        return request.exception() or request.result()

    outcome = clock.run(run())
    definition = expected(case)
    if isinstance(definition, str):
        assert isinstance(outcome, StepFailed | Unavailable), (definition, outcome)
        event("error")
        return
    tensors, answered, missing = definition
    assert not isinstance(outcome, ServingGraphError), outcome
    assert tensors.keys() == outcome.keys()
    for name, tensor in tensors.items():
        np.testing.assert_allclose(outcome[name].astype("f8"), tensor, rtol=1e-5, atol=1e-6)
    assert ",".join(answered) == context.response_parameters["n.members"]
    assert ",".join(missing) == context.response_parameters.get("n.defaulted", "")
    event(f"{case.rule}: {'whole' if len(answered) == len(case.members) else 'partial'}")
