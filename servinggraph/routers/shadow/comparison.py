"""Compares what two branches gave for one request: within a tolerance, by label, or by a function of the user's.

Made for outputs of any size: differences are worked out a piece at a time, so that comparing takes little memory
beside the outputs themselves.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from pydantic import Field

from servinggraph.errors import Problem, StepFailed
from servinggraph.importing import ImportProblem, load_object
from servinggraph.interfaces import Options
from servinggraph.messages import Body
from servinggraph.tensors import Array, Signature, TensorSpec

__all__ = ["Comparison", "ComparisonOptions", "TensorRule", "Verdict"]

_PIECE: Final = 65_536
"""Elements that are compared at a time."""


class TensorRule(Options):
    """How one tensor is compared."""

    by: Literal["values", "label", "ignore"] | None = Field(None, description="As for all, or `ignore`.")
    rtol: float | None = Field(None, ge=0, description="As for all.")
    atol: float | None = Field(None, ge=0, description="As for all.")


class ComparisonOptions(Options):
    """When two answers agree."""

    by: Literal["values", "label"] = Field(
        "values",
        description="values: floating tensors agree within the tolerance; label: in where the largest of the last axis is. "
        "Integers, booleans and text must be equal either way.",
    )
    rtol: float = Field(1e-3, ge=0, description="Tolerance relative to the champion's value.")
    atol: float = Field(1e-6, ge=0, description="Tolerance that is added to that.")
    tensors: dict[str, TensorRule] = Field(
        default_factory=dict, description="Tensor name to `{by: values, label or ignore, rtol: ..., atol: ...}` of its own."
    )
    call: str | Callable[..., Any] | None = Field(
        None,
        description="'package.module:function' in place of all that: gets the champion's and the challenger's outputs, returns "
        "True or False, or such a truth and a mapping of name to difference. Runs in a thread.",
    )


@dataclass(slots=True)
class Verdict:
    """What a comparison found.

    Attributes:
        agrees: True when the answers agree in everything that is compared.
        reason: what differs first, a short text such as "values of 'y'"; empty where they agree.
        rows: rows of the answers; 0 where they are no batches.
        agreeing_rows: those that agree.
        differences: the largest absolute difference in each floating tensor, or what the user's function measured.
    """

    agrees: bool = True
    reason: str = ""
    rows: int = 0
    agreeing_rows: int = 0
    differences: dict[str, float] = field(default_factory=dict)

    def differs(self, reason: str) -> None:
        """Note that the answers do not agree; the first reason counts."""
        if self.agrees:
            self.agrees, self.reason = False, reason


class Comparison:
    """Holds a challenger's answer against the champion's.

    Args:
        options: when they agree.
        base: folder that the user's function is found from.
        branches: what the branches give, as far as known.

    Attributes:
        custom: True when a function of the user's compares.
        problems: why this cannot work.
    """

    def __init__(self, options: ComparisonOptions, base: Path, branches: Mapping[str, Signature]) -> None:
        self.problems: list[Problem] = []
        self.custom = options.call is not None
        self._options = options
        self._function = self._loaded(base)
        outputs = next((found.outputs for found in branches.values() if found.outputs is not None), None)
        self._in_rows = bool(outputs) and all(spec.shape and spec.shape[0] == -1 for spec in (outputs or {}).values())
        self._check(outputs)

    def __call__(self, champion: Any, challenger: Any) -> Verdict:
        """Compare two answers; neither is changed.

        Raises:
            Exception: whatever the user's function raises; StepFailed for what it must not return.
        """
        if self._function is not None:
            return _custom(self._function(champion, challenger))
        if not isinstance(champion, Mapping) or not isinstance(challenger, Mapping):
            verdict = Verdict()
            if not self._same(champion, challenger, self._options.rtol, self._options.atol):
                verdict.differs("values")
            return verdict
        return self._tensors(champion, challenger)

    def _tensors(self, champion: Mapping[str, Any], challenger: Mapping[str, Any]) -> Verdict:
        verdict = Verdict()
        rows: list[Array | None] = []
        for name in sorted({*champion, *challenger}, key=str):
            rule = self._options.tensors.get(name)
            by = (rule and rule.by) or self._options.by
            if by == "ignore":
                continue
            rtol = self._options.rtol if rule is None or rule.rtol is None else rule.rtol
            atol = self._options.atol if rule is None or rule.atol is None else rule.atol
            if name not in champion or name not in challenger:
                verdict.differs(f"'{name}' is missing")
                rows.append(_no_row(champion.get(name)))
                continue
            one, other = champion[name], challenger[name]
            if not isinstance(one, np.ndarray | np.generic) or not isinstance(other, np.ndarray | np.generic):
                if not self._same(one, other, rtol, atol):
                    verdict.differs(f"values of '{name}'")
                rows.append(None)
                continue
            one, other = np.asarray(one), np.asarray(other)
            if one.shape != other.shape:
                verdict.differs(f"shape of '{name}'")
                rows.append(_no_row(one))
            elif by == "label" and _floating(one) and _floating(other):
                rows.append(_by_label(one, other, name, verdict))
            else:
                rows.append(_by_value(one, other, rtol, atol, name, verdict))
        if self._in_rows and rows:
            _count_rows(rows, verdict)
        return verdict

    def _same(self, one: Any, other: Any, rtol: float, atol: float) -> bool:
        """Compare values that are no tensors: documents, numbers within the tolerance, arrays inside of them as well."""
        if isinstance(one, Body) and isinstance(other, Body):
            one, other = one.value, other.value
        if isinstance(one, np.ndarray) or isinstance(other, np.ndarray):
            one, other = np.asarray(one), np.asarray(other)
            return one.shape == other.shape and bool(np.all(_agreeing(one, other, rtol, atol)[0]))
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            return one.keys() == other.keys() and all(self._same(one[key], other[key], rtol, atol) for key in one)
        if isinstance(one, list | tuple) and isinstance(other, list | tuple):
            return len(one) == len(other) and all(self._same(a, b, rtol, atol) for a, b in zip(one, other, strict=True))
        if isinstance(one, float | np.floating) or isinstance(other, float | np.floating):
            numbers = (int, float, np.number)
            return isinstance(one, numbers) and isinstance(other, numbers) and bool(_close(one, other, rtol, atol))
        return bool(one == other)

    def _loaded(self, base: Path) -> Callable[[Any, Any], Any] | None:
        call = self._options.call
        if call is None:
            return None
        others = [name for name in ("by", "rtol", "atol", "tensors") if name in self._options.model_fields_set]
        if others:
            text = f"'compare.{others[0]}' says nothing to a function of your own: leave it out, or 'compare.call'"
            self.problems.append(Problem(text, node="compare"))
        try:
            found = load_object(call, base) if isinstance(call, str) else call
        except ImportProblem as error:
            self.problems.append(Problem(str(error), node="compare"))
            return None
        if not callable(found) or inspect.iscoroutinefunction(found):
            what = "async, and it runs in a thread" if callable(found) else f"a {type(found).__name__}, which is not callable"
            self.problems.append(Problem(f"'compare.call' leads to what is {what}", node="compare"))
            return None
        return found

    def _check(self, outputs: Mapping[str, TensorSpec] | None) -> None:
        """Report rules for tensors that there are not, and labels of tensors that have none."""
        if outputs is None:
            return
        for name in self._options.tensors:
            if name not in outputs:
                text = f"'compare.tensors' names '{name}', but the branches give {', '.join(sorted(outputs))}"
                self.problems.append(Problem(text, node="compare"))
        for name, spec in outputs.items():
            rule = self._options.tensors.get(name)
            by = (rule and rule.by) or self._options.by
            is_floating = (spec.datatype or "").startswith(("FP", "BF"))
            if self.custom or by != "label" or not is_floating or spec.shape is None:
                continue
            if len(spec.shape) < 2 or spec.shape[-1] == 1:
                text = (
                    f"'compare' by label needs scores of several classes in the last axis, and '{name}' has shape "
                    f"{list(spec.shape)}: say 'tensors: {{{name}: {{by: values}}}}', or ignore it"
                )
                self.problems.append(Problem(text, node="compare"))


def _custom(result: Any) -> Verdict:
    """Return what the user's function found."""
    differences: Any = {}
    if isinstance(result, tuple) and len(result) == 2:
        result, differences = result
    if not isinstance(result, bool | np.bool_) or not isinstance(differences, Mapping):
        raise StepFailed(f"returned a {type(result).__name__}, expected True or False, or that and a mapping of differences")
    verdict = Verdict(differences={str(name): abs(float(value)) for name, value in list(differences.items())[:64]})
    if not result:
        verdict.differs("the function says so")
    return verdict


