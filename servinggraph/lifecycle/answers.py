"""Holds what the last node gave against what the graph promises."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from servinggraph.errors import StepFailed
from servinggraph.messages import Body
from servinggraph.tensors import Array, TensorSpec, datatype_of, fits_shape

__all__ = ["answer_body", "answer_tensors"]


def answer_body(value: Any, declared: Mapping[str, TensorSpec] | None, node: str) -> Body:
    """Return the free-form answer that the last node gave: tensors where outputs are declared, else anything.

    Raises:
        StepFailed: as `answer_tensors`, where outputs are declared.
    """
    if type(value) is Body:
        return value
    return Body(value if declared is None else answer_tensors(value, declared, node))


def answer_tensors(value: Any, declared: Mapping[str, TensorSpec] | None, node: str) -> dict[str, Array]:
    """Return the tensors that the last node gave, only the declared ones where outputs are declared.

    Raises:
        StepFailed: it gave something else than arrays, or others than the metadata promise.
    """
    if type(value) is not dict and not isinstance(value, Mapping):
        if isinstance(value, np.ndarray) and declared is not None and len(declared) == 1:
            value = {next(iter(declared)): value}
        else:
            got = type(value).__name__
            raise StepFailed(f"gave a {got} as the answer, expected a mapping of tensor name to numpy array").at(node)
    tensors: dict[str, Array] = {}
    if declared is None:
        for name, array in value.items():
            if not isinstance(name, str):
                raise StepFailed(f"gave an answer tensor named {name!r}, which is a {type(name).__name__} and no text").at(node)
            tensors[name] = array if type(array) is np.ndarray else _as_array(name, array, value, node)
        return tensors
    for name, spec in declared.items():
        array = value.get(name)
        if type(array) is not np.ndarray:
            array = _as_array(name, array, value, node)
        if spec.datatype is not None and datatype_of(array) != spec.datatype:
            got = datatype_of(array) or array.dtype
            raise StepFailed(f"answer tensor '{name}' has datatype {got}, declared is {spec.datatype}").at(node)
        if spec.shape is not None and not fits_shape(array.shape, spec.shape):
            raise StepFailed(f"answer tensor '{name}' has shape {list(array.shape)}, declared is {list(spec.shape)}").at(node)
        tensors[name] = array
    return tensors


def _as_array(name: str, array: Any, value: Mapping[Any, Any], node: str) -> Array:
    if array is None:
        raise StepFailed(f"gave no tensor '{name}': got {', '.join(map(str, value)) or 'none'}").at(node)
    if not isinstance(array, np.generic | np.ndarray):
        raise StepFailed(f"answer tensor '{name}' is a {type(array).__name__}, expected a numpy array").at(node)
    return np.asarray(array)
