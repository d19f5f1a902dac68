"""Texts and documents with fields in braces, filled from a request: `/users/{user.id}`, `{instances: "{pixels}"}`.

A field is a dotted path into the value, `user.name` or `items.0`; or `parameters.x`, `headers.x` and `id` of the request.
A value whose own field has one of these names is reached by `value.`. `{{` and `}}` are braces.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final
from urllib.parse import quote

import numpy as np

from servinggraph.context import Context
from servinggraph.errors import InvalidRequest

__all__ = ["Field", "UrlTemplate", "document_template", "look_up", "parts_of", "scalar_text"]

_PART: Final = re.compile(r"\{\{|\}\}|\{(?P<field>[^{}]*)\}|(?P<stray>[{}])")
_FIELD: Final = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")
_SLASH: Final = re.compile(r"[/\\]")
_DOTS: Final = frozenset({".", ".."})
_OF_REQUEST: Final = ("parameters", "headers", "id")


class Field:
    """A field of a template.

    Attributes:
        path: as the template has it.
        of_request: True for what stands beside the value: parameters, headers, the id.
    """

    __slots__ = ("_keys", "_root", "of_request", "path")

    def __init__(self, path: str) -> None:
        self.path = path
        root, *keys = path.split(".")
        self.of_request = root in _OF_REQUEST and (bool(keys) != (root == "id"))
        self._root = root if self.of_request else "value"
        self._keys = keys if self.of_request or (root == "value" and keys) else [root, *keys]

    def read(self, value: Any, context: Context) -> Any:
        """Return what the field stands for in a request.

        Raises:
            InvalidRequest: the request has no such field.
        """
        if self._root == "id":
            return context.id
        if self._root == "value":
            return look_up(value, self._keys, self.path)
        return look_up(getattr(context, self._root), [".".join(self._keys)], self.path)


def look_up(document: Any, keys: Sequence[str], path: str) -> Any:
    """Follow a path into a document: names in mappings, numbers in lists and arrays.

    Raises:
        InvalidRequest: it leads nowhere.
    """
    for key in keys:
        try:
            if isinstance(document, Mapping):
                document = document[key]
            elif isinstance(document, list | tuple | np.ndarray):
                document = document[int(key)]
            else:
                raise KeyError(key)
        except (KeyError, ValueError, IndexError):
            raise InvalidRequest(f"there is no '{path}' in it ('{key}' is missing)") from None
    return document


def parts_of(text: str) -> list[str | Field]:
    """Return the fields of a template, and the texts between them.

    Raises:
        ValueError: a brace without its partner, or a field that is no dotted path.
    """
    parts: list[str | Field] = []
    at = 0
    for match in _PART.finditer(text):
        parts.append(text[at : match.start()])
        at = match.end()
        if match["stray"]:
            raise ValueError(f"'{match[0]}' stands alone: a field is written {{name}}, a brace {{{{ or }}}}")
        if match["field"] is None:
            parts.append(match[0][0])
        elif not _FIELD.fullmatch(match["field"]):
            raise ValueError(f"'{match[0]}' is no field: expected a dotted path, {{user.id}} say")
        else:
            parts.append(Field(match["field"]))
    parts.append(text[at:])
    return [part for part in parts if part != ""]


def scalar_text(value: Any, path: str) -> str:
    """Return a single value as text.

    Raises:
        InvalidRequest: it is none: null, a list, a tensor of several elements.
    """
    if isinstance(value, np.ndarray | np.generic):
        if value.size != 1:
            raise InvalidRequest(f"field '{path}' has {value.size} elements, and a text takes one")
        value = value.item()
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            raise InvalidRequest(f"field '{path}' is not UTF-8") from None
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str | int | float):
        return str(value)
    raise InvalidRequest(f"field '{path}' is {type(value).__name__}, and a text takes a single value")


class UrlTemplate:
    """Path and query of a URL with fields, each quoted, so that none can lead to another place.

    Args:
        text: what stands behind the host.

    Raises:
        ValueError: it is no template.

    Attributes:
        fields: its fields.
    """

    def __init__(self, text: str) -> None:
        path, mark, query = text.partition("?")
        self._segments = [_quoted(parts_of(segment)) for segment in path.split("/")]
        self._query = _quoted(parts_of(query))
        self._mark = mark
        self.fields = [part for parts in (*self._segments, self._query) for part in parts if isinstance(part, Field)]

    def fill(self, value: Any, context: Context) -> str:
        """Return the text for a request.

        Raises:
            InvalidRequest: a field is missing, is no single value, or would change the path's meaning.
        """
        path = "/".join(_segment(parts, value, context) for parts in self._segments)
        texts = [_text(part, value, context) for part in self._query]
        return path + self._mark + _encoded(self._query, texts)


def _segment(parts: Sequence[str | Field], value: Any, context: Context) -> str:
    texts = [_text(part, value, context) for part in parts]
    whole = "".join(texts)
    for part, text in zip(parts, texts, strict=True):
        # An empty segment, and dots, would make it another address than the one that was written down; servers that
        # take %2F for a slash are no exception.
        if isinstance(part, Field) and (not whole or not _DOTS.isdisjoint(_SLASH.split(whole))):
            raise InvalidRequest(f"field '{part.path}' would be '{text}' in the URL's path")
    return _encoded(parts, texts)


def _text(part: str | Field, value: Any, context: Context) -> str:
    return scalar_text(part.read(value, context), part.path) if isinstance(part, Field) else part


def _encoded(parts: Sequence[str | Field], texts: Sequence[str]) -> str:
    return "".join(quote(text, safe="") if isinstance(part, Field) else text for part, text in zip(parts, texts, strict=True))


def _quoted(parts: list[str | Field]) -> list[str | Field]:
    return [quote(part, safe="%:@!$&'()*+,;=-._~/?") if isinstance(part, str) else part for part in parts]


Fill = Callable[[Any, Context], Any]


def document_template(template: Any, fields: list[Field]) -> Fill:
    """Return what makes a document for a request; every field of the template joins `fields`.

    A text that is one field and nothing else becomes what the field stands for, of whatever type.

    Raises:
        ValueError: a text in it is no template.
    """
    if isinstance(template, Mapping):
        items = [(str(key), document_template(item, fields)) for key, item in template.items()]
        return lambda value, context: {key: fill(value, context) for key, fill in items}
    if isinstance(template, list):
        entries = [document_template(item, fields) for item in template]
        return lambda value, context: [fill(value, context) for fill in entries]
    if not isinstance(template, str):
        return lambda value, context: template
    parts = parts_of(template)
    found = [part for part in parts if isinstance(part, Field)]
    fields.extend(found)
    if not found:
        text = "".join(str(part) for part in parts)
        return lambda value, context: text
    if len(parts) == 1:
        return found[0].read

    def joined(value: Any, context: Context) -> str:
        return "".join(_text(part, value, context) for part in parts)

    return joined
