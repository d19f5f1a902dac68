"""Follows imports: the Python files that a graph runs, and the packages that they come from."""

from __future__ import annotations

import ast
import importlib.util
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import Distribution, PackageNotFoundError, distribution, packages_distributions, requires
from pathlib import Path
from typing import Final

import servinggraph

__all__ = ["Code", "UnreadableCode", "code_of", "pinned"]

_EXTRAS: Final = ("'grpc'", "'onnx'", "'kafka'", "'redis'", "'remote'")
"""What the image of servinggraph brings beside the base installation."""
_INSTALLED: Final = frozenset({"site-packages", "dist-packages"})
_NOT_OWN: Final = [
    Path(servinggraph.__file__).resolve().parent,
    *(Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib")),
]


class UnreadableCode(Exception):
    """A Python file that belongs to a graph cannot be read; the text says which and why."""


@dataclass(frozen=True, slots=True)
class Code:
    """The code of graphs: Python files that are neither installed nor a part of Python.

    Attributes:
        files: every file.
        search: folders beside those of the graphs from which imports of them start, in order.
        foreign: top-level names of what is imported from elsewhere, each with the name of a file that does.
    """

    files: set[Path]
    search: list[Path]
    foreign: dict[str, str]


def code_of(folders: Iterable[Path], named: Iterable[tuple[str, Path]]) -> Code:
    """Find the code of graphs that were compiled.

    A graph that was compiled has loaded what its steps name; what that imports only when it runs is
    found by reading it.

    Args:
        folders: those that the graphs' import strings start from.
        named: modules that the graphs name, each with the graph's folder.

    Raises:
        UnreadableCode: a file cannot be parsed.
    """
    search = _Search(list(dict.fromkeys(folders)))
    for name, folder in named:
        search.follow([name], folder / "the graph")
    search.add(Path(file) for module in list(sys.modules.values()) if (file := getattr(module, "__file__", None)))
    while search.ahead:
        file = search.ahead.pop()
        if file not in search.code.files:
            search.code.files.add(file)
            search.follow(list(_imports(file)), file)
    return search.code


class _Search:
    """Finds own code, beginning in the folders of graphs; where an import leads out of them, there as well."""

    def __init__(self, folders: list[Path]) -> None:
        self._folders = folders
        self.code = Code(set(), [], {})
        self.ahead: list[Path] = []

    def add(self, files: Iterable[Path]) -> None:
        """Take those of many files that are own code in the graphs' folders."""
        places = [file.absolute() for file in files if file.suffix == ".py"]
        self.ahead += [file for file in places if self._root(file) in self._folders and self._is_own(file)]

    def follow(self, names: Iterable[str], importer: Path) -> None:
        """Look where the imports of a file lead."""
        local, foreign = set(), {}
        for name in names:
            top = name.partition(".")[0]  # empty for a relative one
            found = list(self._local(name, importer))
            if not found and top and (folder := self._other_folder(top)) is not None:
                self.code.search.append(folder)
                found = list(self._local(name, importer))
            self.ahead += found
            if found:
                local.add(top)
            elif top:
                foreign[top] = importer.name
        for top in foreign.keys() - local:  # a package without __init__.py is no file, but what is in it
            self.code.foreign.setdefault(top, foreign[top])

    def _local(self, name: str, importer: Path) -> Iterator[Path]:
        """Return the files of own code that a name leads to, its packages included."""
        bare = name.lstrip(".")
        levels = len(name) - len(bare)
        root = self._root(importer)
        inside = [folder for folder in importer.parents if root is not None and (folder == root or root in folder.parents)]
        starts = [importer.parents[levels - 1]] if levels else [*inside, *self._folders, *self.code.search]
        parts = bare.split(".") if bare else []
        for start in starts:
            files = [start / "__init__.py"] if levels else []
            for count in range(1, len(parts) + 1):
                place = start.joinpath(*parts[:count])
                files += [place / "__init__.py", place.with_name(f"{place.name}.py")]
            yield from (file for file in files if file.is_file() and self._is_own(file))

    def _other_folder(self, top: str) -> Path | None:
        """Return a further folder from which a module or package is imported; None when it is installed, or nowhere."""
        try:
            spec = importlib.util.find_spec(top)
        except (ImportError, ValueError):  # __main__ has none
            return None
        if spec is None:
            return None
        if spec.submodule_search_locations:
            place = Path(next(iter(spec.submodule_search_locations))).absolute()
        elif spec.origin is not None and spec.origin.endswith(".py"):
            place = Path(spec.origin).absolute()
        else:  # compiled, or built in
            return None
        known = place.parent in self._folders or place.parent in self.code.search
        return place.parent if self._is_own(place) and not known else None

    def _root(self, file: Path) -> Path | None:
        """Return the folder of imports that a file is in; of several the innermost."""
        inside = [folder for folder in (*self._folders, *self.code.search) if folder in file.parents]
        return max(inside, key=lambda folder: len(folder.parts), default=None)

    def _is_own(self, file: Path) -> bool:
        """Tell whether a file is neither installed, nor Python's, nor ours: a graph may have a .venv beside it."""
        root, real = self._root(file), file.resolve()
        parts = file.parts if root is None else file.relative_to(root).parts
        return not _INSTALLED.intersection(parts) and not any(folder in (real, *real.parents) for folder in _NOT_OWN)


def pinned(foreign: Mapping[str, str], warnings: list[str]) -> list[str]:
    """Return the installed versions of packages, those of servinggraph's image left out.

    Args:
        foreign: their top-level names, each with the name of a file that imports it.
        warnings: gets a line for each that is not installed here, or from where an image's build cannot have it.
    """
    owners: Mapping[str, list[str]] = packages_distributions()
    ours = _ours()
    pins: dict[str, str] = {}
    for name, importer in sorted(foreign.items()):
        if name in sys.stdlib_module_names or name == "servinggraph":
            continue
        if name not in owners:
            warnings.append(f"{importer} imports '{name}', which is not installed here: it is left out")
        for owner in dict.fromkeys(owners.get(name, ())):
            if _normal(owner) in ours:
                continue
            package = distribution(owner)
            if _is_from_elsewhere(package):
                warnings.append(
                    f"{importer} imports '{name}', and {owner} was installed from a file or a repository, not from a package "
                    "index: it is left out; a requirements.txt beside the graph can say where it is"
                )
            else:
                pins[_normal(owner)] = f"{owner}=={package.version}"
    return [pins[name] for name in sorted(pins)]


def _imports(file: Path) -> Iterator[str]:
    """Return the full names of what a Python file imports, anywhere in it; relative ones begin with dots."""
    try:
        tree = ast.parse(file.read_bytes(), str(file))
    except (OSError, SyntaxError, ValueError) as error:
        raise UnreadableCode(f"{file}, which the graph's code imports, cannot be read: {error}") from error
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            yield base
            yield from (f"{base}{'' if base.endswith('.') else '.'}{alias.name}" for alias in node.names)


def _is_from_elsewhere(package: Distribution) -> bool:
    """Tell whether a package index has it not, or another one of that name. Source: PEP 610."""
    return package.read_text("direct_url.json") is not None


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
