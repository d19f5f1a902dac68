"""The `ensemble` router: several members answer side by side, and their answers become one."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Final, Literal

from pydantic import Field

from servinggraph.context import Context
from servinggraph.errors import GraphInvalid, InvalidRequest, Problem, ServingGraphError, StepFailed, nearest
from servinggraph.importing import ImportProblem, load_object
from servinggraph.interfaces import Handler, Router, RouterOptions, Tensors
from servinggraph.routers.ensembles.defaults import Defaults, defaults_of
from servinggraph.routers.ensembles.gathering import Gathering
from servinggraph.routers.ensembles.means import maximum, mean, median, trimmed_mean
from servinggraph.routers.ensembles.outputs import Members, alike, columns, common_outputs, require_tensors
from servinggraph.routers.ensembles.shares import shares_of, weight_problems
from servinggraph.routers.ensembles.votes import elected_class, elected_label
from servinggraph.routers.selection import weights_problem
from servinggraph.routers.signatures import union_of_inputs
from servinggraph.tensors import Array, Signature, TensorSpec

__all__ = ["Ensemble", "EnsembleOptions"]

Rule = Callable[[Sequence[Array], Sequence[float], str], Array]
"""Takes one output of all members, their shares, and the output's name; returns what it becomes."""

_RULES: Final[Mapping[str, Rule]] = {
    "mean": mean,
    "weighted_mean": mean,
    "median": median,
    "trimmed_mean": trimmed_mean,
    "max": maximum,
    "vote": elected_label,
    "soft_vote": mean,
}
_WEIGHTED: Final = ("weighted_mean", "vote", "soft_vote")
_KNOWN: Final = (*_RULES, "stacking")
_FOR: Final[Mapping[str, Sequence[str]]] = {
    "weights": _WEIGHTED,
    "trim": ("trimmed_mean",),
    "ties": ("vote",),
    "label": ("soft_vote",),
    "tensors": tuple(_RULES),
    "stacker": ("stacking",),
}
"""Option to the rules that take it."""
_NEEDED: Final = {"weighted_mean": "weights", "trimmed_mean": "trim", "stacking": "stacker"}


class EnsembleOptions(RouterOptions):
    """Members side by side whose answers are combined."""

    combine: str | Callable[..., Any] = Field(
        "mean",
        description="mean, weighted_mean, median, trimmed_mean or max of every floating output; vote over every label; "
        "soft_vote by probabilities; stacking: a branch that gets all that the members gave; or 'package.module:function' that "
        "takes a mapping of member to its tensors.",
    )
    trim: float | None = Field(
        None, gt=0, lt=0.5, description="Share of members left out at either end, for trimmed_mean; rounded down."
    )
    ties: Literal["smallest", "first"] = Field(
        "smallest",
        description="Which of several labels with equal votes wins a vote: the smallest, or that of the first member in order.",
    )
    label: str = Field(
        "label",
        description="Output of soft_vote beside the mean probabilities: the class with the highest, the first of equals.",
    )
    stacker: str | None = Field(
        None, description="Branch that is no member, for stacking: it gets what the members gave, named `member.tensor`."
    )
    weights: dict[str, float] | None = Field(
        None, description="Weight of each member, for weighted_mean, vote and soft_vote; can be changed while it serves."
    )
    tensors: list[str] | None = Field(
        None,
        min_length=1,
        description="Outputs to combine, others are dropped; by default all, and members must give the same.",
    )
    quorum: int | None = Field(
        None, ge=1, description="Members that must answer; by default all, and 1 where 'on_failure' lets members fail."
    )
    wait: Literal["all", "quorum"] = Field(
        "all", description="Answer when every member has answered or failed, or as soon as `quorum` of them have answered."
    )
    on_failure: Literal["fail", "reweight", "default"] | None = Field(
        None,
        description="What a member's failure is (with 'wait: quorum', fail leaves out who is late): the request's; or the "
        "others answer alone, weighted anew; or its tensors are those in 'defaults'. By default reweight where there is a "
        "'quorum', else fail.",
    )
    defaults: dict[str, dict[str, Any]] | None = Field(
        None,
        description="Member to tensor to the value that stands in for it: a number or text, or lists that fit the tensor's "
        "last axes. A member without one may not fail.",
    )


