"""References to environment variables in a definition: `${NAME}`, `${NAME:-default}`, and `$$` for a dollar sign.

A definition keeps its references, so that it is written to a file as it was read; they are followed when it is
compiled. What they stand for may be secret: texts for people name the reference.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import quote, quote_plus

import orjson
import yaml

__all__ = ["Expansion", "KeyPath", "Reference", "begins_with_reference", "expand", "required_variables", "spellings"]

KeyPath = tuple[str | int, ...]

_REFERENCE: Final = re.compile(r"\$(?:\$|\{(?P<name>[A-Za-z_][A-Za-z0-9_]*)(?::-(?P<default>[^}]*))?\}|(?P<broken>\{[^}]*\}?))")
_SHORT: Final = 4
"""A value with fewer characters is anywhere in a text by accident."""


@dataclass(frozen=True, slots=True)
class Reference:
    """A text of the definition with references in it.

    Attributes:
        text: as the definition has it.
        expanded: what it became, as text.
        values: what came from the environment, each with the reference to it.
    """

    text: str
    expanded: str
    values: Mapping[str, str]


class Expansion:
    """A definition whose references are followed.

    Attributes:
        document: the definition.
        references: key path of every text that had references in it.
        faults: key path and reason of every reference that leads nowhere.
    """

    def __init__(self) -> None:
        self.document: Any = None
        self.references: dict[KeyPath, Reference] = {}
        self.faults: list[tuple[KeyPath, str]] = []

    def as_text(self, path: KeyPath, value: Any) -> str | None:
        """Return the text at a key that was read as something else, `007` as a number say; None where it was not."""
        reference = self.references.get(path)
        return None if reference is None or isinstance(value, str) else reference.expanded

    def shown(self, path: KeyPath, value: Any) -> str:
        """Return a value as a text for people has it: references instead of what they stand for."""
        reference = self.references.get(path)
        return reference.text if reference is not None else repr(self._shown(path, value))

    def _shown(self, path: KeyPath, value: Any) -> Any:
        if path in self.references:
            return self.references[path].text
        if isinstance(value, dict):
            return {key: self._shown((*path, key), item) for key, item in value.items()}
        if isinstance(value, list):
            return [self._shown((*path, index), item) for index, item in enumerate(value)]
        return value

    def conceal(self, text: str, path: KeyPath) -> str:
        """Return a text for people with references instead of the values that came from the environment.

        Args:
            text: the text.
            path: the key that it is about. Short values are looked for only if they stand there or below.
        """
        for place, reference in self.references.items():
            concerned = place[: len(path)] == path
            for value, name in reference.values.items():
                if value and (concerned or len(value) >= _SHORT):
                    # Inside a longer word a short value is another thing.
                    around = (r"(?<!\w)", r"(?!\w)") if len(value) < _SHORT else ("", "")
                    found = "|".join(re.escape(spelled) for spelled in spellings(value))
                    text = re.sub(f"{around[0]}(?:{found}){around[1]}", lambda _, name=name: name, text)  # type: ignore[misc]
        return text


def spellings(secret: str) -> list[str]:
    """Return the ways in which others may quote a text: as it is, as it stands in a URL, in JSON; the longest first."""
    try:
        in_json = orjson.dumps(secret).decode()[1:-1]
    except orjson.JSONEncodeError:  # bytes of the environment that are not UTF-8
        return [secret]
    ways = {secret, quote(secret, safe=""), quote(secret, safe="%:@!$&'()*+,;=-._~/?"), quote_plus(secret), in_json}
    return sorted(ways, key=len, reverse=True)


def expand(document: Any, environment: Mapping[str, str]) -> Expansion:
    """Follow every reference in the values of a definition.

    Where a reference is all of a text, the value has the type that YAML gives to what it became: `${ROWS:-32}` is a
    number. A text with more in it stays text. As in a shell, `:-` covers a variable that is empty, too.
    """
    expansion = Expansion()

    def follow(value: Any, path: KeyPath) -> Any:
        if isinstance(value, dict):
            return {key: follow(item, (*path, key)) for key, item in value.items()}
        if isinstance(value, list):
            return [follow(item, (*path, index)) for index, item in enumerate(value)]
        return text_of(value, path) if isinstance(value, str) and "$" in value else value

    def text_of(text: str, path: KeyPath) -> Any:
        values: dict[str, str] = {}

        def variable(match: re.Match[str]) -> str:
            name, default = match["name"], match["default"]
            if match["broken"]:
                reason = f"'{match[0]}' is no reference: write ${{NAME}} or ${{NAME:-default}}, and $$ for a dollar sign"
                expansion.faults.append((path, reason))
                return ""
            if name is None:
                return "$"
            if given := environment.get(name):
                values[given] = f"${{{name}}}"
                return given
            if default is None:
                state = "empty" if name in environment else "not set"
                reason = f"environment variable {name} is {state}; set it or write ${{{name}:-default}}"
                expansion.faults.append((path, reason))
            return default or ""

        became = _REFERENCE.sub(variable, text)
        whole = _REFERENCE.fullmatch(text)
        if whole is None or whole["name"] is None:
            if became != text.replace("$$", "$"):
                expansion.references[path] = Reference(text, became, values)
            return became
        expansion.references[path] = Reference(text, became, values)
        return _typed(became)

    expansion.document = follow(document, ())
    return expansion


def required_variables(document: Any) -> list[str]:
    """Return the names of the variables that a definition refers to without a default."""
    if isinstance(document, str):
        return [match["name"] for match in _REFERENCE.finditer(document) if match["name"] and match["default"] is None]
    inside = document.values() if isinstance(document, dict) else document if isinstance(document, list) else ()
    return [name for item in inside for name in required_variables(item)]


def begins_with_reference(text: str) -> bool:
    """Tell whether what a text begins with is known only when it is compiled."""
    match = _REFERENCE.match(text)
    return match is not None and match["name"] is not None


def _typed(text: str) -> Any:
    """Return a plain scalar as YAML reads it."""
    loader = yaml.SafeLoader("")
    try:
        tag = loader.resolve(yaml.ScalarNode, text, (True, False))  # type: ignore[no-untyped-call]  # PyYAML's stubs
        return loader.construct_object(yaml.ScalarNode(tag, text))
    except (yaml.YAMLError, ValueError):  # 2026-13-45 looks like a date
        return text
    finally:
        loader.dispose()
