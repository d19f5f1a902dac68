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
) -> ModelT | None:
    """Return the model made of `values`, or None after adding every problem found.

    Args:
        model: the pydantic model.
        values: raw values.
        source: where they came from, for lines.
        path: key path of `values` in the source.
        problems: problems found are appended here.
        node: node that they concern.
        other_keys: keys that are valid at the top as well, for the "did you mean".
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        for location, entry in _without_other_alternatives(error):
            message = _message(entry, location, model, other_keys)
            problem = source.problem(message, (*path, *location), node)
            if problem not in problems:
                problems.append(problem)
        return None


_ALTERNATIVE = re.compile(r"BatchPolicy|bool|str|int|float|(list|dict|literal|constrained|nullable|function|tagged)[-\[].*")
_EXPECTED = {
    "bool_type": "true or false",
    "model_type": "a mapping",
    "dict_type": "a mapping",
    "string_type": "text",
    "list_type": "a list",
    "int_type": "a whole number",
    "float_type": "a number",
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
            first["msg"] = f"expected {' or '.join(dict.fromkeys(wanted))}"
            plain.append((place, first))
    return plain


def _message(entry: Any, location: KeyPath, model: type[BaseModel], other_keys: Sequence[str]) -> str:
    key = ".".join(str(part) for part in location)
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
    text = str(entry["msg"]).replace("Input should be", "expected")
    text = text[0].lower() + text[1:]
    return f"'{key}': {text}, got {entry['input']!r}"


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
