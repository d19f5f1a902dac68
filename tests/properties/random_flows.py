"""Random trees of routers, steps and guards with random faults, and what a caller may see of them.

The oracle computes, the slow and simple way, every answer that a caller may get and every code
of an error. Where the set of codes is empty the caller must be answered; where the set of
answers is empty it must not.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import product
from statistics import median
from typing import Any

import numpy as np
from hypothesis import assume, strategies as st
from running import Caller, Release

from servinggraph import Graph, InvalidRequest, routers
from servinggraph.context import Context
from servinggraph.errors import Unavailable
from servinggraph.interfaces import NodeSketch

Rows = tuple[float, ...]
MOST_ANSWERS = 300
FAILING = {"raise": "internal", "invalid": "invalid_request", "down": "unavailable", "flaky": "unavailable"}
CAUGHT = {"unavailable", "limit_exceeded", "deadline_exceeded", "internal"}
RETRIED = {"unavailable", "limit_exceeded", "internal"}
CONDITIONS: Mapping[str, Callable[[int, Rows], bool]] = {
    "rows > 1": lambda who, rows: len(rows) > 1,
    "get(parameters, 'n', 0) > 1": lambda who, rows: who > 1,
    "max(inputs['x']) > 3.01": lambda who, rows: max(who, *rows) > 3.01,
    "id == '0' or min(inputs['x']) < -0.01": lambda who, rows: who == 0 or min(who, *rows) < -0.01,
}
"""Expression to what it means. No mean of small whole numbers comes so near to a bound that rounding could decide."""
COMBINED: Mapping[str, Callable[[list[float], list[int]], float]] = {
    "mean": lambda values, weights: sum(values) / len(values),
    "weighted_mean": lambda values, weights: sum(v * w for v, w in zip(values, weights, strict=True)) / sum(weights),
    "median": lambda values, weights: median(values),
    "max": lambda values, weights: max(values),
}


@dataclass
class Seen:
    """What a node saw of its calls; written by its own step, read when all is over."""

    entries: int = 0
    times: list[float] = field(default_factory=list)
    running: int = 0
    most: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)
    by_caller: dict[int, int] = field(default_factory=dict)

    def begin(self, who: int, time: float) -> int:
        with self.lock:
            self.times.append(time)
            self.running += 1
            self.most = max(self.most, self.running)
            self.by_caller[who] = self.by_caller.get(who, 0) + 1
            return self.by_caller[who]

    def end(self) -> None:
        with self.lock:
            self.running -= 1


@dataclass
class Flow:
    """A step, or a router with its branches."""

    kind: str
    branches: list[Flow] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    guards: dict[str, Any] = field(default_factory=dict)
    mode: str = "sync"
    factor: int = 1
    addend: int = 0
    faults: dict[int, str] = field(default_factory=dict)
    seen: Seen = field(default_factory=Seen)

    @property
    def names(self) -> list[str]:
        return [f"b{number}" for number in range(len(self.branches))]

    def every(self) -> list[Flow]:
        return [self, *(inner for branch in self.branches for inner in branch.every())]


@dataclass
class Case:
    """A tree, its callers, and all that goes wrong."""

    flow: Flow
    callers: list[Caller]

    @property
    def hangs(self) -> bool:
        return any("hang" in flow.faults.values() for flow in self.flow.every())

    @property
    def works_behind(self) -> bool:
        return any(flow.kind == "champion" for flow in self.flow.every())

    def graph(self, release: Release) -> Graph:
        graph = Graph("flows", inputs={"x": ("FP64", [-1, 2])})
        return graph.to(_sketch(self.flow), "n").respond()


# Drawn


@st.composite
def cases(draw: st.DrawFn) -> Case:
    count = draw(st.sampled_from([3, 6, 1, 2, 8]))
    callers = [
        Caller(
            number=number,
            rows=draw(st.lists(st.integers(-4, 6), min_size=1, max_size=3)),
            starts_at=draw(st.sampled_from([0, 0, 0, 1, 4, 10])),
            deadline_ms=draw(st.sampled_from([None, None, None, 5, 20])),
            cancel_ms=draw(st.sampled_from([None, None, None, None, 0, 1, 4, 12])),
            priority=0,
        )
        for number in range(count)
    ]
    case = Case(_flow(draw, draw(st.sampled_from([3, 2, 4, 1])), count), callers)
    if case.hangs:
        for caller in callers:
            caller.deadline_ms = caller.deadline_ms if caller.deadline_ms is not None else 30
    return case


def _flow(draw: st.DrawFn, depth: int, callers: int) -> Flow:
    if depth == 0 or draw(st.integers(0, 7)) == 7:
        return _step(draw, callers)
    kind = draw(st.sampled_from(list(KINDS)))
    least, most = KINDS[kind]
    branches = [_flow(draw, depth - 1, callers) for _ in range(draw(st.integers(least, most)))]
    flow = Flow(kind, branches)
    flow.options = _options(draw, flow)
    if draw(st.integers(0, 3)) == 3:
        flow.guards = _guards(draw)
    return flow


def _step(draw: st.DrawFn, callers: int) -> Flow:
    flow = Flow("step", mode=draw(st.sampled_from(["sync", "sync", "async", "async", "thread"])))
    flow.factor, flow.addend = draw(st.integers(-1, 2)), draw(st.integers(-3, 3))
    if draw(st.integers(0, 3)) == 3:
        flow.guards = _guards(draw)
    elif draw(st.integers(0, 3)) == 3:
        flow.options = {"batch": {"max_rows": draw(st.sampled_from([1, 4, 32])), "max_delay_ms": draw(st.sampled_from([0, 3]))}}
    kinds = ["raise", "slow"] if flow.options else ["raise", "invalid", "down", "flaky", "flaky", "slow"]
    if flow.mode == "async" and not flow.options:
        kinds.append("hang")
    for caller in range(callers):
        if draw(st.integers(0, 4)) == 4:
            flow.faults[caller] = draw(st.sampled_from(kinds))
    return flow


def _guards(draw: st.DrawFn) -> dict[str, Any]:
    guards: dict[str, Any] = {}
    chosen = draw(
        st.lists(st.sampled_from(["retry", "breaker", "rate", "places", "timeout"]), min_size=1, max_size=3, unique=True)
    )
    if "retry" in chosen:
        guards["retry"] = {
            "attempts": draw(st.integers(2, 4)),
            "backoff_ms": draw(st.sampled_from([0, 2])),
            "budget": draw(st.sampled_from([0, 0.5, 2])),
            "burst": draw(st.integers(1, 4)),
        }
    if "breaker" in chosen:
        guards["circuit_breaker"] = {"failures": draw(st.integers(1, 3)), "open_ms": draw(st.sampled_from([1, 5]))}
    if "rate" in chosen:
        guards["rate_limit"] = {"per_s": draw(st.sampled_from([100, 1000])), "burst": draw(st.integers(1, 3))}
    if "places" in chosen:
        guards["max_concurrency"] = {"limit": draw(st.integers(1, 2)), "max_queue": draw(st.sampled_from([0, 1, 100]))}
    if "timeout" in chosen:
        guards["timeout_ms"] = draw(st.sampled_from([3, 12]))
    return guards


KINDS: dict[str, tuple[int, int]] = {
    "chain": (1, 3),
    "ensemble": (2, 3),
    "stacking": (2, 3),
    "model": (2, 3),
    "ab": (2, 3),
    "bandit": (2, 3),
    "choice": (2, 3),
    "fallback": (2, 3),
    "filter": (1, 1),
    "map": (1, 1),
    "cycle": (1, 1),
    "canary": (2, 2),
    "champion": (2, 3),
}
"""Kind to the fewest and most branches."""


def _options(draw: st.DrawFn, flow: Flow) -> dict[str, Any]:
    names = flow.names
    if flow.kind == "ensemble":
        combine = draw(st.sampled_from(list(COMBINED)))
        options: dict[str, Any] = {"combine": combine, "quorum": draw(st.sampled_from([None, 1, 2]))}
        if options["quorum"] is not None:
            options["wait"] = draw(st.sampled_from(["all", "quorum"]))
        if combine == "weighted_mean":
            options["weights"] = {name: draw(st.integers(1, 3)) for name in names}
        return options
    if flow.kind == "ab":
        weights = {name: draw(st.sampled_from([0, 1, 3])) for name in names[:-1]} | {names[-1]: 1}
        return {"weights": weights, "key": draw(st.sampled_from([None, "id", "parameter:n", "tensor:x"]))}
    if flow.kind == "model":
        default = draw(st.sampled_from([None, *names]))
        unknown = "default" if default is not None and draw(st.booleans()) else "refuse"
        aliases = {str(number): draw(st.sampled_from(names)) for number in range(draw(st.integers(0, 4)))}
        return {"by": "parameter:n", "aliases": aliases, "default": default, "unknown": unknown}
    if flow.kind == "bandit":
        policy = draw(st.sampled_from(["epsilon_greedy", "ucb1", "thompson"]))
        scorer, failure_reward = draw(st.sampled_from([None, "accuracy"])), draw(st.sampled_from([None, 0.0]))
        return {
            "policy": policy,
            "key": draw(st.sampled_from([None, "id"])),
            "scorer": scorer,
            "failure_reward": failure_reward,
        }
    if flow.kind == "choice":
        when = {name: draw(st.sampled_from(list(CONDITIONS))) for name in names[:-1]}
        if draw(st.booleans()):
            return {"when": when, "default": names[-1]}
        return {"when": when | {names[-1]: draw(st.sampled_from(list(CONDITIONS)))}, "otherwise": _refusal(draw)}
    if flow.kind == "canary":
        rails = {
            "failures": {"watch": "error_rate", "margin": "1%"},
            "slow": {"watch": "latency", "quantile": "p50", "ratio": 1.5},
        }
        return {
            "baseline": names[0],
            "challenger": names[1],
            "steps": draw(st.sampled_from([["50%", "100%"], ["1%", "100%"], ["100%"]])),
            "hold": "1ms",
            "min_samples": 1,
            "guardrails": {name: rails[name] for name in draw(st.sets(st.sampled_from(list(rails)), min_size=1))},
            "key": draw(st.sampled_from([None, "id"])),
        }
    if flow.kind == "champion":
        shadow = {"timeout_ms": 5, "concurrency": draw(st.integers(1, 2)), "max_pending": draw(st.sampled_from([1, 64]))}
        return {"champion": draw(st.sampled_from(names)), "shadow": shadow}
    if flow.kind == "filter":
        return {"when": draw(st.sampled_from(list(CONDITIONS))), "otherwise": _refusal(draw)}
    if flow.kind == "map":
        return {"concurrency": draw(st.integers(1, 3)), "tolerate": draw(st.sampled_from([0, 0.5, 1, 2]))}
    if flow.kind == "cycle":
        return {
            "repeat_while": draw(st.sampled_from(list(CONDITIONS))),
            "max_iterations": draw(st.integers(1, 3)),
            "at_limit": draw(st.sampled_from(["error", "last"])),
        }
    return {}


def _refusal(draw: st.DrawFn) -> dict[str, str]:
    return {"error": draw(st.sampled_from(["invalid_request", "not_found", "unavailable"])), "message": "refused"}


# Built


def _sketch(flow: Flow) -> NodeSketch:
    """Return what the builder takes. A node with guards stands behind a step that counts who comes in."""
    inner = _bare(flow)
    if not flow.guards:
        return inner
    if flow.kind != "step":
        inner = routers.Chain({"counted": _counting(flow), "body": inner}, **flow.guards)
    return routers.Chain({"entry": _entering(flow), "guarded": inner})


def _bare(flow: Flow) -> NodeSketch:
    branches = {name: _sketch(branch) for name, branch in zip(flow.names, flow.branches, strict=True)}
    if flow.kind == "step":
        return _python(flow)
    if flow.kind == "stacking":
        return routers.Ensemble({**branches, "last": _stacker}, "stacking", stacker="last", **flow.options)
    if flow.kind in ("filter", "map", "cycle"):
        (branch,) = branches.values()
        return getattr(routers, flow.kind.capitalize())(branch, **flow.options)
    return getattr(routers, flow.kind.capitalize())(branches, **flow.options)


def _stacker(value: Any) -> Any:
    members = np.stack(list(value.values()))  # fails where a map inside has left out rows of one member
    return {"x": np.stack([members[0, :, 0], members[:, :, 1].sum(axis=0)], axis=1)}


def _entering(flow: Flow) -> NodeSketch:
    def enter(value: Any) -> Any:
        flow.seen.entries += 1
        return value

    return NodeSketch("step", "python", {"call": enter})


def _counting(flow: Flow) -> NodeSketch:
    def count(value: Any) -> Any:
        flow.seen.begin(0, asyncio.get_running_loop().time())
        return value

    return NodeSketch("step", "python", {"call": count})


def _python(flow: Flow) -> NodeSketch:
    options: dict[str, Any] = {"call": _function(flow), **flow.options, **flow.guards}
    if flow.mode == "thread":
        options |= {"run": "thread", "threads": 2}
    return NodeSketch("step", "python", options)


def _function(flow: Flow) -> Callable[..., Any]:
    def computed(value: Any, kind: str, call: int) -> Any:
        if kind == "raise":
            raise ValueError("injected")
        if kind == "invalid":
            raise InvalidRequest("injected")
        if kind == "down" or (kind == "flaky" and call == 1):
            raise Unavailable("injected")
        x = value["x"]
        return {"x": np.stack([x[:, 0], x[:, 1] * flow.factor + flow.addend], axis=1)}

    def fault(value: Any) -> tuple[int, str]:
        callers = {int(who) for who in np.rint(value["x"][:, 0])}
        kinds = [flow.faults[who] for who in callers if who in flow.faults]
        return min(callers), "raise" if "raise" in kinds else kinds[0] if kinds else ""

    if flow.mode == "async":

        async def suspend(value: Any) -> Any:
            who, kind = fault(value)
            call = flow.seen.begin(who, asyncio.get_running_loop().time())
            try:
                if kind == "hang":
                    await asyncio.Event().wait()
                await asyncio.sleep(0.007 if kind == "slow" else 0)
                return computed(value, kind, call)
            finally:
                flow.seen.end()

        return suspend

    def block(value: Any, context: Context) -> Any:
        who, kind = fault(value)
        loop = None if flow.mode == "thread" else asyncio.get_running_loop()
        call = flow.seen.begin(who, -1.0 if loop is None else loop.time())
        try:
            return computed(value, kind, call)
        finally:
            flow.seen.end()

    return block


# Expected


@dataclass(frozen=True)
class Outcomes:
    """Every answer that there may be, and every code of an error."""

    answers: frozenset[Rows]
    errors: frozenset[str]

    def __or__(self, other: Outcomes) -> Outcomes:
        return Outcomes(self.answers | other.answers, self.errors | other.errors)


NOTHING = Outcomes(frozenset(), frozenset())


def _error(*codes: str) -> Outcomes:
    return Outcomes(frozenset(), frozenset(codes))


def _answers(answers: Any) -> Outcomes:
    found = frozenset(tuple(round(number, 9) + 0.0 for number in answer) for answer in answers)
    assume(len(found) <= MOST_ANSWERS)
    return Outcomes(found, frozenset())


def outcomes(flow: Flow, who: int, rows: Rows) -> Outcomes:
    """Return what may become of a caller's rows in a node."""
    found = _outcomes_of[flow.kind](flow, who, rows)
    codes = set()
    if "circuit_breaker" in flow.guards:
        codes.add("unavailable")
    if "rate_limit" in flow.guards or "max_concurrency" in flow.guards:
        codes.add("limit_exceeded")
    if "timeout_ms" in flow.guards:
        codes.add("deadline_exceeded")
    return found | _error(*codes)


