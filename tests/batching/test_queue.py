"""The queue's decisions, with numbers for time."""

from __future__ import annotations

import random
import tracemalloc
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import pytest

from servinggraph.batching.queue import BatchQueue
from servinggraph.interfaces import BatchPolicy


@dataclass(eq=False)
class Request:
    rows: int = 1
    key: Hashable = "k"
    priority: int = 0
    deadline: float | None = None
    counts: bool = True
    gone: bool = False
    ballast: Any = None


def queue_of(**policy: Any) -> BatchQueue[Request]:
    return BatchQueue(BatchPolicy(**policy))


def put(queue: BatchQueue[Request], *requests: Request, now: float = 0.0, idle: bool = True) -> None:
    for request in requests:
        queue.put(request, now, idle=idle)


def rows(batch: list[Request]) -> list[int]:
    return [request.rows for request in batch]


def test_an_empty_queue_gives_nothing_and_plans_nothing() -> None:
    queue = queue_of()
    assert [] == queue.take(0.0)
    assert queue.next_event(busy=False) is None
    assert not queue.waiting
    assert [] == queue.expire(1e9)


def test_a_request_that_finds_the_node_idle_leaves_at_once_whatever_the_delay() -> None:
    queue = queue_of(max_delay_ms=10)
    only = Request()
    put(queue, only)
    assert 0.0 == queue.next_event(busy=False)
    assert [only] == queue.take(0.0)


def test_a_request_that_finds_the_node_busy_waits_for_company_until_the_delay_is_over() -> None:
    queue = queue_of(max_delay_ms=10)
    only = Request()
    put(queue, only, now=1.0, idle=False)
    assert [] == queue.take(1.009)
    assert queue.next_event(busy=False) == pytest.approx(1.010)
    assert [only] == queue.take(1.0101)


def test_the_delay_counts_from_the_oldest_request() -> None:
    queue = queue_of(max_delay_ms=10)
    first, second = Request(), Request()
    put(queue, first, now=0.0, idle=False)
    put(queue, second, now=0.009, idle=False)
    assert [first, second] == queue.take(0.010)


def test_wait_when_idle_makes_an_idle_node_wait_as_triton_does() -> None:
    queue = queue_of(max_delay_ms=10, wait_when_idle=True)
    put(queue, Request())
    assert [] == queue.take(0.009)
    assert [1] == rows(queue.take(0.010))


def test_a_full_batch_does_not_wait_for_the_delay() -> None:
    queue = queue_of(max_rows=4, max_delay_ms=10)
    put(queue, *(Request() for _ in range(5)), idle=False)
    assert [1, 1, 1, 1] == rows(queue.take(0.0))
    assert [] == queue.take(0.0)


def test_a_batch_that_the_next_request_does_not_fit_in_is_full() -> None:
    queue = queue_of(max_rows=4, max_delay_ms=10)
    put(queue, Request(3), Request(2), idle=False)
    assert [3] == rows(queue.take(0.0))


def test_nothing_overtakes_a_request_that_is_too_large_for_the_rest_of_a_batch() -> None:
    queue = queue_of(max_rows=4)
    put(queue, Request(3), Request(2), Request(1))
    assert [3] == rows(queue.take(0.0))
    assert [2, 1] == rows(queue.take(0.0))


def test_a_preferred_size_leaves_at_once_and_the_rest_waits() -> None:
    queue = queue_of(max_rows=8, preferred_rows=[4], max_delay_ms=10)
    put(queue, *(Request() for _ in range(3)), idle=False)
    assert [] == queue.take(0.0)
    put(queue, Request(), Request(), idle=False)
    # Triton sends what is there once the largest preferred size is reached, at best exactly that.
    assert 4 == sum(rows(queue.take(0.0)))
    assert [] == queue.take(0.0)


def test_the_largest_preferred_size_that_can_be_reached_is_chosen() -> None:
    queue = queue_of(max_rows=16, preferred_rows=[2, 4, 16], max_delay_ms=10)
    put(queue, *(Request() for _ in range(7)), idle=False)
    assert 4 == sum(rows(queue.take(0.0)))
    assert 2 == sum(rows(queue.take(0.0)))
    assert [] == queue.take(0.0)


def test_a_preferred_size_counts_only_where_requests_add_up_to_it_exactly() -> None:
    queue = queue_of(max_rows=16, preferred_rows=[4, 16], max_delay_ms=10)
    put(queue, Request(3), Request(3), idle=False)
    assert [] == queue.take(0.0)
    assert [3, 3] == rows(queue.take(0.010))