def _by_value(one: Array, other: Array, rtol: float, atol: float, name: str, verdict: Verdict) -> Array | None:
    """Compare elements; returns for each row whether all of it agrees, None for a scalar."""
    agreeing, difference = _agreeing(one, other, rtol, atol)
    if difference is not None:
        verdict.differences[name] = difference
    if not agreeing.all():
        verdict.differs(f"values of '{name}'")
    return _of_rows(agreeing.reshape(one.shape))


def _by_label(one: Array, other: Array, name: str, verdict: Verdict) -> Array | None:
    """Compare where the largest value of the last axis is; the first of several."""
    if one.ndim == 0 or one.shape[-1] == 0:
        raise ValueError(f"'{name}' has shape {list(one.shape)}, and labels need scores in the last axis")
    agreeing = np.asarray(one.argmax(axis=-1) == other.argmax(axis=-1))
    # What is no number has no label, and `argmax` takes it for the largest.
    agreeing = np.asarray(agreeing & (np.isnan(one).any(axis=-1) == np.isnan(other).any(axis=-1)))
    if not agreeing.all():
        verdict.differs(f"label of '{name}'")
    return _of_rows(agreeing)


def _no_row(champion: Any) -> Array | None:
    """Return that no row of a champion's tensor agrees; None where it has no rows."""
    return np.zeros(champion.shape[0], bool) if isinstance(champion, np.ndarray) and champion.ndim else None