def _of_step(flow: Flow, who: int, rows: Rows) -> Outcomes:
    kind = flow.faults.get(who, "")
    if kind == "hang":
        return _error("deadline_exceeded")
    errors = _error(FAILING[kind]) if kind in FAILING else NOTHING
    if kind in FAILING and kind != "flaky":
        return errors
    return errors | _answers([[x * flow.factor + flow.addend for x in rows]])


def _of_chain(flow: Flow, who: int, rows: Rows) -> Outcomes:
    found = _answers([rows])
    for branch in flow.branches:
        found = _each(found, lambda answer, branch=branch: outcomes(branch, who, answer))
    return found


def _each(found: Outcomes, then: Callable[[Rows], Outcomes]) -> Outcomes:
    after = _error(*found.errors)
    for answer in found.answers:
        after |= then(answer)
    return after


def _of_ab(flow: Flow, who: int, rows: Rows) -> Outcomes:
    found = NOTHING
    for name, branch in zip(flow.names, flow.branches, strict=True):
        if flow.options["weights"][name]:
            found |= outcomes(branch, who, rows)
    return found


def _of_model(flow: Flow, who: int, rows: Rows) -> Outcomes:
    branches = dict(zip(flow.names, flow.branches, strict=True))
    name = flow.options["aliases"].get(str(who)) or (flow.options["default"] if flow.options["unknown"] == "default" else None)
    return outcomes(branches[name], who, rows) if name else _error("not_found")


