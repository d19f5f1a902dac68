"""Answers a decoded request: the one way from a front end into a graph.

A front end decodes bytes into an `InferenceRequest` and fills a `Context`; what comes back
it encodes. Everything between is here, so that all front ends behave alike.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any

import numpy as np

from servinggraph.context import Context
from servinggraph.errors import ServingGraphError, StepFailed
from servinggraph.lifecycle.catalog import ServedGraph
from servinggraph.messages import InferenceRequest, InferenceResponse
from servinggraph.tensors import Array, TensorSpec, datatype_of, fits_shape

__all__ = ["answer_tensors", "infer", "stream"]


async def infer(graph: ServedGraph, request: InferenceRequest, context: Context) -> InferenceResponse:
    """Run one request through a graph.

    Args:
        graph: the graph.
        request: the decoded request, already held against the graph's declared inputs.
        context: its identity and limits.

    Raises:
        Unsupported: the graph is decoupled (`graph.plan.decoupled`): use `stream`.
        ServingGraphError: with the node that failed.
    """
    plan = graph.plan
    graph.requests += 1
    try:
        value = await graph.executor.run(request.inputs, context)
        outputs = answer_tensors(value, plan.outputs, plan.answer)
    except ServingGraphError as error:
        if error.__class__ is StepFailed:
            error.at(plan.answer)
        raise
    except Exception as error:  # a defect of ours
        raise StepFailed(f"{type(error).__name__}: {error}").at(plan.answer) from error
    finally:
        graph.leave()
    return InferenceResponse(plan.name, plan.version, outputs, request.id, context.response_parameters)


async def stream(graph: ServedGraph, request: InferenceRequest, context: Context) -> AsyncGenerator[InferenceResponse, None]:
    """Run one request through a graph that may give any number of answers; see `infer`.

    The next answer is made when it is asked for, so a slow reader slows the graph and fills no
    queue. Close this (`aclosing`) when the reader has gone: that ends the graph's generators. An
    answer's parameters are those that steps have set for it, or before the first one.
    """
    plan = graph.plan
    if not plan.decoupled:
        yield await infer(graph, request, context)
        return
    graph.requests += 1
    try:
        async with aclosing(graph.executor.stream(request.inputs, context)) as values:
            async for value in values:
                outputs = answer_tensors(value, plan.outputs, plan.answer)
                yield InferenceResponse(plan.name, plan.version, outputs, request.id, dict(context.response_parameters))
    except ServingGraphError as error:
        if error.__class__ is StepFailed:
            error.at(plan.answer)
        raise
    except Exception as error:  # a defect of ours
        raise StepFailed(f"{type(error).__name__}: {error}").at(plan.answer) from error
    finally:
        graph.leave()


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
