"""Compiles a whole graph: definition in, plan or all problems out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from servinggraph.compiler.bodies import body_keys
from servinggraph.compiler.labels import declared_outputs
from servinggraph.compiler.nested import compile_nested
from servinggraph.compiler.nodes import NodeCompiler, Tensors, lone_node
from servinggraph.compiler.options import validated
from servinggraph.compiler.sequences import sequence_problems
from servinggraph.compiler.topology import ordered, sources_of, stream_problems
from servinggraph.errors import GraphInvalid, Problem, nearest
from servinggraph.plan import INPUTS, Plan, PlanNode
from servinggraph.spec import GraphSpec, Source
from servinggraph.spec.model import name_problem

__all__ = ["compile_graph", "compile_source"]

Replacements = Mapping[str, Callable[..., Any]]


def compile_source(source: Source, replace: Replacements | None = None) -> Plan:
    """Compile what was read from a file.

    Raises:
        GraphInvalid: with every problem of the definition.
    """
    problems = list(source.problems)
    # What a definition must have is put in where it is missing: a mistake hides no other.
    defaults = {"graph": "unnamed", "inputs": {}, "nodes": {}}
    spec = validated(GraphSpec, source.expanded(), source, (), problems, defaults=defaults)
    if spec is None:
        raise GraphInvalid(_in_file_order(problems, source.file))
    return compile_graph(spec, source, replace, problems)


def compile_graph(
    spec: GraphSpec,
    source: Source,
    replace: Replacements | None = None,
    problems: list[Problem] | None = None,
    prefix: str = "",
) -> Plan:
    """Compile a definition.

    Args:
        spec: the graph.
        source: where it came from: folder of its relative paths, lines of its keys.
        replace: node or branch name to a callable that stands in for it, for tests.
        problems: what is known to be wrong already; more joins it.
        prefix: what stands before the names of nodes: `outer.` for a graph that is a node of another.

    Raises:
        GraphInvalid: with every problem found.
    """
    problems = [] if problems is None else problems
    inputs_known = not any("'inputs" in problem.message for problem in problems)
    replace = replace or {}
    reason = name_problem(spec.graph, "graph")
    if reason:
        problems.append(source.problem(reason, ("graph",)))
    if not spec.nodes:
        problems.append(source.problem("'nodes' is empty: a graph has at least one node", ("nodes",)))
    problems.extend(
        source.problem(reason, ("nodes", name), name) for name in spec.nodes if (reason := name_problem(name, "node"))
    )
    problems.extend(_unbatchable(spec, source))
    problems.extend(_uncacheable(spec, source))
    sources = sources_of(spec, source, problems)
    order = ordered(sources, spec, source, problems)
    inputs = {name: model.spec() for name, model in spec.tensors.items()}
    problems.extend(
        source.problem(f"'labels' names classes of an output, and '{name}' is an input", ("inputs", name, "labels"))
        for name, model in spec.tensors.items()
        if model.labels is not None
    )
    nested = partial(compile_nested, compile_graph, source, replace, spec.sequences)
    compiler = NodeCompiler(source, replace, problems, sequences=spec.sequences is not None, nested=nested)
    takes_body = spec.inputs == "body"
    # Inputs that are themselves at fault are taken for unknown, so that nothing follows from them.
    behind: dict[str, Tensors] = {INPUTS: inputs if inputs_known and not takes_body else None}
    nodes: dict[str, PlanNode] = {}
    for name in order or spec.nodes:
        given = _merged(name, sources[name], behind, source, problems)
        after = tuple(source if source == INPUTS else prefix + source for source in sources[name])
        node = compiler.node(prefix + name, spec.nodes[name], ("nodes", name), after, given)
        behind[name] = node.signature.outputs if node else None
        if node is not None:
            nodes[name] = node
    problems.extend(stream_problems(order, sources, {name for name, node in nodes.items() if node.streams}, spec, source))
    lone = next((found for node in nodes.values() if (found := lone_node(node.name, node.work, node.inside))), None)
    if spec.batch is not None and lone is not None:
        problems.append(source.problem(f"'batch' joins whole requests: {lone}", ("batch",)))
    if not prefix:
        _check_replacements(replace, nodes, spec, problems)
    problems.extend(sequence_problems(spec, order, sources, nodes, source))
    problems.extend(_unreadable(spec, nodes, source))
    outputs = _answer(spec, behind.get(spec.answer or ""), source, problems)
    if problems:
        raise GraphInvalid(_in_file_order(problems, source.file))
    return Plan(
        name=spec.graph,
        version=spec.version,
        inputs=inputs,
        outputs=outputs,
        nodes=tuple(nodes[name] for name in order),
        answer=prefix + (spec.answer or ""),
        timeout_s=None if spec.timeout_ms is None else spec.timeout_ms / 1e3,
        batch=spec.batch,
        cache=spec.cache,
        source=source.file,
        body=takes_body,
        body_keys=body_keys(nodes.values()) if takes_body else None,
        sequences=spec.sequences,
        kafka=spec.kafka and spec.kafka.below(source.base),
    )


def _unbatchable(spec: GraphSpec, source: Source) -> list[Problem]:
    """Return what stands in the way of batching whole requests, where the graph asks for it."""
    if spec.batch is None:
        return []
    if spec.inputs == "body":
        text = "'batch' joins requests by their first axis, and a body has none: give 'batch' to the nodes that take tensors"
        return [source.problem(text, ("batch",))]
    return [
        source.problem(f"'batch' joins requests by their first axis, and that of input '{name}' is not free", ("batch",))
        for name, model in spec.tensors.items()
        if not model.shape or model.shape[0] != -1
    ]


def _unreadable(spec: GraphSpec, nodes: Mapping[str, PlanNode], source: Source) -> list[Problem]:
    """Return what stands in the way of requests from topics, where the graph asks for them."""
    if spec.kafka is None:
        return []
    problems = [
        source.problem(f"'kafka' writes one answer for each record, and node '{name}' gives any number", ("kafka",), name)
        for name, node in nodes.items()
        if node.streams
    ]
    if spec.sequences is not None and spec.kafka.order == "none":
        text = "'order: none' lets the requests of a sequence overtake each other: use 'key', and a key for each sequence"
        problems.append(source.problem(text, ("kafka", "order")))
    return problems


def _uncacheable(spec: GraphSpec, source: Source) -> list[Problem]:
    """Return what stands in the way of keeping whole answers, where the graph asks for it."""
    if spec.cache is None:
        return []
    if spec.sequences is not None:
        return [
            source.problem("'cache' keeps the graph's answers, which with 'sequences' depend on what came before", ("cache",))
        ]
    return [
        source.problem(f"'cache' keeps the graph's answers, and node '{name}' does not say 'pure: true'", ("cache",), name)
        for name, node in spec.nodes.items()
        if not node.pure
    ]


def _merged(
    name: str, after: tuple[str, ...], behind: Mapping[str, Tensors], source: Source, problems: list[Problem]
) -> Tensors:
    """Return the tensors that reach a node: the union of what its sources give."""
    if len(after) == 1:
        return behind.get(after[0])
    merged: dict[str, Any] = {}
    giver: dict[str, str] = {}
    complete = True
    for predecessor in after:
        tensors = behind.get(predecessor)
        if tensors is None:
            complete = False
            continue
        for tensor, known in tensors.items():
            if tensor in merged:
                text = (
                    f"'{giver[tensor]}' and '{predecessor}' both give a tensor '{tensor}': "
                    "rename one with 'rename: {outputs: ...}'"
                )
                problems.append(source.problem(text, ("nodes", name, "after"), name))
            merged[tensor] = known
            giver[tensor] = predecessor
    return merged if complete else None


def _answer(spec: GraphSpec, given: Tensors, source: Source, problems: list[Problem]) -> Tensors:
    """Return the tensors of the answer: the declared ones, else all that the last node gives."""
    if spec.outputs is None:
        return given
    declared = declared_outputs(spec.outputs, source, ("outputs",), problems)
    for name, expected in declared.items():
        if given is None:
            continue
        if name not in given:
            text = f"the answer has no tensor '{name}'{nearest(name, list(given))}"
            problems.append(source.problem(text, ("outputs", name)))
        elif reason := given[name].conflict_with(expected):
            problems.append(source.problem(f"output '{name}' does not fit: its {reason}", ("outputs", name)))
    return declared


def _check_replacements(replace: Replacements, nodes: Mapping[str, PlanNode], spec: GraphSpec, problems: list[Problem]) -> None:
    known = [*spec.nodes]
    waiting = [(name, node) for name, node in spec.nodes.items()]
    while waiting:
        prefix, node = waiting.pop()
        for short, branch in (node.branches or {}).items():
            known.append(f"{prefix}.{short}")
            waiting.append((f"{prefix}.{short}", branch))
    for compiled in nodes.values():
        known.extend(node.name for node in _all_inside(compiled))
    # Which nodes a graph in a graph has is known only when it compiles.
    failed = tuple(f"{name}." for name, node in spec.nodes.items() if node.step is not None and name not in nodes)
    problems.extend(
        Problem(f"there is no node '{name}' to replace{nearest(name, known)}")
        for name in replace
        if name not in known and not name.startswith(failed)
    )


def _all_inside(node: PlanNode) -> list[PlanNode]:
    return [found for inner in node.inside for found in (inner, *_all_inside(inner))]


def _in_file_order(problems: list[Problem], file: str | None) -> list[Problem]:
    def place(problem: Problem) -> tuple[bool, str, int]:
        elsewhere = problem.file is not None and problem.file != file
        return elsewhere, (problem.file or "") if elsewhere else "", problem.line or 0

    return sorted(dict.fromkeys(problems), key=place)
