"""Random graphs with random faults, and what a caller may see of them.

Each row carries the number of its caller, so that a step knows whom to fail, and a batch
that mixes callers up is found out. All arithmetic is on small whole numbers, and exact.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from hypothesis import strategies as st
from running import Caller, Release

from servinggraph import Graph, routers
from servinggraph.interfaces import NodeSketch, RowErrors

FAILING = ("raise", "exit", "cancelled", "stop iteration", "row error", "few rows")
_RAISED = {"raise": ValueError, "exit": SystemExit, "cancelled": asyncio.CancelledError, "stop iteration": StopIteration}
MODES = ("sync", "async", "thread")


@dataclass
class Work:
    """A step or a branch: multiplies the sum of what it gets, and adds."""

    name: str
    mode: str
    factor: int
    addend: int
    batch: Mapping[str, Any] | None
    timeout_ms: float | None
    faults: dict[int, str] = field(default_factory=dict)


@dataclass
class Node:
    """A node: one work, or several in an ensemble."""

    name: str
    sources: list[str]
    works: list[Work]
    combine: str | None = None
    weights: list[int] = field(default_factory=list)
    quorum: int | None = None
    batch: Mapping[str, Any] | None = None


@dataclass
class Case:
    """A graph, its callers, and all that goes wrong."""

    nodes: list[Node]
    callers: list[Caller]
    batch: Mapping[str, Any] | None
    timeout_ms: float | None
    works_behind = False

    @property
    def works(self) -> list[Work]:
        return [work for node in self.nodes for work in node.works]

    @property
    def hangs(self) -> bool:
        return self.has("hang")

    def graph(self, release: Release) -> Graph:
        return graph_of(self, release)

    def has(self, *faults: str) -> bool:
        return any(fault in faults for work in self.works for fault in work.faults.values())


@st.composite
def policies(draw: st.DrawFn) -> dict[str, Any]:
    policy: dict[str, Any] = {"max_rows": draw(st.sampled_from([32, 4, 1, 2]))}
    policy["max_delay_ms"] = draw(st.sampled_from([0, 3]))
    policy["wait_when_idle"] = draw(st.booleans())
    policy["instances"] = draw(st.sampled_from([1, 1, 2]))
    if draw(st.integers(0, 3)) == 3:
        policy["pad_to"] = [2, 32]
    if draw(st.integers(0, 3)) == 3:
        policy["preferred_rows"] = [policy["max_rows"]]
    if draw(st.integers(0, 7)) == 7:
        policy["isolate"] = False
    if draw(st.integers(0, 7)) == 7:
        policy["max_queue"] = 1
    if draw(st.integers(0, 5)) == 5:
        policy["queue_timeout_ms"] = 6
        policy["on_timeout"] = draw(st.sampled_from(["reject", "continue"]))
    if draw(st.integers(0, 3)) == 3:
        policy["priorities"] = 2
    return policy


@st.composite
def cases(draw: st.DrawFn) -> Case:
    count = draw(st.integers(1, 8))
    callers = [
        Caller(
            number=number,
            rows=draw(st.lists(st.integers(-9, 9), min_size=0 if draw(st.integers(0, 9)) == 9 else 1, max_size=5)),
            starts_at=draw(st.sampled_from([0, 0, 0, 1, 4, 10])),
            deadline_ms=draw(st.sampled_from([None, None, 0, 5, 20])),
            cancel_ms=draw(st.sampled_from([None, None, None, None, 0, 1, 4, 12])),
            priority=draw(st.integers(0, 2)),
        )
        for number in range(count)
    ]
    nodes: list[Node] = []
    dangling: list[str] = []
    size = draw(st.integers(1, 30)) if draw(st.booleans()) else draw(st.integers(1, 6))
    for index in range(size):
        name = f"n{index}"
        known = ["inputs", *(node.name for node in nodes)]
        if index == size - 1:
            sources = dangling or ["inputs"]
        elif draw(st.integers(0, 2)):
            sources = [known[-1]]
        else:
            sources = draw(st.lists(st.sampled_from(known), min_size=1, max_size=3, unique=True))
        nodes.append(_node(draw, name, list(sources), count))
        dangling = [other for other in dangling if other not in sources] + [name]
    batch = draw(policies()) if draw(st.integers(0, 7)) == 7 else None
    case = Case(nodes, callers, batch, draw(st.sampled_from([None, None, None, 15])))
    if case.has("hang"):
        for caller in callers:
            caller.deadline_ms = caller.deadline_ms if caller.deadline_ms is not None else 30
    return case


def _node(draw: st.DrawFn, name: str, sources: list[str], callers: int) -> Node:
    if draw(st.integers(0, 5)) < 5:
        return Node(name, sources, [_work(draw, name, callers)])
    works = [_work(draw, f"{name}.m{number}", callers) for number in range(draw(st.integers(2, 3)))]
    combine = draw(st.sampled_from(["mean", "weighted_mean", "sum"]))
    return Node(
        name,
        sources,
        works,
        combine=combine,
        weights=draw(st.lists(st.integers(1, 3), min_size=len(works), max_size=len(works))),
        quorum=draw(st.sampled_from([None, None, 1, 2])),
        batch=draw(policies()) if draw(st.integers(0, 7)) == 7 else None,
    )


def _work(draw: st.DrawFn, name: str, callers: int) -> Work:
    work = Work(
        name,
        mode=draw(st.sampled_from(MODES)) if draw(st.booleans()) else draw(st.sampled_from(MODES[:2])),
        factor=draw(st.integers(-1, 2)),
        addend=draw(st.integers(-3, 3)),
        batch=draw(policies()) if draw(st.integers(0, 2)) == 2 else None,
        timeout_ms=draw(st.sampled_from([None, None, None, None, 8])),
    )
    if draw(st.integers(0, 4)) == 4:
        faults = [*FAILING[:4], "slow", "slow", "hang"] if work.batch is None else [*FAILING, "slow", "slow", "hang"]
        work.faults[draw(st.integers(0, callers - 1))] = draw(st.sampled_from(faults))
    return work


def graph_of(case: Case, release: Release) -> Graph:
    """Build the graph through the public builder."""
    options: dict[str, Any] = {}
    if case.batch is not None:
        options["batch"] = case.batch
    if case.timeout_ms is not None:
        options["timeout_ms"] = case.timeout_ms
    graph = Graph("random", inputs={"x": ("FP64", [-1, 2])}, **options)
    for node in case.nodes:
        if node.combine is None:
            sketch = _step(node.works[0], node.name, release)
        else:
            more: dict[str, Any] = {}
            if node.combine == "weighted_mean":
                more["weights"] = {_short(work): weight for work, weight in zip(node.works, node.weights, strict=True)}
            if node.quorum is not None:
                more["quorum"] = node.quorum
            if node.batch is not None:
                more["batch"] = node.batch
            branches = {_short(work): _step(work, node.name, release) for work in node.works}
            sketch = routers.Ensemble(branches, combine=_total if node.combine == "sum" else node.combine, **more)
        graph.add(sketch, node.name, after=node.sources)
    graph.answer(case.nodes[-1].name)
    return graph


def _short(work: Work) -> str:
    return work.name.rpartition(".")[2]


def _total(members: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    arrays = [next(iter(tensors.values())) for tensors in members.values()]
    (name,) = next(iter(members.values()))
    total = sum(array[:, 1] for array in arrays)
    return {name: np.stack([arrays[0][:, 0], total], axis=1)}


def _step(work: Work, output: str, release: Release) -> NodeSketch:
    options: dict[str, Any] = {"call": _function(work, output, release)}
    if work.mode == "thread":
        options |= {"run": "thread", "threads": 2}
    if work.batch is not None:
        options["batch"] = work.batch
    if work.timeout_ms is not None:
        options["timeout_ms"] = work.timeout_ms
    return NodeSketch("step", "python", options)


def _function(work: Work, output: str, release: Release) -> Callable[..., Any]:
    if work.mode == "async":

        async def suspend(value: Any) -> Any:
            kind, rows = _fault_in(work, value)
            if kind == "hang":
                await asyncio.Event().wait()
            await asyncio.sleep(0.007 if kind == "slow" else 0)
            return _computed(work, output, value, kind, rows)

        return suspend

    def block(value: Any) -> Any:
        kind, rows = _fault_in(work, value)
        if work.mode == "thread" and kind == "hang":
            release.event.wait(30)
        return _computed(work, output, value, kind, rows)

    return block


def _fault_in(work: Work, value: Mapping[str, Any]) -> tuple[str, Any]:
    """Return what is to go wrong with a value, and for which of its rows."""
    ids = np.rint(next(iter(value.values()))[:, 0])
    for caller, kind in work.faults.items():
        rows = np.flatnonzero(ids == caller)
        if len(rows):
            return kind, rows
    return "", ()


def _computed(work: Work, output: str, value: Mapping[str, Any], kind: str, rows: Any) -> Any:
    if kind in _RAISED:
        raise _RAISED[kind]
    arrays = list(value.values())
    numbers = sum(array[:, 1] for array in arrays) * work.factor + work.addend
    result = {output: np.stack([arrays[0][:, 0], numbers], axis=1)}
    if kind == "row error":
        return RowErrors(result, {int(row): "injected" for row in rows})
    if kind == "few rows":
        return {output: np.delete(result[output], rows, axis=0)}
    return result


def expected(case: Case, caller: Caller, answered: Mapping[str, Any]) -> np.ndarray:
    """Compute the answer the slow and simple way; `answered` says which members of an ensemble took part."""
    columns: dict[str, np.ndarray] = {"inputs": np.array(caller.rows, float)}
    for node in case.nodes:
        given = sum(columns[source] for source in node.sources)
        outcomes = {_short(work): given * work.factor + work.addend for work in node.works}
        if node.combine is None:
            (columns[node.name],) = outcomes.values()
            continue
        members = str(answered[f"{node.name}.members"]).split(",")
        weights = dict(zip(outcomes, node.weights, strict=True))
        if node.combine == "sum":
            columns[node.name] = sum(outcomes[member] for member in members)
        elif node.combine == "mean":
            columns[node.name] = sum(outcomes[member] for member in members) / len(members)
        else:
            total = sum(weights[member] for member in members)
            columns[node.name] = sum(outcomes[member] * weights[member] for member in members) / total
    return columns[case.nodes[-1].name]
