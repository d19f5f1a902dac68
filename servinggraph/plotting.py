"""Draws a plan: Mermaid text by itself, SVG and other pictures with Graphviz."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from servinggraph.plan import INPUTS, Plan, PlanNode
from servinggraph.tensors import TensorSpec

__all__ = ["PlotProblem", "draw", "mermaid"]


class PlotProblem(Exception):
    """The picture cannot be drawn; says what is missing."""


def draw(plan: Plan, path: Path) -> None:
    """Write a picture in the format of the file's suffix: .svg, .png, .pdf, .dot, or .mmd for Mermaid.

    Raises:
        PlotProblem: Graphviz is not installed, or does not know the format.
    """
    form = path.suffix.lstrip(".")
    if form in ("mmd", "mermaid"):
        path.write_text(mermaid(plan) + "\n", encoding="utf-8")
        return
    try:
        import graphviz
    except ImportError:
        raise PlotProblem("drawing needs the Python package graphviz: pip install 'servinggraph[plot]'") from None
    picture = _dot(plan, graphviz)
    if form == "dot":
        path.write_text(picture.source, encoding="utf-8")
        return
    try:
        path.write_bytes(picture.pipe(format=form or "svg"))
    except graphviz.ExecutableNotFound:
        raise PlotProblem("drawing needs Graphviz: apt install graphviz (or write Mermaid: -o graph.mmd)") from None
    except (ValueError, graphviz.CalledProcessError) as error:
        raise PlotProblem(f"Graphviz cannot write '{path}': {error}") from None


def mermaid(plan: Plan) -> str:
    """Return the plan as a Mermaid flowchart, which GitHub and many editors draw."""
    lines = ["flowchart LR", f'  {INPUTS}(["{_inputs(plan)}"])']

    def add(node: PlanNode, indent: str) -> None:
        identity = node.name.replace(".", "__").replace("-", "_")
        if node.inside:
            lines.append(f'{indent}subgraph {identity}["{node.name}: {node.work.describe()}"]')
            for inner in node.inside:
                add(inner, indent + "  ")
                lines.extend(f"{indent}  {_id(source)} --> {_id(inner.name)}" for source in inner.sources if source != INPUTS)
            lines.append(f"{indent}end")
        else:
            short = node.name.rpartition(".")[2]
            lines.append(f'{indent}{identity}["<b>{short}</b><br/>{node.work.describe()}"]')

    for node in plan.nodes:
        add(node, "  ")
    for node in plan.nodes:
        lines += [f"  {_id(source)} --> {_id(node.name)}" for source in node.sources]
    lines.append(f'  answer(["{_tensors(plan.outputs or {}) or "answer"}"])')
    lines.append(f"  {_id(plan.answer)} --> answer")
    return "\n".join(lines)


def _dot(plan: Plan, graphviz: Any) -> Any:
    picture = graphviz.Digraph(plan.name, graph_attr={"rankdir": "LR", "fontname": "Helvetica", "compound": "true"})
    picture.attr(
        "node", shape="box", style="rounded,filled", fillcolor="#eef3fb", color="#5b7bb4", fontname="Helvetica", fontsize="11"
    )
    picture.attr("edge", color="#5b6b80")
    picture.node(INPUTS, _inputs(plan, "\n") or INPUTS, shape="oval", fillcolor="#f6f6f6")
    for node in plan.nodes:
        _add_dot(picture, node, graphviz)
    for node in plan.nodes:
        for source in node.sources:
            _edge(picture, plan, source, node)
    picture.node("answer", _tensors(plan.outputs or {}, "\n") or "answer", shape="oval", fillcolor="#f6f6f6")
    last = next(node for node in plan.nodes if node.name == plan.answer)
    for end in _ends(last):
        picture.edge(end, "answer")
    return picture


def _add_dot(picture: Any, node: PlanNode, graphviz: Any) -> None:
    if not node.inside:
        short = node.name.rpartition(".")[2]
        picture.node(node.name, f"{short}\n{node.work.describe()}")
        return
    with picture.subgraph(name=f"cluster_{node.name}") as cluster:
        label = f"{node.name}: {node.work.describe()}"
        cluster.attr(label=label, style="rounded,dashed", color="#b08a3c", fontname="Helvetica", fontsize="11")
        for inner in node.inside:
            _add_dot(cluster, inner, graphviz)
            for source in inner.sources:
                if source != INPUTS and node.graph is not None:
                    _edge(cluster, node.graph, source, inner)


def _edge(picture: Any, plan: Plan, source: str, node: PlanNode) -> None:
    before = next((other for other in plan.nodes if other.name == source), None)
    for start in _ends(before) if before is not None else [source]:
        for end in _beginnings(node):
            picture.edge(start, end)


def _beginnings(node: PlanNode) -> list[str]:
    """Return the boxes that an edge to a node leads to: those of a router's branches, of a graph's first nodes."""
    if not node.inside:
        return [node.name]
    first = [inner for inner in node.inside if node.graph is None or INPUTS in inner.sources]
    return [box for inner in first for box in _beginnings(inner)]


def _ends(node: PlanNode) -> list[str]:
    """Return the boxes that an edge from a node begins at: those of a router's branches, of a graph's answer."""
    if not node.inside:
        return [node.name]
    last = [inner for inner in node.inside if node.graph is None or inner.name == node.graph.answer]
    return [box for inner in last for box in _ends(inner)]


def _inputs(plan: Plan, separator: str = "<br/>") -> str:
    return "body" if plan.body else _tensors(plan.inputs, separator)


def _tensors(tensors: Any, separator: str = "<br/>") -> str:
    return separator.join(f"{name} {_spec(spec)}" for name, spec in tensors.items())


def _spec(spec: TensorSpec) -> str:
    return f"{spec.datatype or '?'} {list(spec.shape) if spec.shape is not None else ''}".strip()


def _id(name: str) -> str:
    return name.replace(".", "__").replace("-", "_")
