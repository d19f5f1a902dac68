"""Finds what belongs to a graph: its files, code and models, and the versions of the packages that its code imports."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from servinggraph.cli.image.code import UnreadableCode, code_of, pinned
from servinggraph.cli.image.requirements import BadRequirements, read_requirements
from servinggraph.interfaces import Step
from servinggraph.lifecycle.layout import CONFIG_FILE, Layout, chosen
from servinggraph.plan import Plan
from servinggraph.spec import read_file
from servinggraph.spec.environment import required_variables
from servinggraph.tensors import TensorSpec

__all__ = ["CannotCollect", "Collected", "collect"]

_IMPORT_STRING: Final = re.compile(r"([A-Za-z_][\w.]*):[A-Za-z_][\w.]*")


class CannotCollect(Exception):
    """The graph cannot be put into an image as it is; the text says what to change."""


@dataclass
class Collected:
    """What an image of a graph holds.

    Attributes:
        root: the folder that all files are under.
        path: what is served, under `root`.
        files: every file, under `root`, in order.
        names: the graphs' names.
        requirements: lines of a requirements file for what the code imports beside servinggraph.
        search: folders under `root` from which code is imported, beside those of graphs.
        variables: environment variables without which the graphs cannot be compiled.
        warnings: what the person who builds should know.
    """

    root: Path
    path: Path
    files: list[Path]
    names: list[str]
    requirements: list[str]
    search: list[Path]
    variables: list[str]
    warnings: list[str] = field(default_factory=list)


def collect(
    path: Path,
    plans: Sequence[Plan],
    overrides: Sequence[str] = (),
    include: Sequence[str] = (),
    requirements: Path | None = None,
) -> Collected:
    """Find what belongs to a graph file, a folder of graphs, or a bare model.

    Taken are the graphs' files, those of graphs in them included, the Python files that they import and
    that no package has installed, what steps and outputs name (models and their external data, labels,
    certificates to trust), and what `include` adds. Nothing else is: no data, no keys.

    Args:
        path: what would be served.
        plans: its graphs, compiled.
        overrides: the `--set` texts with which they were.
        include: further files, as glob patterns from the graph's folder; as in a shell, a wildcard passes
            over names that begin with a dot.
        requirements: a requirements file to use; by default `requirements.txt` in the graph's folder, or
            else the versions that are installed here of what the code imports.

    Raises:
        CannotCollect: a file cannot have the same place in an image, or a pattern finds nothing.
    """
    path = path.resolve()
    folder = path if path.is_dir() else path.parent
    graphs = [path] if path.is_file() else _served(folder, overrides)
    nested, bases, modules = _looked_through(plans)
    files = {*graphs, *nested, *(file for plan in plans for file in _named(plan))}
    if path.is_dir():
        configs = [place / CONFIG_FILE for graph in graphs for place in graph.parents[:2] if folder in place.parents]
        files.update(file for file in configs if file.is_file())
    for pattern in include:
        files.update(_matching(folder, pattern))
    warnings: list[str] = []
    try:
        code = code_of([folder, *bases], modules)
        given = requirements or next((file for file in [folder / "requirements.txt"] if file.is_file()), None)
        lines = read_requirements(given, warnings) if given else pinned(code.foreign, warnings)
    except (UnreadableCode, BadRequirements) as error:
        raise CannotCollect(str(error)) from error
    checked = [read_file(file, overrides) for file in graphs if file.suffix != ".onnx"] + [read_file(file) for file in nested]
    variables = sorted({name for source in checked for name in required_variables(source.document)})
    warnings += _about_graphs(folder, graphs, variables)
    files.update(code.files)
    # A version's folder may be a link: what is found in it stays at the link's name.
    links = {real: graph.parent for graph in graphs if (real := graph.parent.resolve()) != graph.parent}
    for real, link in links.items():
        files = {link / file.relative_to(real) if real in file.parents else file for file in files}
    root = Path(os.path.commonpath([folder, *code.search, *(file.parent for file in files)]))
    if root == Path(root.anchor):
        far = next(file for file in sorted(files) if folder not in file.parents)
        raise CannotCollect(f"{far} and {path} have no folder in common: bring it nearer to the graph")
    return Collected(
        root=root,
        path=path.relative_to(root),
        files=sorted(file.relative_to(root) for file in files),
        names=list(dict.fromkeys(plan.name for plan in plans)),
        requirements=lines,
        search=[place.relative_to(root) for place in code.search],
        variables=variables,
        warnings=warnings,
    )


def _served(folder: Path, overrides: Sequence[str]) -> list[Path]:
    """Return the graph files and models of a folder that are served: those that were compiled."""
    return [found.file for entry in Layout(folder, overrides).scan().values() for found in chosen(entry)]


def _about_graphs(folder: Path, graphs: Sequence[Path], variables: Sequence[str]) -> Iterator[str]:
    """Say what of a graph an image will not have as one might expect."""
    used = folder / "requirements.txt"
    for file in dict.fromkeys(graph.parent / "requirements.txt" for graph in graphs):
        if file != used and file.is_file():
            yield f"{file} is not read: for a folder of graphs it is {used}"
    if variables:
        yield f"the server's environment must have {', '.join(variables)}, without a default: the graph is checked here only"


def _looked_through(plans: Sequence[Plan]) -> tuple[list[Path], list[Path], list[tuple[str, Path]]]:
    """Return the files of graphs in graphs, the folders that code is named from, and the modules that are."""
    files: list[Path] = []
    bases: list[Path] = []
    modules: list[tuple[str, Path]] = []
    for node in (node for plan in plans for node in plan.every_node()):
        work = node.work
        options: Any = work.options
        bases.append(work.base)
        if isinstance(work, Step) and work.graph_file is not None:
            files.append(_absolute(work.graph_file))
        kind = type(work).__module__  # another package's may be a step or router, too
        named = [match[1] for text in _texts(options.model_dump()) if (match := _IMPORT_STRING.fullmatch(text))]
        # `tensor:card` looks like one, too, but nothing of that name was imported.
        modules += [(name, work.base) for name in [kind, *named] if name in sys.modules]
    return files, bases, modules


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)


def _named(plan: Plan) -> Iterator[Path]:
    """Return the files that a graph's steps and outputs name."""
    nodes = plan.every_node()
    for node in nodes:
        work = node.work
        if isinstance(work, Step):
            needed = [*work.files(), *([work.graph_file] if work.graph_file is not None else [])]
            if needed and Path(str(getattr(work.options, "path", ""))).is_absolute():
                raise _by_absolute_path(plan, needed[0], node.name)
            yield from map(_absolute, needed)
        yield from _labels(plan, node.outputs, work.base, node.name)
    base = plan.nodes[0].work.base
    if plan.kafka is not None and plan.kafka.security.ca is not None and base in (ca := Path(plan.kafka.security.ca)).parents:
        yield ca  # whom to trust is no secret, other than certificate and key
    for inner in [plan, *(node.graph for node in nodes if node.graph is not None)]:
        yield from _labels(plan, inner.outputs, inner.nodes[0].work.base)


