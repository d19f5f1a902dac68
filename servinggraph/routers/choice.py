"""The `choice` router: the first branch whose condition holds answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field

from servinggraph.context import Context
from servinggraph.errors import GraphInvalid, Problem, nearest
from servinggraph.interfaces import RouterOptions, Selector
from servinggraph.routers.refusals import Refusal
from servinggraph.routers.selection.expressions import Expression
from servinggraph.routers.signatures import common_signature
from servinggraph.tensors import Signature

__all__ = ["Choice", "ChoiceOptions"]


class ChoiceOptions(RouterOptions):
    """The first branch whose condition holds answers."""

    when: dict[str, str] = Field(
        min_length=1,
        description="Branch to condition, in order: an expression over inputs, body, parameters, headers, id and rows.",
    )
    default: str | None = Field(None, description="Branch that answers where no condition holds.")
    otherwise: Refusal | None = Field(None, description="Error that the caller gets where no condition holds.")


class Choice(Selector[ChoiceOptions]):
    """Sends each request to one branch by conditions on it; which one stands in `<node>.branch`."""

    options_type = ChoiceOptions
    decides_by_request = True

    def signature(self, branches: Mapping[str, Signature]) -> Signature:
        problems: list[Problem] = []
        self._rules: list[tuple[str, Expression]] = []
        for branch, text in self.options.when.items():
            if branch not in branches:
                problems.append(
                    Problem(f"'when' names '{branch}', which is no branch{nearest(branch, list(branches))}", node="when")
                )
                continue
            try:
                self._rules.append((branch, Expression(text, self.conceal)))
            except ValueError as error:
                problems.append(Problem(str(error), node="when"))
        default = self.options.default
        if default is not None and default not in branches:
            problems.append(
                Problem(f"'default' is '{default}', which is no branch{nearest(default, list(branches))}", node="default")
            )
        if (default is None) == (self.options.otherwise is None):
            text = "needs 'default' (a branch) or 'otherwise' (an error), one of them: what happens where no condition holds"
            problems.append(Problem(text, node="default" if default else None))
        problems += [
            Problem(f"branch '{branch}' is never chosen: it is neither in 'when' nor the default", node="branches")
            for branch in branches
            if branch not in self.options.when and branch != default
        ]
        signature = common_signature(branches, problems)
        if problems:
            raise GraphInvalid(problems)
        self.reads = tuple(dict.fromkeys(name for _, rule in self._rules for name in rule.tensors))
        self._decisions = dict.fromkeys(branches, 0)
        self._refused = 0
        return signature

    def choose(self, value: Any, context: Context) -> str:
        chosen = next((branch for branch, rule in self._rules if rule.holds(value, context)), self.options.default)
        if chosen is None:
            self._refused += 1
            assert self.options.otherwise is not None  # as checked
            raise self.options.otherwise.raised()
        self._decisions[chosen] += 1
        context.response_parameters[f"{self.name}.branch"] = chosen
        return chosen

    def describe(self) -> str:
        return "choice (" + ", ".join(self.options.when) + ")"

    def report(self) -> dict[str, Any]:
        return {"decisions": dict(self._decisions), "refused": self._refused}