def _of_rows(agreeing: Array) -> Array | None:
    if agreeing.ndim == 0:
        return None
    if agreeing.ndim == 1:
        return agreeing
    # Not reshaped: of no rows and -1 numpy cannot tell the size.
    return np.asarray(agreeing.all(axis=tuple(range(1, agreeing.ndim))))


def _count_rows(rows: list[Array | None], verdict: Verdict) -> None:
    """Count the rows in which all tensors agree, where all have as many."""
    known = [found for found in rows if found is not None]
    if len(known) == len(rows) and all(len(found) == len(known[0]) for found in known):
        verdict.rows = len(known[0])
        verdict.agreeing_rows = int(np.logical_and.reduce(known).sum())


def _agreeing(one: Array, other: Array, rtol: float, atol: float) -> tuple[Array, float | None]:
    """Return for each element, in one row, whether it agrees, and of floating arrays the largest absolute difference.

    The difference is infinite where one is a number and the other is not, or has no end.
    """
    one, other = one.reshape(-1), other.reshape(-1)
    if not (_floating(one) or _floating(other)):
        if one.dtype.kind not in "OUST" and other.dtype.kind not in "OUST":
            return np.asarray(one == other, dtype=bool), None
        pairs = zip(_texts(one), _texts(other), strict=True)
        return np.fromiter((bool(a == b) for a, b in pairs), bool, len(one)), None
    if one.dtype.kind in "OUST" or other.dtype.kind in "OUST":
        return np.zeros(one.shape, bool), None
    agreeing = np.empty(one.shape, bool)
    largest = 0.0
    for piece in _pieces(len(one)):
        a, b = one[piece].astype(np.float64), other[piece].astype(np.float64)
        with np.errstate(invalid="ignore", over="ignore"):
            difference = np.abs(b - a)
            most = _most(difference)
            if isfinite(most):  # all of them are, and so are the values: what `isclose` is careful about is not there
                agreeing[piece] = difference <= atol + rtol * np.abs(a)
            else:
                agreeing[piece] = _close(a, b, rtol, atol)
                difference[(a == b) | (np.isnan(a) & np.isnan(b))] = 0.0
                most = _most(np.nan_to_num(difference, nan=np.inf, posinf=np.inf))
        largest = max(largest, most)
    return agreeing, largest


def _most(difference: Array) -> float:
    return float(difference.max(initial=0.0))


def _close(champion: Any, challenger: Any, rtol: float, atol: float) -> Any:
    with np.errstate(invalid="ignore", over="ignore"):
        return np.isclose(challenger, champion, rtol=rtol, atol=atol, equal_nan=True)


def _pieces(size: int) -> Iterator[slice]:
    return (slice(start, start + _PIECE) for start in range(0, size, _PIECE))


def _floating(array: Array) -> bool:
    return array.dtype.kind == "f" or array.dtype.name == "bfloat16"


def _texts(array: Array) -> Iterator[Any]:
    """Return text as bytes, however it was given; other elements as they are."""
    return (item.encode("utf-8", "surrogateescape") if isinstance(item, str) else item for item in array.tolist())