def test_a_request_beyond_the_largest_preferred_size_leaves_at_once() -> None:
    queue = queue_of(max_rows=16, preferred_rows=[4], max_delay_ms=10)
    put(queue, Request(9), idle=False)
    assert [9] == rows(queue.take(0.0))


def test_after_the_delay_a_batch_takes_all_there_is_room_for() -> None:
    queue = queue_of(max_rows=8, preferred_rows=[4], max_delay_ms=10)
    put(queue, *(Request() for _ in range(3)), idle=False)
    assert 3 == sum(rows(queue.take(0.010)))


def test_requests_that_have_gone_count_for_no_preferred_size() -> None:
    queue = queue_of(max_rows=4, max_delay_ms=10)
    requests = [Request() for _ in range(4)]
    put(queue, *requests, idle=False)
    requests[1].gone = requests[2].gone = True
    assert [] == queue.take(0.0)
    assert [requests[0], requests[3]] == queue.take(0.010)
    assert 0 == len(queue)


def test_one_that_has_gone_makes_nobody_wait_on_an_idle_node() -> None:
    queue = queue_of(max_delay_ms=10)
    gone, here = Request(gone=True), Request(key="other")
    put(queue, gone, here)
    assert [here] == queue.take(0.0)
    assert not queue.waiting


def test_keys_never_meet_in_a_batch() -> None:
    queue = queue_of(max_rows=8)
    a, b, c = Request(key="a"), Request(key="b"), Request(key="a")
    put(queue, a, b, c)
    assert [a, c] == queue.take(0.0)
    assert [b] == queue.take(0.0)


def test_of_several_keys_that_are_due_the_one_waiting_longest_goes_first() -> None:
    queue = queue_of()
    requests = [Request(key=key) for key in "abcabc"]
    put(queue, *requests)
    assert ["a", "b", "c"] == [queue.take(0.0)[0].key for _ in range(3)]


def test_a_key_that_waits_for_company_holds_no_other_up() -> None:
    queue = queue_of(max_rows=2, max_delay_ms=10)
    put(queue, Request(key="a"), now=0.0, idle=False)
    put(queue, Request(key="b"), Request(key="b"), now=0.001, idle=False)
    assert ["b", "b"] == [request.key for request in queue.take(0.001)]
    assert [] == queue.take(0.001)


def test_higher_priority_is_served_first_and_fills_up_with_lower() -> None:
    queue = queue_of(max_rows=3, priorities=3)
    low, middle, high = (Request(priority=priority) for priority in (3, 2, 1))
    late_low = Request(priority=3)
    put(queue, low, middle, high, late_low)
    assert [high, middle, low] == queue.take(0.0)
    assert [late_low] == queue.take(0.0)


@pytest.mark.parametrize("priority", [0, -1, 4, 10**6])
def test_a_priority_out_of_range_takes_the_default_level(priority: int) -> None:
    queue = queue_of(priorities=3, default_priority=2, max_rows=1)
    odd, low, high = Request(priority=priority), Request(priority=3), Request(priority=1)
    put(queue, low, odd, high)
    assert [high, odd, low] == [queue.take(0.0)[0] for _ in range(3)]


def test_priority_goes_across_keys() -> None:
    queue = queue_of(priorities=2)
    low, high = Request(key="a", priority=2), Request(key="b", priority=1)
    put(queue, low, high)
    assert [high] == queue.take(0.0)


def test_a_low_priority_whose_delay_is_over_does_not_wait_again_for_a_fresh_high_one() -> None:
    queue = queue_of(priorities=2, max_delay_ms=10)
    low, high = Request(priority=2), Request(priority=1)
    put(queue, low, now=0.0, idle=False)
    put(queue, high, now=0.009, idle=False)
    assert queue.next_event(busy=False) == pytest.approx(0.010)
    assert [high, low] == queue.take(0.010)


def test_a_deadline_takes_a_request_out_before_it_runs() -> None:
    queue = queue_of()
    late, fine = Request(deadline=1.0), Request(deadline=2.0)
    put(queue, late, fine)
    assert 1.0 == queue.next_event(busy=True)
    assert [] == queue.expire(0.999)
    assert [late] == queue.expire(1.0)
    assert [fine] == queue.take(1.0)
    assert 0 == len(queue)


