"""Graphs as nodes of other graphs: read from their own files, compiled with the names that they have in the whole."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from servinggraph.compiler.options import validated
from servinggraph.errors import GraphInvalid, Problem
from servinggraph.interfaces import SequencePolicy
from servinggraph.plan import Plan
from servinggraph.spec import GraphSpec, Source, read_file
from servinggraph.tensors import Signature

__all__ = ["NestedGraph", "compile_nested"]


@dataclass(frozen=True, slots=True)
class NestedGraph:
    """A graph that is a node of another.

    Attributes:
        plan: the graph, its nodes named `outer.inner`.
        impure: one of its nodes that does not say `pure: true`; None without one.
    """

    plan: Plan
    impure: str | None

    @property
    def signature(self) -> Signature:
        """What it takes and gives."""
        return Signature(None if self.plan.body else self.plan.inputs, self.plan.outputs)


def compile_nested(
    compile_graph: Callable[..., Plan],
    outer: Source,
    replace: Mapping[str, Callable[..., Any]],
    sequences: SequencePolicy | None,
    file: Path,
    shown: str,
    node: str,
) -> NestedGraph:
    """Compile a graph that is a node of another.

    Args:
        compile_graph: what compiles a definition.
        outer: the other's definition.
        replace: see `compile_graph`; nodes in here are `outer.inner`.
        sequences: those of the other graph.
        file: its file.
        shown: its path as errors have it.
        node: full name of the node.

    Raises:
        GraphInvalid: with every problem; those of the node itself name no file.
    """
    file = file.resolve()
    around = outer.inside
    if outer.file is not None:
        around = (*around, ((outer.base / Path(outer.file).name).resolve(), outer.file))
    chain = [path for path, _ in around]
    if file in chain:
        names = " -> ".join([*(name for _, name in around[chain.index(file) :]), shown])
        raise GraphInvalid([Problem(f"a graph cannot be a node of itself: {names}")])
    source = read_file(file, environment=outer.environment, shown=shown)
    source.inside = around
    problems = list(source.problems)
    defaults = {"graph": "unnamed", "inputs": {}, "nodes": {}}
    spec = validated(GraphSpec, source.expanded(), source, (), problems, defaults=defaults)
    if spec is None:
        raise GraphInvalid(problems)
    problems.extend(
        source.problem(f"'{key}' is for the graph that is served, and this one is its node '{node}'", (key,))
        for key in ("sequences", "kafka")
        if getattr(spec, key) is not None
    )
    try:
        plan = compile_graph(spec.model_copy(update={"sequences": sequences}), source, replace, problems, f"{node}.")
    except GraphInvalid as error:
        raise GraphInvalid([_named_inside(problem, node) for problem in error.problems]) from None
    if plan.decoupled:
        text = "has a generator, and a graph that is a node of another gives one value: put the generator into the outer graph"
        raise GraphInvalid([source.problem(text, (), node)])
    return NestedGraph(plan, next((f"{node}.{name}" for name, inner in spec.nodes.items() if not inner.pure), None))


def _named_inside(problem: Problem, node: str) -> Problem:
    """Return a problem with the full name of the node that it concerns."""
    if problem.node is None or problem.node.startswith(f"{node}."):
        return problem
    return dataclasses.replace(problem, node=f"{node}.{problem.node}")