def _of_stacking(flow: Flow, who: int, rows: Rows) -> Outcomes:
    members = [outcomes(branch, who, rows) for branch in flow.branches]
    assume(np.prod([len(found.answers) for found in members]) <= MOST_ANSWERS)
    errors = {code for found in members for code in found.errors}
    sums = []
    for chosen in product(*(found.answers for found in members)):
        if len({len(answer) for answer in chosen}) > 1:
            errors.add("internal")
        else:
            sums.append([sum(column) for column in zip(*chosen, strict=True)])
    return _answers(sums) | _error(*errors)


def _of_bandit(flow: Flow, who: int, rows: Rows) -> Outcomes:
    found = NOTHING
    for branch in flow.branches:
        found |= outcomes(branch, who, rows)
    return found


def _of_choice(flow: Flow, who: int, rows: Rows) -> Outcomes:
    branches = dict(zip(flow.names, flow.branches, strict=True))
    for name, condition in flow.options["when"].items():
        if CONDITIONS[condition](who, rows):
            return outcomes(branches[name], who, rows)
    if "default" in flow.options:
        return outcomes(branches[flow.options["default"]], who, rows)
    return _error(flow.options["otherwise"]["error"])


def _of_filter(flow: Flow, who: int, rows: Rows) -> Outcomes:
    if CONDITIONS[flow.options["when"]](who, rows):
        return outcomes(flow.branches[0], who, rows)
    return _error(flow.options["otherwise"]["error"])


