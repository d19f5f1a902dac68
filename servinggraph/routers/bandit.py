"""The `bandit` router: each request goes to the variant that a policy chooses, and feedback teaches the policy."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from typing import Any, Final, Self

import numpy as np

from servinggraph.context import Context
from servinggraph.errors import ErrorCode, GraphInvalid, InvalidRequest, Problem, ServingGraphError, StepFailed
from servinggraph.importing import ImportProblem
from servinggraph.interfaces import Feedback, Handler, Learned, Receipt, Router
from servinggraph.routers.bandits import (
    Answered,
    Answers,
    Arm,
    BanditOptions,
    Scorer,
    added,
    features_of,
    policy_of,
    report_of,
    scorer,
)
from servinggraph.routers.selection import Decisions, KeyReader, key_reader, key_tensors
from servinggraph.routers.signatures import common_signature
from servinggraph.statistics import is_late
from servinggraph.tensors import Array, Signature, TensorSpec

__all__ = ["Bandit", "BanditOptions"]

logger = logging.getLogger("servinggraph.routers")

_NOTHING: Final = np.zeros(4)

_OWN_FAULT: Final = frozenset({ErrorCode.INTERNAL, ErrorCode.UNAVAILABLE, ErrorCode.DEADLINE_EXCEEDED})
"""Failures that a variant answers for; the others are the caller's, or a limit's."""


class Bandit(Router[BanditOptions]):
    """Sends each request to one variant, and learns which from feedback.

    Which one answered stands in the response's parameters, `<node>.variant`. What is learned are
    sums over rewards, so a reward that comes late or out of order counts like any other. Requests are
    remembered by id in the process that answered; of several decisions for one id the last one counts.
    """

    options_type = BanditOptions
    decides_by_request = True

    def signature(self, branches: Mapping[str, Signature]) -> Signature:
        problems: list[Problem] = []
        options = self.options
        self._policy = policy_of(options, problems)
        self._arms: dict[str, Arm] = {name: self._policy.arm(name) for name in branches}
        self._decisions = dict.fromkeys(branches, 0)
        self._enabled: Sequence[Arm] = tuple(self._arms.values())
        self._scorer = self._made_scorer(problems)
        self._key: KeyReader | None = None
        self.reads = key_tensors(options.key)
        if options.key is not None:
            try:
                self._key = key_reader(options.key)
            except ValueError as error:
                problems.append(Problem(str(error), node="key"))
        for name in ("failure_reward", "missing_reward"):
            reward = getattr(options, name)
            if reward is not None and float(reward) not in self._policy.rewards:
                problems.append(Problem(f"{reward} is outside of reward_range", node=name))
        signature = common_signature(branches, problems)
        if problems:
            raise GraphInvalid(problems)
        missed = None if options.missing_reward is None else self._missed
        self._answers = Answers(options.window, keep=self._scorer is not None, missed=missed)
        self._stays: Decisions[str] = Decisions(options.window.size, options.window.age_s)
        self._parameter = f"{self.name}.variant"
        self._size: int | None = None  # of features, from the first that were learned from
        self._handed_out: dict[str, Array] = {}
        self._clipped = 0
        self._resets = 0
        if options.features is None or signature.inputs is None:
            return signature
        return Signature({options.features: TensorSpec(), **signature.inputs}, signature.outputs)

    async def route(self, value: Any, context: Context, branches: Mapping[str, Handler]) -> Any:
        features = None if self.options.features is None else self._features(value, self.options.features)
        if self.options.missing_reward is not None:
            assert self.host is not None  # it serves
            self._answers.expire(self.host.now())
        arm = self._policy.choose(self._enabled, features) if self._key is None else self._stay(value, context, features)
        if context.sequence is not None:
            arm = self._arms[context.sequence.stays(self.name, arm.name)]
        arm.decided += 1
        self._decisions[arm.name] += 1
        context.response_parameters[self._parameter] = arm.name
        try:
            answer = await branches[arm.name](value, context)
        except (ServingGraphError, asyncio.CancelledError) as error:
            reward = self.options.failure_reward
            if (
                reward is not None
                and self._at_fault(error, context)
                and (features is None or self._size in (None, features.size))
            ):
                self._observe(arm, reward, features)
            raise
        if context.id:
            assert self.host is not None  # it serves
            self._answers.note(context.id, arm.name, features, answer, self.host.now(), unseen=context.shadow)
        return answer

    def _at_fault(self, error: BaseException, context: Context) -> bool:
        """Tell whether a variant answers for a failure: by its own fault, or because the request's time was up."""
        if isinstance(error, ServingGraphError):
            return error.code in _OWN_FAULT
        assert self.host is not None  # it serves
        return is_late(context.deadline, self.host.now())

    def describe(self) -> str:
        return f"bandit ({self.options.policy}: {', '.join(self._arms)})"

    def knows(self, id: str) -> bool:
        assert self.host is not None  # it serves
        return self._answers.find(id, self.host.now()) is not None

    def feedback(self, record: Feedback) -> Receipt:
        if record.metric != self.options.metric or (record.variant and record.variant not in self._arms):
            return Receipt.UNUSED
        if record.id:
            return self._of_request(record)
        if record.reward is None:
            raise InvalidRequest(f"router '{self.name}' compares a truth with an answer: it needs the 'id' of the request")
        if self._policy.contextual:
            raise InvalidRequest(f"router '{self.name}' learns from a request's features: it needs the 'id' of the request")
        self._observe(self._arms[record.variant], self._checked(record.reward), None)
        return Receipt.TAKEN

    def settings(self) -> dict[str, Any]:
        numbers = {name: self._policy.values[name] for name, number in self._policy.numbers.items() if not number.fixed}
        return {**numbers, "enabled": {name: arm.enabled for name, arm in self._arms.items()}, "resets": self._resets}

    def adjust(self, changes: Mapping[str, Any]) -> None:
        numbers: dict[str, float] = {}
        for name, value in changes.items():
            if name in ("enabled", "resets"):
                continue
            number = self._policy.numbers.get(name)
            if number is None or number.fixed:
                raise InvalidRequest(f"'{name}' cannot be changed; {', '.join(self.settings())} can")
            if reason := number.problem(name, value):
                raise InvalidRequest(reason)
            numbers[name] = float(value)
        enabled = self._checked_enabled(changes.get("enabled", {}))
        resets = changes.get("resets", self._resets)
        if type(resets) is not int or resets < self._resets:
            text = f"'resets' counts how often everything was forgotten, {self._resets} times: one more forgets it now"
            raise InvalidRequest(f"{text}, got {resets!r}")
        self._policy.values.update(numbers)
        self._enable(enabled)
        if resets != self._resets:
            self._forget(resets)

    def report(self) -> dict[str, Any]:
        return report_of(self._arms, self._decisions, self._answers, self._clipped)

    def remember(self) -> dict[str, Any]:
        return {**self.settings(), "learned": {name: arm.sums().tolist() for name, arm in self._arms.items()}}

    def recall(self, remembered: Mapping[str, Any]) -> None:
        if remembered.get("revision", 1):
            self._recall_settings(remembered)
        self._resets = int(remembered.get("resets", 0))
        for name, sums in remembered.get("learned", {}).items():
            if name in self._arms:
                self._take(self._arms[name], _numbers(name, sums))
        self._handed_out = {name: arm.sums() for name, arm in self._arms.items()}  # it was, before the restart

    def _recall_settings(self, remembered: Mapping[str, Any]) -> None:
        numbers = self._policy.numbers
        known = {n: v for n, v in remembered.items() if n in numbers and not numbers[n].fixed and not numbers[n].problem(n, v)}
        self._policy.values.update(known)
        enabled = remembered.get("enabled", {})
        kept = {name: bool(enabled.get(name, True)) for name in self._arms}
        self._enable(kept if any(kept.values()) else dict.fromkeys(kept, True))

    def succeed(self, before: Self) -> None:
        kept = ("window", "scorer", "features", "key", "missing_reward")
        if all(getattr(before.options, name) == getattr(self.options, name) for name in kept):
            self._answers, self._stays = before._answers, before._stays
            if self._answers.missed is not None:
                self._answers.missed = self._missed

    def hand_out(self) -> Learned:
        since: dict[str, Array] = {}
        for name, arm in self._arms.items():
            now = arm.sums()
            changed = added(now, self._handed_out.get(name, _NOTHING), -1.0)
            self._handed_out[name] = now
            if changed.any():
                since[name] = changed
        return Learned(self._resets, since)

    def take_in(self, everyone: Learned) -> None:
        if everyone.era < self._resets:
            return  # of before it was forgotten
        if everyone.era > self._resets:
            self._forget(everyone.era)
        for name, arm in self._arms.items():
            theirs, now = everyone.sums.get(name, _NOTHING), arm.sums()
            handed_out = self._handed_out.get(name, _NOTHING)
            if theirs[1] < handed_out[1]:
                logger.warning(
                    "router '%s': of %d rewards of '%s' the store knows %d", self.name, handed_out[1], name, theirs[1]
                )
            everything = added(theirs, added(now, handed_out, -1.0))
            if not np.array_equal(everything, now):
                self._take(arm, everything)
            self._handed_out[name] = theirs

    def _features(self, value: Any, name: str) -> Array:
        """Return a request's features with a constant 1 behind them.

        Raises:
            InvalidRequest: it has none, or others than the requests before it.
        """
        given = value.get(name) if isinstance(value, Mapping) else None
        if given is None:
            raise InvalidRequest(f"'{name}' is not there, by which router '{self.name}' decides")
        try:
            return features_of(given, self._size)
        except ValueError as error:
            raise InvalidRequest(f"'{name}', by which router '{self.name}' decides, {error}") from None

    def _stay(self, value: Any, context: Context, features: Array | None) -> Arm:
        """Return the arm that a caller stays with, or stays with from now on."""
        assert self._key is not None
        assert self.host is not None  # it serves
        key = self._key(value, context)
        if key is None:
            return self._policy.choose(self._enabled, features)
        now = self.host.now()
        arm = self._arms.get(self._stays.find(key, now) or "")
        if arm is None or not arm.enabled:
            arm = self._policy.choose(self._enabled, features)
            self._stays.note(key, arm.name, now)
        return arm

    def _of_request(self, record: Feedback) -> Receipt:
        if record.reward is not None:
            reward = self._checked(record.reward)  # first: what is passed on to another worker cannot be refused any more
        elif self._scorer is None:
            raise InvalidRequest(f"router '{self.name}' has no scorer that could compare a truth: send a reward")
        assert self.host is not None  # it serves
        answered = self._answers.find(record.id, self.host.now())
        if answered is None or answered.variant not in self._arms:
            self._answers.unknown += 1
            return Receipt.UNKNOWN
        if answered.unseen and record.reward is not None:
            return Receipt.UNUSED
        if record.variant and record.variant != answered.variant:
            raise InvalidRequest(f"request '{record.id:.100}' was answered by '{answered.variant}', not by '{record.variant}'")
        if answered.learned:
            self._answers.duplicates += 1
            return Receipt.DUPLICATE
        forgotten = record.reward is None and answered.answer is None
        if forgotten or (self._policy.contextual and answered.features is None):
            self._answers.unknown += 1  # the window's bytes were needed for others
            return Receipt.UNKNOWN
        if record.reward is None:
            assert self._scorer is not None  # as seen
            try:
                reward = self._clip(self._scorer(answered.answer, record.truth))
            except ServingGraphError as error:
                raise error.at(self.name) from error.__cause__
        self._observe(self._arms[answered.variant], reward, answered.features)
        self._answers.learned(answered)
        return Receipt.TAKEN

    def _missed(self, answered: Answered) -> None:
        """Learn from a request whose feedback has not come in time."""
        assert self.options.missing_reward is not None  # or nobody is told
        arm = self._arms.get(answered.variant)
        if arm is not None and (answered.features is not None or not self._policy.contextual):
            self._assume(arm, self.options.missing_reward, answered.features)

    def _assume(self, arm: Arm, reward: float, features: Array | None) -> None:
        """Learn a reward that nobody gave, where the features fit those that were learned from."""
        if features is None or self._size in (None, features.size):
            self._observe(arm, float(reward), features)

    def _observe(self, arm: Arm, reward: float, features: Array | None) -> None:
        assert self.host is not None  # it serves
        if features is not None:
            self._sized(features.size)
        arm.observe(reward, features)
        self.host.keep()

    def _sized(self, size: int) -> None:
        """Hold features against those that were learned from; the first of them say how many there are.

        Raises:
            InvalidRequest: there are more, or fewer.
        """
        if self._size is None:
            self._size = size
        elif self._size != size:
            raise InvalidRequest(f"router '{self.name}' has learned from {self._size - 1} features, these are {size - 1}")

    def _checked(self, reward: float) -> float:
        low, high = self._policy.rewards
        if reward not in self._policy.rewards:
            where = f"from {low:g} to {high:g} (its reward_range)" if self._policy.rewards.bounded else "up to 1e100"
            raise InvalidRequest(f"router '{self.name}' takes rewards {where}, got {reward:g}")
        return reward

    def _clip(self, reward: float) -> float:
        """Return the nearest reward in the range: an answer that is far off must count, and as nothing worse than bad.

        Raises:
            StepFailed: the range has no end that could be the nearest.
        """
        rewards = self._policy.rewards
        if reward in rewards:
            return reward
        if not rewards.bounded:
            raise StepFailed(f"the scorer gave {reward:g}, which is no reward; with a 'reward_range' it would be the lowest")
        self._clipped += 1
        return rewards.high if reward > rewards.high else rewards.low

    def _checked_enabled(self, enabled: Any) -> dict[str, bool]:
        if not isinstance(enabled, Mapping) or any(type(value) is not bool for value in enabled.values()):
            raise InvalidRequest("'enabled' is a mapping of branch to true or false")
        for name in enabled:
            if name not in self._arms:
                raise InvalidRequest(f"'enabled' names '{name}', which is no branch: {', '.join(self._arms)}")
        merged = {name: enabled.get(name, arm.enabled) for name, arm in self._arms.items()}
        if not any(merged.values()):
            raise InvalidRequest("at least one branch stays enabled")
        return merged

    def _enable(self, enabled: Mapping[str, bool]) -> None:
        for name, arm in self._arms.items():
            arm.enabled = enabled[name]
        self._enabled = tuple(arm for arm in self._arms.values() if arm.enabled)

    def _forget(self, resets: int) -> None:
        for arm in self._arms.values():
            arm.clear()
        self._handed_out = {}
        self._size = None
        self._resets = resets

    def _take(self, arm: Arm, sums: Array) -> None:
        """Take up sums of before a restart, or of all workers.

        Raises:
            InvalidRequest: they are of other rewards, or of features of another size.
        """
        low, high = self._policy.rewards
        count, total = sums[1], sums[2]
        slack = 1e-6 * (count + 1)
        if count and not low * count - slack <= total <= high * count + slack:
            raise InvalidRequest(f"the mean reward of '{arm.name}' was {total / count:g}, outside of reward_range")
        size = self._policy.size_of(sums)
        if size is not None:
            self._sized(size)
        arm.take(sums)

    def _made_scorer(self, problems: list[Problem]) -> Scorer | None:
        if self.options.scorer is None:
            return None
        try:
            return scorer(self.options.scorer, self.base)
        except (ValueError, ImportProblem) as error:
            problems.append(Problem(str(error), node="scorer"))
            return None


def _numbers(name: str, saved: Any) -> Array:
    """Return saved sums as an array.

    Raises:
        InvalidRequest: they are none.
    """
    are_numbers = isinstance(saved, list) and len(saved) >= len(_NOTHING) and all(type(n) in (int, float) for n in saved)
    if not are_numbers or min(saved[:2]) < 0:  # requests and rewards
        raise InvalidRequest(f"what '{name}' learned is no list of numbers")
    return np.array(saved, np.float64)
