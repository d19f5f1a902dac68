"""The `canary` router: a challenger gets more and more of the requests while guardrails hold, and none once one is hurt."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from time import monotonic, perf_counter
from typing import Any, Final

from pydantic import Field

from servinggraph.context import Context
from servinggraph.errors import GraphInvalid, InvalidRequest, Problem, Unavailable, nearest
from servinggraph.interfaces import Feedback, Observer, Receipt, RouterHost, RouterOptions
from servinggraph.routers.rollout.guardrails import GuardrailOptions, MetricGuardrail
from servinggraph.routers.rollout.outcomes import NO_LIFE, Metering, Outcomes, Phase
from servinggraph.routers.rollout.schedule import Duration, RolloutStep, Share, Stage, stages
from servinggraph.routers.rollout.trial import ROLLED_BACK, Move, Plan, Trial
from servinggraph.routers.selection import KeyReader, Weights, key_reader, key_tensors, weights_problem
from servinggraph.routers.selection.decisions import Decisions
from servinggraph.routers.signatures import common_signature
from servinggraph.sequence import Turn
from servinggraph.tensors import Signature

__all__ = ["Canary", "CanaryOptions"]

logger = logging.getLogger("servinggraph.canary")

_LOOK_EVERY_S: Final = 1.0
"""How often the schedule is looked at; guardrails are looked at after some requests, too."""


_KEEP_EVERY_S: Final = 10.0
"""How often the time that was held, and the evidence, are saved where nothing else changes: what a crash may lose."""

_Begun = tuple[Outcomes, Context, float]
"""Where a request's outcome goes, its context, and when it began by the stopwatch."""


class CanaryOptions(RouterOptions):
    """A challenger gets more and more of the requests, as long as it is not worse than the baseline."""

    baseline: str = Field(description="Branch that is replaced if all goes well.")
    challenger: str = Field(description="Branch under trial.")
    steps: list[Share | RolloutStep] = Field(
        description="The challenger's share in each step, rising: [1%, 10%, 50%, 100%]; or `{share: 10%, hold: 1h}`."
    )
    hold: Duration = Field("10m", validate_default=True, description="How long a step lasts at least: 500ms, 30s, 10m, 2h, 1d.")
    guardrails: dict[str, GuardrailOptions] = Field(
        default_factory=dict, description="What of the challenger is watched, by a name of your choice."
    )
    window: Duration = Field(
        "5m",
        validate_default=True,
        description="How far back guardrails look for rates and quantiles; further where there are fewer than `min_samples`.",
    )
    min_samples: int = Field(
        100, ge=1, description="Samples of each branch in a step without which it does not end. A rollback needs none."
    )
    alpha: float = Field(
        0.05,
        gt=0,
        le=0.5,
        description="Chance at most that a challenger as good as its guardrails allow is rolled back, over the whole rollout "
        "and however often it is looked at.",
    )
    key: str | None = Field(
        None,
        description="Where the key is that keeps a caller with a branch: header:NAME, parameter:NAME, tensor:NAME, "
        "field:PATH or id. Requests without it, and all without this option, are spread by chance.",
    )
    salt: str | None = Field(
        None, description="Sets the assignment of keys apart from other routers'; by default the node's name."
    )


