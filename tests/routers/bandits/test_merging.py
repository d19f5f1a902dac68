"""What workers learn adds up, whatever is lost, repeated or forgotten on the way."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
from hypothesis import given, settings, strategies as st

from servinggraph.interfaces import Feedback, Learned
from servinggraph.routers.bandit import Bandit
from servinggraph.routers.bandits import BanditOptions
from servinggraph.tensors import Signature


class Host:
    """Where a router runs, as far as it matters here."""

    def now(self):
        return 0.0

    def changed(self, who, why, before, after):
        raise AssertionError

    def keep(self):
        """Nothing is saved."""


class Sums:
    """The store's promise, in memory: era by era, each numbered addition once."""

    def __init__(self):
        self.era, self.sums, self.seen = 0, {}, {}

    def add(self, worker, number, learned):
        if learned.era > self.era:
            self.era, self.sums = learned.era, {}
        if learned.sums and number > self.seen.get(worker, 0):
            self.seen[worker] = number
            if learned.era == self.era:
                for name, numbers in learned.sums.items():
                    self.sums[name] = self.sums.get(name, np.zeros(4)) + numbers
        return Learned(self.era, {name: numbers.copy() for name, numbers in self.sums.items()})


class Worker:
    """A process: a router, and what it does not know to have arrived."""

    def __init__(self, name):
        self.name, self.number, self.unsent = name, 0, None
        self.router = Bandit("score", BanditOptions(policy="ucb1"), Path())
        self.router.signature({"a": Signature(), "b": Signature()})
        self.router.host = Host()

    def exchange(self, sums, how="fine"):
        if self.unsent is None:
            self.unsent = self.router.hand_out()
            self.number += 1
        if how == "lost":
            return
        everyone = sums.add(self.name, self.number, self.unsent)
        if how == "fine":
            self.unsent = None
            self.router.take_in(everyone)

    @property
    def era(self):
        return self.router.settings()["resets"]

    @property
    def counts(self):
        return {name: rewards["count"] for name, rewards in self.router.report()["rewards"].items()}


EVENTS = st.one_of(
    st.tuples(st.just("reward"), st.integers(0, 2), st.sampled_from("ab")),
    st.tuples(st.just("exchange"), st.integers(0, 2), st.sampled_from(["fine", "fine", "lost", "unanswered"])),
    st.tuples(st.just("forget"), st.integers(0, 2), st.just("")),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(EVENTS, max_size=60))
def test_in_the_end_everybody_knows_every_reward_of_the_last_era_once(events):
    sums, workers = Sums(), [Worker(name) for name in "xyz"]
    given_in = Counter()
    for what, who, how in events:
        worker = workers[who]
        if what == "reward":
            worker.router.feedback(Feedback(variant=how, reward=0.5))
            given_in[worker.era, how] += 1
        elif what == "exchange":
            worker.exchange(sums, how)
        else:
            worker.router.adjust({"resets": worker.era + 1})
    for _ in range(3):  # what was unsent, what came since, and what the others had
        for worker in workers:
            worker.exchange(sums)
    last = max(worker.era for worker in workers)
    wanted = {arm: given_in[last, arm] for arm in "ab"}
    assert [wanted] * 3 == [worker.counts for worker in workers]
