"""Tensors that a model hands itself from request to request: Triton's implicit state.

They are no inputs and outputs of the node. Here they have the batch as their first axis,
whichever axis of the model it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from servinggraph.context import Context
from servinggraph.errors import GraphInvalid, Problem, StepFailed, nearest
from servinggraph.interfaces import Options
from servinggraph.tensors import DATATYPES, Array, Signature, TensorSpec, datatype_of, fits_shape

__all__ = ["ModelState", "StateOptions", "read_state"]

Execute = Callable[[dict[str, Array]], dict[str, Array]]


class StateOptions(Options):
    """A tensor that the model gives and gets back with the next request of the sequence."""

    input: str = Field(description="Model input that the tensor goes into.")
    output: str = Field(description="Model output that it comes from.")
    initial: str = Field("zeros", description="What a sequence begins with: `zeros`, or a .npy file.")
    shape: list[int] | None = Field(
        None, description="Shape of `zeros`, for one sequence, where the model leaves more open than its batch axis."
    )
    axis: int = Field(0, ge=0, description="Axis of the tensor that is the batch; 1 for most exported LSTMs and GRUs.")


@dataclass(frozen=True, slots=True)
class _Kept:
    """One tensor of the state.

    Attributes:
        input, output: names in the model.
        axis: its batch axis in the model.
        spec: datatype and shape, the batch axis first and free where states can be joined.
        initial: what a sequence begins with, batch axis first.
        why_alone: why states of several sequences cannot be joined; None when they can.
    """

    input: str
    output: str
    axis: int
    spec: TensorSpec
    initial: Array
    why_alone: str | None


class ModelState:
    """The state of one model step.

    Attributes:
        why_alone: why the model cannot be batched; None when it can, as far as its state goes.
        joins: True when the state has a free batch axis, so that a request is one row.
    """

    def __init__(self, node: str, kept: Sequence[_Kept], own: Signature) -> None:
        self._node = node
        self._kept = kept
        self._own = own
        self._moved = [tensor for tensor in kept if tensor.axis and tensor.initial.ndim]
        self._row_counter = next(iter(own.inputs or ()), None)
        self.why_alone = next((tensor.why_alone for tensor in kept if tensor.why_alone), None)
        self.joins = self.why_alone is None

    @property
    def own(self) -> Signature:
        """The signature without the state."""
        return self._own

    @property
    def whole(self) -> Signature:
        """The signature with the state, batch axes first."""
        inputs = {**(self._own.inputs or {}), **{tensor.input: tensor.spec for tensor in self._kept}}
        outputs = {**(self._own.outputs or {}), **{tensor.output: tensor.spec for tensor in self._kept}}
        return Signature(inputs, outputs)

    def batch_first(self, execute: Execute) -> Execute:
        """Return what runs the model with its state's batch axes first."""
        moved = self._moved
        if not moved:
            return execute

        def run(feeds: dict[str, Array]) -> dict[str, Array]:
            results = execute(feeds | {t.input: np.moveaxis(feeds[t.input], 0, t.axis) for t in moved})
            return results | {t.output: np.moveaxis(results[t.output], t.axis, 0) for t in moved}

        return run

    def run(self, execute: Execute) -> Callable[[dict[str, Array], Context], dict[str, Array]]:
        """Return what runs the model for a batch of sequences, given its own tensors only."""
        node, kept, row_counter, joins = self._node, self._kept, self._row_counter, self.joins

        def call(value: dict[str, Array], context: Context) -> dict[str, Array]:
            turns = context.sequences
            states = [turn.state(node) for turn in turns]
            rows = len(value[row_counter]) if joins and row_counter is not None else 1
            feeds = dict(value)
            for tensor in kept:
                parts = [state.get(tensor.input, tensor.initial) for state in states]
                parts.extend(parts[-1:] * (rows - len(parts)))  # padding has some state, too
                feeds[tensor.input] = parts[0] if len(parts) == 1 else np.concatenate(parts)
            results = execute(feeds)
            given = {tensor.input: results.pop(tensor.output) for tensor in kept}
            if rows == 1:
                turns[0].keep(node, given)
                return results
            for name, array in given.items():
                if not array.ndim or len(array) != rows:
                    raise StepFailed(f"state '{name}' came back with shape {list(array.shape)} for {rows} sequences")
            for row, turn in enumerate(turns):
                # Copies: a view would keep the whole batch's state as long as the sequence.
                turn.keep(node, {name: array[row : row + 1].copy() for name, array in given.items()})
            return results

        return call


