"""Reads a graph's YAML: overrides, and the line of every key.

Gives plain dicts and lists; what they mean is `model`'s. PyYAML resolves scalars, this
module keeps the positions that PyYAML throws away and refuses duplicate keys.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from servinggraph.errors import GraphInvalid, Problem, nearest
from servinggraph.spec.environment import Expansion, KeyPath, expand

__all__ = ["KeyPath", "Source", "read_file", "read_text"]


@dataclass
class Source:
    """Where a definition came from.

    Attributes:
        document: the definition as plain dicts and lists, with its references to the environment.
        base: folder that its relative paths start from.
        file: path of the file as the user gave it; None for a graph built in Python.
        lines: key path to line, counted from 1.
        overridden: key paths that an override set, with the text of the override.
        problems: what reading found that does not stand in the way of looking for more.
        environment: values for `${NAME}`; None for the process environment.
        expansion: what `expanded` found; empty before.
        inside: files of the graphs that this one is a node of, outermost first, each as it is and as it was given.
    """

    document: dict[str, Any]
    base: Path
    file: str | None = None
    lines: dict[KeyPath, int] = field(default_factory=dict)
    overridden: dict[KeyPath, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    environment: Mapping[str, str] | None = None
    expansion: Expansion = field(default_factory=Expansion)
    inside: tuple[tuple[Path, str], ...] = ()

    def expanded(self) -> dict[str, Any]:
        """Return the definition with values of the environment instead of the references to them.

        Raises:
            GraphInvalid: variables that are not set.
        """
        self.expansion = expand(self.document, os.environ if self.environment is None else self.environment)
        if self.expansion.faults:
            found = [self.problem(reason, path, _node_at(path)) for path, reason in self.expansion.faults]
            raise GraphInvalid([*self.problems, *found])
        document: dict[str, Any] = self.expansion.document
        return document

    def problem(self, message: str, path: KeyPath = (), node: str | None = None) -> Problem:
        """Return a problem placed at a key, or at the nearest enclosing key that has a line; it holds no secrets."""
        message = self.expansion.conceal(message, path)
        for end in range(len(path), 0, -1):
            if path[:end] in self.overridden:
                return Problem(f"{message} (set by --set {self.overridden[path[:end]]})", node, self.file)
        line = next((self.lines[path[:end]] for end in range(len(path), -1, -1) if path[:end] in self.lines), None)
        return Problem(message, node, self.file, line)


def read_file(
    path: Path, overrides: Sequence[str] = (), environment: Mapping[str, str] | None = None, shown: str | None = None
) -> Source:
    """Read a graph file.

    Args:
        path: the YAML file.
        overrides: `dotted.key=value` texts, the value in YAML.
        environment: values for `${NAME}`; the process environment by default.
        shown: the path as errors have it; by default as it is.

    Raises:
        GraphInvalid: unreadable, not YAML, duplicate keys, overrides of nothing.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise GraphInvalid([Problem(f"there is no file '{path}'")]) from None
    except (OSError, UnicodeDecodeError) as error:
        raise GraphInvalid([Problem(f"cannot read '{path}': {error}")]) from error
    return read_text(text, shown or str(path), path.resolve().parent, overrides, environment)


def read_text(
    text: str,
    file: str | None,
    base: Path,
    overrides: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
) -> Source:
    """Read a graph definition from YAML text; see `read_file`."""
    reader = _Reader(file)
    document = reader.read(text)
    if not reader.problems and not isinstance(document, dict):
        reader.problems.append(
            Problem(f"expected a mapping with 'graph:', 'inputs:' and 'nodes:', got {_kind(document)}", None, file, 1)
        )
    if reader.problems:
        raise GraphInvalid(reader.problems)
    source = Source(document, base, file, reader.lines, problems=reader.duplicates, environment=environment)
    problems = [problem for text in overrides if (problem := _override(source, text)) is not None]
    if problems:
        raise GraphInvalid(problems)
    return source