class Ensemble(Router[EnsembleOptions]):
    """Runs every branch on the same value and combines what they give.

    Who answered stands in the response's parameters, `<node>.members`, and where there are
    `weights`, with what share of them in `<node>.weights`; for whom a default stood in, in
    `<node>.defaulted`. A member that fails is the request's failure, unless `on_failure` says
    otherwise and `quorum` members answered without it. With `wait: quorum` it does not wait for
    the others either: they are cancelled.
    """

    options_type = EnsembleOptions
    keeps_rows = True

    @classmethod
    def reaching(cls, branch: str, options: Mapping[str, Any], given: Tensors, before: Mapping[str, Signature]) -> Tensors:
        if options.get("combine") != "stacking" or branch != options.get("stacker"):
            return given
        if any(signature.outputs is None for signature in before.values()):
            return None
        return {
            f"{member}.{tensor}": spec
            for member, signature in before.items()
            for tensor, spec in (signature.outputs or {}).items()
        }

    def signature(self, branches: Mapping[str, Signature]) -> Signature:
        options = self.options
        problems = _combination_problems(options)
        members = {name: signature for name, signature in branches.items() if name != options.stacker}
        if options.stacker is not None and (not branches or list(branches)[-1] != options.stacker):
            hint = nearest(options.stacker, list(branches)) if options.stacker not in branches else ": put it there"
            problems.append(Problem(f"'stacker' names '{options.stacker}', which is not the last branch{hint}", node="stacker"))
        if not members:
            problems.append(Problem("needs a branch beside the stacker: its members", node="branches"))
        self._names = tuple(members)
        self._combine = self._combination(problems)
        if options.weights is not None and options.combine in _WEIGHTED:
            problems.extend(weight_problems(options.weights, self._names))
        combined = common_outputs(members, options.tensors, problems) if options.combine in _RULES else None
        problems.extend(_datatype_problems(options, combined))
        self._gathering = self._gatherer(members, combined, problems)
        if problems:
            raise GraphInvalid(problems)
        self._tell = {key: f"{self.name}.{key}" for key in ("members", "weights", "defaulted")}
        self._set(options.weights or dict.fromkeys(self._names, 1.0))
        self._requests = 0
        self._missing = dict.fromkeys(self._names, 0)
        return Signature(union_of_inputs(members), self._outputs(branches, members, combined))

    async def route(self, value: Any, context: Context, branches: Mapping[str, Handler]) -> Any:
        names = self._names
        answers = await self._gathering.answers([branches[name](value, context) for name in names], context)
        shares, answered = self._shares, self._every_name
        told = context.response_parameters
        self._requests += 1
        try:
            if len(answers) < len(names):
                answered = ",".join(answers)
                for name in names:
                    self._missing[name] += name not in answers
                if self._defaults is not None:
                    told[self._tell["defaulted"]] = ",".join(name for name in names if name not in answers)
                    answers = self._defaults.filled(answers, names, value)
                else:
                    shares = shares_of(self._weights, answers)
            told[self._tell["members"]] = answered
            if self._tells_weights:
                told[self._tell["weights"]] = shares.text
            if self.options.stacker is None:
                result = self._combine(answers, shares.shares)
            else:
                result = branches[self.options.stacker](_stacked(answers), context)
        except ServingGraphError:
            raise
        except Exception as error:
            raise StepFailed.because_of(error, f"cannot combine {', '.join(answers)}: ") from error
        return await result if inspect.isawaitable(result) else result

    def settings(self) -> dict[str, Any]:
        return {} if self.options.weights is None else {"weights": dict(self._weights)}

    def adjust(self, changes: Mapping[str, Any]) -> None:
        if self.options.weights is None:
            return super().adjust(changes)
        for name in changes:
            if name not in ("weights", "revision"):
                raise InvalidRequest(f"'{name}' cannot be changed; 'weights' can")
        weights = changes.get("weights")
        if reason := weights_problem(weights, self._weights):
            raise InvalidRequest(reason)
        assert weights is not None  # just seen
        return self._set({**dict.fromkeys(self._names, 0.0), **weights})

    def report(self) -> dict[str, Any]:
        shares = dict(zip(self._names, self._shares.shares, strict=True))
        return {"requests": self._requests, "missing": dict(self._missing), "shares": shares}

    def impurity(self) -> str | None:
        if self._may_miss:
            return "answers without members that fail ('quorum' or 'on_failure')"
        return None

    def describe(self) -> str:
        rule = self.options.combine if isinstance(self.options.combine, str) else "custom"
        return f"ensemble ({rule})"

    async def stop(self) -> None:
        await self._gathering.end()

    def _set(self, weights: Mapping[str, float]) -> None:
        self._weights = dict(weights)
        self._shares = shares_of(self._weights, self._names)
        self._every_name = ",".join(self._names)

    def _combination(self, problems: list[Problem]) -> Callable[[Members, Sequence[float]], Any]:
        """Return what makes one answer of what members gave and their shares."""
        combine = self.options.combine
        self._tells_weights = self.options.weights is not None
        if isinstance(combine, str) and ":" in combine:
            try:
                combine = load_object(combine, self.base)
            except ImportProblem as error:
                problems.append(Problem(str(error), node="combine"))
                return self._by_rule(mean)
            if not callable(combine):
                text = f"'combine' leads to a {type(combine).__name__}, which is not callable"
                problems.append(Problem(text, node="combine"))
        if callable(combine):
            own = combine
            return lambda members, shares: own(members)
        rule = _RULES.get(str(combine), mean)
        if combine == "vote":
            rule = partial(elected_label, ties=self.options.ties)
        elif combine == "trimmed_mean":
            rule = partial(trimmed_mean, trim=self.options.trim or 0.0)
        return self._elected if combine == "soft_vote" else self._by_rule(rule)

    def _by_rule(self, rule: Rule) -> Callable[[Members, Sequence[float]], Any]:
        tensors = self.options.tensors

        def combine(members: Members, shares: Sequence[float]) -> dict[str, Array]:
            return {column: rule(alike(members, column), shares, column) for column in columns(members, tensors)}

        return combine

    def _elected(self, members: Members, shares: Sequence[float]) -> dict[str, Array]:
        found = columns(members, self.options.tensors)
        if len(found) != 1 or found[0] == self.options.label:
            raise StepFailed(f"members gave {', '.join(sorted(found))}: name the probabilities in 'tensors'")
        arrays = alike(members, found[0])
        return {found[0]: mean(arrays, shares, found[0]), self.options.label: elected_class(arrays, shares, found[0])}

    def _gatherer(
        self, members: Mapping[str, Signature], combined: Mapping[str, TensorSpec] | None, problems: list[Problem]
    ) -> Gathering:
        """Return what waits for members, by quorum and failure policy."""
        options = self.options
        count, quorum = len(members), options.quorum
        on_failure = options.on_failure or ("fail" if quorum is None else "reweight")
        hedged = options.wait == "quorum"
        may_fail = list(members) if on_failure == "reweight" else list(options.defaults or ())
        may_be_late = list(members) if on_failure != "default" else may_fail
        self._defaults: Defaults | None = None
        if quorum is not None and quorum > count:
            problems.append(Problem(f"'quorum' is {quorum}, but there are {count} members", node="quorum"))
        if hedged and quorum is None:
            problems.append(Problem("'wait: quorum' needs 'quorum': how many answers are enough", node="wait"))
        if on_failure == "fail" and quorum is not None and quorum < count and not hedged:
            text = "'on_failure: fail' needs every member, and 'quorum' does not: say reweight or default"
            problems.append(Problem(text, node="on_failure"))
        if on_failure != "default" and options.stacker is not None and (on_failure == "reweight" or hedged):
            text = "a stacker needs what every member gives: 'on_failure: default' has 'defaults' for those that give nothing"
            problems.append(Problem(text, node="on_failure" if options.on_failure else "quorum"))
        if (on_failure == "default") != (options.defaults is not None):
            problems.append(Problem("'on_failure: default' and 'defaults' belong together", node="defaults"))
        elif options.defaults is not None:
            same = options.combine in _RULES
            self._defaults = defaults_of(options.defaults, members, combined, problems, same=same)
        needed = quorum or (count if on_failure == "fail" else 1)
        if needed >= count:  # nobody can be spared, so a failure is the request's, as it is
            may_fail = may_be_late = []
        self._may_miss = bool(may_fail) or (hedged and bool(may_be_late))
        return Gathering(tuple(members), needed, hedged=hedged, may_fail=may_fail, may_be_late=may_be_late)

    def _outputs(
        self, branches: Mapping[str, Signature], members: Mapping[str, Signature], combined: Mapping[str, TensorSpec] | None
    ) -> Mapping[str, TensorSpec] | None:
        """Return what is known of the answer's tensors."""
        if self.options.stacker is not None:
            return branches[self.options.stacker].outputs
        if combined is None or any(signature.outputs is None for signature in members.values()):
            return None
        if self.options.combine != "soft_vote":
            return combined
        (spec,) = combined.values()
        return {**combined, self.options.label: TensorSpec("INT64", spec.shape and spec.shape[:-1])}


