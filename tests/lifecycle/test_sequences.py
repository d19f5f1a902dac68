"""Decisions about sequences: numbers in, verdicts out."""

import pytest

from servinggraph.errors import Cancelled, DeadlineExceeded, InvalidRequest, LimitExceeded, Unavailable
from servinggraph.interfaces import SequencePolicy
from servinggraph.lifecycle.sequences import Place, SequenceTable


def a_table(**limits):
    return SequenceTable("g", SequencePolicy(**limits))


def arrive(table, id=7, now=0.0, **flags):
    place = Place(id, **flags)
    return place, table.arrive(place, now)


def started(table, id=7, now=0.0):
    """Start a sequence, and have its first request succeed."""
    place, verdicts = arrive(table, id, now, start=True)
    assert [(place, None)] == verdicts
    assert [] == table.finish(place, now)


def errors(verdicts):
    return [type(error) for _, error in verdicts]


def test_the_first_request_runs_at_once_and_the_next_when_it_has_ended():
    table = a_table()
    first, now = arrive(table, start=True)
    second, later = arrive(table)
    third, last = arrive(table, end=True)

    assert ([(first, None)], [], []) == (now, later, last)
    assert [(second, None)] == table.finish(first, 0)
    assert [(third, None)] == table.finish(second, 0)
    assert [] == table.finish(third, 0)
    assert 0 == len(table)


def test_an_unknown_sequence_must_be_started():
    with pytest.raises(
        InvalidRequest, match="inference request for sequence 7 to model 'g' must specify the START flag on the first"
    ):
        arrive(a_table())


def test_a_number_and_its_text_are_two_sequences():
    table = a_table()
    started(table, 5)
    with pytest.raises(InvalidRequest, match="START"):
        arrive(table, "5")


def test_kept_state_reaches_the_next_request_and_only_after_success():
    table = a_table()
    first, _ = arrive(table, start=True)
    first.turn.keep("n", {"a": 1})
    table.finish(first, 0)
    failing, _ = arrive(table)
    failing.turn.keep("n", {"a": 2})
    table.finish(failing, 0, failed=True)
    third, _ = arrive(table)

    assert {"a": 1} == third.turn.state("n")
    assert {} == third.turn.state("other")


def test_changing_what_a_turn_hands_out_changes_nothing_kept():
    table = a_table()
    first, _ = arrive(table, start=True)
    first.turn.keep("n", {"a": 1})
    table.finish(first, 0)
    second, _ = arrive(table)
    second.turn.state("n")["a"] = 2

    assert {"a": 1} == second.turn.state("n")


def test_a_start_that_fails_leaves_no_sequence():
    table = a_table()
    first, _ = arrive(table, start=True)
    second, _ = arrive(table)

    assert [InvalidRequest] == errors(table.finish(first, 0, failed=True))
    assert 0 == len(table)


def test_an_end_that_fails_leaves_the_sequence():
    table = a_table()
    started(table)
    last, _ = arrive(table, end=True)
    table.finish(last, 0, failed=True)

    assert 1 == len(table)
    assert [None] == [error for _, error in arrive(table, end=True)[1]]


def test_a_running_sequence_that_is_started_begins_anew_with_a_warning(caplog):
    table = a_table()
    first, _ = arrive(table, start=True)
    first.turn.keep("n", {"a": 1})
    table.finish(first, 0)
    again, verdicts = arrive(table, start=True)

    assert [(again, None)] == verdicts
    assert {} == again.turn.state("n")
    assert "graph 'g': sequence 7 starts anew; the one under way is ended" in caplog.text


def test_what_arrived_before_a_new_start_is_still_of_the_old_run():
    table = a_table()
    first, _ = arrive(table, start=True)
    first.turn.keep("n", {"a": 1})
    second, _ = arrive(table)
    again, _ = arrive(table, start=True)

    table.finish(first, 0)
    assert {"a": 1} == second.turn.state("n")
    assert [(again, None)] == table.finish(second, 0)
    assert {} == again.turn.state("n")


def test_what_follows_an_end_must_start():
    table = a_table()
    last, _ = arrive(table, start=True, end=True)
    behind, _ = arrive(table)
    new, _ = arrive(table, start=True)
    (refused, error), granted = table.finish(last, 0)

    assert (behind, InvalidRequest) == (refused, type(error))
    assert (new, None) == granted


def test_a_start_that_was_too_late_takes_its_followers_with_it():
    table = a_table()
    started(table)
    busy, _ = arrive(table)
    again, _ = arrive(table, start=True)
    follower, _ = arrive(table)

    assert [(again, DeadlineExceeded)] == [(place, type(error)) for place, error in table.expire(again, 1.0)]
    # It must not run on the state of the sequence before.
    assert [(follower, InvalidRequest)] == [(place, type(error)) for place, error in table.finish(busy, 1.0)]


