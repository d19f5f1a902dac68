"""A graph that is a node of another: takes the inputs that it declares and no others, gives the outputs that it promises."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from servinggraph.context import Context
from servinggraph.errors import StepFailed
from servinggraph.executor.wiring import output_check
from servinggraph.interfaces import Operation
from servinggraph.plan import Plan
from servinggraph.tensors import TensorSpec, datatype_of, fits_shape

__all__ = ["nested_operation"]


def nested_operation(graph: Plan, operation: Operation) -> Operation:
    """Return the operation of a whole graph with what its door would do to a request and an answer."""
    enter = _same if graph.body else _entrance(graph.name, graph.inputs)
    leave = _same if graph.outputs is None else _exit(graph.answer, graph.outputs)
    call = operation.call
    if operation.suspends:

        async def wait(value: Any, context: Context) -> Any:
            return leave(await call(enter(value), context))

        return Operation(wait, suspends=True)
    return Operation(lambda value, context: leave(call(enter(value), context)), suspends=False)


def _same(value: Any) -> Any:
    return value


def _entrance(graph: str, inputs: Mapping[str, TensorSpec]) -> Callable[[Any], dict[str, Any]]:
    def enter(value: Any) -> dict[str, Any]:
        if not isinstance(value, Mapping):
            raise StepFailed(f"graph '{graph}' takes tensors {', '.join(inputs)}, but got a {type(value).__name__}")
        taken: dict[str, Any] = {}
        for name, spec in inputs.items():
            array = value.get(name)
            if array is None and spec.optional:
                continue
            if not isinstance(array, np.ndarray):
                got = f"got {', '.join(map(str, value)) or 'none'}" if array is None else f"it is a {type(array).__name__}"
                raise StepFailed(f"graph '{graph}' takes a tensor '{name}', but {got}")
            if datatype_of(array) != spec.datatype:
                got = datatype_of(array) or str(array.dtype)
                raise StepFailed(f"graph '{graph}' takes '{name}' in datatype {spec.datatype}, got {got}")
            if spec.shape is not None and not fits_shape(array.shape, spec.shape):
                raise StepFailed(f"graph '{graph}' takes '{name}' in shape {list(spec.shape)}, got {list(array.shape)}")
            taken[name] = array
        return taken

    return enter


def _exit(answer: str, outputs: Mapping[str, TensorSpec]) -> Callable[[Any], dict[str, Any]]:
    check = output_check(answer, outputs)

    def leave(value: Any) -> dict[str, Any]:
        try:
            checked = check(value)
        except StepFailed as error:
            raise error.at(answer) from None
        return {name: checked[name] for name in outputs}

    return leave
