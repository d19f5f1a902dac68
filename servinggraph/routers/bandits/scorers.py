"""Scorers: what an answer is worth, once the truth is known."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import inf, isfinite, isnan
from pathlib import Path
from typing import Any, Final

import numpy as np

from servinggraph.errors import InvalidRequest, ServingGraphError, StepFailed, nearest
from servinggraph.importing import load_object
from servinggraph.tensors import Array

__all__ = ["SCORERS", "Scorer", "scorer"]

Scorer = Callable[[Any, Any], float]
"""Takes the answer and the truth, returns the reward; minus infinity for an answer that is no number.

Raises:
    InvalidRequest: the truth does not fit the answer.
    StepFailed: the scorer itself failed.
"""


def _accuracy(given: Array, truth: Array) -> float:
    return float(np.mean(given == truth))


def _absolute(given: Array, truth: Array) -> float:
    return -float(np.mean(np.abs(given.astype(np.float64) - truth.astype(np.float64))))


def _squared(given: Array, truth: Array) -> float:
    return -float(np.mean((given.astype(np.float64) - truth.astype(np.float64)) ** 2))


SCORERS: Final[Mapping[str, Callable[[Array, Array], float]]] = {
    "accuracy": _accuracy,
    "absolute_error": _absolute,
    "squared_error": _squared,
}
"""Built-in scorers; an error counts as a negative reward, so that more is better."""


def scorer(option: str | Callable[..., Any], base: Path) -> Scorer:
    """Return the scorer that a graph names.

    Args:
        option: the name of a built-in one, `package.module:function`, or a function of (answer, truth).
        base: folder that modules are looked for in first.

    Raises:
        ValueError: there is none of this name.
        ImportProblem: the import string leads nowhere.
    """
    if isinstance(option, str):
        if option in SCORERS:
            return _built_in(option)
        if ":" not in option:
            raise ValueError(f"there is no scorer '{option}'{nearest(option, list(SCORERS))}, or 'package.module:function'")
        option = load_object(option, base)
    if not callable(option):
        raise ValueError(f"the scorer is a {type(option).__name__}, which is not callable")  # noqa: TRY004  (what a graph says)
    return _custom(option)


def _built_in(name: str) -> Scorer:
    rule = SCORERS[name]

    def score(answer: Any, truth: Any) -> float:
        if not isinstance(answer, Mapping):
            raise StepFailed(f"scorer '{name}' compares tensors, and the answer was a {type(answer).__name__}")
        if not isinstance(truth, Mapping):
            if len(answer) != 1:
                names = ", ".join(answer)
                raise InvalidRequest(f"the answer has several tensors: the truth says which, as an object with keys of {names}")
            truth = {next(iter(answer)): truth}
        if not truth:
            raise InvalidRequest("the truth has no tensor")
        pairs = [_fitted(name, tensor, answer, given) for tensor, given in truth.items()]
        with np.errstate(over="ignore", invalid="ignore"):
            reward = sum(rule(*pair) for pair in pairs) / len(pairs)
        # The truth is finite, so it is the answer that is no number: nothing is farther off.
        return -inf if isnan(reward) else reward

    return score


def _fitted(scorer: str, tensor: str, answer: Mapping[str, Any], truth: Any) -> tuple[Array, Array]:
    """Return what was answered and the truth, alike in size and kind."""
    if tensor not in answer:
        raise InvalidRequest(f"the truth has a tensor '{tensor}', which the answer had not{nearest(tensor, list(answer))}")
    given = np.asarray(answer[tensor])
    try:
        wanted = np.asarray(truth, dtype=object if given.dtype == object else None)
    except ValueError:
        raise InvalidRequest(f"the truth of '{tensor}' is ragged") from None
    if given.dtype == object or given.dtype.kind in "US":
        given, wanted = _texts(given), _texts(wanted)
    elif wanted.dtype.kind not in "iufb" and wanted.dtype.name != "bfloat16":
        raise InvalidRequest(f"the truth of '{tensor}' is no numbers, and the answer has {given.dtype}")
    if given.size != wanted.size:
        raise InvalidRequest(f"the truth of '{tensor}' has {wanted.size} elements, the answer had {given.size}")
    if not given.size:
        raise InvalidRequest(f"the truth of '{tensor}' has no element, and so had the answer: there is nothing to compare")
    if scorer != "accuracy":
        if given.dtype.kind in "OU":
            raise InvalidRequest(f"'{tensor}' is text, and scorer '{scorer}' compares numbers")
        if not np.isfinite(wanted.astype(np.float64)).all():
            raise InvalidRequest(f"the truth of '{tensor}' is not a finite number somewhere, and scorer '{scorer}' needs one")
    return given.reshape(-1), wanted.reshape(-1)


def _texts(array: Array) -> Array:
    texts = [item.decode("utf-8", "surrogateescape") if isinstance(item, bytes) else str(item) for item in array.flat]
    return np.array(texts, dtype=object)


def _custom(call: Callable[[Any, Any], Any]) -> Scorer:
    def score(answer: Any, truth: Any) -> float:
        try:
            reward = float(call(answer, truth))
        except ServingGraphError:
            raise
        except Exception as error:
            raise StepFailed.because_of(error, "the scorer failed: ") from error
        if not isfinite(reward):
            raise StepFailed(f"the scorer gave {reward}, which is no reward")
        return reward

    return score