def _of_fallback(flow: Flow, who: int, rows: Rows) -> Outcomes:
    found = NOTHING
    for branch in flow.branches[:-1]:
        here = outcomes(branch, who, rows)
        found |= Outcomes(here.answers, here.errors - CAUGHT)
        if not here.errors & CAUGHT:
            return found
    return found | outcomes(flow.branches[-1], who, rows)


def _of_map(flow: Flow, who: int, rows: Rows) -> Outcomes:
    tolerate = flow.options["tolerate"]
    borne = int(tolerate * len(rows)) if tolerate < 1 else int(tolerate)
    each = [outcomes(flow.branches[0], who, (row,)) for row in rows]
    errors = {code for found in each for code in found.errors}
    may_fail = sum(bool(found.errors) for found in each)
    choices = [[*found.answers, *([()] if found.errors else [])] for found in each]
    assume(np.prod([len(choice) for choice in choices]) <= MOST_ANSWERS)
    made = [
        sum(chosen, ())
        for chosen in product(*choices)
        if (failed := sum(not part for part in chosen)) <= borne and failed < len(rows)
    ]
    return _answers(made) | _error(*(errors if may_fail > borne or may_fail == len(rows) else ()))


def _of_cycle(flow: Flow, who: int, rows: Rows) -> Outcomes:
    holds = CONDITIONS[flow.options["repeat_while"]]
    ended, going = NOTHING, _answers([rows])
    for _ in range(flow.options["max_iterations"]):
        given = _each(going, lambda answer: outcomes(flow.branches[0], who, answer))
        ended |= _error(*given.errors) | _answers([answer for answer in given.answers if not holds(who, answer)])
        going = _answers([answer for answer in given.answers if holds(who, answer)])
    if not going.answers:
        return ended
    return ended | (going if flow.options["at_limit"] == "last" else _error("internal"))


