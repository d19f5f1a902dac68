"""What a repository's folder holds: graphs, their versions, and which of them are to be served.

    FOLDER/name/graph.yaml                    one version; its number stands in the file
    FOLDER/name/1/graph.yaml | model.onnx     versions: positive integers without leading zeros
    FOLDER/name/config.yaml                   `versions: {latest: 2}`, `all` or `[1, 3]`
    FOLDER/*.yaml                             graphs side by side
    FOLDER/*.onnx                             bare models, where there is none of the above

Names that begin with a dot are passed over. Only looks; compiles and loads nothing.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from servinggraph.errors import GraphInvalid, Problem, nearest
from servinggraph.spec import read_file

__all__ = ["CONFIG_FILE", "Entry", "Found", "Layout", "VersionPolicy", "chosen", "version_policy"]

CONFIG_FILE: Final = "config.yaml"
_VERSION: Final = re.compile(r"[1-9][0-9]*")
_GRAPH_FILES: Final = (".yaml", ".yml")
_VERSION_FILES: Final = ("graph.yaml", "graph.yml", "model.onnx")

VersionPolicy = int | str | tuple[int, ...]
"""How many of the latest versions, "all", or which."""
State = tuple[tuple[str, int, int], ...]
"""Path, size and time of change of every file that belongs to a version."""


@dataclass(frozen=True, slots=True)
class Found:
    """One version of a graph on disk.

    Attributes:
        version: its number; the file's where there is no folder that says it.
        file: the graph file or the model.
        state: changes when any of its files does.
        numbered: True when the number is a folder's name.
    """

    version: str
    file: Path
    state: State
    numbered: bool = False


@dataclass(frozen=True, slots=True)
class Entry:
    """One graph on disk.

    Attributes:
        name: its name.
        versions: all its versions, in order of number.
        policy: which of them are to be served.
        in_folder: True when it has a folder, whose name is the graph's.
        problems: why it cannot be served, whatever its versions are like.
    """

    name: str
    versions: tuple[Found, ...]
    policy: VersionPolicy = "all"
    in_folder: bool = False
    problems: tuple[Problem, ...] = ()

    @property
    def state(self) -> Any:
        """Changes when anything does that a load would see."""
        return self.policy, self.problems, tuple((found.version, found.state) for found in chosen(self))


def chosen(entry: Entry) -> list[Found]:
    """Return the versions that the policy picks; of listed ones those that are there."""
    policy = entry.policy
    if isinstance(policy, int):
        return list(entry.versions[-policy:])
    if policy == "all":
        return list(entry.versions)
    return [found for found in entry.versions if int(found.version) in policy]


def version_policy(value: Any) -> VersionPolicy:
    """Return the policy that `all`, `{latest: 2}` or `[1, 3]` stands for.

    Raises:
        ValueError: it is none of these.
    """
    if value == "all":
        return "all"
    if isinstance(value, dict) and list(value) == ["latest"] and _is_number(value["latest"]):
        return int(value["latest"])
    if isinstance(value, list) and value and all(_is_number(item) for item in value):
        return tuple(value)
    raise ValueError(f"'versions' is 'all', '{{latest: 2}}' or a list of version numbers, got {value!r}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


class Layout:
    """Looks at a repository's folder.

    Args:
        folder: the folder.
        overrides: `--set` texts, which may change a graph's name or version.
    """

    def __init__(self, folder: Path, overrides: Sequence[str] = ()) -> None:
        self.folder = folder
        self._overrides = overrides
        # What a plain graph file said of itself when it could last be read: a file that is
        # half written must not look like a graph that is gone.
        self._last: dict[Path, tuple[tuple[str, int, int], str, str]] = {}

    def scan(self) -> dict[str, Entry]:
        """Return all graphs by name. Blocks: reads directories and heads of files.

        Raises:
            GraphInvalid: the folder cannot be read.
        """
        try:
            paths = sorted(path for path in self.folder.iterdir() if not path.name.startswith("."))
        except OSError as error:
            raise GraphInvalid([Problem(f"cannot read folder '{self.folder}': {error.strerror}")]) from error
        folders = [entry for path in paths if path.is_dir() and (entry := self.folder_entry(path)) is not None]
        in_folders = {entry.name for entry in folders}
        files = [path for path in paths if path.suffix in _GRAPH_FILES and path.is_file()]
        loose = [path for path in paths if path.name not in in_folders and path.suffix not in _GRAPH_FILES]
        shared = _state(self.folder, loose) if files else ()
        entries: dict[str, Entry] = {}
        for entry in [*folders, *self._plain(files, shared)]:
            other = entries.get(entry.name)
            entries[entry.name] = entry if other is None else _joined(other, entry)
        if not entries:
            # Models beside graph files are those that the graphs name; alone they are what is to be served.
            models = [path for path in paths if path.suffix == ".onnx" and path.is_file()]
            entries = {p.stem: Entry(p.stem, (Found("1", p, _state(self.folder, [p])),)) for p in models}
        return dict(sorted(entries.items()))

    def folder_entry(self, folder: Path) -> Entry | None:
        """Return the graph in a folder, None when there is none."""
        versions = [
            Found(path.name, file, _state(path, [path]), numbered=True)
            for path in folder.iterdir()
            if _VERSION.fullmatch(path.name) and path.is_dir()
            if (file := next((path / name for name in _VERSION_FILES if (path / name).is_file()), None)) is not None
        ]
        versions.sort(key=lambda found: int(found.version))
        config = folder / CONFIG_FILE
        top = next((folder / name for name in _VERSION_FILES[:2] if (folder / name).is_file()), None)
        problems: list[Problem] = []
        policy: VersionPolicy = 1
        if config.is_file():
            try:
                policy = _read_policy(config)
            except GraphInvalid as error:
                problems.extend(error.problems)
        if top is not None:
            if versions:
                text = f"beside it are version folders ({', '.join(found.version for found in versions)}): keep one form"
                problems.append(Problem(text, file=str(top)))
            _, version = self._head(top, folder.name)
            versions = [Found(version, top, _state(folder, [folder]))]
        if not versions and not problems:
            return None
        return Entry(folder.name, tuple(versions), policy, in_folder=True, problems=tuple(problems))

    def _plain(self, files: Iterable[Path], shared: State) -> Iterator[Entry]:
        for path in files:
            name, version = self._head(path, path.stem)
            # Which of the files around it are a graph's own cannot be told: a change of any is one of all.
            yield Entry(name, (Found(version, path, (*_state(self.folder, [path]), *shared)),))

    def _head(self, path: Path, name: str) -> tuple[str, str]:
        """Return the name and version that a graph file gives."""
        state = _state(path.parent, [path])
        last = self._last.get(path)
        if last is not None and state and last[0] == state[0]:
            return last[1], last[2]
        try:
            document = read_file(path, self._overrides).expanded()
        except GraphInvalid:
            return (last[1], last[2]) if last is not None else (name, "1")
        head = str(document.get("graph", name)), str(document.get("version", "1"))
        if not _VERSION.fullmatch(head[1]):
            head = head[0], "1"  # the compiler says what is wrong with it
        if state:
            self._last[path] = (state[0], *head)
        return head


def _joined(one: Entry, other: Entry) -> Entry:
    """Return a graph of which several files have versions."""
    have = {found.version: found for found in one.versions}
    problems = [*one.problems, *other.problems]
    for found in other.versions:
        first = have.setdefault(found.version, found)
        if first is not found:
            text = f"graph '{one.name}' version {found.version} is in {first.file}, too"
            problems.append(Problem(text, file=str(found.file)))
    versions = tuple(sorted(have.values(), key=lambda found: int(found.version)))
    return Entry(one.name, versions, "all", one.in_folder or other.in_folder, tuple(problems))


def _read_policy(path: Path) -> VersionPolicy:
    source = read_file(path)
    document = source.expanded()
    problems = [
        source.problem(f"unknown key '{key}'{nearest(key, ['versions'])}", (key,)) for key in document if key != "versions"
    ]
    try:
        policy = version_policy(document.get("versions", {"latest": 1}))
    except ValueError as error:
        problems.append(source.problem(str(error), ("versions",)))
        policy = 1
    if problems:
        raise GraphInvalid(problems)
    return policy


def _state(base: Path, paths: Iterable[Path]) -> State:
    """Return path, size and time of change of files, and of all files in folders."""
    files: list[tuple[str, int, int]] = []
    for path in paths:
        for file in _files(path):
            try:
                status = file.stat()
            except OSError:
                continue  # it went while we looked
            files.append((os.path.relpath(file, base), status.st_size, status.st_mtime_ns))
    return tuple(sorted(files))


def _files(path: Path) -> Iterator[Path]:
    if path.name.startswith(".") or path.name == "__pycache__":
        return
    if not path.is_dir():
        yield path
        return
    for folder, inner, names in os.walk(path):
        inner[:] = [name for name in inner if not name.startswith(".") and name != "__pycache__"]
        yield from (Path(folder) / name for name in names if not name.startswith("."))
