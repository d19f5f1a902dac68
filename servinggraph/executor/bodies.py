"""The entrance of a graph with `inputs: body`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from servinggraph.errors import InvalidRequest
from servinggraph.interfaces import Handler
from servinggraph.messages import Body
from servinggraph.plan import Plan
from servinggraph.tensors import TensorSpec, datatype_of, fits_shape

__all__ = ["entered", "entrance"]


def entrance(plan: Plan) -> Callable[[Any], Any]:
    """Return what takes a `Body`, checks what the first nodes look up in it, and gives its value."""
    refusal = f"graph '{plan.name}' takes one free-form body and no tensors: send it to the graph's 'invocations' endpoint"
    keys = plan.body_keys

    def enter(body: Any) -> Any:
        if type(body) is not Body:
            raise InvalidRequest(refusal)
        if keys is not None:
            _check(plan.name, body.value, keys)
        return body.value

    return enter


def entered(enter: Callable[[Any], Any], handler: Handler) -> Handler:
    """Return a handler of bodies, over one of their values."""
    return lambda body, context: handler(enter(body), context)


def _check(model: str, value: Any, keys: Mapping[str, TensorSpec]) -> None:
    if not isinstance(value, Mapping):
        wanted = f" with {', '.join(map(repr, keys))}" if keys else ""
        raise InvalidRequest(f"graph '{model}' takes a body that is an object{wanted}, got {_kind(value)}")
    for name, spec in keys.items():
        if name not in value:
            if spec.optional:
                continue
            got = ", ".join(repr(key)[:40] for key in list(value)[:10]) or "nothing"
            raise InvalidRequest(f"graph '{model}' takes '{name}' from the body, which has {got}")
        if spec.datatype is None and spec.shape is None:
            continue
        array = value[name]
        wanted = f"a tensor of datatype {spec.datatype or 'any'}"
        if not isinstance(array, np.ndarray):
            raise InvalidRequest(f"'{name}' of the body is {_kind(array)}, but graph '{model}' needs {wanted}")
        if spec.datatype is not None and datatype_of(array) != spec.datatype:
            got = datatype_of(array) or array.dtype
            raise InvalidRequest(f"'{name}' of the body has datatype {got}, but graph '{model}' needs {wanted}")
        if spec.shape is not None and not fits_shape(array.shape, spec.shape):
            raise InvalidRequest(
                f"'{name}' of the body has shape {list(array.shape)}, but graph '{model}' needs {list(spec.shape)}"
            )


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "an array", str: "text", bytes: "bytes", type(None): "null", bool: "a boolean"}
    return names.get(type(value)) or ("a number" if isinstance(value, int | float) else f"a {type(value).__name__}")
