"""Makes plans of what is on disk: a graph file, a bare model, one version of a graph of a repository."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from servinggraph.compiler import compile_source
from servinggraph.compiler.nodes import NodeCompiler
from servinggraph.errors import GraphInvalid, Problem
from servinggraph.lifecycle.layout import Entry, Found, Layout, chosen
from servinggraph.lifecycle.overrides import LoadConfig
from servinggraph.plan import Plan
from servinggraph.scopes import ModuleScope
from servinggraph.spec import GraphSpec, Source, read_file
from servinggraph.spec.source import read_text

__all__ = ["no_graph", "read_graphs", "read_version"]


def read_graphs(path: Path, overrides: Sequence[str] = (), replace: Any = None) -> list[Plan]:
    """Compile what `serve` and `check` are given: a graph file, a repository's folder, or a bare model.

    Raises:
        GraphInvalid: with the problems of every file.
    """
    if path.is_dir():
        return _read_folder(path, overrides)
    if path.suffix == ".onnx":
        if not path.is_file():
            raise GraphInvalid([Problem(f"there is no file '{path}'")])
        return [compile_source(_bare_model(path, path.stem, overrides))]
    if not path.exists():
        raise GraphInvalid([Problem(f"there is no file or folder '{path}'")])
    return [compile_source(read_file(path, overrides), replace)]


def no_graph(folder: Path) -> GraphInvalid:
    """Return the error for a folder without graphs."""
    return GraphInvalid([Problem(f"folder '{folder}' holds no graph: expected *.yaml, */graph.yaml, */1/graph.yaml or *.onnx")])


def _read_folder(path: Path, overrides: Sequence[str]) -> list[Plan]:
    entries = Layout(path, overrides).scan()
    if not entries:
        raise no_graph(path)
    plans: list[Plan] = []
    problems: list[Problem] = []
    for entry in entries.values():
        problems.extend(entry.problems)
        for found in chosen(entry):
            try:
                with ModuleScope(f"{entry.name}.{found.version}")():
                    plans.append(read_version(entry, found, overrides))
            except GraphInvalid as error:
                problems.extend(error.problems)
    if problems:
        raise GraphInvalid(list(dict.fromkeys(problems)))
    return plans


def read_version(entry: Entry, found: Found, overrides: Sequence[str] = (), config: LoadConfig | None = None) -> Plan:
    """Compile one version of a graph of a repository.

    Args:
        entry: the graph.
        found: the version.
        overrides: `--set` texts.
        config: what a load request says otherwise.

    Raises:
        GraphInvalid: with every problem, one of name or number included.
    """
    problems: list[Problem] = []
    if config is not None and config.definition is not None:
        # Whoever asks for a load is not to read this process's environment.
        source = read_text(config.definition, "'config'", found.file.resolve().parent, environment={})
        problems += _settle(source, "graph", entry.name, "the request is for")
        problems += _settle(source, "version", found.version, "the request loads version")
    elif found.file.suffix == ".onnx":
        source = _bare_model(found.file, entry.name, overrides)
        source.document.setdefault("version", found.version)
    else:
        source = read_file(found.file, overrides)
        if entry.in_folder:
            problems += _settle(source, "graph", entry.name, "a graph is called like its folder,")
        if found.numbered:
            problems += _settle(source, "version", found.version, "a version has its folder's number,")
    if config is not None:
        problems += config.apply(source)
    if problems:
        raise GraphInvalid(problems)
    return compile_source(source)


def _settle(source: Source, key: str, given: str, rule: str) -> list[Problem]:
    """Fill in the graph's name or version where the definition leaves it out; say where it has another."""
    source.document.setdefault(key, given)
    said = source.expanded()[key]
    if str(said) == given:
        return []
    return [source.problem(f"'{key}: {said}', but {rule} '{given}': change one, or leave '{key}' out", (key,))]


def _bare_model(path: Path, name: str, overrides: Sequence[str]) -> Source:
    """Return a graph of nothing but one model; `--set` reaches its node as `model`."""
    base = path.resolve().parent
    text = f"graph: {name}\ninputs: {{}}\nnodes:\n  model: {{step: onnx, path: {path.name!r}}}\nanswer: model\n"
    source = read_text(text, None, base, overrides)
    spec = GraphSpec.model_validate(source.expanded())
    # The graph's inputs are the model's: made a first time to learn them.
    problems: list[Problem] = []
    node = NodeCompiler(source, {}, problems, spec.sequences is not None).node(
        "model", spec.nodes["model"], ("nodes", "model"), (), None
    )
    if node is None:
        raise GraphInvalid(problems)
    source.document["inputs"] = {
        tensor: {"datatype": known.datatype, "shape": list(known.shape or ()), "optional": known.optional}
        for tensor, known in (node.signature.inputs or {}).items()
    }
    return source
