"""The `fallback` router: its branches are tried in order until one answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from servinggraph.context import Context
from servinggraph.errors import ErrorCode, GraphInvalid, Problem, ServingGraphError
from servinggraph.interfaces import Handler, Router, RouterOptions
from servinggraph.routers.signatures import common_signature
from servinggraph.tensors import Signature

__all__ = ["Fallback", "FallbackOptions"]


class FallbackOptions(RouterOptions):
    """Branches that are tried in order until one answers."""

    on: list[Literal["unavailable", "limit_exceeded", "deadline_exceeded", "internal", "invalid_request"]] = Field(
        ["unavailable", "limit_exceeded", "deadline_exceeded", "internal"],
        min_length=1,
        description="Codes of errors after which the next branch is tried; others are the request's end.",
    )


class Fallback(Router[FallbackOptions]):
    """Tries its branches in order; the next one runs when the one before it failed.

    A later branch sees why in `context.failure`. Which one answered stands in `<node>.branch`. If
    all fail the last error is the caller's, with the others as its causes.
    """

    options_type = FallbackOptions

    def signature(self, branches: Mapping[str, Signature]) -> Signature:
        problems: list[Problem] = []
        if len(branches) < 2:
            problems.append(Problem("needs two branches or more: what is tried, and what stands in for it", node="branches"))
        signature = common_signature(branches, problems)
        if problems:
            raise GraphInvalid(problems)
        self._on = frozenset(ErrorCode(code) for code in self.options.on)
        self._answered = dict.fromkeys(branches, 0)
        self._last = list(branches)[-1]
        return signature

    async def route(self, value: Any, context: Context, branches: Mapping[str, Handler]) -> Any:
        failure: ServingGraphError | None = None
        view: Context | None = None
        try:
            for name, branch in branches.items():
                view = context.for_piece()
                view.failure = failure
                try:
                    result = await branch(value, view)
                except ServingGraphError as error:
                    if failure is not None and error.__cause__ is None:
                        error.__cause__ = failure
                    # What a request's own deadline ended has no time for another try.
                    if name == self._last or error.code not in self._on or context.cancelled:
                        raise
                    failure = error
                    continue
                context.response_parameters.update(view.response_parameters)
                context.response_parameters[f"{self.name}.branch"] = name
                self._answered[name] += 1
                return result
            raise AssertionError("the last branch answers or raises")
        finally:
            del failure, view  # by its traceback a failure holds this frame, and with it the tensors

    def describe(self) -> str:
        return "fallback"

    def report(self) -> dict[str, Any]:
        return {"answered": dict(self._answered)}
