"""Random schedules of sequences: arrivals, cancellations, failures, late requests, idle times.

Whatever comes in which order: every request is answered once, requests of a sequence run one
by one in order of arrival, each sees just what its predecessors kept, limits hold, and
nothing is left at the end.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import pytest
from hypothesis import given, strategies as st

from servinggraph.context import Context
from servinggraph.errors import InvalidRequest, ServingGraphError
from servinggraph.interfaces import SequencePolicy
from servinggraph.lifecycle.sequencer import Sequencer
from servinggraph.plan import Plan
from servinggraph.testing import ManualClock

IDLE_S = 0.2
Key = int | str
IDS: list[Key] = [1, "1", 2, "b"]


@dataclass
class Request:
    number: int
    key: Key
    start: bool
    end: bool
    seconds: float
    fails: bool
    timeout_s: float | None
    idle_s: float = 0.0
    outcome: str = ""


@dataclass
class Watch:
    """Runs requests, and holds what each of them sees against a model of its own.

    Attributes:
        began: numbers of the requests of each id that ran, in order.
        kept: what the sequence under way has kept; None where there is none.
        run: number of the start that it began with.
        started: number of the last start that was let in.
        run_of: the start that each request came behind.
        touched: when an id last had a request, or one ended.
    """

    loop: asyncio.AbstractEventLoop
    most: int
    running: dict[Key, int] = field(default_factory=dict)
    began: dict[Key, list[int]] = field(default_factory=dict)
    kept: dict[Key, list[int] | None] = field(default_factory=dict)
    run: dict[Key, int] = field(default_factory=dict)
    started: dict[Key, int] = field(default_factory=dict)
    run_of: dict[int, int | None] = field(default_factory=dict)
    touched: dict[Key, float] = field(default_factory=dict)

    def is_live(self, key: Key, run: int | None) -> bool:
        return self.kept.get(key) is not None and self.run[key] == run

    async def work(self, request: Request, context: Context) -> str:
        key, turn = request.key, context.sequence
        assert turn is not None
        assert (key, request.start, request.end) == (turn.id, turn.start, turn.end)
        assert key not in self.running, "two requests of a sequence at once"
        self.running[key] = request.number
        assert len(self.running) <= self.most
        self.began.setdefault(key, []).append(request.number)
        if request.start:
            self.kept[key], self.run[key] = [], request.number
        kept = turn.state("n").get("seen", [])
        assert self.kept.get(key) is not None, "a request ran without its sequence"
        assert self.kept[key] == kept
        assert self.run[key] == self.run_of.get(request.number, request.number if request.start else self.started.get(key))
        assert request.start or request.idle_s <= IDLE_S
        context.begin_work()  # work that goes on after a cancellation
        self.loop.call_later(request.seconds, self._ended, request, context)
        try:
            if request.seconds:
                await asyncio.sleep(request.seconds)
            if request.fails:
                raise InvalidRequest("failed")
        except asyncio.CancelledError:
            self.kept[key] = None
            raise
        except ServingGraphError:
            if request.start:
                self.kept[key] = None
            raise
        turn.keep("n", {"seen": [*kept, request.number]})
        if self.kept[key] is not None:  # it was not cancelled meanwhile
            self.kept[key] = None if request.end else [*kept, request.number]
        return "answer"

    def _ended(self, request: Request, context: Context) -> None:
        del self.running[request.key]
        self.touched[request.key] = self.loop.time()
        context.end_work()

    def let_in(self, request: Request) -> None:
        if request.start:
            self.started[request.key] = request.number
        self.run_of[request.number] = self.started.get(request.key)

    def refused(self, request: Request, error: ServingGraphError) -> None:
        """Check that a request had no sequence to belong to, if it is told so."""
        if "START flag" in str(error):
            assert not request.start
            run = self.run_of.get(request.number, self.started.get(request.key))
            if request.idle_s >= IDLE_S:
                self.kept[request.key] = None  # its sequence ended of itself
            assert not self.is_live(request.key, run), "a request was taken for a stranger"


ARRIVAL = st.builds(
    lambda *fields: ("arrive", *fields),
    st.sampled_from(IDS),
    st.sampled_from([True, False, False, False]),
    st.sampled_from([True, False, False, False]),
    st.sampled_from([0.0, 0.01, 0.05]),
    st.sampled_from([True, False, False, False, False]),
    st.sampled_from([None, None, None, 0.02, 0.08]),
)
CANCEL = st.tuples(st.just("cancel"), st.integers(0, 30))
ADVANCE = st.tuples(st.just("advance"), st.sampled_from([0.0, 0.005, 0.02, 0.1, 0.3]))
SCHEDULES = st.lists(st.one_of(ARRIVAL, ARRIVAL, ARRIVAL, CANCEL, ADVANCE), min_size=1, max_size=40)
LIMITS = st.fixed_dictionaries(
    {"max": st.sampled_from([1, 2, 10]), "max_backlog": st.sampled_from([0, 1, 10]), "max_queue": st.sampled_from([1, 3, 50])}
)


async def play(clock, schedule, limits):
    loop = asyncio.get_running_loop()
    watch = Watch(loop, limits["max"])
    sequencer = Sequencer(Plan("g", "1", {}, None, (), ""), SequencePolicy(idle_ms=IDLE_S * 1e3, **limits), watch.work, None)
    requests, tasks = [], []

    async def send(request):
        parameters = {"sequence_id": request.key, "sequence_start": request.start, "sequence_end": request.end}
        deadline = None if request.timeout_s is None else loop.time() + request.timeout_s
        request.idle_s = loop.time() - watch.touched.get(request.key, loop.time())
        watch.touched[request.key] = loop.time()
        try:
            request.outcome += await sequencer.run(request, Context(parameters=parameters, deadline=deadline))
        except ServingGraphError as error:
            request.outcome += "error"
            watch.refused(request, error)

    for kind, *what in schedule:
        if kind == "arrive":
            requests.append(Request(len(requests), *what))
            tasks.append(asyncio.ensure_future(send(requests[-1])))
            await asyncio.sleep(0)
            if not tasks[-1].done() or requests[-1].number in watch.began.get(requests[-1].key, []):
                watch.let_in(requests[-1])
        elif kind == "advance":
            await clock.advance(what[0])
        elif what[0] < len(tasks) and not tasks[what[0]].done():
            request = requests[what[0]]
            tasks[what[0]].cancel()
            # Also one that waits takes its sequence with it, if that is the one under way.
            if watch.is_live(request.key, watch.run_of[request.number]):
                watch.kept[request.key] = None
    await clock.advance(5)
    for request, task in zip(requests, tasks, strict=True):
        assert task.done()
        assert request.outcome in ("answer", "error") or task.cancelled()
        assert task.cancelled() or task.exception() is None, task.exception()
    assert all(numbers == sorted(numbers) for numbers in watch.began.values())
    assert (0, {}) == (len(sequencer), watch.running)


@pytest.mark.timeout(3600)
@given(SCHEDULES, LIMITS)
def test_sequences_are_right_whatever_happens(schedule, limits):
    clock = ManualClock()
    clock.run(play(clock, schedule, limits))
