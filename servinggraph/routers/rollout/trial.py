"""A challenger's way through the stages: when it goes on, when it waits, when it is taken back. No clock and no await."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from servinggraph.routers.rollout.guardrails import GuardrailOptions, MetricGuardrail
from servinggraph.routers.rollout.outcomes import Outcomes, Phase
from servinggraph.routers.rollout.schedule import Stage, percent
from servinggraph.routers.rollout.watch import Limits, Watch, plain
from servinggraph.routers.rollout.watches import watch_of

__all__ = ["ROLLED_BACK", "Move", "Plan", "Trial"]

ROLLED_BACK: Final = "rolled_back"
"""The stage of a challenger that gets no requests any more."""

_REMEMBERED: Final = 100
_FEWEST: Final = 4
_MOST: Final = 512


@dataclass(frozen=True, slots=True)
class Plan:
    """What a rollout is to do.

    Attributes:
        challenger: name of the branch under trial.
        baseline: name of the branch that it is compared to.
        stages: the schedule.
        guardrails: what is watched, by name.
        window_s: length of the sliding window, seconds.
        min_samples: samples of each branch without which no stage ends.
        alpha: chance that a challenger which is good enough is rolled back, over the whole rollout.
    """

    challenger: str
    baseline: str
    stages: Sequence[Stage]
    guardrails: Mapping[str, GuardrailOptions]
    window_s: float
    min_samples: int
    alpha: float


@dataclass(frozen=True, slots=True)
class Move:
    """A change of stage that the rollout decided on.

    Attributes:
        before: the stage that it left.
        after: the stage that it went to.
        why: the reason, with its numbers.
    """

    before: str
    after: str
    why: str


class Trial:
    """Where a rollout stands.

    Args:
        plan: what it is to do.
        now: when it begins, seconds on any clock that does not go back.

    Attributes:
        stage: the stage it is at, counted from 1; 0 when the challenger was rolled back.
        paused: True while no stage ends; guardrails still watch.
        phase: takes the outcomes of requests that are decided now.
        watches: the guardrails.
        history: the changes of stage, oldest first.
    """

    def __init__(self, plan: Plan, now: float) -> None:
        self._plan = plan
        self._metrics = {options.metric for options in plan.guardrails.values() if isinstance(options, MetricGuardrail)}
        self._began = self._last = now
        self.stage = 1
        self.paused = False
        self.history: deque[dict[str, Any]] = deque(maxlen=_REMEMBERED)
        self._by_hand: float | None = None
        self._life = 0
        self.phase = Phase(0.0, (), self._life)
        self._anew(now)
        self._enter(now)
        self._note(now, "", "the rollout began", "canary")

    @property
    def name(self) -> str:
        """The stage's name: its share, or `rolled_back`."""
        return self._plan.stages[self.stage - 1].name if self.stage else ROLLED_BACK

    @property
    def share(self) -> float:
        """The challenger's share of the requests."""
        if self._by_hand is not None:
            return self._by_hand
        return self._plan.stages[self.stage - 1].share if self.stage else 0.0

    @property
    def status(self) -> str:
        """`rolling`, `paused`, `promoted` or `rolled_back`."""
        if not self.stage:
            return ROLLED_BACK
        if self.paused:
            return "paused"
        return "promoted" if self.share >= 1 else "rolling"

    def advance(self, now: float) -> Move | None:
        """Evaluate what came in, and decide.

        Returns:
            The change of stage, which has happened; None when there is none.
        """
        self._count(now)
        if not self.stage:
            return None
        hurt = next((watch for watch in self.watches if watch.hurt), None)
        if hurt is not None:
            return self._move(0, now, self._verdict(hurt))
        if self.paused or self.stage == len(self._plan.stages) or self._waits_for() is not None:
            return None
        return self._move(self.stage + 1, now, f"held {self._held_s:.6g} s: {self._fine()}")

    def late(self, outcomes: Outcomes, now: float) -> Move | None:
        """Evaluate what came in for a phase that may be over, and decide."""
        phase = outcomes.phase
        if phase.life != self._life:
            outcomes.settle()
            outcomes.clear()
            return None
        if phase is not self.phase:
            self._evaluate(phase, now)
        return self.advance(now)

    def go(self, stage: int, now: float, why: str = "by hand") -> None:
        """Go to a stage by hand; 0 rolls back. From there, a stage begins a new trial with evidence of its own."""
        self._count(now)
        self._move(stage, now, why, "hand")

    def pause(self, paused: bool, now: float) -> None:
        """Pause, or go on: then the share is that of the stage again."""
        self._count(now)
        self.paused = paused
        if not paused and self._by_hand is not None:
            self._by_hand = None
            self._enter(now, keep_hold=True)

    def set_share(self, share: float, now: float) -> None:
        """Set the challenger's share by hand, which pauses the schedule."""
        self._count(now)
        self.paused = True
        self._by_hand = share
        self._enter(now, keep_hold=True)

    def stage_of(self, name: str) -> int | None:
        """Return the stage with a name; None when there is none."""
        names = [ROLLED_BACK, *(stage.name for stage in self._plan.stages)]
        return names.index(name) if name in names else None

    def report(self) -> dict[str, Any]:
        """Return where it stands, as plain values."""
        share = self.share
        return {
            "stage": self.name,
            "status": self.status,
            "waits_for": self._waits_for() if self.status == "rolling" else None,
            "held_s": plain(self._held_s),
            "guardrails": {watch.name: watch.report(share) for watch in self.watches},
            "history": list(self.history),
        }

    def remember(self) -> dict[str, Any]:
        """Return what has to survive a restart, as plain values; samples are counted anew."""
        return {
            "challenger": self._plan.challenger,
            "baseline": self._plan.baseline,
            "stage": self.name,
            "paused": self.paused,
            "share_by_hand": self._by_hand,
            "held_s": self._held_s,
            "ran_s": self._last - self._began,
            "history": list(self.history),
            "guardrails": {
                watch.name: {"declared": self._declared(watch.name), "evidence": watch.remember()} for watch in self.watches
            },
        }

    def recall(self, remembered: Mapping[str, Any], now: float) -> None:
        """Take up what `remember` gave, unless other branches were on trial; evidence only of guardrails as they were declared.

        Raises:
            ValueError: there is no such stage any more, or it is not what `remember` gives.
        """
        if (remembered.get("challenger"), remembered.get("baseline")) != (self._plan.challenger, self._plan.baseline):
            return
        stage = self.stage_of(str(remembered.get("stage")))
        if stage is None:
            raise ValueError(f"its stage '{remembered.get('stage')}' is none of {', '.join(s.name for s in self._plan.stages)}")
        by_hand = remembered.get("share_by_hand")
        try:
            history = [dict(entry) for entry in remembered["history"]]
            self.stage, self.paused = stage, bool(remembered["paused"])
            self._by_hand = None if by_hand is None else min(max(float(by_hand), 0.0), 1.0)
            self._enter(now)
            self._held_s = float(remembered["held_s"])
            self._began = now - float(remembered["ran_s"])
            for watch in self.watches:
                kept = remembered["guardrails"].get(watch.name)
                if kept is not None and kept["declared"] == self._declared(watch.name):
                    watch.recall(kept["evidence"])
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{type(error).__name__}: {error}") from error
        self.history.clear()
        self.history.extend(history)

    def _count(self, now: float) -> None:
        """Evaluate what came in, and count the time, without deciding."""
        self._evaluate(self.phase, now)
        if not self.paused:
            self._held_s += now - self._last
        self._last = now

    def _declared(self, guardrail: str) -> Any:
        return self._plan.guardrails[guardrail].model_dump(mode="json")

    def _anew(self, now: float) -> None:
        """Begin a trial of its own, without evidence."""
        plan = self._plan
        alpha = plan.alpha / max(len(plan.guardrails), 1)  # so that all together keep to it
        self.watches = []
        for name, options in plan.guardrails.items():
            least = options.min_samples or plan.min_samples
            limits = Limits(plan.window_s, least, alpha, plan.challenger, plan.baseline)
            self.watches.append(watch_of(name, options, limits, now))

    def _enter(self, now: float, *, keep_hold: bool = False) -> None:
        """Begin a phase: from here on requests are decided by another share."""
        # What still comes for the one before is looked at as soon as it comes.
        self.phase.challenger.most = self.phase.baseline.most = 1
        self.phase = Phase(self.share, self._metrics, self._life)
        self._set_sizes(0)
        self._requests = 0
        if not keep_hold:
            self._held_s = 0.0
        if self.stage:  # what was seen before a rollback is what people ask for after it
            for watch in self.watches:
                watch.begin_step(now)

    def _move(self, stage: int, now: float, why: str, who: str = "canary") -> Move:
        before, was = self.name, self.stage
        if not was:
            self._anew(now)
        if not stage:
            self.paused = False
        if not was or not stage:
            self._life += 1
        self.stage, self._by_hand = stage, None
        self._enter(now)
        self._note(now, before, why, who)
        return Move(before, self.name, why)

    def _evaluate(self, phase: Phase, now: float) -> None:
        for outcomes in (phase.challenger, phase.baseline):
            outcomes.settle()
        if self.stage:
            for watch in self.watches:
                watch.take(phase, now)
        if phase is self.phase:
            self._requests += len(phase.challenger.durations)
            self._set_sizes(self._requests)
        phase.challenger.clear()
        phase.baseline.clear()

    def _set_sizes(self, requests: int) -> None:
        # The more there were, the less a few matter: a decision comes at most an eighth of the requests late.
        self.phase.challenger.most = min(max(requests // 8, _FEWEST), _MOST)
        self.phase.baseline.most = _MOST

    def _waits_for(self) -> str | None:
        """Say why the stage does not end; None when it may."""
        if self.stage == len(self._plan.stages):
            return "nothing: this is the last step"
        hold_s = self._plan.stages[self.stage - 1].hold_s
        if self._held_s < hold_s:
            return f"its hold: {self._held_s:.6g} of {hold_s:.6g} s"
        if not self.watches and self._requests < self._plan.min_samples:
            return f"requests: '{self._plan.challenger}' had {self._requests} of {self._plan.min_samples}"
        waits = (watch.waits_for(alone=self.share >= 1) for watch in self.watches)
        return next((reason for reason in waits if reason is not None), None)

    def _verdict(self, watch: Watch) -> str:
        alpha = self._plan.alpha
        numbers = f"evidence {watch.evidence.value:,.0f} reached {len(self.watches) / alpha:,.0f}"
        return f"guardrail '{watch.name}': {watch.figures()}; {numbers} (chance of a false alarm at most {percent(alpha)})"

    def _fine(self) -> str:
        if not self.watches:
            return f"{self._requests} requests, no guardrail"
        return "; ".join(f"'{watch.name}' is fine ({watch.figures()})" for watch in self.watches)

    def _note(self, now: float, before: str, why: str, who: str) -> None:
        self.history.append({"after_s": plain(now - self._began), "from": before, "to": self.name, "who": who, "why": why})
