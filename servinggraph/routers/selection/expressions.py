"""Small expressions over a request, for routers that decide: parsed and checked when the graph is compiled.

`simpleeval` computes them; it walks the syntax tree and knows neither `eval` nor imports. On
top of its own limits only the nodes, names and functions below are let through: no attributes, no
powers, no comprehensions. Who writes a graph file can run code anyway; this is so that what a
request brings can never make an expression do more than it says.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from typing import Any, Final

import numpy as np
from simpleeval import DEFAULT_OPERATORS, EvalWithCompoundTypes, InvalidExpression

from servinggraph.context import Context
from servinggraph.errors import InvalidRequest, ServingGraphError, StepFailed, nearest
from servinggraph.tensors import row_count

__all__ = ["FUNCTIONS", "NAMES", "Expression"]

NAMES: Final = ("inputs", "body", "parameters", "headers", "id", "rows")
"""What an expression sees: tensors by name, the whole value, the request's parameters, headers, id, and number of rows."""

_LONGEST: Final = 500
"""Most characters of an error, which may quote what the request has."""


def _get(mapping: Any, key: Any, default: Any = None) -> Any:
    return mapping.get(key, default) if isinstance(mapping, Mapping) else default


def _text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _reduced(numpy_function: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that takes an array, a list, or several values."""

    def call(*values: Any) -> Any:
        if len(values) == 1 and isinstance(values[0], np.ndarray):
            return numpy_function(values[0])
        return plain(*values)

    return call


def _mean(values: Any) -> Any:
    if not np.size(values):
        raise ValueError("there is no mean of no values")
    return np.mean(values)


FUNCTIONS: Final[Mapping[str, Callable[..., Any]]] = {
    "abs": abs,
    "all": _reduced(np.all, all),
    "any": _reduced(np.any, any),
    "bool": bool,
    "float": float,
    "get": _get,
    "int": int,
    "len": len,
    "lower": lambda text: _text(text).lower(),
    "max": _reduced(np.max, max),
    "mean": _mean,
    "min": _reduced(np.min, min),
    "str": _text,
    "sum": _reduced(np.sum, sum),
}


def _has_text(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list | tuple) and any(isinstance(item, str) for item in value))


def _as_text(value: Any) -> Any:
    """Return bytes as text, and so those in arrays and lists; anything else as it is."""
    if isinstance(value, bytes):
        return _text(value)
    if isinstance(value, list | tuple):
        return [_as_text(item) for item in value]
    if isinstance(value, np.ndarray) and value.dtype.kind in "OS":
        texts = np.empty(value.size, object)
        texts[:] = [_as_text(item) for item in value.flat]
        return texts.reshape(value.shape)
    return value


def _comparing(compare: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """Return a comparison for which a BYTES tensor's elements, which are bytes, are the texts that an expression has."""

    def call(one: Any, other: Any) -> Any:
        if _has_text(other):
            one = _as_text(one)
        if _has_text(one):
            other = _as_text(other)
        return compare(one, other)

    return call


_COMPARISONS: Final = (ast.Eq, ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.GtE, ast.In, ast.NotIn)

_OPERATORS: Final = DEFAULT_OPERATORS | {kind: _comparing(DEFAULT_OPERATORS[kind]) for kind in _COMPARISONS}

_ALLOWED: Final = (
    ast.Expression, ast.BoolOp, ast.And, ast.Or, ast.UnaryOp, ast.Not, ast.USub, ast.UAdd, ast.BinOp,
    ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod, ast.Compare, ast.Eq, ast.NotEq, ast.Lt, ast.LtE,
    ast.Gt, ast.GtE, ast.In, ast.NotIn, ast.Is, ast.IsNot, ast.Call, ast.Name, ast.Load, ast.Constant,
    ast.Subscript, ast.List, ast.Tuple, ast.IfExp,
)  # fmt: skip


class Expression:
    """A condition over a request.

    Args:
        text: the expression, in Python's syntax.
        conceal: puts references in place of what came from the environment, in a text for people.

    Attributes:
        text: the expression.
        tensors: names of those that it asks for by `inputs['name']`.

    Raises:
        ValueError: it cannot be parsed, or uses what there is not.
    """

    __slots__ = ("_conceal", "_evaluator", "_tree", "tensors", "text")

    def __init__(self, text: str, conceal: Callable[[str], str] = str) -> None:
        self.text = text
        self._conceal = conceal
        try:
            tree = ast.parse(text.strip(), mode="eval")
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            reason = error.msg if isinstance(error, SyntaxError) else error
            raise ValueError(f"'{text}' is no expression: {reason}") from None
        for node in ast.walk(tree):
            if misfit := _misfit(node):
                raise ValueError(f"'{text}' {misfit}")
        self._tree = tree.body
        self.tensors = tuple(dict.fromkeys(name for node in ast.walk(tree) if (name := _tensor_of(node)) is not None))
        self._evaluator = EvalWithCompoundTypes(operators=_OPERATORS, functions=dict(FUNCTIONS), names={}, allowed_attrs={})

    def holds(self, value: Any, context: Context) -> bool:
        """Tell whether the expression is true of a request.

        Raises:
            InvalidRequest: it names a tensor, parameter or header that the request does not have, or cannot be computed of
                what the request has there.
            StepFailed: it fails in any other way, or gives an array of several elements.
        """
        result = self.value(value, context)
        try:
            return bool(result)
        except ValueError:
            text = f"expression '{self.text}' gives {getattr(result, 'size', 'several')} truth values: use any(...) or all(...)"
            raise StepFailed(self._conceal(text)) from None

    def value(self, value: Any, context: Context) -> Any:
        """Return what the expression gives; errors as `holds`."""
        is_mapping = isinstance(value, Mapping)
        self._evaluator.names = {
            "inputs": value if is_mapping else {},
            "body": value,
            "parameters": context.parameters,
            "headers": context.headers,
            "id": context.id,
            "rows": _rows(value) if is_mapping else None,
            "True": True,
            "False": False,
            "None": None,
        }
        try:
            return self._evaluator.eval("", self._tree)
        except ServingGraphError:
            raise
        except (KeyError, IndexError) as error:
            text = f"expression '{self.text}' asks for {error}, which this request does not have"
            raise InvalidRequest(self._conceal(f"{text}; get(mapping, key) gives None then")) from None
        except (TypeError, ValueError, ArithmeticError) as error:  # a text for a number, no rows for their maximum
            if "truth value of an array" in str(error):  # numpy's words for what `and`, `or` and `not` cannot do
                text = f"expression '{self.text}' asks several truth values for one: use any(...) or all(...)"
                raise StepFailed(self._conceal(text)) from None
            text = f"expression '{self.text}' cannot be computed of this request: {type(error).__name__}: {error}"
            raise InvalidRequest(self._conceal(text)[:_LONGEST]) from None
        except (InvalidExpression, Exception) as error:
            text = f"expression '{self.text}' failed: {type(error).__name__}: {error}"
            raise StepFailed(self._conceal(text)) from error


def _misfit(node: ast.AST) -> str | None:
    """Say why a part of an expression is not let through; None when it is."""
    if not isinstance(node, _ALLOWED):
        what = {"Attribute": "an attribute (write mapping['key'])", "Pow": "a power"}.get(type(node).__name__)
        return f"has {what or type(node).__name__}, which expressions do not have"
    if isinstance(node, ast.Call) and not isinstance(node.func, ast.Name):
        return "calls something that is no function of expressions"
    if isinstance(node, ast.Call) and node.keywords:
        return "calls a function with a keyword argument, which expressions do not have"
    if isinstance(node, ast.Name) and node.id not in NAMES and node.id not in FUNCTIONS:
        return f"has an unknown name '{node.id}'{nearest(node.id, [*NAMES, *FUNCTIONS])}"
    return None


def _tensor_of(node: ast.AST) -> str | None:
    """Return the tensor that `inputs['name']` names; None for another part of an expression."""
    if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name) and node.value.id == "inputs":
        name = node.slice.value if isinstance(node.slice, ast.Constant) else None
        return name if isinstance(name, str) else None
    return None


def _rows(value: Mapping[str, Any]) -> int | None:
    try:
        return row_count(value)
    except (ValueError, AttributeError):
        return None
