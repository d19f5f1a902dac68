"""Validates a raw definition against the pydantic models, in words a user can act on."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from servinggraph.errors import Problem, nearest
from servinggraph.spec.source import KeyPath, Source

__all__ = ["validated"]

ModelT = TypeVar("ModelT", bound=BaseModel)


def validated(
    model: type[ModelT],
    values: Mapping[str, Any],
    source: Source,
    path: KeyPath,
    problems: list[Problem],
    *,
    node: str | None = None,
    other_keys: Sequence[str] = (),
    defaults: Mapping[str, Any] | None = None,
) -> ModelT | None:
    """Return the model made of `values`, after adding every problem found.

    With problems the model is made of what is left without the keys at fault, so that the
    compiler can go on and find others; None where nothing sensible is left.

    Args:
        model: the pydantic model.
        values: raw values.
        source: where they came from, for lines.
        path: key path of `values` in the source.
        problems: problems found are appended here.
        node: node that they concern, unless the path to the key names one.
        other_keys: keys that are valid at the top as well, for the "did you mean".
        defaults: what to go on with where a key that must be there is missing.
    """
    defaults = defaults or {}
    reported: set[KeyPath] = set()
    for _ in range(_REPAIRS):
        try:
            return model.model_validate(values)
        except ValidationError as error:
            faults = _without_other_alternatives(error)
        texts = {location: text for location, entry in faults if (text := _text_after_all(entry, (*path, *location), source))}
        for location, text in texts.items():
            values = _with(values, location, text)
        faults = [(location, entry) for location, entry in faults if location not in texts]
        for location, entry in faults:
            message = _message(entry, location, model, other_keys, source.expansion.shown((*path, *location), entry["input"]))
            problem = source.problem(message, (*path, *location), node or _node_at(location))
            # A key that was taken out below is missing only because of that.
            if problem not in problems and location not in reported:
                problems.append(problem)
            reported.add(location)
        for location, entry in faults:
            at = location[:-1] if entry["type"] == "missing" else location
            if entry["type"] == "missing" and location[0] in defaults:
                values = {**values, str(location[0]): defaults[str(location[0])]}
            elif at:
                values = _without(values, at)
            else:
                return None
    return None


def _node_at(location: KeyPath) -> str | None:
    """Return the full name of the node that a key path from the top of a file leads into."""
    names = [str(location[i + 1]) for i in range(len(location) - 2) if location[i] in ("nodes", "branches")]
    return ".".join(names) if location[:1] == ("nodes",) and names else None


def _text_after_all(entry: Any, path: KeyPath, source: Source) -> str | None:
    """Return the text of a reference that YAML reads as a number or the like, where text is what is expected.

    A password may be 007.
    """
    if entry["type"] == "string_type" or (entry["type"] == "union" and "text" in entry["msg"].split()):
        return source.expansion.as_text(path, entry["input"])
    return None


def _with(values: Any, location: KeyPath, value: Any) -> Any:
    """Return a copy with another value at a key path that is there."""
    if not location:
        return value
    changed = values.copy()
    changed[location[0]] = _with(values[location[0]], location[1:], value)
    return changed


def _without(values: Any, location: KeyPath) -> Any:
    """Return a copy without the key at `location`, or without the nearest one around it that there is."""
    key, *rest = location
    if isinstance(values, Mapping) and key in values:
        if rest and isinstance(values[key], Mapping | list):
            return {**values, key: _without(values[key], tuple(rest))}
        return {name: value for name, value in values.items() if name != key}
    if isinstance(values, list) and isinstance(key, int) and key < len(values):
        if rest and isinstance(values[key], Mapping | list):
            return [*values[:key], _without(values[key], tuple(rest)), *values[key + 1 :]]
        return [*values[:key], *values[key + 1 :]]
    return values


_REPAIRS = 6
_ALTERNATIVE = re.compile(r"BatchPolicy|bool|str|int|float|(list|dict|literal|constrained|nullable|function|tagged)[-\[].*")
_EXPECTED = {
    "bool_type": "true or false",
    "model_type": "a mapping",
    "dict_type": "a mapping",
    "string_type": "text",
    "list_type": "a list",
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_parsing": "true or false",
    "int_parsing": "a whole number",
    "float_parsing": "a number",
    "callable_type": "a callable",
}


def _without_other_alternatives(error: ValidationError) -> list[tuple[KeyPath, Any]]:
    """Return (key path, entry) pairs, with one entry where a value matched no alternative of a union.

    For `batch: {max_row: 3}` pydantic also reports that a mapping is no boolean.
    """
    plain: list[tuple[KeyPath, Any]] = []
    unions: dict[KeyPath, list[tuple[KeyPath, Any]]] = {}
    for entry in error.errors(include_url=False):
        location = entry["loc"]
        mark = next((i for i, part in enumerate(location) if isinstance(part, str) and _ALTERNATIVE.fullmatch(part)), None)
        if mark is None:
            plain.append((location, entry))
        else:
            unions.setdefault(location[:mark], []).append(((*location[:mark], *location[mark + 1 :]), entry))
    for place, found in unions.items():
        inside = [(at, entry) for at, entry in found if at != place or entry["type"] not in (*_EXPECTED, "literal_error")]
        if inside:
            plain.extend(inside)
        else:
            wanted = [_EXPECTED.get(entry["type"]) or str(entry["ctx"]["expected"]) for _, entry in found]
            first = dict(found[0][1])
            first |= {"type": "union", "msg": f"expected {' or '.join(dict.fromkeys(wanted))}"}
            plain.append((place, first))
    return plain


def _message(entry: Any, location: KeyPath, model: type[BaseModel], other_keys: Sequence[str], got: str) -> str:
    key = ".".join(str(part) for part in _below_node(location))
    kind = entry["type"]
    if kind == "extra_forbidden":
        parent = _model_at(model, location[:-1])
        names = list(parent.model_fields) if parent is not None else []
        if len(location) == 1:
            names += other_keys
        return f"unknown key '{key}'{nearest(str(location[-1]), names)}"
    if kind == "missing":
        return f"missing key '{key}'{_meaning(model, location)}"
    if kind == "value_error":
        text = str(entry["ctx"]["error"])
        return f"'{key}': {text}" if key else text
    text = f"expected {_EXPECTED[kind]}" if kind in _EXPECTED else str(entry["msg"]).replace("Input should be", "expected")
    text = text[0].lower() + text[1:]
    if kind == "literal_error" and isinstance(entry["input"], str):
        hint = nearest(entry["input"], re.findall(r"'([^']*)'", str(entry["ctx"]["expected"])))
        return f"'{key}': {text}, got {got}{hint if 'mean' in hint else ''}"
    return f"'{key}': {text}, got {got}"


def _below_node(location: KeyPath) -> KeyPath:
    """Return the part of a key path below the node that an error text names anyway."""
    while len(location) > 2 and location[0] in ("nodes", "branches"):
        location = location[2:]
    return location


def _meaning(model: type[BaseModel], location: KeyPath) -> str:
    parent = _model_at(model, location[:-1])
    field = parent.model_fields.get(str(location[-1])) if parent is not None else None
    return f": {field.description}" if field is not None and field.description else ""


def _model_at(model: type[BaseModel] | None, location: KeyPath) -> type[BaseModel] | None:
    """Follow a key path through the models' annotations."""
    for part in location:
        if model is None:
            return None
        field = model.model_fields.get(str(part))
        if field is not None:
            model = _model_in(field.annotation)
        # Otherwise `part` is a name inside a mapping of models, and the model stays.
    return model


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        found = _model_in(argument)
        if found is not None:
            return found
    return None