def _of_ensemble(flow: Flow, who: int, rows: Rows) -> Outcomes:
    members = [outcomes(branch, who, rows) for branch in flow.branches]
    most = len(members)
    quorum = min(flow.options["quorum"] or most, most)
    weights = list(flow.options.get("weights", dict.fromkeys(flow.names, 1)).values())
    early = flow.options.get("wait") == "quorum"
    choices = [[*found.answers, *([None] if found.errors or early else [])] for found in members]
    assume(np.prod([len(choice) for choice in choices]) <= MOST_ANSWERS)
    combined, errors = [], set()
    for chosen in product(*choices):
        there = [(answer, weight) for answer, weight in zip(chosen, weights, strict=True) if answer is not None]
        if len(there) < quorum:
            continue
        if len({len(answer) for answer, _ in there}) > 1:
            errors.add("internal")  # a map inside has left out rows of one member
            continue
        rule = COMBINED[flow.options["combine"]]
        columns = zip(*(answer for answer, _ in there), strict=True)
        combined.append([rule(list(column), [weight for _, weight in there]) for column in columns])
    if most - sum(bool(found.errors) for found in members) < quorum:
        # Without a spare member the first failure is the caller's; with one, there are too few.
        failures = {code for found in members for code in found.errors}
        errors |= failures if quorum == most else {"unavailable", *(failures & {"invalid_request"})}
    return _answers(combined) | _error(*errors)


def _of_canary(flow: Flow, who: int, rows: Rows) -> Outcomes:
    """Either branch may answer, however the trial stands."""
    return outcomes(flow.branches[0], who, rows) | outcomes(flow.branches[1], who, rows)


def _of_champion(flow: Flow, who: int, rows: Rows) -> Outcomes:
    """Whatever becomes of the challengers, the caller gets what the champion gives."""
    return outcomes(flow.branches[flow.names.index(flow.options["champion"])], who, rows)


_outcomes_of: dict[str, Callable[[Flow, int, Rows], Outcomes]] = {
    "step": _of_step,
    "chain": _of_chain,
    "ab": _of_ab,
    "bandit": _of_bandit,
    "choice": _of_choice,
    "filter": _of_filter,
    "fallback": _of_fallback,
    "map": _of_map,
    "cycle": _of_cycle,
    "ensemble": _of_ensemble,
    "stacking": _of_stacking,
    "model": _of_model,
    "canary": _of_canary,
    "champion": _of_champion,
}