def test_a_queue_timeout_refuses_by_default() -> None:
    queue = queue_of(queue_timeout_ms=10)
    waiting = Request()
    put(queue, waiting)
    assert [waiting] == queue.expire(0.010)
    assert not queue.waiting


def test_the_earlier_of_deadline_and_queue_timeout_counts() -> None:
    queue = queue_of(queue_timeout_ms=10)
    assert 0.005 == queue.put(Request(deadline=0.005), 0.0, idle=True)
    assert queue.put(Request(deadline=5.0), 0.0, idle=True) == pytest.approx(0.010)
    assert queue_of().put(Request(), 0.0, idle=True) is None


def test_on_timeout_continue_serves_it_behind_all_unexpired_of_its_priority() -> None:
    queue = queue_of(queue_timeout_ms=10, on_timeout="continue", max_rows=1, priorities=2)
    old, low = Request(priority=1), Request(priority=2)
    put(queue, old, now=0.0)
    put(queue, low, now=0.005)
    assert [] == queue.expire(0.010)
    fresh = Request(priority=1)
    put(queue, fresh, now=0.010)
    assert 3 == len(queue)
    assert [fresh, old, low] == [queue.take(0.010)[0] for _ in range(3)]


def test_what_continues_still_leaves_at_its_deadline() -> None:
    queue = queue_of(queue_timeout_ms=10, on_timeout="continue")
    old = Request(deadline=0.050)
    put(queue, old)
    assert [] == queue.expire(0.010)
    assert 0.050 == queue.next_event(busy=True)
    assert [old] == queue.expire(0.050)
    assert 0 == len(queue)
    assert not queue.waiting


def test_what_continues_moves_back_only_once() -> None:
    queue = queue_of(queue_timeout_ms=10, on_timeout="continue")
    put(queue, Request())
    assert [] == queue.expire(0.010)
    assert queue.next_event(busy=True) is None
    assert [1] == rows(queue.take(0.010))


def test_the_queue_is_full_at_max_queue_and_room_again_after_a_batch() -> None:
    queue = queue_of(max_queue=2, max_rows=1)
    put(queue, Request(), Request())
    assert queue.full
    queue.take(0.0)
    assert not queue.full


def test_those_that_have_gone_take_no_room_in_a_full_queue() -> None:
    queue = queue_of(max_queue=2)
    requests = [Request(), Request()]
    put(queue, *requests)
    requests[0].gone = True
    assert not queue.full
    assert 1 == len(queue)
    assert [requests[1]] == queue.take(0.0)


def test_pieces_of_a_request_count_once() -> None:
    queue = queue_of(max_queue=1, max_rows=4)
    put(queue, Request(4), Request(4, counts=False), Request(1, counts=False))
    assert 1 == len(queue)
    assert [4] == rows(queue.take(0.0))
    assert 0 == len(queue)
    assert [4] == rows(queue.take(0.0))
    assert [1] == rows(queue.take(0.0))
    assert 0 == len(queue)


def test_members_without_rows_ride_along_and_run_alone() -> None:
    queue = queue_of(max_rows=2)
    put(queue, Request(0), Request(2), Request(0), Request(1))
    assert [0, 2, 0] == rows(queue.take(0.0))
    assert [1] == rows(queue.take(0.0))
    put(queue, Request(0))
    assert [0] == rows(queue.take(0.0))
    assert not queue.waiting


def test_members_without_rows_wait_for_the_delay_like_others() -> None:
    queue = queue_of(max_rows=2, max_delay_ms=10)
    put(queue, Request(0), Request(0), idle=False)
    assert [] == queue.take(0.0)
    assert [0, 0] == rows(queue.take(0.010))


def test_put_back_is_due_at_once_behind_others_and_without_a_queue_timeout() -> None:
    queue = queue_of(max_delay_ms=10, wait_when_idle=True, queue_timeout_ms=5, max_rows=1)
    waiting, again = Request(), Request(key="its own", counts=False, deadline=1.0)
    put(queue, waiting)
    queue.put_back(again, 0.0)
    assert 1 == len(queue)
    assert [waiting] == queue.take(0.0)
    assert [again] == queue.take(0.0)
    queue.put_back(again, 0.0)
    assert [] == queue.expire(0.5)
    assert [again] == queue.expire(1.0)


def test_busy_instances_need_no_wake_up_for_a_delay() -> None:
    queue = queue_of(max_delay_ms=10)
    put(queue, Request(), idle=False)
    assert queue.next_event(busy=True) is None
    assert queue.next_event(busy=False) == pytest.approx(0.010)


