"""The `ab` router: each request goes to one of several variants, by weight, and a key stays with its variant."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Self

from pydantic import Field

from servinggraph.context import Context
from servinggraph.errors import GraphInvalid, InvalidRequest, Problem
from servinggraph.interfaces import Feedback, Receipt, RouterOptions, Selector
from servinggraph.routers.selection import Decisions, KeyReader, Rewards, Weights, key_reader, key_tensors, weights_problem
from servinggraph.routers.signatures import common_signature
from servinggraph.tensors import Signature

__all__ = ["Ab", "AbOptions"]

_METRICS: Final = 32
"""Most names of metrics that feedback brings: callers choose them."""


class AbOptions(RouterOptions):
    """One of several variants answers, chosen by weight."""

    weights: dict[str, float] = Field(description="Weight of each variant; only their ratios matter.")
    key: str | None = Field(
        None,
        description="Where the key is that keeps a caller with a variant: header:NAME, parameter:NAME, tensor:NAME, "
        "field:PATH or id. Requests without it, and all without this option, are spread by chance.",
    )
    salt: str | None = Field(
        None, description="Sets the assignment of keys apart from other routers'; by default the node's name."
    )


class Ab(Selector[AbOptions]):
    """Sends each request to one variant, and a sequence to the variant that its first request got.

    Which one answered stands in the response's parameters, `<node>.variant`. The weights can
    be changed while it serves; then only the keys move whose variant lost or won weight.
    """

    options_type = AbOptions
    decides_by_request = True

    def signature(self, branches: Mapping[str, Signature]) -> Signature:
        problems: list[Problem] = []
        self._names = dict.fromkeys(branches)
        reason = weights_problem(self.options.weights, branches)
        if reason is None and (missing := [name for name in branches if name not in self.options.weights]):
            reason = f"weights have none for {', '.join(missing)}; 0 sends it no request"
        if reason:
            problems.append(Problem(reason, node="weights"))
        self._key: KeyReader | None = None
        self.reads = key_tensors(self.options.key)
        if self.options.key is not None:
            try:
                self._key = key_reader(self.options.key)
            except ValueError as error:
                problems.append(Problem(str(error), node="key"))
        signature = common_signature(branches, problems)
        if problems:
            raise GraphInvalid(problems)
        self._set(self.options.weights)
        self._decisions = dict.fromkeys(branches, 0)
        self._noted: Decisions[str] = Decisions()
        self._rewards: dict[str, dict[str, Rewards]] = {}
        self._parameter = f"{self.name}.variant"
        return signature

    def choose(self, value: Any, context: Context) -> str:
        key = None if self._key is None else self._key(value, context)
        variant = self._weights.at_random() if key is None else self._weights.by_key(key)
        if context.sequence is not None:
            variant = context.sequence.stays(self.name, variant)
        self._decisions[variant] += 1
        context.response_parameters[self._parameter] = variant
        if context.id and not context.shadow:  # of a copy nobody saw the answer, so feedback is not for it
            assert self.host is not None  # it serves
            self._noted.note(context.id, variant, self.host.now())
        return variant

    def feedback(self, record: Feedback) -> Receipt:
        if record.reward is None or (record.variant and record.variant not in self._names):
            return Receipt.UNUSED
        if record.metric not in self._rewards and len(self._rewards) >= _METRICS:
            raise InvalidRequest(f"router '{self.name}' has feedback of {_METRICS} metrics already, and takes no more names")
        variant: str | None = record.variant
        if record.id:
            assert self.host is not None  # it serves
            now = self.host.now()
            if self._noted.find(record.id, now) is None:
                self._noted.unknown += 1
                return Receipt.UNKNOWN
            variant = self._noted.claim(record.id, record.metric, now)
            if variant is None:
                return Receipt.DUPLICATE
            if variant not in self._names:  # of before the graph was loaded anew
                return Receipt.UNKNOWN
        assert variant  # one of the two is there
        by_variant = self._rewards.setdefault(record.metric, {name: Rewards() for name in self._names})
        by_variant[variant].add(record.reward)
        return Receipt.TAKEN

    def knows(self, id: str) -> bool:
        assert self.host is not None  # it serves
        return self._noted.find(id, self.host.now()) is not None

    def describe(self) -> str:
        return "ab (" + ", ".join(f"{name} {share:.0%}" for name, share in self._weights.shares.items()) + ")"

    def settings(self) -> dict[str, Any]:
        return {"weights": dict(self._plain)}

    def adjust(self, changes: Mapping[str, Any]) -> None:
        for name in changes:
            if name not in ("weights", "revision"):
                raise InvalidRequest(f"'{name}' cannot be changed; 'weights' can")
        weights = changes.get("weights")
        if reason := weights_problem(weights, self._names):
            raise InvalidRequest(reason)
        assert weights is not None  # just seen
        self._set({**dict.fromkeys(self._names, 0.0), **weights})

    def succeed(self, before: Self) -> None:
        self._noted = before._noted
        for metric, by_variant in before._rewards.items():
            self._rewards[metric] = {name: by_variant.get(name, Rewards()) for name in self._names}

    def report(self) -> dict[str, Any]:
        report: dict[str, Any] = {"decisions": dict(self._decisions), "shares": dict(self._weights.shares)}
        if self._rewards or self._noted.unknown:
            report["feedback"] = {"duplicates": self._noted.duplicates, "unknown": self._noted.unknown}
            report["rewards"] = {
                metric: {name: rewards.plain() for name, rewards in by_variant.items()}
                for metric, by_variant in self._rewards.items()
            }
        return report

    def _set(self, weights: Mapping[str, float]) -> None:
        self._plain = dict(weights)
        salt = self.options.salt
        self._weights = Weights(weights, self.name if salt is None else salt)
