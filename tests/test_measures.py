"""What is measured for metrics: every duration in its size, whenever it is counted, and nothing kept for it."""

import asyncio
import weakref
from collections import Counter

from hypothesis import given, strategies as st

from servinggraph.context import Context
from servinggraph.measures import BOUNDS_NS, Durations, NodeDurations, Traffic

LONGEST = BOUNDS_NS[-1]
near_a_bound = st.builds(lambda bound, off: bound + off, st.sampled_from(BOUNDS_NS), st.integers(-1, 1))
durations = st.one_of(st.integers(0, 200_000), near_a_bound, st.integers(0, 2 * LONGEST))


class Failure(Exception):
    """One that a weak reference may be to."""


def size_of(ns):
    return next((size for size, bound in enumerate(BOUNDS_NS) if ns <= bound), len(BOUNDS_NS))


def check(found: Durations, expected):
    """Hold what was counted against all durations."""
    sizes = Counter(map(size_of, expected))
    assert found.counts == [sizes[size] for size in range(len(BOUNDS_NS) + 1)]
    assert found.ns == sum(expected)


@given(st.lists(st.tuples(st.lists(durations, min_size=1, max_size=9), durations, durations), max_size=5))
def test_a_batch_counts_each_wait_of_each_member(batches):
    node = NodeDurations()
    queued, waited, computed = [], [], []
    for ages, open_for, took in batches:
        began = 10 * LONGEST
        free, arrivals = began - open_for, [began - age for age in ages]
        node.add_batch(arrivals.copy(), free, began, began + took)
        queued += [max(free - arrived, 0) for arrived in arrivals]
        waited += [began - max(arrived, free) for arrived in arrivals]
        computed += [took] * len(ages)
    check(node.queue, queued)
    check(node.batch_wait, waited)
    check(node.compute, computed)


def test_a_batch_whose_members_have_all_left_counts_nothing():
    node = NodeDurations()
    node.add_batch([], 0, 5, 9)
    check(node.queue, [])
    check(node.batch_wait, [])
    check(node.compute, [])


def answered(traffic: Traffic, decode: int, run: int) -> Context:
    """Count a request, and return its context, by which its times are known."""
    context = Context()
    context.arrived = 1
    context.run_began = 1 + decode
    context.run_ended = 1 + decode + run
    traffic.succeeded(context)
    return context


def check_traffic(traffic: Traffic, contexts: list[Context]):
    assert traffic.answered == len(contexts)
    check(traffic.whole, [context.sent - context.arrived for context in contexts])
    check(traffic.decode, [context.run_began - context.arrived for context in contexts])
    check(traffic.encode, [context.sent - context.run_ended for context in contexts])


@given(st.lists(st.tuples(durations, durations, st.sampled_from(["", "read", "turn"])), max_size=20))
def test_requests_are_counted_exactly_whenever_somebody_asks(requests):
    async def main():
        traffic, contexts = Traffic(), []
        for decode, run, then in requests:
            contexts.append(answered(traffic, decode, run))
            if then == "read":  # in the turn in which it was answered
                check_traffic(traffic, contexts)
            elif then == "turn":
                await asyncio.sleep(0)
        check_traffic(traffic, contexts)
        await asyncio.sleep(0)
        check_traffic(traffic, contexts)

    asyncio.run(main())


def test_what_a_request_had_is_not_kept_beyond_its_turn():
    async def main():
        traffic = Traffic()
        context = answered(traffic, 1, 1)
        context.failure = failure = Failure()
        kept = weakref.ref(failure)
        del context, failure
        await asyncio.sleep(0)
        assert kept() is None
        assert traffic.answered == 1

    asyncio.run(main())


def test_the_access_log_is_told_at_once():
    async def main():
        lines = []
        traffic = Traffic(lambda *line: lines.append(line))
        context = answered(traffic, 1, 1)
        assert lines == [(context.sent, "ok", context.sent - context.arrived, context.id)]

    asyncio.run(main())