def test_clear_gives_everything_and_leaves_nothing() -> None:
    queue = queue_of(priorities=2, queue_timeout_ms=10, on_timeout="continue")
    requests = [Request(key=number % 3, priority=number % 2 + 1) for number in range(7)]
    put(queue, *requests)
    queue.expire(0.010)
    assert set(map(id, requests)) == set(map(id, queue.clear()))
    assert 0 == len(queue)
    assert not queue.waiting
    assert [] == queue.take(9.0)
    assert queue.next_event(busy=False) is None


def test_served_requests_with_far_deadlines_are_let_go_of() -> None:
    queue = queue_of(max_rows=8)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for _ in range(20_000):
            put(queue, Request(deadline=1e9, ballast=bytearray(10_000)))
            assert 1 == len(queue.take(0.0))
        grown = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert grown < 1_000_000


def test_requests_that_expire_behind_one_that_cannot_leave_are_let_go_of() -> None:
    queue = queue_of()
    put(queue, Request(), idle=False)  # its model hangs: nothing is taken any more
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for number in range(20_000):
            put(queue, Request(deadline=number + 0.5, ballast=bytearray(10_000)), now=float(number))
            assert 1 == len(queue.expire(number + 1.0))
        grown = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert grown < 1_000_000
    assert 1 == len(queue)


@pytest.mark.parametrize("seed", range(300))
def test_every_request_leaves_exactly_once_in_order_and_within_its_limits(seed: int) -> None:
    """Random traffic against what the queue promises, whatever the policy."""
    draw = random.Random(seed)
    max_rows = draw.choice([1, 2, 3, 8])
    policy = BatchPolicy(
        max_rows=max_rows,
        max_delay_ms=draw.choice([0, 5]),
        wait_when_idle=draw.random() < 0.3,
        preferred_rows=sorted(draw.sample(range(1, max_rows + 1), k=draw.randint(1, max_rows)))
        if draw.random() < 0.5
        else None,
        max_queue=draw.choice([3, 1000]),
        queue_timeout_ms=draw.choice([None, 7]),
        on_timeout=draw.choice(["reject", "continue"]),
        priorities=draw.choice([1, 3]),
    )
    queue: BatchQueue[Request] = BatchQueue(policy)
    inside: list[Request] = []
    since: dict[int, float] = {}
    now = 0.0
    for _ in range(120):
        now += draw.choice([0, 0, 0.001, 0.004])
        action = draw.random()
        if action < 0.55:
            request = Request(draw.randint(0, max_rows), draw.choice("ab"), draw.randint(0, 4))
            request.deadline = None if draw.random() < 0.7 else now + draw.choice([0.0, 0.003, 50])
            if queue.full:
                assert policy.max_queue == sum(not request.gone for request in inside)
                continue
            queue.put(request, now, idle=draw.random() < 0.5)
            inside.append(request)
            since[id(request)] = now
        elif action < 0.65 and inside:
            draw.choice(inside).gone = True
        else:
            for request in queue.expire(now):
                inside.remove(request)
                is_late = request.deadline is not None and request.deadline <= now
                assert is_late or (policy.on_timeout == "reject" and now >= since[id(request)] + 0.007)
            assert all(request.gone or request.deadline is None or request.deadline > now for request in inside)
            batch = queue.take(now)
            live = [request for request in inside if not request.gone]
            if batch:
                assert 1 == len({request.key for request in batch})
                assert sum(rows(batch)) <= max_rows
                assert not any(request.gone for request in batch)
                first_of_level: dict[int, list[int]] = {}
                for request in batch:
                    inside.remove(request)
                    if policy.queue_timeout_ms is None:
                        level = request.priority if 1 <= request.priority <= policy.priorities else policy.priorities
                        first_of_level.setdefault(level, []).append(live.index(request))
                assert list(first_of_level) == sorted(first_of_level)
                assert all(numbers == sorted(numbers) for numbers in first_of_level.values())
            elif policy.max_delay_ms == 0:
                assert not live
            moment = queue.next_event(busy=False)
            assert moment is not None or not any(not request.gone for request in inside)
            if not batch and moment is not None:
                assert moment > now
    rest: list[Request] = []
    now += 100
    rest.extend(queue.expire(now))
    while batch := queue.take(now):
        rest.extend(batch)
    assert {id(request) for request in inside if not request.gone} <= {id(request) for request in rest}
    assert len(rest) == len({id(request) for request in rest})
    assert not queue.waiting
    assert 0 == len(queue)
