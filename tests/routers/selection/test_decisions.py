"""What was decided for a request is found again, once for each use, within bounds."""

from __future__ import annotations

import tracemalloc

from hypothesis import given, strategies as st

from servinggraph.routers.selection import Decisions


def test_a_decision_is_claimed_once_for_each_use() -> None:
    decisions: Decisions[str] = Decisions()
    decisions.note("1", "a", 0)
    assert "a" == decisions.claim("1", "reward", 1)
    assert decisions.claim("1", "reward", 2) is None
    assert "a" == decisions.claim("1", "clicks", 3)
    assert (1, 0) == (decisions.duplicates, decisions.unknown)


def test_what_is_too_old_or_was_never_noted_is_unknown() -> None:
    decisions: Decisions[str] = Decisions(age_s=10)
    decisions.note("1", "a", 0)
    decisions.note("", "b", 0)
    assert "a" == decisions.find("1", 10)
    assert decisions.claim("1", "reward", 10.1) is None
    assert decisions.claim("", "reward", 0) is None
    assert decisions.claim("2", "reward", 0) is None
    assert (0, 3, 0) == (decisions.duplicates, decisions.unknown, len(decisions))


def test_an_id_that_comes_again_is_decided_anew_and_is_young_again() -> None:
    decisions: Decisions[str] = Decisions(size=2, age_s=10)
    decisions.note("1", "a", 0)
    assert "a" == decisions.claim("1", "reward", 0)
    decisions.note("2", "b", 1)
    decisions.note("1", "c", 2)
    decisions.note("3", "d", 3)
    assert decisions.find("2", 3) is None
    assert "c" == decisions.claim("1", "reward", 12)
    assert 0 == decisions.duplicates


def test_an_id_of_any_length_takes_little_memory() -> None:
    decisions: Decisions[str] = Decisions()
    tracemalloc.start()
    try:
        for number in range(20):
            decisions.note(f"{'x' * 1_000_000}{number}", str(number), 0)
        assert 100_000 > tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    for number in range(20):
        assert str(number) == decisions.find(f"{'x' * 1_000_000}{number}", 0)
        assert str(number) == decisions.claim(f"{'x' * 1_000_000}{number}", "reward", 0)
    assert decisions.find("x" * 1_000_000, 0) is None


@given(
    st.integers(1, 4),
    st.lists(st.tuples(st.sampled_from("nc"), st.sampled_from("abcdef"), st.integers(0, 3)), max_size=40),
)
def test_it_answers_as_a_plain_list_of_the_past_would(size: int, steps: list[tuple[str, str, int]]) -> None:
    decisions: Decisions[int] = Decisions(size=size, age_s=5)
    past: list[tuple[str, int, int]] = []
    claimed: set[int] = set()
    now = 0
    for number, (what, name, later) in enumerate(steps):
        now += later
        if what == "n":
            decisions.note(name, number, now)
            past = [entry for entry in past if entry[0] != name] + [(name, number, now)]
            past = past[-size:]
        else:
            past = [entry for entry in past if entry[2] >= now - 5]
            expected = next((entry[1] for entry in past if entry[0] == name and entry[1] not in claimed), None)
            assert expected == decisions.claim(name, "reward", now)
            if expected is not None:
                claimed.add(expected)
        assert len(decisions) <= size


def test_what_is_forgotten_is_told_by_age_and_by_number_but_not_what_is_replaced() -> None:
    told: list[str] = []
    noted: Decisions[str] = Decisions(2, 60, told.append)
    for name, decision in (("r", "replaced"), ("r", "first"), ("s", "second"), ("t", "third")):
        noted.note(name, decision, 0)
    assert ["first"] == told
    noted.forget(60)
    assert ["first"] == told
    noted.forget(61)
    assert (["first", "second", "third"], 0) == (told, len(noted))