def _combination_problems(options: EnsembleOptions) -> list[Problem]:
    """Return which options do not go with the rule."""
    combine = options.combine
    own = not isinstance(combine, str) or ":" in combine
    if not own and combine not in _KNOWN:
        text = f"unknown rule '{combine}'{nearest(str(combine), _KNOWN)}; or 'package.module:function'"
        return [Problem(text, node="combine")]
    rule = "a function of your own" if own else f"'combine: {combine}'"
    problems = [
        Problem(f"'{option}' is for {', '.join(rules)}; {rule} does not take it", node=option)
        for option, rules in _FOR.items()
        if option in options.model_fields_set and getattr(options, option) is not None and combine not in rules
    ]
    needed = _NEEDED.get(str(combine))
    if needed is not None and getattr(options, needed) is None:
        what = "'weights', one for each branch" if needed == "weights" else f"'{needed}'"
        problems.append(Problem(f"'combine: {combine}' needs {what}", node="combine"))
    return problems


def _datatype_problems(options: EnsembleOptions, combined: Mapping[str, TensorSpec] | None) -> list[Problem]:
    """Return which outputs a rule cannot combine, as far as they are known."""
    if combined is None:
        return []
    problems = []
    for name, spec in combined.items():
        floating = (spec.datatype or "").startswith(("FP", "BF"))
        if spec.datatype and not floating and options.combine != "vote":
            text = (
                f"output '{name}' is {spec.datatype}, and a mean of labels is no label: vote over it, "
                "or leave it out: 'tensors' lists those to combine"
            )
            problems.append(Problem(text, node="combine"))
        if floating and options.combine == "vote":
            text = f"output '{name}' is {spec.datatype}: vote over labels, or 'combine: soft_vote' by probabilities"
            problems.append(Problem(text, node="combine"))
    if options.combine == "soft_vote" and (len(combined) != 1 or options.label in combined):
        text = f"soft_vote elects by one tensor, and members give {', '.join(combined)}: name the probabilities in 'tensors'"
        problems.append(Problem(text, node="tensors" if options.tensors else "combine"))
    return problems


def _stacked(answers: Members) -> dict[str, Array]:
    """Return the tensors of all members by the names that a stacker knows."""
    require_tensors(answers)
    return {f"{member}.{name}": array for member, tensors in answers.items() for name, array in tensors.items()}
