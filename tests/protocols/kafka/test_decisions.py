"""What decides without I/O: which offset may be committed, which record may run, how much may be read, what is tried again."""

from __future__ import annotations

from hypothesis import given, strategies as st

from servinggraph.errors import ErrorCode, InvalidRequest, StepFailed, Unavailable
from servinggraph.protocols.kafka.budget import Budget
from servinggraph.protocols.kafka.lanes import Lanes
from servinggraph.protocols.kafka.offsets import Offsets
from servinggraph.protocols.kafka.status import KAFKA_OUTCOME, Outcome, outcome_of


@given(st.sets(st.integers(0, 60), min_size=1), st.randoms())
def test_a_position_never_passes_an_unfinished_record_and_ends_behind_the_last(offsets, random):
    kept = Offsets()
    for offset in sorted(offsets):
        kept.begin(offset)
    left = list(offsets)
    random.shuffle(left)
    passed = []
    while left:
        passed += kept.finish(left.pop())
        assert all(offset >= kept.position for offset in left)
        assert len(left) == kept.unfinished

    assert (sorted(offsets), max(offsets) + 1, 0) == (passed, kept.position, len(kept))


def test_a_position_is_to_be_committed_once():
    offsets = Offsets()
    assert offsets.to_commit is None
    offsets.begin(5)
    assert 5 == offsets.to_commit
    offsets.committed = 5
    assert offsets.to_commit is None
    offsets.finish(5)
    assert 6 == offsets.to_commit


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.randoms())
def test_a_lane_runs_its_items_one_at_a_time_in_their_order(keys, random):
    lanes = Lanes()
    running = [(key, number) for number, key in enumerate(keys) if lanes.enter(key, (key, number))]
    ended = []
    while running:
        assert len({key for key, _ in running}) == len(running)
        random.shuffle(running)
        item = running.pop()
        ended.append(item)
        following = lanes.leave(item[0])
        if following is not None:
            running.append(following)

    assert sorted(enumerate(keys)) == sorted((number, key) for key, number in ended)
    for key in set(keys):
        assert sorted(mine := [number for each, number in ended if each == key]) == mine


def test_reading_pauses_at_either_limit_and_goes_on_once_there_is_room_worth_it():
    budget = Budget(8, 1000)
    for _ in range(7):
        budget.take(10)
    assert not budget.full
    budget.take(10)
    assert (True, 0) == (budget.full, budget.room)
    assert [False, True, False] == [budget.give(10) for _ in range(3)]
    assert (False, 3) == (budget.full, budget.room)
    budget.take(2000)
    assert budget.full
    assert budget.give(2000)


def test_every_error_code_has_an_outcome():
    assert set(ErrorCode) == set(KAFKA_OUTCOME)


def test_what_may_pass_is_tried_again_and_what_cannot_is_given_up():
    assert [Outcome.RETRY, Outcome.GIVE_UP, Outcome.GIVE_UP] == [
        outcome_of(error("x")) for error in (Unavailable, InvalidRequest, StepFailed)
    ]


def test_a_step_that_says_that_a_retry_can_help_is_believed():
    error = StepFailed("the remote side is down")
    error.retryable = True

    assert Outcome.RETRY is outcome_of(error)
