"""The `champion` router: the champion answers, challengers get a copy of the request and are compared to it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import isfinite
from random import random
from time import perf_counter_ns
from typing import Any, Final

import numpy as np
import orjson
from pydantic import Field
from xxhash import xxh3_64_intdigest

from servinggraph.concurrency import WorkerThreads
from servinggraph.context import Context
from servinggraph.errors import GraphInvalid, InvalidRequest, Problem, nearest
from servinggraph.executor.wiring import read_only
from servinggraph.interfaces import Handler, Learned, Router, RouterHost, RouterOptions
from servinggraph.routers.bandits.arms import added
from servinggraph.routers.selection import KeyReader, key_reader, key_tensors
from servinggraph.routers.shadow import Comparison, ComparisonOptions, Copy, Lane, Record, ShadowOptions
from servinggraph.routers.shadow.holding import kept
from servinggraph.routers.signatures import common_signature
from servinggraph.statistics import is_late
from servinggraph.tensors import Array, Signature

__all__ = ["Champion", "ChampionOptions"]

_NOTHING: Final = np.zeros(0)
_SCALE: Final = 2.0**-53


class ChampionOptions(RouterOptions):
    """One branch answers, the others run on copies of its requests and are compared to it."""

    champion: str = Field(description="Branch that answers.")
    rate: float | dict[str, float] = Field(
        1.0, description="Share of the requests that challengers get a copy of, 0 to 1; or challenger to share."
    )
    key: str | None = Field(
        None,
        description="Where the key is that decides which requests are copied, so that those of one caller all are or none is: "
        "header:NAME, parameter:NAME, tensor:NAME, field:PATH or id. Requests without it are chosen by chance.",
    )
    salt: str | None = Field(None, description="Sets the choice by key apart from other routers'; by default the node's name.")
    compare: ComparisonOptions = Field(
        default_factory=ComparisonOptions, description="When a challenger's answer agrees with the champion's."
    )
    shadow: ShadowOptions = Field(default_factory=ShadowOptions, description="What each challenger may take.")
    examples: int = Field(
        20, ge=0, le=1000, description="Disagreements kept for the report, a fair sample of all, with first elements of the "
        "tensors; 0 for none, where requests are confidential."
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Roles:
    """Who does what; immutable, so a promotion is one assignment, and a request sees one state of it.

    Attributes:
        champion: the branch that answers.
        rates: each challenger's share of requests.
        chosen: the same for those above 0, with the seed of the hash of keys.
    """

    champion: str
    rates: Mapping[str, float]
    chosen: tuple[tuple[str, float, int], ...]


class Champion(Router[ChampionOptions]):
    """Lets the champion answer, and runs challengers on copies of its requests.

    A copy is taken by reference, begins when its request has been answered, and has a deadline
    and response parameters of its own (`context.shadow` tells a step that it runs for one). What
    becomes of it concerns nobody but the report. Requests that the champion fails, or whose caller
    leaves before it has answered, are not copied: there is nothing to compare, and an overload must
    not double itself. The answer and its value are read-only to all who get them.

    Which branch answered stands in the response's parameters, `<node>.variant`.
    """

    options_type = ChampionOptions
    decides_by_request = True
    detached = True

    def signature(self, branches: Mapping[str, Signature]) -> Signature:
        problems: list[Problem] = []
        self._names = tuple(branches)
        options = self.options
        if len(branches) < 2:
            problems.append(Problem("a champion needs a challenger beside it: at least two branches", node="branches"))
        if options.champion not in branches:
            text = f"'champion' names '{options.champion}', which is no branch{nearest(options.champion, self._names)}"
            problems.append(Problem(text, node="champion"))
        rates = self._rates_of(options.rate, options.champion)
        missing = [name for name in self._names if name not in rates and name != options.champion]
        reason = self._rates_problem(rates, options.champion)
        if reason is None and missing:
            reason = f"'rate' has none for {', '.join(missing)}; 0 gives it no copy"
        if reason:
            problems.append(Problem(reason, node="rate"))
        self._key: KeyReader | None = None
        self.reads = key_tensors(self.options.key)
        if options.key is not None:
            try:
                self._key = key_reader(options.key)
            except ValueError as error:
                problems.append(Problem(str(error), node="key"))
        self._compare = Comparison(options.compare, self.base, branches)
        problems.extend(self._compare.problems)
        signature = common_signature(branches, problems)
        if problems:
            raise GraphInvalid(problems)
        self._roles = self._made_roles(options.champion, rates)
        self._lanes: dict[str, Lane] = {}
        self._records: dict[tuple[str, str], Record] = {}
        self._resets = 0
        self._handed_out: dict[str, Array] = {}
        self._decisions = dict.fromkeys(self._names, 0)
        self._failures = dict.fromkeys(self._names, 0)
        self._threads: WorkerThreads | None = None
        self._parameter = f"{self.name}.variant"
        return signature

    async def start(self, host: RouterHost) -> None:
        await super().start(host)
        self._loop = asyncio.get_running_loop()
        self._threads = WorkerThreads(1, f"{self.name}-compare")
        self._threads.start()
        for name in self._names:
            self._lanes[name] = Lane(f"{self.name}.{name}", self.options.shadow, self._compare, self._threads, host.keep)

    def let_go(self) -> None:
        for lane in self._lanes.values():
            lane.let_go()

    async def stop(self) -> None:
        self.let_go()
        if self._lanes:
            await asyncio.gather(*(lane.ended() for lane in self._lanes.values()))
        if self._threads is not None:
            self._threads.stop()

    async def route(self, value: Any, context: Context, branches: Mapping[str, Handler]) -> Any:
        roles = self._roles
        champion = roles.champion
        self._decisions[champion] += 1
        context.response_parameters[self._parameter] = champion
        began = perf_counter_ns()
        try:
            answer = await branches[champion](value, context)
        except Exception:
            self._failures[champion] += 1
            raise
        except asyncio.CancelledError:
            self._failures[champion] += is_late(context.deadline, self._loop.time())  # or the caller has left
            raise
        took = perf_counter_ns() - began
        answer = read_only(answer)  # also where nothing is copied: a step behind must fail always or never
        key = None if self._key is None else self._key(value, context)
        copies = [
            (name, Copy(kept(value), context, kept(answer), took, branches[name], self._record(champion, name)))
            for name, rate, seed in roles.chosen
            if rate >= 1 or _draw(key, seed) < rate
        ]
        if copies:
            context.when_answered(partial(self._offer, copies))
        return answer

    def _offer(self, copies: Sequence[tuple[str, Copy]]) -> None:
        # In the next turn of the loop: in this one the answer is encoded and sent.
        for name, copy in copies:
            self._loop.call_soon(self._lanes[name].offer, copy)

    def _record(self, champion: str, challenger: str) -> Record:
        record = self._records.get((champion, challenger))
        if record is None:
            record = self._records[champion, challenger] = Record(self.options.examples)
        return record

    def describe(self) -> str:
        rates = ", ".join(f"{name} {rate:.0%}" for name, rate in self._roles.rates.items())
        return f"champion ({self._roles.champion}; shadows: {rates})"

    def settings(self) -> dict[str, Any]:
        return {"champion": self._roles.champion, "rate": dict(self._roles.rates), "resets": self._resets}

    def adjust(self, changes: Mapping[str, Any]) -> None:
        for name in changes:
            if name not in ("champion", "rate", "resets"):
                raise InvalidRequest(f"'{name}' cannot be changed; 'champion', 'rate' and 'resets' can")
        before = self._roles
        champion = changes.get("champion", before.champion)
        if champion not in self._names:
            raise InvalidRequest(f"'champion' names {champion!r}, which is no branch{nearest(str(champion), self._names)}")
        rates = dict(before.rates)
        if champion != before.champion:
            # They change places: the one that was champion gets copies as the other one did.
            rates[before.champion] = rates.pop(champion)
        given = self._rates_of(changes.get("rate", {}), champion)
        if reason := self._rates_problem(given, champion):
            raise InvalidRequest(reason)
        resets = changes.get("resets", self._resets)
        if type(resets) is not int or resets < self._resets:
            text = f"'resets' counts how often everything was forgotten, {self._resets} times: one more forgets it now"
            raise InvalidRequest(f"{text}, got {resets!r}")
        self._roles = self._made_roles(champion, {**rates, **given})
        if resets != self._resets:
            self._forget(resets)

    def report(self) -> dict[str, Any]:
        champion = self._roles.champion
        challengers: dict[str, Any] = {}
        for name, rate in self._roles.rates.items():
            record = self._records.get((champion, name)) or Record(0)
            lane = self._lanes.get(name)
            now = {"running": lane.running, "waiting": lane.waiting, "bytes": lane.bytes} if lane else {}
            challengers[name] = {"rate": rate, "now": now, **record.report()}
        return {
            "champion": champion,
            "decisions": dict(self._decisions),
            "failures": dict(self._failures),
            "challengers": challengers,
        }

    def remember(self) -> dict[str, Any]:
        learned = {}
        for name, numbers in self._sums().items():
            places = np.flatnonzero(numbers)
            learned[name] = [places.tolist(), numbers[places].tolist()]
        return {**self.settings(), "learned": learned}

    def recall(self, remembered: Mapping[str, Any]) -> None:
        settings = self.settings()
        self._resets = int(remembered.get("resets", 0))
        if remembered.get("revision", 1):
            self.adjust({name: remembered[name] for name in settings if name in remembered})
        sums: dict[str, Array] = {}
        try:
            for name, (places, numbers) in remembered.get("learned", {}).items():
                sums[name] = np.zeros(max(places, default=0) + 1)
                sums[name][places] = numbers
            self._take(sums)
        except (TypeError, ValueError, IndexError, AttributeError) as error:
            raise InvalidRequest(f"what was learned is not what a champion router saves: {error!r}") from error
        self._handed_out = self._sums()  # it was, before the restart

    def hand_out(self) -> Learned:
        now = self._sums()
        since = {name: added(numbers, self._handed_out.get(name, _NOTHING), -1.0) for name, numbers in now.items()}
        self._handed_out = now
        return Learned(self._resets, {name: numbers for name, numbers in since.items() if numbers.any()})

    def take_in(self, everyone: Learned) -> None:
        if everyone.era < self._resets:
            return  # of before it was forgotten
        if everyone.era > self._resets:
            self._forget(everyone.era)
        everything = dict(everyone.sums)
        for name, numbers in self._sums().items():
            since = added(numbers, self._handed_out.get(name, _NOTHING), -1.0)
            everything[name] = added(everything.get(name, _NOTHING), since)
        self._handed_out = dict(everyone.sums)
        self._take(everything)

    def _sums(self) -> dict[str, Array]:
        """Return all counts; a name is a JSON list of champion, challenger, and what is counted."""
        return {
            orjson.dumps([*pair, *place]).decode(): numbers
            for pair, record in self._records.items()
            for place, numbers in record.sums().items()
        }

    def _take(self, sums: Mapping[str, Array]) -> None:
        """Make the records those of all counts; of branches that there are not here any more, or not yet, nothing is kept."""
        by_pair: dict[tuple[str, str], dict[tuple[str, ...], Array]] = {pair: {} for pair in self._records}
        for name, numbers in sums.items():
            champion, challenger, *place = map(str, orjson.loads(name))
            if champion in self._names and challenger in self._names:
                by_pair.setdefault((champion, challenger), {})[tuple(place)] = numbers
        for pair, counts in by_pair.items():
            self._record(*pair).take(counts)

    def _forget(self, resets: int) -> None:
        # What is under way is counted in the records of before, which nobody looks at any more.
        self._resets = resets
        self._records = {}
        self._handed_out = {}

    def _made_roles(self, champion: str, rates: Mapping[str, float]) -> _Roles:
        """Return roles with each other branch's rate, in the order of the branches."""
        salt = self.name if self.options.salt is None else self.options.salt
        challengers = {name: float(rates[name]) for name in self._names if name != champion}
        seeds = {name: xxh3_64_intdigest(f"{salt}\0{name}".encode()) for name in challengers}
        chosen = tuple((name, rate, seeds[name]) for name, rate in challengers.items() if rate > 0)
        return _Roles(champion, challengers, chosen)

    def _rates_of(self, rate: Any, champion: str) -> Mapping[Any, Any]:
        return rate if isinstance(rate, Mapping) else {name: rate for name in self._names if name != champion}

    def _rates_problem(self, rates: Mapping[Any, Any], champion: str) -> str | None:
        for name, rate in rates.items():
            if name not in self._names:
                return f"'rate' names '{name}', which is no branch{nearest(str(name), self._names)}"
            if name == champion:
                return f"'rate' names '{name}', which is the champion: it gets every request"
            if isinstance(rate, bool) or not isinstance(rate, int | float) or not isfinite(rate) or not 0 <= rate <= 1:
                return f"the rate of '{name}' is a number from 0 to 1, got {rate!r}"
        return None


def _draw(key: str | None, seed: int) -> float:
    """Return a number from 0 to below 1: by chance, or always the same one for a key."""
    if key is None:
        return random()  # noqa: S311  (chance, not a secret)
    return (xxh3_64_intdigest(key.encode("utf-8", "surrogateescape"), seed) >> 11) * _SCALE
