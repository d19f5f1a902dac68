"""How records run beside each other, on a clock that the test moves; without a broker."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

from servinggraph.errors import DeadlineExceeded, InvalidRequest, Unavailable
from servinggraph.kafka import KafkaOptions
from servinggraph.protocols.kafka.pulse import Fenced, Pulse
from servinggraph.protocols.kafka.recent import Recent
from servinggraph.protocols.kafka.records import Partition, Work
from servinggraph.protocols.kafka.report import Counts
from servinggraph.protocols.kafka.runner import Runner

LEAST = {"brokers": "h:1", "input": {"topics": ["in"], "group": "g"}, "output": {"topic": "out"}}


class Bench:
    """A runner, with an exchange that does what the test says and a list of what was delivered."""

    def __init__(self, **options):
        self.partition = Partition(("in", 0))
        self.answers = {}
        self.began, self.delivered, self.failures = [], [], []
        self.late = set()
        self.counts = Counts()
        exchange = SimpleNamespace(
            answer=self._answer, expired=lambda work: work.record.key in self.late, given_up=lambda work, error: None
        )
        addressing = SimpleNamespace(
            checked=lambda work: "out", answer=lambda work, answer: ("answer", work.record.key, answer),
            failure=lambda work, error: ("failure", work.record.key, error.code.value),
        )  # fmt: skip
        retry = {"attempts": 3, "first_ms": 1000.0}
        made = KafkaOptions.model_validate({**LEAST, "retry": retry, **options})
        self.runner = Runner(exchange, addressing, None, made, self.counts, self._deliver, self.failures.append)

    async def _answer(self, work):
        self.began.append(work.record.key)
        answer = self.answers.get(work.record.key, b"ok")
        answer = answer(work.attempts) if callable(answer) else answer
        if isinstance(answer, Exception):
            raise answer
        if isinstance(answer, asyncio.Event):
            await answer.wait()
        return "ok"

    async def _deliver(self, work, outgoing):
        self.delivered.append(outgoing)

    def take(self, *keys):
        for key in keys:
            self.runner.take(Work(self.partition, SimpleNamespace(key=key, value=b"", headers=(), offset=0)))
        self.runner.go()


def test_a_key_s_records_run_one_after_the_other_and_other_keys_beside(run, manual_clock):
    async def main():
        bench = Bench()
        gate = bench.answers[b"a"] = asyncio.Event()
        bench.take(b"a", b"a", b"b", None)
        await manual_clock.settle()
        assert [b"a", b"b", None] == bench.began
        assert [b"b", None] == [key for _, key, _ in bench.delivered]
        gate.set()
        await manual_clock.settle()
        assert [b"a", b"b", None, b"a"] == bench.began
        assert 4 == len(bench.delivered)

    run(main())


def test_no_more_run_than_may(run, manual_clock):
    async def main():
        bench = Bench(max_in_flight=2)
        gates = [bench.answers.setdefault(bytes([i]), asyncio.Event()) for i in range(5)]
        bench.take(*(bytes([i]) for i in range(5)))
        await manual_clock.settle()
        assert (2, 3) == (bench.runner.running, bench.runner.waiting)
        for gate in gates:
            gate.set()
        await manual_clock.settle()
        assert 5 == len(bench.delivered)

    run(main())


def test_a_record_that_is_tried_again_keeps_its_key_waiting_and_leaves_its_place(run, manual_clock):
    async def main():
        bench = Bench(max_in_flight=1)
        bench.answers[b"a"] = lambda attempt: Unavailable("down") if attempt < 3 else b"ok"
        bench.take(b"a", b"a", b"b")
        await manual_clock.settle()
        assert [b"b"] == [key for _, key, _ in bench.delivered]
        await manual_clock.advance(6)  # at most one second, then two; for each of them
        assert [b"b", b"a", b"a"] == [key for _, key, _ in bench.delivered]
        assert 4 == bench.counts.retries

    run(main())


@pytest.mark.parametrize(
    ("error", "late", "attempts"),
    [(Unavailable("x"), False, 3), (InvalidRequest("x"), False, 1), (DeadlineExceeded("x"), False, 3), (DeadlineExceeded("x"), True, 1)],
)  # fmt: skip
def test_attempts_end_where_they_cannot_help(run, manual_clock, error, late, attempts):
    async def main():
        bench = Bench()
        bench.answers[b"a"] = lambda attempt: error
        if late:
            bench.late.add(b"a")
        bench.take(b"a")
        await manual_clock.advance(10)
        assert attempts == len(bench.began)
        assert [("failure", b"a", error.code.value)] == bench.delivered

    run(main())


def test_a_stop_waits_for_what_runs_and_begins_nothing_more(run, manual_clock):
    async def main():
        bench = Bench(max_in_flight=2)
        gate = bench.answers[b"a"] = asyncio.Event()
        bench.answers[b"r"] = lambda attempt: Unavailable("down")
        bench.take(b"a", b"r", b"a", b"c", b"d")
        await manual_clock.settle()
        ended = asyncio.ensure_future(bench.runner.drain(manual_clock.time() + 5, waiting=False))
        bench.partition.lanes.clear()
        await manual_clock.settle()
        assert not ended.done()
        gate.set()
        assert await ended
        assert 1 == bench.began.count(b"a")
        assert (0, 0) == (bench.runner.running, bench.runner.waiting)

    run(main())


def test_what_runs_longer_than_it_may_is_abandoned_and_not_delivered(run, manual_clock):
    async def main():
        bench = Bench()
        bench.answers[b"a"] = asyncio.Event()
        bench.take(b"a")
        await manual_clock.settle()
        ended = asyncio.ensure_future(bench.runner.drain(manual_clock.time() + 5, waiting=False))
        await manual_clock.advance(5)
        assert not await ended
        await bench.runner.abandon()
        assert ([], [], 0) == (bench.delivered, bench.failures, bench.runner.running)

    run(main())


def test_a_record_whose_partition_went_away_while_it_ran_is_not_delivered(run, manual_clock):
    async def main():
        bench = Bench()
        gate = bench.answers[b"a"] = asyncio.Event()
        bench.take(b"a")
        await manual_clock.settle()
        bench.partition.owned = False
        gate.set()
        await manual_clock.settle()
        assert [] == bench.delivered

    run(main())


def test_a_standstill_is_noticed_by_whatever_runs_first(run, manual_clock):
    async def main():
        pulse = Pulse(10.0)
        beating = asyncio.ensure_future(pulse.run())
        await manual_clock.advance(60)
        pulse.check()
        manual_clock._now += 11  # the process was stopped, and is let go on
        with pytest.raises(Fenced, match="stood still for 11"):
            pulse.check()
        await manual_clock.settle()
        with pytest.raises(Fenced):
            await beating

    run(main())


def test_a_request_is_known_while_it_runs_and_once_it_is_answered_but_not_after_it_failed():
    recent = Recent(2)
    assert recent.begin(b"1")
    assert not recent.begin(b"1")
    recent.forget_running()
    assert recent.begin(b"1")
    for name in (b"1", b"2", b"3"):
        recent.add(name)

    assert [True, False, False] == [recent.begin(id) for name in (b"1", b"2", b"3")]
