"""Follows imports: the Python files that a graph runs, and the packages that they come from."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, packages_distributions, requires, version
from pathlib import Path
from typing import Final

__all__ = ["modules_below", "pinned"]

_EXTRAS: Final = ("'grpc'", "'onnx'", "'kafka'", "'redis'", "'remote'")
"""What the image of servinggraph brings beside the base installation."""


def modules_below(folder: Path) -> set[Path]:
    """Return the files of modules that are loaded from below a folder, and what they import from there.

    A graph that was compiled has loaded what its steps name; what those import only when they run is
    found by reading them.
    """
    files = {Path(file) for module in list(sys.modules.values()) if (file := getattr(module, "__file__", None))}
    found: set[Path] = set()
    ahead = [file.resolve() for file in files if file.suffix == ".py" and folder in file.resolve().parents]
    while ahead:
        file = ahead.pop()
        if file not in found:
            found.add(file)
            ahead += [local for name in _imports(file) for local in _local(name, file, folder)]
    return found


def pinned(files: set[Path], warnings: list[str]) -> list[str]:
    """Return the installed versions of what Python files import, the packages of servinggraph's image left out.

    Args:
        files: the files; what they import from each other is no package.
        warnings: gets a line for each import that is not installed here.
    """
    local = {file.stem for file in files} | {file.parent.name for file in files if file.name == "__init__.py"}
    owners: Mapping[str, list[str]] = packages_distributions()
    ours = _ours()
    pins: dict[str, str] = {}
    for file in sorted(files):
        for name in sorted({full.partition(".")[0] for full in _imports(file)} - {""}):
            if name in sys.stdlib_module_names or name in local or name == "servinggraph":
                continue
            if name not in owners:
                warnings.append(f"{file.name} imports '{name}', which is not installed here: it is left out")
            for distribution in owners.get(name, ()):
                if _normal(distribution) not in ours:
                    pins[_normal(distribution)] = f"{distribution}=={version(distribution)}"
    return [pins[name] for name in sorted(pins)]


def _imports(file: Path) -> Iterator[str]:
    """Return the full names of what a Python file imports, anywhere in it; relative ones begin with dots."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"), str(file))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            yield base
            yield from (f"{base}{'' if base.endswith('.') else '.'}{alias.name}" for alias in node.names)


def _local(name: str, importer: Path, folder: Path) -> Iterator[Path]:
    """Return the files that a name leads to, its packages included, where they are below a folder."""
    bare = name.lstrip(".")
    levels = len(name) - len(bare)
    roots = [importer.parents[levels - 1]] if levels else [p for p in importer.parents if p == folder or folder in p.parents]
    parts = bare.split(".") if bare else []
    for root in roots:
        for count in range(len(parts) + 1):
            place = root.joinpath(*parts[:count])
            for file in (place / "__init__.py", *([place.with_suffix(".py")] if count else [])):
                if file.is_file():
                    yield file.resolve()


def _ours() -> set[str]:
    try:
        lines = requires("servinggraph") or []
    except PackageNotFoundError:
        lines = []
    names = {"onnxruntime-gpu"}
    for line in lines:
        requirement, _, marker = line.partition(";")
        if "extra ==" not in marker or any(extra in marker for extra in _EXTRAS):
            names.add(_normal("".join(c if c.isalnum() or c in "-_." else " " for c in requirement).split()[0]))
    return names


def _normal(name: str) -> str:
    return name.lower().replace("_", "-").replace(".", "-")