def read_state(node: str, options: Sequence[StateOptions], signature: Signature, base: Path) -> ModelState:
    """Return the state that options describe.

    Args:
        node: the node.
        options: the tensors that are kept.
        signature: the model's.
        base: folder that relative paths start from.

    Raises:
        GraphInvalid: with everything that does not fit the model.
    """
    inputs, outputs = dict(signature.inputs or {}), dict(signature.outputs or {})
    problems: list[str] = []
    kept: list[_Kept] = []
    for option in options:
        found = len(problems)
        into, out = inputs.pop(option.input, None), outputs.pop(option.output, None)
        for side, name, spec, known in (
            ("input", option.input, into, signature.inputs),
            ("output", option.output, out, signature.outputs),
        ):
            if spec is None:
                twice = name in (known or {})
                text = f"{side} '{name}' is named twice" if twice else f"the model has no {side} '{name}'"
                problems.append(text + ("" if twice else nearest(name, list(known or {}))))
        if into is None or out is None:
            continue
        if reason := into.conflict_with(out):
            problems.append(f"output '{option.output}' cannot go into input '{option.input}': its {_other_way(reason)}")
        if into.datatype == "BYTES":
            problems.append(f"input '{option.input}' is text, which cannot be state")
        if into.shape and option.axis >= len(into.shape):
            problems.append(f"axis {option.axis} is beyond input '{option.input}' of shape {list(into.shape)}")
        if len(problems) == found:
            try:
                kept.append(_kept(option, into, base))
            except _Unfit as error:
                problems.append(str(error))
    if problems:
        raise GraphInvalid([Problem(f"'state': {text}", node="state") for text in problems])
    return ModelState(node, kept, Signature(inputs, outputs))


class _Unfit(Exception):
    """What a sequence is to begin with does not fit the model."""


def _kept(option: StateOptions, spec: TensorSpec, base: Path) -> _Kept:
    shape = spec.shape or ()
    free = [axis for axis, size in enumerate(shape) if size == -1]
    alone = None
    if option.axis not in free:
        alone = f"the batch axis {option.axis} of state '{option.input}' is fixed, its shape is {list(shape)}"
    elif len(free) > 1:
        alone = f"state '{option.input}' has shape {list(shape)}, so that sequences may have states of several sizes"
    initial = _initial(option, spec, base)
    if option.axis in free and initial.shape[option.axis] != 1:
        raise _Unfit(
            f"what '{option.input}' begins with is for one sequence: axis {option.axis} must be 1, not {initial.shape}"
        )
    first = np.moveaxis(initial, option.axis, 0) if shape else initial
    whole = TensorSpec(spec.datatype, first.shape if alone else (-1, *first.shape[1:]))
    return _Kept(option.input, option.output, option.axis, whole, first, alone)


def _initial(option: StateOptions, spec: TensorSpec, base: Path) -> Array:
    shape = spec.shape or ()
    dtype = DATATYPES[spec.datatype or "FP32"]
    if option.initial == "zeros":
        sizes = option.shape or [1 if size == -1 and axis == option.axis else size for axis, size in enumerate(shape)]
        if min(sizes, default=0) < 0:
            raise _Unfit(f"input '{option.input}' has shape {list(shape)}: say the 'shape' of its zeros")
        array: Array = np.zeros(sizes, dtype)
    elif option.shape is not None:
        raise _Unfit(f"'shape' is for zeros, and '{option.input}' begins with {option.initial}")
    else:
        array = _from_file(base / option.initial)
    if datatype_of(array) != spec.datatype or not fits_shape(array.shape, shape):
        got = f"{datatype_of(array) or array.dtype} {list(array.shape)}"
        raise _Unfit(f"input '{option.input}' is {spec.datatype} {list(shape)}, and cannot begin with {got}")
    return array


def _from_file(path: Path) -> Any:
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise _Unfit(f"'initial' is neither 'zeros' nor a .npy file that can be read: {error}") from error
    if not isinstance(array, np.ndarray):
        raise _Unfit(f"'initial' names {path.name}, which holds several arrays: save one with numpy.save")
    return array


def _other_way(reason: str) -> str:
    """Return a conflict's text with both sides named."""
    return reason.replace(", expected ", ", the output's is ")
