"""Builds graphs in Python, and writes and reads them as YAML; the model underneath is the same."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar

import yaml

from servinggraph.compiler import compile_source
from servinggraph.errors import Problem
from servinggraph.importing import ImportProblem, import_string
from servinggraph.interfaces import NodeSketch
from servinggraph.plan import INPUTS, Plan
from servinggraph.spec import Source, read_file
from servinggraph.spec.environment import KeyPath, begins_with_reference

if TYPE_CHECKING:
    from servinggraph.testing.mock import MockServer

__all__ = ["Graph", "Node", "signature"]

TensorText = tuple[str, Sequence[int]]
Work = NodeSketch | Callable[..., Any]
CallableT = TypeVar("CallableT", bound=Callable[..., Any])


def signature(
    *, inputs: Mapping[str, TensorText] | None = None, outputs: Mapping[str, TensorText] | None = None
) -> Callable[[CallableT], CallableT]:
    """Declare the tensors that a step function or class takes and gives.

    The compiler then checks them against the nodes around, and clients see the outputs of
    the last node in the metadata.

    Args:
        inputs: tensor name to (datatype, shape), -1 for any size.
        outputs: the same for what it returns.
    """

    def mark(target: CallableT) -> CallableT:
        if inputs is not None:
            target.__servinggraph_inputs__ = dict(inputs)  # type: ignore[attr-defined]  # how the python step finds it
        if outputs is not None:
            target.__servinggraph_outputs__ = dict(outputs)  # type: ignore[attr-defined]
        return target

    return mark


class Node:
    """A node of a graph under construction; `to` puts the next one behind it."""

    def __init__(self, graph: Graph, name: str) -> None:
        self._graph = graph
        self.name = name

    def to(self, work: Work, name: str | None = None, **options: Any) -> Node:
        """Add a node that takes this one's result; see `Graph.add`."""
        return self._graph.add(work, name, after=self, **options)

    def respond(self) -> Graph:
        """Make this node's result the answer; returns the graph."""
        self._graph.answer(self)
        return self._graph