class Canary(Observer[CanaryOptions]):
    """Sends a share of the requests to the challenger, which rises step by step, or falls to nothing.

    Settings: `stage` (a step by its share, or `rolled_back`), `paused`, `weights` (which pauses as
    well), and the commands `promote: true` (on to the next step) and `rollback: true`.
    """

    options_type = CanaryOptions
    decides_by_request = True

    def signature(self, branches: Mapping[str, Signature]) -> Signature:
        problems: list[Problem] = []
        options = self.options
        self._key: KeyReader | None = None
        self.reads = key_tensors(options.key)
        for role, name in (("baseline", options.baseline), ("challenger", options.challenger)):
            if name not in branches:
                problems.append(Problem(f"{role} '{name}' is no branch{nearest(name, list(branches))}", node=role))
        if options.baseline == options.challenger:
            problems.append(Problem("baseline and challenger are the same branch", node="challenger"))
        if more := [name for name in branches if name not in (options.baseline, options.challenger)]:
            problems.append(
                Problem(f"it has two branches, and '{more[0]}' is neither baseline nor challenger", node="branches")
            )
        steps: tuple[Stage, ...] = ()
        try:
            steps = stages(options.steps, options.hold)
        except ValueError as error:
            problems.append(Problem(str(error), node="steps"))
        try:
            self._key = None if options.key is None else key_reader(options.key)
        except ValueError as error:
            problems.append(Problem(str(error), node="key"))
        signature = common_signature(branches, problems)
        if problems:
            raise GraphInvalid(problems)
        self._plan = Plan(
            options.challenger, options.baseline, steps, options.guardrails, options.window, options.min_samples, options.alpha
        )
        self._metrics = {bound.metric for bound in options.guardrails.values() if isinstance(bound, MetricGuardrail)}
        self._noted: Decisions[Outcomes] | None = Decisions() if self._metrics else None
        self._decisions = {options.baseline: 0, options.challenger: 0}
        self._parameter = f"{self.name}.variant"
        self._begin_on(monotonic, perf_counter)
        return signature

    async def start(self, host: RouterHost) -> None:
        await super().start(host)
        self._begin_on(host.now, _stopwatch(asyncio.get_running_loop()))
        shortest = min([_LOOK_EVERY_S, *(stage.hold_s / 4 for stage in self._plan.stages)])
        self._look_every_s = max(shortest, 0.005)
        self._look_again()

    async def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def begin(self, value: Any, context: Context) -> tuple[str, Context, _Begun]:
        key = None if self._key is None else self._key(value, context)
        branch = self._weights.at_random() if key is None else self._weights.by_key(key)
        outcomes = self._outcomes[branch]
        if context.sequence is not None:
            branch, outcomes = self._in_sequence(context.sequence, branch)
        self._decisions[branch] += 1
        context.response_parameters[self._parameter] = branch
        if self._noted is not None:
            if not context.shadow:  # of a copy nobody saw the answer, so feedback is not for it
                self._noted.note(context.id, outcomes, self._now())
            context = context.metered(Metering(outcomes, context.meter))
        return branch, context, (outcomes, context, self._stopwatch())

    def end(self, begun: _Begun, error: BaseException | None) -> None:
        outcomes, context, began = begun
        took = self._stopwatch() - began
        if error is None:
            outcomes.durations.append(took)
        else:
            outcomes.failed(error, took, context.deadline, self._now())
        if len(outcomes.durations) >= outcomes.most:
            self._evaluate(outcomes)

    def describe(self) -> str:
        options = self.options
        steps = ", ".join(stage.name for stage in self._plan.stages)
        watched = f", watching {', '.join(options.guardrails)}" if options.guardrails else ", without guardrails"
        return f"canary ({options.challenger} beside {options.baseline}: {steps}{watched})"

    def settings(self) -> dict[str, Any]:
        trial = self._trial
        return {
            "stage": trial.name,
            "paused": trial.paused,
            "weights": {self.options.baseline: _part(1 - trial.share), self.options.challenger: _part(trial.share)},
            "promote": False,
            "rollback": False,
        }

    def adjust(self, changes: Mapping[str, Any]) -> None:
        stage, share, paused = self._wanted(changes)
        trial, now = self._trial, self._now()
        if stage is not None:
            trial.go(stage, now)
        if paused is not None:
            trial.pause(paused, now)
        if share is not None:
            trial.set_share(share, now)
        self._follow()

    def report(self) -> dict[str, Any]:
        self._advance()
        report = {"decisions": dict(self._decisions), "shares": dict(self._weights.shares), **self._trial.report()}
        if self._noted is not None:
            report["feedback"] = {"duplicates": self._noted.duplicates, "unknown": self._noted.unknown}
        return report

    def remember(self) -> dict[str, Any]:
        remembered = self._trial.remember()
        if remembered["share_by_hand"] is not None:  # other workers take up settings by their names
            remembered["weights"] = self.settings()["weights"]
        return remembered

    def gives_way(self, saved: Mapping[str, Any]) -> bool:
        # Whoever moved the challenger on, by hand or not, has not seen what speaks against it.
        return bool(saved.get("stage") == ROLLED_BACK and saved.get("challenger") == self._plan.challenger)

    def recall(self, remembered: Mapping[str, Any]) -> None:
        try:
            self._trial.recall(remembered, self._now())
        except ValueError as error:
            raise InvalidRequest(str(error)) from error
        self._follow()

    def knows(self, id: str) -> bool:
        return self._noted is not None and self._noted.find(id, self._now()) is not None

    def feedback(self, record: Feedback) -> Receipt:
        # Only the id tells with which share the request was decided, so a variant alone is of no use.
        if self._noted is None or record.metric not in self._metrics or record.reward is None or not record.id:
            return Receipt.UNUSED
        now = self._now()
        outcomes = self._noted.claim(record.id, record.metric, now)
        if outcomes is None:
            return Receipt.UNKNOWN if self._noted.find(record.id, now) is None else Receipt.DUPLICATE
        values = outcomes.values[record.metric]
        values.append(float(record.reward))
        if len(values) >= outcomes.most:
            self._evaluate(outcomes)
        return Receipt.TAKEN

    def _in_sequence(self, turn: Turn, branch: str) -> tuple[str, Outcomes]:
        """Return the branch that answers a sequence to its end, and where the outcome goes: the other has not its state.

        Raises:
            Unavailable: it was the challenger, which was rolled back.
        """
        share = self._trial.share
        kept = {} if turn.start else turn.state(self.name)
        turn.keep(self.name, kept or {"branch": branch, "share": share})
        if not kept:
            return branch, self._outcomes[branch]
        branch = kept["branch"]
        if branch == self._plan.challenger and not share:
            raise Unavailable(f"'{branch}', which answered sequence {turn.id}, was rolled back: begin the sequence anew")
        # Decided with another share than the requests of now: it would count for too much or too little.
        counted = self._outcomes if kept["share"] == share else self._uncounted
        return branch, counted[branch]

    def _wanted(self, changes: Mapping[str, Any]) -> tuple[int | None, float | None, bool | None]:
        """Return stage, challenger's share and whether to pause, as far as changes name them.

        Raises:
            InvalidRequest: they cannot be.
        """
        trial, plan = self._trial, self._plan
        for name in changes:
            if name not in ("stage", "paused", "weights", "promote", "rollback"):
                raise InvalidRequest(f"'{name}' cannot be changed; stage, paused, weights, promote and rollback can")
        for name in ("paused", "promote", "rollback"):
            if not isinstance(changes.get(name, False), bool):
                raise InvalidRequest(f"'{name}' is true or false, got {changes[name]!r}")
        moves = [name for name in ("stage", "promote", "rollback") if changes.get(name)]
        if len(moves) > 1:
            raise InvalidRequest(f"'{moves[0]}' and '{moves[1]}' cannot both be asked for")
        stage: int | None = None
        if "stage" in changes:
            stage = trial.stage_of(str(changes["stage"]))
            if stage is None:
                names = ", ".join(step.name for step in plan.stages)
                raise InvalidRequest(f"'stage' is one of {names} or {ROLLED_BACK}, got {changes['stage']!r}")
            stage = None if stage == trial.stage else stage
        elif changes.get("rollback"):
            stage = 0 if trial.stage else None
        elif changes.get("promote"):
            stage = self._next()
        at = trial.stage if stage is None else stage
        weights = changes.get("weights")
        if weights is None:
            return stage, None, changes.get("paused")
        if changes.get("paused") is False:
            raise InvalidRequest("'weights' by hand pause the schedule: 'paused' cannot be false with them")
        return stage, self._share(weights, at), changes.get("paused")

    def _next(self) -> int:
        trial = self._trial
        if not trial.stage:
            raise InvalidRequest(f"'{self._plan.challenger}' was rolled back: name the 'stage' that it is to begin with")
        if trial.stage == len(self._plan.stages):
            raise InvalidRequest(f"it is at its last step, {trial.name}, already")
        return trial.stage + 1

    def _share(self, weights: Any, stage: int) -> float:
        names = dict.fromkeys((self._plan.baseline, self._plan.challenger))
        if reason := weights_problem(weights, names):
            raise InvalidRequest(reason)
        mine = float(weights.get(self._plan.challenger, 0))
        if not stage and mine:
            raise InvalidRequest(f"'{self._plan.challenger}' was rolled back: name the 'stage' that it is to begin with")
        return mine / (mine + float(weights.get(self._plan.baseline, 0)))

    def _follow(self) -> None:
        """Decide requests as the trial says from here on; no await, so that none sees half of it."""
        share, plan, phase, salt = self._trial.share, self._plan, self._trial.phase, self.options.salt
        self._weights = Weights({plan.baseline: 1 - share, plan.challenger: share}, self.name if salt is None else salt)
        self._outcomes = {plan.baseline: phase.baseline, plan.challenger: phase.challenger}
        nowhere = Phase(0.0, self._metrics, NO_LIFE)
        self._uncounted = {plan.baseline: nowhere.baseline, plan.challenger: nowhere.challenger}

    def _begin_on(self, now: Callable[[], float], stopwatch: Callable[[], float]) -> None:
        """Begin the rollout on a clock: before `start` the machine's, so that a router without a host routes, too."""
        self._now = now
        self._stopwatch = stopwatch
        self._kept = now()
        self._timer: asyncio.TimerHandle | None = None
        self._trial = Trial(self._plan, now())
        self._follow()

    def _look_again(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(self._look_every_s, self._look)

    def _look(self) -> None:
        """Look at the schedule, and again after a while."""
        self._look_again()
        self._advance()
        now = self._now()
        if self.host is not None and now - self._kept >= _KEEP_EVERY_S:
            self.host.keep()
            self._kept = now

    def _evaluate(self, outcomes: Outcomes) -> None:
        """Evaluate what came in, since there is enough of it; a defect of this is no failure of the request that set it off."""
        try:
            self._moved(lambda now: self._trial.late(outcomes, now))
        except Exception:
            logger.exception("router '%s' could not evaluate what came in", self.name)
            outcomes.settle()
            outcomes.clear()

    def _advance(self) -> None:
        self._moved(self._trial.advance)

    def _moved(self, decide: Callable[[float], Move | None]) -> None:
        before = self.settings()
        move = decide(self._now())
        if move is None:
            return
        self._follow()
        if self.host is None:
            return
        after = self.settings()
        changed = [name for name in after if after[name] != before[name]]
        if move.after == ROLLED_BACK:
            logger.warning("router '%s' rolled back '%s': %s", self.name, self._plan.challenger, move.why)
        self.host.changed("canary", move.why, {n: before[n] for n in changed}, {n: after[n] for n in changed})


def _stopwatch(loop: asyncio.AbstractEventLoop) -> Callable[[], float]:
    """Return what measures durations: a loop's clock may tick in milliseconds, and stands still while a step runs inline.

    Where somebody has given the loop a clock of their own, as a test does, it is that one: on theirs alone time passes.
    """
    theirs = isinstance(loop, asyncio.BaseEventLoop) and type(loop).time is not asyncio.BaseEventLoop.time
    return loop.time if theirs else perf_counter


def _part(share: float) -> float:
    return float(f"{share:.6g}")
