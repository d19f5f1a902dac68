"""The `cycle` router: its branch runs again and again while a condition holds."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from servinggraph.context import Context
from servinggraph.errors import DeadlineExceeded, GraphInvalid, Problem, StepFailed
from servinggraph.interfaces import Handler, Router, RouterOptions
from servinggraph.routers.selection.expressions import Expression
from servinggraph.tensors import Signature

__all__ = ["Cycle", "CycleOptions"]


class CycleOptions(RouterOptions):
    """A branch that runs again and again."""

    repeat_while: str = Field(description="Condition on what the branch gave last, before each further turn.")
    max_iterations: int = Field(ge=1, le=10_000, description="Most turns of a request.")
    at_limit: Literal["error", "last"] = Field(
        "error", description="After the last turn, if the condition still holds: an error, or what that turn gave."
    )


class Cycle(Router[CycleOptions]):
    """Runs its one branch, and again on what it gave, while a condition holds of that.

    How many turns it took stands in `<node>.iterations`.
    """

    options_type = CycleOptions
    repeats = True

    def signature(self, branches: Mapping[str, Signature]) -> Signature:
        problems: list[Problem] = []
        if len(branches) != 1:
            problems.append(Problem(f"takes one branch, what is repeated; got {', '.join(branches)}", node="branches"))
        try:
            self._again = Expression(self.options.repeat_while, self.conceal)
        except ValueError as error:
            problems.append(Problem(str(error), node="repeat_while"))
        if problems:
            raise GraphInvalid(problems)
        ((name, signature),) = branches.items()
        for tensor, spec in (signature.inputs or {}).items():
            given = None if signature.outputs is None else signature.outputs.get(tensor)
            if signature.outputs is not None and given is None and not spec.optional:
                text = f"branch '{name}' takes '{tensor}' again in the next turn, but does not give it: 'keep' or 'rename' it"
                problems.append(Problem(text, node="branches"))
            elif given is not None and (reason := given.conflict_with(spec)):
                problems.append(Problem(f"branch '{name}' cannot take its own '{tensor}': its {reason}", node="branches"))
        if problems:
            raise GraphInvalid(problems)
        return signature

    async def route(self, value: Any, context: Context, branches: Mapping[str, Handler]) -> Any:
        (branch,) = branches.values()
        clock = asyncio.get_running_loop().time
        for turn in range(1, self.options.max_iterations + 1):
            if context.deadline is not None and clock() >= context.deadline:
                raise DeadlineExceeded(f"Request timeout expired after {turn - 1} turns")
            value = await branch(value, context)
            if not self._again.holds(value, context):
                break
            await asyncio.sleep(0)  # turns that suspend nowhere would never let anybody else run
        else:
            if self.options.at_limit == "error":
                limit, condition = self.options.max_iterations, self.conceal(self.options.repeat_while)
                raise StepFailed(f"'repeat_while: {condition}' still holds after {limit} turns (limit 'max_iterations')")
        context.response_parameters[f"{self.name}.iterations"] = turn
        return value

    def describe(self) -> str:
        return f"cycle (at most {self.options.max_iterations})"