class _Reader:
    """Turns YAML text into plain values and notes lines and problems on the way."""

    def __init__(self, file: str | None) -> None:
        self._file = file
        self._inside: set[int] = set()
        self.lines: dict[KeyPath, int] = {}
        self.problems: list[Problem] = []
        self.duplicates: list[Problem] = []

    def read(self, text: str) -> Any:
        loader = yaml.SafeLoader(text)
        try:
            root = loader.get_single_node()
            if root is None:
                self._report(1, "the file is empty")
                return None
            return self._value(loader, root, ())
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            what = " ".join(part for part in (error.context, error.problem) if part)
            self._report(mark.line + 1 if mark else 1, f"not valid YAML: {what}")
        except yaml.YAMLError as error:
            self._report(1, f"not valid YAML: {error}")
        finally:
            loader.dispose()
        return None

    def _report(self, line: int, message: str) -> None:
        self.problems.append(Problem(message, None, self._file, line))

    def _value(self, loader: yaml.SafeLoader, node: yaml.Node, path: KeyPath) -> Any:
        line = node.start_mark.line + 1
        self.lines.setdefault(path, line)
        if isinstance(node, yaml.ScalarNode):
            return loader.construct_object(node)
        if id(node) in self._inside:
            self._report(line, "an alias contains itself")
            return None
        self._inside.add(id(node))
        try:
            if isinstance(node, yaml.MappingNode):
                return self._mapping(loader, node, path)
            return [self._value(loader, item, (*path, index)) for index, item in enumerate(node.value)]
        finally:
            self._inside.discard(id(node))

    def _mapping(self, loader: yaml.SafeLoader, node: yaml.MappingNode, path: KeyPath) -> dict[str, Any]:
        loader.flatten_mapping(node)  # `<<` merge keys
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                self._report(line, "a key must be plain text")
                continue
            key = key_node.value
            if key in result:
                text = f"duplicate key '{key}': first given in line {self.lines[(*path, key)]}"
                self.duplicates.append(Problem(text, None, self._file, line))
                continue
            self.lines[(*path, key)] = line
            result[key] = self._value(loader, value_node, (*path, key))
        return result


def _node_at(path: KeyPath) -> str | None:
    """Return the full name of the node that a key path leads into; None where it leads elsewhere."""
    names = [str(path[i + 1]) for i in range(len(path) - 1) if path[i] in ("nodes", "branches")]
    return ".".join(names) if path[:1] == ("nodes",) and names else None


def _override(source: Source, text: str) -> Problem | None:
    key, equals, raw = text.partition("=")
    parts = tuple(key.split("."))
    if not equals or not all(parts):
        return Problem(f"--set {text}: expected key=value, for example nodes.score.batch.max_rows=64")
    try:
        value = yaml.safe_load(raw)
    except yaml.YAMLError as error:
        return Problem(f"--set {text}: the value is not valid YAML: {error}")
    place: Any = source.document
    for depth, part in enumerate(parts[:-1]):
        named = depth > 0 and parts[depth - 1] in ("nodes", "branches", "inputs", "outputs")
        if isinstance(place, dict) and part not in place and not named:
            place[part] = {}
        if not isinstance(place, dict) or part not in place:
            known = nearest(part, list(place)) if isinstance(place, dict) else ""
            return Problem(f"--set {text}: there is no '{'.'.join(parts[: depth + 1])}'{known}", None, source.file)
        if place[part] is None or isinstance(place[part], bool):
            place[part] = {}  # `batch: true` gets a key of its own
        place = place[part]
    if not isinstance(place, dict):
        return Problem(f"--set {text}: '{'.'.join(parts[:-1])}' has no keys", None, source.file)
    place[parts[-1]] = value
    source.overridden[parts] = text
    return None


def _kind(value: Any) -> str:
    return {list: "a list", str: "text", type(None): "nothing"}.get(type(value), type(value).__name__)
