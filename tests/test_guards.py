"""Retry budget, breaker, rate: decisions with numbers for the time."""

from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from servinggraph.guards import Breaker, BreakerState, RetryBudget, TokenBucket, backoff_s


@given(st.lists(st.integers(0, 5), max_size=200), st.floats(0, 2), st.integers(1, 20))
def test_retries_never_exceed_their_share_and_burst(retries_wanted, share, burst):
    budget = RetryBudget(share, burst)
    retried = 0
    for number, wanted in enumerate(retries_wanted, 1):
        budget.request()
        retried += sum(budget.retry() for _ in range(wanted))
        assert retried <= burst + share * number + 1e-6


def test_a_budget_that_is_used_up_fills_again_with_requests():
    budget = RetryBudget(0.2, 1)
    assert (True, False) == (budget.retry(), budget.retry())
    for _ in range(5):
        assert not budget.retry()
        budget.request()
    assert budget.retry()


def test_pauses_double_up_to_the_longest_and_jitter_takes_any_part():
    assert [0.1, 0.2, 0.4, 0.5, 0.5] == [backoff_s(n, 0.1, 0.5, jitter=False) for n in range(1, 6)]
    assert 0.5 == backoff_s(10**6, 0.1, 0.5, jitter=False)
    parts = [backoff_s(3, 0.1, 0.5, jitter=True) for _ in range(200)]
    assert all(0 <= part <= 0.4 for part in parts)
    assert len(set(parts)) > 100


@given(st.lists(st.floats(0, 0.5), max_size=100), st.floats(0.5, 50), st.integers(1, 10))
def test_no_span_of_time_sees_more_calls_than_its_rate_and_the_burst(gaps, rate, burst):
    bucket = TokenBucket(rate, burst, 0.0)
    now, taken = 0.0, []
    for gap in gaps:
        now += gap
        if bucket.take(now):
            taken.append(now)
    for i, start in enumerate(taken):
        for j in range(i, len(taken)):
            assert j - i + 1 <= burst + (taken[j] - start) * rate + 1e-6


def test_a_breaker_opens_tries_again_and_closes():
    breaker = Breaker(failures=3, window=5, open_s=10, probes=1)
    for failed in (True, False, True, False):
        assert breaker.allows(0)
        breaker.failed(breaker.period, 0) if failed else breaker.worked(breaker.period)
    assert BreakerState.CLOSED is breaker.state
    breaker.failed(breaker.period, 1)
    assert (BreakerState.OPEN, False, 10.0) == (breaker.state, breaker.allows(1), breaker.retry_after(1))
    assert not breaker.allows(10.9)
    assert breaker.allows(11)
    assert not breaker.allows(11), "one probe at a time"
    breaker.failed(breaker.period, 12)
    assert not breaker.allows(21.9)
    assert breaker.allows(22)
    breaker.left(breaker.period)
    assert breaker.allows(22), "a probe whose caller left says nothing, and gives its turn back"
    breaker.worked(breaker.period)
    assert (BreakerState.CLOSED, True, 2) == (breaker.state, breaker.allows(22), breaker.opened)


def test_old_failures_leave_the_window():
    breaker = Breaker(failures=2, window=3, open_s=1, probes=1)
    period = breaker.period
    for _ in range(10):
        breaker.failed(period, 0)
        breaker.worked(period)
        breaker.worked(period)
    assert BreakerState.CLOSED is breaker.state
    breaker.failed(period, 0)
    breaker.failed(period, 0)
    assert BreakerState.OPEN is breaker.state


def test_calls_that_began_before_it_opened_change_nothing():
    breaker = Breaker(failures=1, window=1, open_s=1, probes=1)
    before = breaker.period
    breaker.failed(before, 0)
    for _ in range(2):  # open, then half open
        breaker.worked(before)
        breaker.failed(before, 0.5)
        breaker.left(before)
        breaker.left(before)
        assert 0.5 == breaker.retry_after(0.5) or BreakerState.HALF_OPEN is breaker.state
        breaker.allows(1)
    assert (BreakerState.HALF_OPEN, False, 1) == (breaker.state, breaker.allows(1), breaker.opened), "one probe, and it runs"
    breaker.worked(breaker.period)
    breaker.failed(before, 2)
    assert BreakerState.CLOSED is breaker.state


@pytest.mark.parametrize("probes", [1, 3])
def test_as_many_probes_as_allowed_try_at_a_time(probes):
    breaker = Breaker(failures=1, window=1, open_s=1, probes=probes)
    breaker.failed(breaker.period, 0)
    assert probes == sum(breaker.allows(2) for _ in range(10))
