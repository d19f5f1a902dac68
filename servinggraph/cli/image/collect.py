"""Finds what belongs to a graph: its files, code and models, and the versions of the packages that its code imports."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from servinggraph.cli.image.code import modules_below, pinned
from servinggraph.interfaces import Step
from servinggraph.plan import Plan

__all__ = ["CannotCollect", "Collected", "collect"]

_GRAPH_FILES = (".yaml", ".yml", ".onnx")
_NEVER = {"__pycache__", "node_modules", "venv", "env"}
"""Folders that hold nothing of a graph, beside those whose names begin with a dot."""


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
        warnings: what the person who builds should know.
    """

    root: Path
    path: Path
    files: list[Path]
    names: list[str]
    requirements: list[str]
    warnings: list[str] = field(default_factory=list)


def collect(path: Path, plans: Sequence[Plan], include: Sequence[str] = (), requirements: Path | None = None) -> Collected:
    """Find what belongs to a graph file, a folder of graphs, or a bare model.

    Taken are the graph's files, the Python files below its folder that it imports, what its steps name
    (models and their external data), and what `include` adds. Of a folder of graphs every graph file and model is taken.
    Nothing else is: no data, no keys.

    Args:
        path: what would be served.
        plans: its graphs, compiled.
        include: further files, as glob patterns from the graph's folder.
        requirements: a requirements file to use as it is; by default `requirements.txt` in the graph's
            folder, or else the versions that are installed here of what the code imports.

    Raises:
        CannotCollect: a file cannot have the same place in an image, or a pattern finds nothing.
    """
    path = path.resolve()
    folder = path if path.is_dir() else path.parent
    files = {path} if path.is_file() else set()
    if path.is_dir():
        files.update(_beside(folder))
    code = modules_below(folder)
    files.update(code)
    for plan in plans:
        files.update(_named(plan))
    for pattern in include:
        found = [match for match in folder.glob(pattern) if match.is_file()]
        if not found:
            raise CannotCollect(f"--include {pattern!r} finds no file in {folder}")
        files.update(match.resolve() for match in found)
    root = Path(os.path.commonpath([folder, *(file.parent for file in files)]))
    if root == Path(root.anchor):
        far = next(file for file in sorted(files) if folder not in file.parents)
        raise CannotCollect(f"{far} and {path} have no folder in common: bring the model nearer to the graph")
    warnings: list[str] = []
    given = requirements or next((file for file in [folder / "requirements.txt"] if file.is_file()), None)
    lines = _read_requirements(given, warnings) if given else pinned(code, warnings)
    ordered = sorted(file.relative_to(root) for file in files)
    return Collected(root, path.relative_to(root), ordered, list(dict.fromkeys(plan.name for plan in plans)), lines, warnings)


def _beside(folder: Path) -> Iterator[Path]:
    """Return graph files and models in a folder and those below it."""
    for found in sorted(folder.iterdir()):
        if found.name.startswith(".") or found.name in _NEVER or (found / "pyvenv.cfg").exists():
            continue
        if found.is_dir():
            yield from _beside(found)
        elif found.suffix in _GRAPH_FILES:
            yield found.resolve()


def _named(plan: Plan) -> Iterator[Path]:
    """Return the files that the steps of a graph need."""
    for node in plan.every_node():
        if isinstance(node.work, Step):
            for file in node.work.files():
                if not _is_relative(node.work, file):
                    raise CannotCollect(
                        f"graph '{plan.name}' node '{node.name}' names {file} by an absolute path, which an image does not "
                        "have: name it from the graph file's folder"
                    )
                yield file.resolve()


def _is_relative(step: Step[Any], file: Path) -> bool:
    return not any(isinstance(value, str) and Path(value).is_absolute() for value in [getattr(step.options, "path", "")])


def _read_requirements(file: Path, warnings: list[str]) -> list[str]:
    lines = file.read_text(encoding="utf-8").splitlines()
    loose = [
        line.strip() for line in lines if line.strip() and line.strip()[0] not in "#-" and "==" not in line and "@" not in line
    ]
    if loose:
        warnings.append(f"{file.name} pins no version of {', '.join(loose)}: two builds may differ")
    return lines