def _labels(plan: Plan, outputs: Mapping[str, TensorSpec] | None, base: Path, node: str = "") -> Iterator[Path]:
    for spec in (outputs or {}).values():
        if spec.labels is None or not (file := _absolute(base / spec.labels.file)).is_file():
            continue  # not there: a graph in this one has named it, from its own folder
        if Path(spec.labels.file).is_absolute():
            raise _by_absolute_path(plan, file, node)
        yield file


def _by_absolute_path(plan: Plan, file: Path, node: str) -> CannotCollect:
    where = f"graph '{plan.name}'" + (f" node '{node}'" if node else "")
    return CannotCollect(
        f"{where} names {file} by an absolute path, which an image does not have: name it from the graph file's folder"
    )


def _matching(folder: Path, pattern: str) -> list[Path]:
    """Return the files that a pattern finds; names that begin with a dot only where the pattern says the dot."""
    if Path(pattern).is_absolute():
        raise CannotCollect(f"--include {pattern!r} is absolute: patterns start from the graph's folder, {folder}")
    hidden = any(part.startswith(".") and part != ".." for part in Path(pattern).parts)
    found = [place for place in folder.glob(pattern) if hidden or not any(p[0] == "." for p in place.relative_to(folder).parts)]
    files = [_absolute(place) for place in found if place.is_file() and "__pycache__" not in place.parts]
    if not files:
        hint = f"; for all in a folder write '{pattern.rstrip('/')}/**/*'" if any(place.is_dir() for place in found) else ""
        raise CannotCollect(f"--include {pattern!r} finds no file in {folder}{hint}")
    return files


def _absolute(file: Path) -> Path:
    """Return a path as it is named, links in it included: under that name the graph looks for it in the image, too."""
    return Path(os.path.abspath(file))  # noqa: PTH100  (follows no links)
