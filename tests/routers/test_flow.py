"""Choice, filter, fallback, cycle and map, alone and inside each other."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from servinggraph import Context, Graph, InvalidRequest, routers, signature, steps
from servinggraph.errors import DeadlineExceeded, GraphInvalid, GraphNotFound, LimitExceeded, StepFailed, Unavailable
from servinggraph.routers.selection.expressions import Expression

X = np.array([1.0, 2.0], np.float32)


def a(value):
    return {"y": value["x"]}


def b(value):
    return {"y": -value["x"]}


def fail(value):
    raise ConnectionError("down")


def a_graph(work, inputs=None, **options):
    return Graph("g", inputs or {"x": ("FP32", [-1])}, **options).to(work, "n").respond()


# Choice

CHOICE = {"when": {"a": "rows > 2 or get(headers, 'x-plan') == 'gold'", "b": "inputs['x'][0] < 0"}}


def test_the_first_branch_whose_condition_holds_answers_and_is_named():
    def c(value):
        return {"y": value["x"] * 0}

    with a_graph(routers.Choice({"a": a, "b": b, "c": c}, **CHOICE, default="c")).mock() as server:
        chosen = [
            server.infer(x=x, headers=headers).parameters["n.branch"]
            for x, headers in (([1, 1, 1], {}), ([-1], {"X-Plan": "gold"}), ([-1], {}), ([1], {}))
        ]
        assert ["a", "a", "b", "c"] == chosen
        assert {"a": 2, "b": 1, "c": 1} == server.router("n").report()["decisions"]


def test_where_no_condition_holds_the_declared_error_is_the_answer():
    otherwise = {"error": "not_found", "message": "no model for this plan"}
    with a_graph(routers.Choice({"a": a}, when={"a": "parameters['plan'] == 'gold'"}, otherwise=otherwise)).mock() as server:
        assert [1, 2] == server.infer(x=X, parameters={"plan": "gold"}).outputs["y"].tolist()
        with pytest.raises(GraphNotFound, match="node 'n': no model for this plan"):
            server.infer(x=X, parameters={"plan": "lead"})
        with pytest.raises(InvalidRequest, match="asks for 'plan', which this request does not have"):
            server.infer(x=X)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"when": {"a": "rows >"}, "default": "b"}, "no expression"),
        ({"when": {"a": "row > 1"}, "default": "b"}, "unknown name 'row'; did you mean 'rows'"),
        ({"when": {"a": "inputs.x > 1"}, "default": "b"}, "an attribute"),
        ({"when": {"a": "9 ** 9 ** 9"}, "default": "b"}, "a power"),
        ({"when": {"a": "[x for x in body]"}, "default": "b"}, "ListComp"),
        ({"when": {"a": "__import__('os')"}, "default": "b"}, "unknown name"),
        ({"when": {"a": "(lambda: 1)()"}, "default": "b"}, "Lambda|no function"),
        ({"when": {"z": "rows > 1", "a": "True"}, "default": "b"}, "'z', which is no branch"),
        ({"when": {"a": "rows > 1"}, "default": "z"}, "'default' is 'z'"),
        ({"when": {"a": "rows > 1"}}, "never chosen|needs 'default'"),
        ({"when": {"a": "rows > 1"}, "default": "a"}, "branch 'b' is never chosen"),
    ],
)
def test_choices_that_cannot_work_are_refused(options, text):
    with pytest.raises(GraphInvalid, match=text):
        a_graph(routers.Choice({"a": a, "b": b}, **options)).compile()


def test_a_router_that_decides_for_each_request_cannot_have_joined_ones():
    inside = routers.Chain({"choose": routers.Choice({"a": a, "b": b}, when={"a": "rows > 1"}, default="b")})
    for graph in (a_graph(steps_in(inside, batch=True)), a_graph(inside, batch={"max_rows": 8})):
        with pytest.raises(GraphInvalid, match="router 'n.choose' decides for each request"):
            graph.compile()


def steps_in(sketch, **options):
    return routers.Chain(dict(sketch.branches), **options)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("any(inputs['x'] > 1)", True),
        ("all(inputs['x'] > 1)", False),
        ("mean(inputs['x']) == 1.5", True),
        ("max(inputs['x']) - min(inputs['x']) == 1", True),
        ("rows == 2 and id == 'r'", True),
        ("'b' in ['a', 'b']", True),
        ("lower(headers['who']) == 'ann'", True),
        ("get(parameters, 'none', 5) == 5", True),
        ("1 if parameters['on'] else 0", True),
        ("not -1 < 0 < 1", False),
    ],
)
def test_expressions_say_what_python_says(text, expected):
    context = Context("r", headers={"who": "Ann"}, parameters={"on": True})
    assert expected is Expression(text).holds({"x": X}, context)


@pytest.mark.parametrize(
    "plan", [np.array([b"gold", b"new"], object), np.array(["gold", "new"], object), np.array([b"gold", b"new"])]
)
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("inputs['plan'][0] == 'gold'", True),
        ("'gold' != inputs['plan'][0]", False),
        ("inputs['plan'][0] in ['silver', 'gold']", True),
        ("inputs['plan'][1] not in ('silver', 'gold')", True),
        ("'gold' in inputs['plan']", True),
        ("'silver' in inputs['plan']", False),
        ("any(inputs['plan'] == 'new')", True),
        ("all(inputs['plan'] != 'old')", True),
        ("'old' in inputs['plan'][0]", True),
        ("inputs['plan'][0] < 'h'", True),
        ("inputs['plan'][0] == inputs['plan'][1]", False),
        ("inputs['plan'][0] in inputs['plan']", True),
    ],
)
def test_the_elements_of_a_bytes_tensor_are_texts_to_a_condition(plan, text, expected):
    assert expected is Expression(text).holds({"plan": plan}, Context())


def test_an_expression_that_is_several_truths_or_fails_says_so():
    context = Context()
    with pytest.raises(StepFailed, match=r"gives 2 truth values: use any\(...\) or all"):
        Expression("inputs['x'] > 1").holds({"x": X}, context)
    with pytest.raises(StepFailed, match="failed"):
        Expression("'a' * 999999999 == body").holds({"x": X}, context)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("parameters['tier'] > 2", "TypeError: '>' not supported between instances of 'str' and 'int'"),
        ("int(headers['x-age']) > 18", "ValueError: invalid literal for int.*'abcabc"),
        ("max(inputs['x']) > 1", "ValueError: zero-size array"),
        ("mean(inputs['x']) > 1", "ValueError: there is no mean of no values"),
        ("10 / rows > 1", "ZeroDivisionError: division by zero"),
    ],
)
def test_what_a_request_brings_that_an_expression_cannot_compute_is_the_requests_mistake(text, reason):
    headers, parameters = {"x-age": "abc" * 1000}, {"tier": "gold"}
    choice = routers.Choice({"a": a, "b": b}, when={"a": text}, default="b", circuit_breaker={"failures": 1})
    with a_graph(choice).mock() as server:
        for _ in range(2):  # callers must not be able to open a breaker
            with pytest.raises(InvalidRequest, match=f"cannot be computed of this request: {reason}") as caught:
                server.infer(x=X[:0], headers=headers, parameters=parameters)
        assert len(caught.value.message) <= 500


# Filter


def test_a_filter_lets_through_or_refuses_with_a_declared_error():
    otherwise = {"error": "invalid_request", "message": "amounts are positive"}
    with a_graph(routers.Filter(a, "min(inputs['x']) > 0", otherwise)).mock() as server:
        assert [1, 2] == server.infer(x=X).outputs["y"].tolist()
        with pytest.raises(InvalidRequest, match="amounts are positive"):
            server.infer(x=-X)
        assert {"passed": 1, "refused": 1} == server.router("n").report()


# Fallback


def test_the_next_branch_answers_when_one_fails_and_sees_why():
    def backup(value, context: Context):
        assert "down" in str(context.failure)
        return {"y": value["x"] * 0}

    with a_graph(routers.Fallback({"main": fail, "backup": backup})).mock() as server:
        reply = server.infer(x=X)
        assert ([0, 0], {"n.branch": "backup"}) == (reply.outputs["y"].tolist(), reply.parameters)


def test_a_branch_that_answers_leaves_the_others_alone():
    with a_graph(routers.Fallback({"main": a, "backup": fail})).mock() as server:
        assert {"n.branch": "main"} == server.infer(x=X).parameters


@pytest.mark.parametrize(
    ("error", "on", "falls"),
    [
        (InvalidRequest("bad"), None, False),
        (InvalidRequest("bad"), ["invalid_request"], True),
        (Unavailable("busy"), None, True),
        (LimitExceeded("full"), ["unavailable"], False),
        (DeadlineExceeded("late"), None, True),
    ],
)
def test_only_errors_that_are_named_fall_back(error, on, falls):
    def broken(value):
        raise error

    options = {} if on is None else {"on": on}
    with a_graph(routers.Fallback({"main": broken, "backup": a}, **options)).mock() as server:
        if falls:
            assert "backup" == server.infer(x=X).parameters["n.branch"]
        else:
            with pytest.raises(type(error), match=str(error)):
                server.infer(x=X)


def test_if_all_fail_the_last_error_is_told():
    def worse(value):
        raise Unavailable("also down")

    graph = a_graph(routers.Fallback({"main": fail, "backup": worse}))
    with graph.mock() as server, pytest.raises(Unavailable, match="node 'n.backup': also down") as caught:
        server.infer(x=X)
    assert "down" in str(caught.value.__cause__)


def test_a_time_limit_of_a_branch_falls_back_and_the_requests_own_does_not(run, manual_clock):
    async def slow(value):
        await asyncio.sleep(5)

    branches = {"main": steps.Python(slow, timeout_ms=100), "backup": a}

    async def check():
        async with a_graph(routers.Fallback(branches)).mock() as server:
            request = asyncio.ensure_future(server.infer(x=X))
            await manual_clock.advance(0.2)
            assert "backup" == (await request).parameters["n.branch"]
            request = asyncio.ensure_future(server.infer(x=X, timeout_s=0.05))
            await manual_clock.advance(0.2)
            assert isinstance(request.exception(), DeadlineExceeded)

    run(check())


# Cycle


@signature(inputs={"x": ("FP32", [-1])}, outputs={"x": ("FP32", [-1])})
def double(value):
    return {"x": value["x"] * 2}


def test_a_branch_runs_until_its_condition_does_not_hold():
    with a_graph(routers.Cycle(double, "max(inputs['x']) < 100", 20)).mock() as server:
        reply = server.infer(x=[1, 3])
        assert ([64, 192], {"n.iterations": 6}) == (reply.outputs["x"].tolist(), reply.parameters)


def test_the_limit_of_turns_is_an_error_or_the_last_value_as_declared():
    with a_graph(routers.Cycle(double, "True", 3)).mock() as server, pytest.raises(StepFailed, match="after 3 turns"):
        server.infer(x=[1])
    with a_graph(routers.Cycle(double, "True", 3, at_limit="last")).mock() as server:
        assert [8] == server.infer(x=[1]).outputs["x"].tolist()


def test_a_deadline_ends_a_cycle_of_plain_steps(run, manual_clock):
    async def nap(value):
        await asyncio.sleep(0.1)
        return value

    async def check():
        async with a_graph(routers.Cycle(nap, "True", 10_000)).mock() as server:
            request = asyncio.ensure_future(server.infer(x=X, timeout_s=1))
            await manual_clock.advance(2)
            assert isinstance(request.exception(), DeadlineExceeded)
            assert 0 == server.in_flight

    run(check())


def test_a_branch_that_cannot_take_what_it_gives_is_refused():
    @signature(inputs={"x": ("FP32", [-1])}, outputs={"y": ("FP32", [-1])})
    def other(value):
        return {"y": value["x"]}

    with pytest.raises(GraphInvalid, match="takes 'x' again in the next turn, but does not give it"):
        a_graph(routers.Cycle(other, "True", 3)).compile()
    with pytest.raises(GraphInvalid, match="max_iterations"):
        a_graph(routers.Cycle(double, "True", 0)).compile()


# Map


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 30), concurrency=st.integers(1, 9), bad=st.sets(st.integers(0, 29)), borne=st.integers(0, 5))
def test_rows_come_back_in_order_without_those_that_failed_and_were_borne(rows, concurrency, bad, borne):
    async def work(value):
        (x,) = value["x"]
        for _ in range(int(x) % 3):
            await asyncio.sleep(0)
        if int(x) in bad:
            raise ConnectionError
        return {"y": value["x"] * 10}

    failing = len([row for row in range(rows) if row in bad])
    with a_graph(routers.Map(work, concurrency=concurrency, tolerate=float(borne))).mock() as server:
        if failing > borne or failing == rows:
            with pytest.raises(StepFailed, match="ConnectionError"):
                server.infer(x=np.arange(rows, dtype=np.float32))
        else:
            reply = server.infer(x=np.arange(rows, dtype=np.float32))
            assert [10 * row for row in range(rows) if row not in bad] == reply.outputs["y"].tolist()
            assert failing == reply.parameters.get("n.failed", 0)
        assert 0 == server.in_flight


def test_items_of_a_document_are_mapped_with_bounded_concurrency(run, manual_clock):
    running, most = [], []

    async def work(item):
        running.append(1)
        most.append(len(running))
        await asyncio.sleep(0.1)
        running.pop()
        if item == "bad":
            raise ConnectionError
        return item * 2

    graph = Graph("g", inputs="body")
    graph.to(routers.Map(work, concurrency=3, tolerate=0.5, on_failure="null"), "n").respond()

    async def check():
        async with graph.mock() as server:
            request = asyncio.ensure_future(server.invoke(["a", "bad", "c", "d", "e"]))
            await manual_clock.advance(1)
            assert (["aa", None, "cc", "dd", "ee"], 3) == (await request, max(most))
            assert [] == await server.invoke([])

    run(check())


def test_more_items_than_allowed_are_refused_and_leaving_ends_them(run, manual_clock):
    ended = []

    async def work(value):
        try:
            await asyncio.sleep(10)
        finally:
            ended.append(1)

    async def check():
        async with a_graph(routers.Map(work, max_items=3)).mock() as server:
            with pytest.raises(InvalidRequest, match="limit 'max_items' = 3"):
                await server.infer(x=np.zeros(4, np.float32))
            request = asyncio.ensure_future(server.infer(x=np.zeros(3, np.float32)))
            await manual_clock.advance(1)
            request.cancel()
            await asyncio.wait([request])
            assert (3, 0) == (len(ended), server.in_flight)

    run(check())


@pytest.mark.parametrize("tolerate", [0, 1])
def test_once_too_many_items_have_failed_the_others_are_cancelled(run, manual_clock, tolerate):
    ended = []

    async def work(value):
        try:
            await asyncio.sleep(float(value["x"][0]))
            raise ConnectionError("down")
        except asyncio.CancelledError:
            ended.append(float(value["x"][0]))
            raise

    async def check():
        async with a_graph(routers.Map(work, concurrency=3, tolerate=tolerate)).mock() as server:
            request = asyncio.ensure_future(server.infer(x=np.array([1, 2, 60, 60], np.float32)))
            await manual_clock.advance(tolerate + 1)
            with pytest.raises(StepFailed, match="ConnectionError: down"):
                await request
            assert ([2.0, 60.0] if not tolerate else [60.0, 60.0]) == ended
            assert 0 == server.in_flight

    run(check())


def test_branches_that_give_different_tensors_for_different_rows_are_a_failure():
    def work(value):
        return {"y" if value["x"][0] else "z": value["x"]}

    with a_graph(routers.Map(work)).mock() as server, pytest.raises(StepFailed, match="different tensors"):
        server.infer(x=[0, 1])


@pytest.mark.parametrize("letter", ["a", b"a"])
def test_texts_of_different_lengths_come_back_whole(letter):
    def work(value):
        return {"y": np.array([letter * int(value["x"][0])])}

    with a_graph(routers.Map(work)).mock() as server:
        assert [b"a", b"aaa", b""] == server.infer(x=[1, 3, 0]).outputs["y"].tolist()


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (lambda x: {"y": x.astype("f8") if x[0] else x}, r"different rows: float32 \[1\] and float64 \[1\]"),
        (lambda x: {"y": np.zeros((1, 2 + int(x[0])))}, r"different rows: float64 \[1, 2\] and float64 \[1, 3\]"),
        (lambda x: {"y": x.sum()}, r"'y' for a row as float32 \[\], which has no rows to join"),
        (lambda x: {"y": [1, 2]}, "'y' for a row as list, which has no rows to join"),
        (lambda x: x, "gave a ndarray for a row, expected a mapping of tensor name to array"),
    ],
)
def test_results_that_cannot_be_joined_are_described(given, text):
    def work(value):
        return given(value["x"])

    with a_graph(routers.Map(work)).mock() as server, pytest.raises(StepFailed, match=text):
        server.infer(x=[0, 1])


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (b'"abc"', "over a list or over rows of tensors, got a str"),
        (b"null", "got a NoneType"),
        (b'{"a": 1}', "'a' of what it got is no tensor"),
        (b"{}", "cannot map over rows: there is no tensor"),
    ],
)
def test_a_body_that_is_no_list_is_the_requests_mistake(body, text):
    with a_graph(routers.Map(lambda value: value), "body").mock() as server:
        reply = server.request("POST", "/invocations", body, {"content-type": "application/json"})
        assert (400, True) == (reply.status, text in reply.json()["error"])


def test_a_tolerance_without_end_is_refused():
    with pytest.raises(GraphInvalid, match="tolerate is a share below 1 or a whole number, got inf"):
        a_graph(routers.Map(a, tolerate=float("inf"))).compile()


DECIDING = {
    "ab": lambda tensor: routers.Ab({"a": a, "b": b}, {"a": 1, "b": 1}, key=f"tensor:{tensor}"),
    "bandit": lambda tensor: routers.Bandit({"a": a, "b": b}, "ucb1", key=f"tensor:{tensor}"),
    "canary": lambda tensor: routers.Canary({"a": a, "b": b}, "a", "b", ["10%"], key=f"tensor:{tensor}"),
    "champion": lambda tensor: routers.Champion({"a": a, "b": b}, "a", key=f"tensor:{tensor}"),
    "model": lambda tensor: routers.Model({"a": a, "b": b}, by=f"tensor:{tensor}", default="a"),
    "choice": lambda tensor: routers.Choice(
        {"a": a, "b": b}, when={"a": f"rows > 1 or inputs['{tensor}'][0] > 1"}, default="b"
    ),
    "filter": lambda tensor: routers.Filter(a, f"max(inputs['{tensor}']) > 0", {"message": "no"}),
}


@pytest.mark.parametrize("kind", DECIDING)
def test_a_tensor_that_decides_and_never_arrives_is_refused(kind):
    inputs = {"x": ("FP32", [-1]), "user": ("INT64", [-1])}
    a_graph(DECIDING[kind]("user"), inputs).compile()
    text = "node 'n': decides by tensor 'usr', which does not reach it: what does is user, x; did you mean 'user'"
    with pytest.raises(GraphInvalid, match=text):
        a_graph(DECIDING[kind]("usr"), inputs).compile()

    @signature(outputs={"x": ("FP32", [-1])})
    def drops(x):
        return {"x": x}

    def dropped(step, key):
        return Graph("g", inputs).to(step, "first").to(DECIDING[kind](key), "n").respond()

    with pytest.raises(GraphInvalid, match="decides by tensor 'user', which does not reach it: what does is x"):
        dropped(drops, "user").compile()
    dropped(lambda value: value, "usr").compile()  # nobody knows what reaches it


# Inside each other


def test_they_work_inside_each_other():
    each = routers.Fallback(
        {
            "main": routers.Choice({"a": a, "broken": fail}, when={"a": "inputs['x'][0] < 2"}, default="broken"),
            "backup": routers.Chain({"again": routers.Cycle(double, "inputs['x'][0] < 50", 10), "b": b}),
        }
    )
    work = routers.Filter(routers.Map(each), "rows < 5", {"message": "too many"})
    with a_graph(work).mock() as server:
        assert [1, -96] == server.infer(x=[1, 3]).outputs["y"].tolist()
        with pytest.raises(InvalidRequest, match="too many"):
            server.infer(x=np.ones(5, np.float32))
