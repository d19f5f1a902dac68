"""The `ensemble` router: several members answer side by side, and their answers become one."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Final, Literal

import numpy as np
from pydantic import Field

from servinggraph.concurrency import cancel_all, run_all, started
from servinggraph.context import Context
from servinggraph.errors import GraphInvalid, InvalidRequest, Problem, ServingGraphError, StepFailed, Unavailable
from servinggraph.importing import ImportProblem, load_object
from servinggraph.interfaces import Handler, Router, RouterOptions
from servinggraph.routers.orders import maximum, median, trimmed_mean
from servinggraph.routers.signatures import union_of_inputs
from servinggraph.tensors import Array, Signature, TensorSpec, datatype_of

__all__ = ["Ensemble", "EnsembleOptions"]

Members = Mapping[str, Mapping[str, Array]]
_WEIGHTED: Final = ("mean", "weighted_mean", "vote")
_ORDERED: Final = ("median", "trimmed_mean", "max")
_RULES: Final = (*_WEIGHTED, *_ORDERED)


class EnsembleOptions(RouterOptions):
    """Members side by side whose answers are combined."""

    combine: str | Callable[..., Any] = Field(
        "mean",
        description="mean, weighted_mean, median, trimmed_mean or max of every floating output, vote over every label, or "
        "'package.module:function' that takes a mapping of member to its tensors.",
    )
    trim: float | None = Field(
        None, gt=0, lt=0.5, description="Share of members left out at either end, for trimmed_mean; rounded down."
    )
    wait: Literal["all", "quorum"] = Field(
        "all", description="Answer when every member has answered or failed, or as soon as `quorum` of them have answered."
    )
    weights: dict[str, float] | None = Field(None, description="Weight of each member, for weighted_mean and vote.")
    quorum: int | None = Field(
        None, ge=1, description="Members that must answer; by default all. With fewer missing the others are re-weighted."
    )
    tensors: list[str] | None = Field(
        None,
        min_length=1,
        description="Outputs to combine, others are dropped; by default all, and members must give the same.",
    )


class Ensemble(Router[EnsembleOptions]):
    """Runs every branch on the same value and combines what they give.

    Who answered stands in the response's parameters, `<node>.answered`. A member that fails
    is the request's failure, unless `quorum` members answered without it; then the answer is
    made of those alone, with their weights normalised anew. With `wait: quorum` it does not wait
    for the others either: they are cancelled.
    """

    options_type = EnsembleOptions

    def signature(self, branches: Mapping[str, Signature]) -> Signature:
        problems: list[Problem] = []
        names = tuple(branches)
        self._combine = self._rule(problems)
        weights = self.options.weights
        if self.options.combine == "weighted_mean" and weights is None:
            problems.append(Problem("'combine: weighted_mean' needs 'weights', one for each branch", node="combine"))
        if (self.options.trim is None) == (self.options.combine == "trimmed_mean"):
            problems.append(Problem("'trim' and 'combine: trimmed_mean' belong together", node="combine"))
        if self.options.wait == "quorum" and self.options.quorum is None:
            problems.append(Problem("'wait: quorum' needs 'quorum': how many answers are enough", node="wait"))
        self._leaving: set[asyncio.Future[Any]] = set()
        if self.options.combine not in _RULES:
            problems.extend(
                Problem(f"'{key}' is for {', '.join(_RULES)}: a function of your own gets all that the members gave", node=key)
                for key in ("weights", "tensors")
                if getattr(self.options, key) is not None
            )
        elif weights is not None and self.options.combine in _ORDERED:
            problems.append(Problem(f"'combine: {self.options.combine}' takes no 'weights'", node="weights"))
        elif weights is not None:
            problems.extend(self._weight_problems(weights, names))
        self._weights = {name: (weights or {}).get(name, 1.0) for name in names}
        if self.options.quorum is not None and self.options.quorum > len(names):
            problems.append(Problem(f"'quorum' is {self.options.quorum}, but there are {len(names)} branches", node="quorum"))
        self._members = len(names)
        self._quorum = min(self.options.quorum or len(names), len(names))
        outputs = self._common_outputs(branches, problems)
        if problems:
            raise GraphInvalid(problems)
        return Signature(union_of_inputs(branches), outputs if self.options.combine in _RULES else None)

    async def route(self, value: Any, context: Context, branches: Mapping[str, Handler]) -> Any:
        calls = [branch(value, context) for branch in branches.values()]
        if self._quorum == len(calls):
            members = dict(zip(branches, await run_all(calls), strict=True))
        else:
            members = await self._at_least_quorum(tuple(branches), calls, context)
        context.response_parameters[f"{self.name}.answered"] = ",".join(members)
        try:
            result = self._combine(members)
        except ServingGraphError:
            raise
        except Exception as error:
            raise StepFailed.because_of(error, f"cannot combine {', '.join(members)}: ") from error
        return await result if inspect.isawaitable(result) else result

    def impurity(self) -> str | None:
        quorum = self.options.quorum
        return "answers without members that fail ('quorum')" if quorum and quorum < self._members else None

    def describe(self) -> str:
        rule = self.options.combine if isinstance(self.options.combine, str) else "custom"
        return f"ensemble ({rule})"

    async def _at_least_quorum(self, names: Sequence[str], calls: Sequence[Any], context: Context) -> dict[str, Any]:
        """Wait for the members, and go on with those that answered if they are enough."""
        futures = started(calls)
        try:
            if self.options.wait == "quorum":
                await self._first_quorum(futures, context)
            else:
                await asyncio.wait(futures)
        except BaseException:
            await cancel_all(futures)
            raise
        members: dict[str, Any] = {}
        failures: dict[str, BaseException] = {}
        for name, future in zip(names, futures, strict=True):
            if future in self._leaving:
                continue
            error = asyncio.CancelledError() if future.cancelled() else future.exception()
            if error is None:
                members[name] = future.result()
            else:
                failures[name] = error
        if context.runs_again:
            for error in failures.values():
                if not getattr(error, "retryable", False):
                    raise error  # one request's row may be to blame: run by itself, the others keep this member
        if len(members) < self._quorum:
            first = next(iter(failures.values()))
            if all(isinstance(error, InvalidRequest) for error in failures.values()):
                raise first  # the caller's mistake, which no retry mends
            texts = "; ".join(f"{name}: {error}" for name, error in failures.items())
            text = f"only {len(members)} of {len(names)} members answered, quorum is {self._quorum} ({texts})"
            raise Unavailable(text) from first
        return members

    async def _first_quorum(self, futures: Sequence[asyncio.Future[Any]], context: Context) -> None:
        """Wait until enough members have answered, or so many have failed that they cannot; cancel the rest."""
        pending = {future for future in futures if not future.done()}
        while pending:
            answered = sum(1 for f in futures if f.done() and not f.cancelled() and f.exception() is None)
            if answered >= self._quorum or answered + len(pending) < self._quorum:
                break
            _, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
        for future in pending:
            # Not waited for: what it holds is freed when it has really ended, the request's slot included.
            context.begin_work()
            self._leaving.add(future)
            future.add_done_callback(partial(self._left, context))
            future.cancel()

    def _left(self, context: Context, future: asyncio.Future[Any]) -> None:
        self._leaving.discard(future)
        if not future.cancelled():
            future.exception()  # looked at: its answer came too late to matter
        context.end_work()

    async def stop(self) -> None:
        if self._leaving:
            await asyncio.wait(set(self._leaving))

    def _rule(self, problems: list[Problem]) -> Callable[[Members], Any]:
        combine = self.options.combine
        if combine in ("mean", "weighted_mean"):
            return self._mean
        if combine == "vote":
            return self._vote
        if combine in _ORDERED:
            trim = self.options.trim or 0.0
            rule = {"median": median, "max": maximum}.get(str(combine), partial(trimmed_mean, trim=trim))
            return lambda members: {column: rule(self._stack(members, column), column) for column in self._columns(members)}
        if isinstance(combine, str):
            if ":" not in combine:
                text = f"unknown rule '{combine}': expected {', '.join(_RULES)}, or 'package.module:function'"
                problems.append(Problem(text, node="combine"))
                return self._mean
            try:
                combine = load_object(combine, self.base)
            except ImportProblem as error:
                problems.append(Problem(str(error), node="combine"))
        if not callable(combine):
            problems.append(Problem(f"'combine' leads to a {type(combine).__name__}, which is not callable", node="combine"))
            return self._mean
        return combine

    def _weight_problems(self, weights: Mapping[str, float], names: Sequence[str]) -> list[Problem]:
        problems = []
        unknown, missing = sorted(set(weights) - set(names)), sorted(set(names) - set(weights))
        if unknown:
            problems.append(
                Problem(f"'weights' names {', '.join(unknown)}, but the branches are {', '.join(names)}", node="weights")
            )
        if missing:
            problems.append(
                Problem(f"'weights' has none for {', '.join(missing)}; 0 leaves a member out of the sum", node="weights")
            )
        if any(weight < 0 or not np.isfinite(weight) for weight in weights.values()) or not any(weights.values()):
            problems.append(Problem(f"'weights' must be 0 or more and not all 0, got {dict(weights)}", node="weights"))
        if self.options.combine == "mean":
            problems.append(Problem("'combine: mean' takes no 'weights'; say 'weighted_mean'", node="weights"))
        return problems

    def _common_outputs(self, branches: Mapping[str, Signature], problems: list[Problem]) -> Mapping[str, TensorSpec] | None:
        """Return the outputs that are combined; reports members that do not fit each other."""
        combine = self.options.combine
        known = {name: signature.outputs for name, signature in branches.items() if signature.outputs is not None}
        if combine not in _RULES or not known:
            return None
        first_name, first = next(iter(known.items()))
        names = self.options.tensors or list(first)
        for member, outputs in known.items():
            gives = ", ".join(sorted(outputs))
            if self.options.tensors is None and set(outputs) != set(first):
                text = (
                    f"member '{first_name}' gives {', '.join(sorted(first))}, but '{member}' gives {gives}: "
                    "rename them, or list those to combine in 'tensors'"
                )
                problems.append(Problem(text, node="branches"))
                return None
            missing = [name for name in names if name not in outputs]
            if missing:
                text = f"'tensors' names {', '.join(missing)}, but member '{member}' gives {gives}"
                problems.append(Problem(text, node="tensors"))
                return None
            for name in names:
                reason = outputs[name].conflict_with(first[name])
                if reason:
                    text = f"members do not fit: output '{name}' of '{member}' against '{first_name}': its {reason}"
                    problems.append(Problem(text, node="branches"))
        for name in names:
            datatype = first[name].datatype or ""
            if combine != "vote" and datatype and not datatype.startswith(("FP", "BF")):
                text = (
                    f"output '{name}' is {datatype}, and a mean of labels is no label: vote over it, "
                    "or leave it out: 'tensors' lists those to combine"
                )
                problems.append(Problem(text, node="combine"))
        return {name: first[name] for name in names} if len(known) == len(branches) else None

    def _columns(self, members: Members) -> list[str]:
        """Return the names of the outputs to combine."""
        for name, tensors in members.items():
            if not isinstance(tensors, Mapping):
                raise StepFailed(f"member '{name}' gave a {type(tensors).__name__}, expected a mapping of tensor name to array")
        first_name, first = next(iter(members.items()))
        if self.options.tensors is not None:
            for name, tensors in members.items():
                missing = [column for column in self.options.tensors if column not in tensors]
                if missing:
                    raise StepFailed(f"member '{name}' gave {sorted(tensors)}, but no {', '.join(missing)}")
            return self.options.tensors
        for name, tensors in members.items():
            if tensors.keys() != first.keys():
                raise StepFailed(f"member '{first_name}' gave {sorted(first)}, but '{name}' gave {sorted(tensors)}")
        return list(first)

    def _stack(self, members: Members, column: str) -> list[Array]:
        arrays = [tensors[column] for tensors in members.values()]
        if any(array.shape != arrays[0].shape for array in arrays):
            shapes = ", ".join(f"{name} {list(tensors[column].shape)}" for name, tensors in members.items())
            raise StepFailed(f"members' outputs '{column}' differ in shape: {shapes}")
        are_text = all(datatype_of(array) == "BYTES" for array in arrays)  # in several widths, perhaps
        if not are_text and any(array.dtype != arrays[0].dtype for array in arrays):
            dtypes = ", ".join(f"{name} {tensors[column].dtype}" for name, tensors in members.items())
            raise StepFailed(f"members' outputs '{column}' differ in datatype: {dtypes}")
        return arrays

    def _shares(self, members: Members) -> list[float]:
        """Return the weights of the members that answered, summing up to 1."""
        weights = [self._weights[name] for name in members]
        total = sum(weights)
        if total == 0:
            raise Unavailable(f"only members of weight 0 answered: {', '.join(members)}")
        return [weight / total for weight in weights]

    def _mean(self, members: Members) -> dict[str, Array]:
        shares = self._shares(members)
        result: dict[str, Array] = {}
        for column in self._columns(members):
            arrays = self._stack(members, column)
            dtype = arrays[0].dtype
            if dtype.kind != "f" and dtype.name != "bfloat16":
                raise StepFailed(f"output '{column}' is {dtype}, and a mean of labels is no label; vote over it")
            # Numbers of 16 bits are summed up in 32: their sum may overflow where their mean does not.
            wide = np.dtype(np.float32) if dtype.itemsize == 2 else dtype
            # A member of weight 0 is left out: its NaN would make the sum one.
            terms = [(array, share) for array, share in zip(arrays, shares, strict=True) if share]
            even = all(share == terms[0][1] for _, share in terms)
            total: Any = None
            for array, share in terms:
                term = array.astype(wide, copy=False)
                if not even:
                    term = term * wide.type(share)
                total = term if total is None else total + term
            if even and len(terms) > 1:
                total = total / wide.type(len(terms))
            result[column] = np.asarray(total).astype(dtype, copy=False)
        return result

    def _vote(self, members: Members) -> dict[str, Array]:
        """Elect each element's label by weight; of labels with equal votes the smallest wins."""
        shares = self._shares(members)
        result: dict[str, Array] = {}
        for column in self._columns(members):
            arrays = self._stack(members, column)
            if arrays[0].dtype.kind in "fV":
                raise StepFailed(f"output '{column}' is {arrays[0].dtype}: vote over labels, or take the mean of scores")
            labels, codes = np.unique(np.stack(_comparable(arrays)), return_inverse=True)
            codes = codes.reshape(len(arrays), *arrays[0].shape)
            # Each member's label is held against every member's: the memory does not grow with the number of labels.
            # Rounded: sums of equal shares must tie although floating addition differs in the last bit.
            votes = [
                np.round(sum(share * (other == own) for other, share in zip(codes, shares, strict=True)), 12) for own in codes
            ]
            most = np.max(votes, axis=0)
            elected = np.min([np.where(vote == most, own, len(labels)) for vote, own in zip(votes, codes, strict=True)], axis=0)
            if all(array.dtype == arrays[0].dtype for array in arrays):
                labels = labels.astype(arrays[0].dtype, copy=False)
            result[column] = labels[elected.reshape(-1)].reshape(arrays[0].shape)
        return result


def _comparable(arrays: Sequence[Array]) -> Sequence[Array]:
    """Return text in one form when members give it in several: as `bytes` and as `str`, or of several widths."""
    kinds = {type(text) for array in arrays for text in array.flat} if arrays[0].dtype.kind in "OUS" else set()
    if len(kinds) < 2:
        return arrays
    as_bytes = [[text.encode() if isinstance(text, str) else text for text in array.flat] for array in arrays]
    return [np.array(texts, dtype=object).reshape(array.shape) for texts, array in zip(as_bytes, arrays, strict=True)]
