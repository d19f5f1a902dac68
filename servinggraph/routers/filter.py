"""The `filter` router: its branch runs for requests of which a condition holds; the others get an honest answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field

from servinggraph.context import Context
from servinggraph.errors import GraphInvalid, Problem
from servinggraph.interfaces import RouterOptions, Selector
from servinggraph.routers.refusals import Refusal
from servinggraph.routers.selection.expressions import Expression
from servinggraph.tensors import Signature

__all__ = ["Filter", "FilterOptions"]


class FilterOptions(RouterOptions):
    """Requests of which a condition holds go on, the others are refused."""

    when: str = Field(description="Condition: an expression over inputs, body, parameters, headers, id and rows.")
    otherwise: Refusal = Field(description="Error that the others get.")


class Filter(Selector[FilterOptions]):
    """Lets requests through to its one branch, or refuses them with a declared error; none is dropped silently."""

    options_type = FilterOptions
    decides_by_request = True

    def signature(self, branches: Mapping[str, Signature]) -> Signature:
        problems: list[Problem] = []
        if len(branches) != 1:
            problems.append(Problem(f"takes one branch, what is behind the filter; got {', '.join(branches)}", node="branches"))
        try:
            self._rule = Expression(self.options.when, self.conceal)
        except ValueError as error:
            problems.append(Problem(str(error), node="when"))
        if problems:
            raise GraphInvalid(problems)
        self.reads = self._rule.tensors
        self._passed = self._refused = 0
        ((self._branch, signature),) = branches.items()
        return signature

    def choose(self, value: Any, context: Context) -> str:
        if not self._rule.holds(value, context):
            self._refused += 1
            raise self.options.otherwise.raised()
        self._passed += 1
        return self._branch

    def describe(self) -> str:
        return f"filter ({self.conceal(self.options.when)})"

    def report(self) -> dict[str, Any]:
        return {"passed": self._passed, "refused": self._refused}