class Graph:
    """A graph definition.

    Args:
        name: the V2 model name.
        inputs: input tensor to (datatype, shape), -1 for any size; or "body" for a graph that takes
            one free-form value.
        version: a positive integer.
        options: other keys of a graph file: `outputs`, `timeout_ms`, `batch`, `kafka`, `description`.
    """

    def __init__(
        self,
        name: str,
        inputs: Mapping[str, TensorText | Mapping[str, Any]] | Literal["body"],
        version: str | int = "1",
        **options: Any,
    ) -> None:
        self._document: dict[str, Any] = {
            "graph": name,
            "version": str(version),
            **_plain(options),
            "inputs": _tensors(inputs) if isinstance(inputs, Mapping) else inputs,
            "nodes": {},
        }
        if "outputs" in self._document:
            self._document["outputs"] = _tensors(options["outputs"])
        self._base = Path.cwd()
        self._file: str | None = None
        self._lines: dict[KeyPath, int] = {}
        self._problems: list[Problem] = []

    @property
    def base(self) -> Path:
        """Folder that relative paths start from."""
        return self._base

    @property
    def name(self) -> str:
        """The V2 model name."""
        return str(self._document["graph"])

    def to(self, work: Work, name: str | None = None, **options: Any) -> Node:
        """Add a node that takes the graph's inputs; see `add`."""
        return self.add(work, name, after=INPUTS, **options)

    def add(
        self,
        work: Work,
        name: str | None = None,
        after: Node | str | Sequence[Node | str] | None = None,
        **options: Any,
    ) -> Node:
        """Add a node.

        Args:
            work: a function or class, or what `steps` and `routers` make.
            name: the node's name; by default the function's, the model file's or the kind's.
            after: node or nodes whose results it takes, "inputs" for the graph's inputs; by
                default the node added before.
            options: keys of the node: `batch`, `timeout_ms`, `rename`, `keep`, ...

        Raises:
            ValueError: a node of that name is there already.
        """
        sketch = _sketch(work)
        nodes: dict[str, Any] = self._document["nodes"]
        chosen = name or _default_name(sketch)
        if chosen in nodes:
            raise ValueError(f"graph '{self.name}' has a node '{chosen}' already: give this one a name of its own")
        entry = _node_document({**sketch.options, **options}, sketch)
        names = [after] if isinstance(after, Node | str) else list(after or [])
        texts = [node.name if isinstance(node, Node) else node for node in names]
        previous = next(reversed(nodes), INPUTS)
        if texts and texts != [previous]:
            entry["after"] = texts[0] if len(texts) == 1 else texts
        nodes[chosen] = entry
        return Node(self, chosen)

    def answer(self, node: Node | str) -> None:
        """Say whose result is the answer."""
        self._document["answer"] = node.name if isinstance(node, Node) else node

    @classmethod
    def load(cls, path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Self:
        """Read a graph from a YAML file.

        Raises:
            GraphInvalid: not readable, or not a graph; with every problem.
        """
        graph = cls("", {})
        graph._adopt(read_file(Path(path), overrides))
        return graph

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the graph as YAML; relative paths of models are rewritten to start from that file.

        Raises:
            ValueError: a function cannot be named in a file: a lambda, a local one, one in `__main__`.
        """
        target = Path(path).resolve()
        document = _moved(self.to_dict(), self._base, target.parent)
        target.write_text(yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=100), encoding="utf-8")

    def to_dict(self) -> dict[str, Any]:
        """Return the definition as a graph file holds it, functions by their import strings."""
        named: dict[str, Any] = _named(self._document)
        return named

    def compile(self, replace: Mapping[str, Callable[..., Any]] | None = None) -> Plan:
        """Check the graph and return its plan.

        Args:
            replace: node or branch name to a callable that stands in for it.

        Raises:
            GraphInvalid: with every problem.
        """
        return compile_source(self._source(), replace)

    def mock(self, replace: Mapping[str, Any] | None = None, **limits: Any) -> MockServer:
        """Return a server without ports that runs the production path, for tests.

        Use it as a context manager, `with` or `async with`.

        Args:
            replace: node or branch name to what stands in for it: a callable, or a mapping of
                tensors that it always gives.
            limits: fields of the server's options, `max_in_flight` say.
        """
        # By name: testing stands above the builder, and production never imports it.
        mock: MockServer = import_module("servinggraph.testing.mock").MockServer(self.compile, replace, **limits)
        return mock

    def _adopt(self, source: Source) -> None:
        self._document = source.document
        self._document["version"] = str(source.document.get("version", "1"))
        self._base, self._file, self._lines = source.base, source.file, source.lines
        self._problems = source.problems

    def _source(self) -> Source:
        return Source(self._document, self._base, self._file, self._lines, problems=self._problems)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Graph):
            return NotImplemented
        return _resolved(self) == _resolved(other)

    __hash__ = None  # type: ignore[assignment]  # mutable

    def __repr__(self) -> str:
        return f"Graph({self.name!r}, nodes={list(self._document.get('nodes', {}))})"


def _tensors(tensors: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: dict(tensor) if isinstance(tensor, Mapping) else {"datatype": tensor[0], "shape": list(tensor[1])}
        for name, tensor in tensors.items()
    }


def _sketch(work: Work) -> NodeSketch:
    return work if isinstance(work, NodeSketch) else NodeSketch("step", "python", {"call": work})


def _node_document(options: Mapping[str, Any], sketch: NodeSketch) -> dict[str, Any]:
    entry = {sketch.role: sketch.kind, **_plain(options)}
    if isinstance(entry.get("outputs"), Mapping):
        entry["outputs"] = _tensors(entry["outputs"])
    if sketch.branches is not None:
        entry["branches"] = {
            name: _node_document(_sketch(branch).options, _sketch(branch)) for name, branch in sketch.branches.items()
        }
    return entry


def _plain(value: Any) -> Any:
    """Return options as YAML would give them: tuples as lists, paths as text; functions stay."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, os.PathLike) else value


def _named(value: Any) -> Any:
    """Return a definition with functions replaced by their import strings."""
    if isinstance(value, Mapping):
        return {key: _named(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_named(item) for item in value]
    if not callable(value):
        return value
    try:
        return import_string(value)
    except ImportProblem as error:
        raise ValueError(f"the graph cannot be written to a file: {error}") from None


def _default_name(sketch: NodeSketch) -> str:
    call, path = sketch.options.get("call"), sketch.options.get("path")
    if isinstance(call, str):
        name = call.rpartition(":")[2]
    elif call is not None:
        name = getattr(call, "__name__", type(call).__name__)
    elif path is not None:
        name = Path(path).stem
    else:
        name = sketch.kind
    return re.sub(r"[^A-Za-z0-9_-]", "_", name).lstrip("-") or sketch.kind


def _resolved(graph: Graph) -> dict[str, Any]:
    """Return a graph's definition with absolute paths, to compare by."""
    root = Path("/")
    return _moved(graph.to_dict(), graph.base, root)


def _moved(document: dict[str, Any], old: Path, new: Path) -> dict[str, Any]:
    """Return the definition with `path`s made to start from another folder, where that can be said."""
    nodes = {name: _moved_node(node, old.resolve(), new.resolve()) for name, node in document["nodes"].items()}
    return {**document, "nodes": nodes}


def _moved_node(node: Any, old: Path, new: Path) -> Any:
    if not isinstance(node, dict):
        return node
    moved = dict(node)
    path = node.get("path")
    # A model below the graph's own folder stays beside it, however its path was written. Where a path
    # that begins with a variable leads is known only when the graph is compiled.
    known = path if isinstance(path, str) and not begins_with_reference(path) else None
    if known is not None and (not Path(known).is_absolute() or Path(known).is_relative_to(new)):
        moved["path"] = Path(os.path.relpath(old / known, new)).as_posix()
    if isinstance(node.get("branches"), dict):
        moved["branches"] = {name: _moved_node(branch, old, new) for name, branch in node["branches"].items()}
    return moved
