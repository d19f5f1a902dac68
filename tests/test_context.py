"""What travels beside a request."""

from __future__ import annotations

import pytest

from servinggraph.context import Context, Headers


def test_headers_are_found_by_any_case_and_the_last_of_equal_names_wins() -> None:
    headers = Headers([(b"X-A", b"1"), (b"x-a", b"2"), (b"B", "ä".encode("latin-1"))])
    assert {"x-a": "2", "b": "ä"} == dict(headers)
    assert "2" == headers["X-a"]
    assert "X-A" in headers
    assert headers.get("nope") is None
    assert 2 == len(headers)


def test_a_context_of_one_request_shares_nothing_with_another() -> None:
    one, two = Context(), Context()
    one.response_parameters["p"] = 1
    assert {} == two.response_parameters
    assert {} == dict(two.headers) == dict(two.parameters)


def test_a_slot_is_given_back_at_once_where_nothing_runs() -> None:
    freed: list[int] = []
    Context().when_idle(lambda: freed.append(1))
    assert [1] == freed


def test_a_slot_is_given_back_once_when_the_last_work_has_ended() -> None:
    freed: list[int] = []
    context = Context()
    context.begin_work()
    context.begin_work()
    context.when_idle(lambda: freed.append(1))
    context.end_work()
    assert [] == freed
    context.end_work()
    assert [1] == freed
    context.begin_work()
    context.end_work()
    assert [1] == freed


def test_an_earlier_deadline_makes_a_view_and_a_later_one_does_not() -> None:
    context = Context(deadline=10)
    assert context.with_deadline(11) is context
    assert context.with_deadline(10) is context
    assert 9 == context.with_deadline(9).deadline
    assert 10 == context.deadline
    assert 3 == Context().with_deadline(3).deadline


@pytest.mark.parametrize("view_of", [lambda c: c.with_deadline(1).with_deadline(0.5), lambda c: c.for_piece()])
def test_a_view_has_the_identity_and_the_bookkeeping_of_its_whole(view_of: object) -> None:
    freed: list[int] = []
    whole = Context("id", deadline=5, headers={"h": "v"}, parameters={"p": 1}, priority=2, graph="g", runs_again=True)
    view = view_of(whole)  # type: ignore[operator]
    assert ("id", {"h": "v"}, {"p": 1}, 2, "g", True) == (
        view.id, view.headers, view.parameters, view.priority, view.graph, view.runs_again)  # fmt: skip
    view.begin_work()
    view.when_idle(lambda: freed.append(1))
    assert [] == freed
    view.end_work()
    assert [1] == freed
    whole.abandon()
    assert view.cancelled


def test_parameters_of_a_piece_stand_apart_and_those_behind_a_deadline_do_not() -> None:
    whole = Context()
    whole.with_deadline(1).response_parameters["a"] = 1
    whole.for_piece().response_parameters["b"] = 2
    assert {"a": 1} == whole.response_parameters


class Noted:
    def __init__(self) -> None:
        self.got: list[tuple[str, str, float]] = []

    def count(self, name: str, amount: float) -> None:
        self.got.append(("count", name, amount))

    def observe(self, name: str, value: float) -> None:
        self.got.append(("observe", name, value))


def test_what_a_step_counts_and_observes_goes_to_the_meter_through_every_view() -> None:
    outer, inner = Noted(), Noted()
    context = Context(deadline=5)
    context.count("unheard")
    context.observe("unheard", 1)
    context.meter = outer
    context.with_deadline(1).for_piece().count("hits")
    context.metered(inner).with_deadline(1).observe("score", 0.5)
    assert [("count", "hits", 1)] == outer.got
    assert [("observe", "score", 0.5)] == inner.got


def test_a_view_with_another_meter_shares_everything_else() -> None:
    context = Context("id", deadline=5)
    view = context.metered(Noted())
    view.response_parameters["a"] = 1
    assert ("id", 5, {"a": 1}) == (view.id, view.deadline, context.response_parameters)