def test_a_request_that_expires_while_waiting_leaves_the_sequence_as_it_was():
    table = a_table()
    started(table)
    busy, _ = arrive(table)
    late, _ = arrive(table)
    third, _ = arrive(table)

    assert [DeadlineExceeded] == errors(table.expire(late, 1.0))
    assert [(third, None)] == table.finish(busy, 1.0)


def test_an_idle_sequence_is_freed_after_its_time_and_not_before():
    table = a_table(idle_ms=500)
    started(table, 1, now=10.0)
    started(table, 2, now=10.2)
    assert 10.5 == table.next_idle_end()

    table.free_idle(10.49)
    assert 2 == len(table)
    table.free_idle(10.5)
    assert 1 == len(table)
    assert 10.7 == table.next_idle_end()
    with pytest.raises(InvalidRequest, match="START"):
        arrive(table, 1)


def test_a_request_keeps_its_sequence_from_being_idle():
    table = a_table(idle_ms=500)
    started(table, now=0.0)
    running, _ = arrive(table, now=0.4)
    assert table.next_idle_end() is None

    table.finish(running, 7.0)
    assert 7.5 == table.next_idle_end()


def test_more_sequences_than_there_are_places_wait_in_order():
    table = a_table(max=1, max_backlog=2)
    started(table, 1)
    second, verdicts = arrive(table, 2, start=True)
    third, _ = arrive(table, 3, start=True)
    assert ([], 2) == (verdicts, table.waiting)
    with pytest.raises(LimitExceeded, match="limit 'sequences.max' = 1, and 'sequences.max_backlog' = 2 wait"):
        arrive(table, 4, start=True)

    last, _ = arrive(table, 1, end=True)
    assert [(second, None)] == table.finish(last, 0)
    assert [(third, None)] == table.finish(second, 0, failed=True)
    assert 0 == table.waiting


def test_an_idle_sequence_makes_room_for_one_that_waits():
    table = a_table(max=1, idle_ms=500)
    started(table, 1)
    second, _ = arrive(table, 2, start=True)

    assert [(second, None)] == table.free_idle(0.5)


def test_the_smallest_timeout_of_a_waiting_sequence_is_that_of_all_of_it():
    table = a_table(max=1)
    started(table, 1)
    first, _ = arrive(table, 2, start=True)
    second, _ = arrive(table, 2)
    verdicts = table.expire(second, 1.0)

    assert [first, second] == [place for place, _ in verdicts]
    assert {"timeout of the corresponding sequence has been expired"} == {str(error) for _, error in verdicts}
    assert [Unavailable] * 2 == errors(verdicts)
    assert 0 == table.waiting


def test_requests_of_one_sequence_wait_up_to_the_limit():
    table = a_table(max_queue=1)
    arrive(table, start=True)
    arrive(table)
    with pytest.raises(LimitExceeded, match="1 requests of it wait already .limit 'sequences.max_queue'"):
        arrive(table)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_cancelling_a_request_cancels_those_of_its_sequence_that_wait(which):
    table = a_table()
    places = [arrive(table, start=True)[0], arrive(table)[0], arrive(table, end=True)[0]]
    other, _ = arrive(table, start=True)
    verdicts = table.cancel(places[which], 0)

    assert [place for place in places[1:] if place is not places[which]] == [place for place, _ in verdicts]
    assert {Cancelled} == set(errors(verdicts))
    # The run that begins behind it is another sequence.
    assert [(other, None)] == table.finish(places[0], 0, failed=which == 0)


def test_a_cancelled_sequence_keeps_nothing():
    table = a_table()
    running, _ = arrive(table, start=True)
    waiting, _ = arrive(table)
    running.turn.keep("n", {"a": 1})
    table.cancel(waiting, 0)
    table.finish(running, 0)

    assert 0 == len(table)


def test_cancelling_a_sequence_of_the_backlog_takes_it_out():
    table = a_table(max=1)
    started(table, 1)
    first, _ = arrive(table, 2, start=True)
    arrive(table, 2)

    assert [Cancelled] == errors(table.cancel(first, 0))
    assert (0, 1) == (table.waiting, len(table))


def test_nothing_new_starts_while_stopping_and_what_is_under_way_goes_on():
    table = a_table(max=1)
    started(table, 1)
    waiting, _ = arrive(table, 2, start=True)

    assert [(waiting, Unavailable)] == [(place, type(error)) for place, error in table.refuse_new()]
    with pytest.raises(Unavailable, match="the server is shutting down: sequence 3 cannot start any more"):
        arrive(table, 3, start=True)
    last, verdicts = arrive(table, 1, end=True)
    assert [(last, None)] == verdicts


def test_a_closed_table_refuses_all_and_forgets_all():
    table = a_table()
    running, _ = arrive(table, start=True)
    waiting, _ = arrive(table)

    assert [(waiting, Unavailable)] == [(place, type(error)) for place, error in table.close()]
    assert [] == table.finish(running, 0)
    assert 0 == len(table)
    with pytest.raises(Unavailable):
        arrive(table)
