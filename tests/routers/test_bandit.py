"""Bandits: who is chosen, what feedback teaches, what is refused, what survives a restart."""

from __future__ import annotations

import asyncio
import json
from collections import Counter

import numpy as np
import pytest

from servinggraph import Graph, routers, steps
from servinggraph.errors import DeadlineExceeded, GraphInvalid, GraphNotFound, InvalidRequest, RequestNotFound, StepFailed

X = np.array([1.0], np.float32)


def a(value):
    return {"y": value["x"]}


def b(value):
    return {"y": -value["x"]}


def total(x, y):
    return {"y": x + y}


def broken(value):
    raise RuntimeError("out of order")


def a_graph(policy="thompson", branches=None, inputs=None, **options):
    options = {"seed": 1, **options}
    graph = Graph("g", inputs or {"x": ("FP32", [-1])})
    return graph.to(routers.Bandit(branches or {"a": a, "b": b}, policy, **options), "score").respond()


POLICIES = [
    ("epsilon_greedy", {}),
    ("epsilon_greedy", {"epsilon": 0.5, "decay": 0.2}),
    ("ucb1", {}),
    ("thompson", {}),
    ("thompson", {"reward_range": "real"}),
]


@pytest.mark.parametrize(("policy", "options"), POLICIES)
def test_the_better_variant_is_chosen_the_more_often(policy, options):
    chance = np.random.default_rng(2)
    worth = {"a": 0.2, "b": 0.8}
    with a_graph(policy, **options).mock() as server:
        chosen = []
        for number in range(600):
            reply = server.infer(x=X, id=f"r{number}")
            variant = reply.parameters["score.variant"]
            assert (1.0 if variant == "a" else -1.0) == reply.outputs["y"][0]
            assert {"score": "taken"} == server.feedback(f"r{number}", reward=float(chance.random() < worth[variant]))
            chosen.append(variant)
        report = server.router("score").report()

    assert dict(Counter(chosen)) == report["decisions"]
    assert Counter(chosen[300:])["b"] > 240
    assert "b" == report["best"]
    for name in "ab":
        assert report["decisions"][name] == report["rewards"][name]["count"]
        assert report["shares"][name] == report["decisions"][name] / 600
    seen = report["rewards"]
    assert report["regret"] == pytest.approx(seen["a"]["count"] * (seen["b"]["mean"] - seen["a"]["mean"]))


def test_every_arm_is_tried_before_any_is_trusted():
    with a_graph("ucb1", {name: a for name in "abcdef"}).mock() as server:
        chosen = []
        for number in range(6):
            chosen.append(server.infer(x=X, id=str(number)).parameters["score.variant"])
            server.feedback(str(number), reward=1.0)
    assert set("abcdef") == set(chosen)


@pytest.mark.parametrize(("policy", "options"), POLICIES)
def test_an_arm_that_gets_no_rewards_cannot_take_all_requests(policy, options):
    with a_graph(policy, **options).mock() as server:
        for number in range(300):
            variant = server.infer(x=X, id=str(number)).parameters["score.variant"]
            if variant == "a":
                server.feedback(str(number), reward=1.0)
        decisions = server.router("score").report()["decisions"]
    assert decisions["a"] > 100


@pytest.mark.parametrize(("policy", "options"), POLICIES)
def test_while_no_reward_has_come_requests_are_spread(policy, options):
    with a_graph(policy, {name: a for name in "abc"}, **options).mock() as server:
        for _ in range(120):
            server.infer(x=X)
        decisions = server.router("score").report()["decisions"]
    assert min(decisions.values()) > 20


def test_a_reward_counts_once_and_the_caller_is_told():
    with a_graph().mock() as server:
        server.infer(x=X, id="r1")
        assert {"score": "taken"} == server.feedback("r1", reward=1.0)
        assert {"score": "duplicate"} == server.feedback("r1", reward=0.0)
        with pytest.raises(RequestNotFound, match="request 'r2' is not known to score of graph 'g'"):
            server.feedback("r2", reward=1.0)
        report = server.router("score").report()
    assert 1 == sum(rewards["count"] for rewards in report["rewards"].values())
    assert (1, 1, 1) == tuple(report["feedback"][name] for name in ("duplicates", "unknown", "remembered"))


def test_a_reward_within_the_window_is_taken_and_one_after_it_is_too_late(run, manual_clock):
    async def check():
        async with a_graph(window={"age_s": 60, "size": 2}).mock() as server:
            for name in ("first", "second", "third"):
                await server.infer(x=X, id=name)
            with pytest.raises(RequestNotFound):
                await server.feedback("first", reward=1.0)  # two are remembered
            await manual_clock.advance(59)
            assert {"score": "taken"} == await server.feedback("second", reward=1.0)
            await manual_clock.advance(2)
            with pytest.raises(RequestNotFound, match="too late"):
                await server.feedback("third", reward=1.0)

    run(check())


def test_rewards_that_come_in_another_order_teach_the_same():
    def learned(order):
        with a_graph().mock() as server:
            for number in range(20):
                server.infer(x=X, id=str(number))
            for number in order:
                server.feedback(str(number), reward=(number % 4) / 4)
            return server.router("score").report()["rewards"]

    assert learned(range(20)) == learned(reversed(range(20)))


def test_feedback_may_name_the_variant_in_place_of_a_request():
    with a_graph().mock() as server:
        assert {"score": "taken"} == server.feedback(variant="b", reward=0.5)
        assert {"score": "taken"} == server.feedback(variant="b", reward=1.0)
        assert {"requests": 0, "count": 2, "mean": 0.75, "deviation": pytest.approx(0.3535534)} == server.router(
            "score"
        ).report()["rewards"]["b"]
        with pytest.raises(InvalidRequest, match="no router that could use this feedback"):
            server.feedback(variant="c", reward=1.0)
        variant = server.infer(x=X, id="r").parameters["score.variant"]
        with pytest.raises(InvalidRequest, match=f"was answered by '{variant}', not by"):
            server.feedback("r", variant="b" if variant == "a" else "a", reward=1.0)
        assert {"score": "taken"} == server.feedback("r", variant=variant, reward=1.0)


@pytest.mark.parametrize(
    ("said", "text"),
    [
        ({"reward": 1.5}, r"router 'score' takes rewards from 0 to 1 \(its reward_range\), got 1.5"),
        ({"reward": -0.1}, "got -0.1"),
        ({"reward": float("nan")}, "finite"),
        ({"reward": True}, "finite number"),
        ({"truth": [1.0]}, "router 'score' has no scorer"),
        ({"reward": 1.0, "metric": "clicks"}, "no router that could use"),
        ({}, "one of the two"),
        ({"reward": 1.0, "truth": 1}, "one of the two"),
    ],
)
def test_feedback_that_cannot_be_used_is_refused_and_teaches_nothing(said, text):
    with a_graph().mock() as server:
        server.infer(x=X, id="r")
        with pytest.raises(InvalidRequest, match=text):
            server.feedback("r", **said)
        with pytest.raises(GraphNotFound, match="no router 'scores'; did you mean 'score'"):
            server.feedback("r", reward=1.0, node="scores")
        assert {"score": "taken"} == server.feedback("r", reward=1.0, node="score")


@pytest.mark.parametrize("reward", [1, 1.0, np.float64(1), np.float32(1), np.int64(1), np.uint8(1)])
def test_a_reward_may_be_a_number_of_numpys(reward):
    with a_graph(branches={"a": a}).mock() as server:
        server.infer(x=X, id="r")
        assert {"score": "taken"} == server.feedback("r", reward=reward)
        assert 1.0 == server.router("score").report()["rewards"]["a"]["mean"]


@pytest.mark.parametrize(
    ("reward", "text"),
    [
        (True, "got a bool"),
        (np.bool_(1), "got a bool"),
        ("1", "got a str"),
        ([1], "got a list"),
        (10**400, "got inf"),
        (np.float32("nan"), "got nan"),
    ],
)
def test_a_reward_that_is_none_is_refused(reward, text):
    with a_graph(branches={"a": a}).mock() as server:
        server.infer(x=X, id="r")
        with pytest.raises(InvalidRequest, match=f"'reward' is a finite number, {text}"):
            server.feedback("r", reward=reward)


@pytest.mark.parametrize("order", [("wide", "narrow"), ("narrow", "wide")])
def test_a_router_that_refuses_feedback_keeps_no_other_from_it(order):
    ranges = {"wide": [0, 10], "narrow": [0, 1]}
    graph = Graph("g", {"x": ("FP32", [-1])})
    at = graph
    for name in order:
        at = at.to(routers.Bandit({"a": lambda value: value}, "thompson", reward_range=ranges[name]), name)
    with at.respond().mock() as server:
        server.infer(x=X, id="r")
        with pytest.raises(InvalidRequest, match="router 'narrow' takes rewards from 0 to 1 .*, got 5; taken by wide"):
            server.feedback("r", reward=5)
        assert 5.0 == server.router("wide").report()["rewards"]["a"]["mean"]
        assert {"wide": "duplicate", "narrow": "taken"} == server.feedback("r", reward=0.5)
        with pytest.raises(InvalidRequest, match="got 50$"):
            server.feedback("r", reward=50)


def test_feedback_over_http_says_what_became_of_it():
    with a_graph().mock() as server:
        server.infer(x=X, id="r")

        def send(document, path="/v2/models/g/feedback"):
            reply = server.request("POST", path, document)
            return reply.status, reply.json().get("routers"), reply.json().get("error", "")

        assert (200, {"score": "taken"}, "") == send(b'{"id": "r", "reward": 1}')
        assert (200, {"score": "duplicate"}, "") == send(b'{"id": "r", "reward": 1}')
        status, _, text = send(b'{"id": "s", "reward": 1}')
        assert (404, True) == (status, "is not known to score" in text)
        status, _, text = send(b'{"variant": "a", "reward": 2}')
        assert (400, True) == (status, "from 0 to 1" in text)
        assert 200 == send(b'{"variant": "a", "reward": 1}', "/v2/models/g/versions/1/feedback")[0]


@pytest.mark.parametrize(
    ("option", "truth", "reward"),
    [
        ("accuracy", [1.0, -2.0], 1.0),
        ("accuracy", {"y": [1.0, 0.0]}, 0.5),
        ("absolute_error", [2.0, -2.0], -0.5),
        ("squared_error", [3.0, -2.0], -2.0),
        ("squared_error", [300.0, -2.0], -9.0),  # beyond the range counts as the worst in it
        (lambda answer, truth: float(answer["y"].sum()) - truth, 1.0, -2.0),
    ],
)
def test_a_truth_is_compared_with_the_answer_that_was_given(option, truth, reward):
    range_ = [0, 1] if option == "accuracy" else [-9, 0]
    with a_graph(branches={"a": a}, scorer=option, reward_range=range_).mock() as server:
        server.infer(x=np.array([1.0, -2.0], np.float32), id="r")
        assert {"score": "taken"} == server.feedback("r", truth=truth)
        assert {"score": "duplicate"} == server.feedback("r", truth=truth)
        report = server.router("score").report()
    assert reward == report["rewards"]["a"]["mean"]
    assert 0 == report["feedback"]["remembered_bytes"]
    assert (reward == -9) == report["feedback"]["clipped"]


@pytest.mark.parametrize(
    ("truth", "text"),
    [
        ({"z": [1.0]}, "a tensor 'z', which the answer had not"),
        ({}, "the truth has no tensor"),
        ([1.0, 2.0], "has 2 elements, the answer had 1"),
        (["a"], "no numbers"),
        ([[1.0], [2.0, 3.0]], "ragged"),
    ],
)
def test_a_truth_that_does_not_fit_is_refused_and_the_right_one_still_taken(truth, text):
    with a_graph(scorer="accuracy").mock() as server:
        server.infer(x=X, id="r")
        with pytest.raises(InvalidRequest, match=text):
            server.feedback("r", truth=truth)
        with pytest.raises(InvalidRequest, match="needs the 'id'"):
            server.feedback(variant="a", truth=[1.0])
        assert {"score": "taken"} == server.feedback("r", truth=[1.0])


def test_a_truth_of_text_is_compared_as_text():
    def label(value):
        return {"label": np.array([b"cat"], object)}

    with a_graph(branches={"a": label}, scorer="accuracy").mock() as server:
        server.infer(x=X, id="r")
        server.feedback("r", truth={"label": ["cat"]})
        assert 1.0 == server.router("score").report()["rewards"]["a"]["mean"]


@pytest.mark.parametrize("option", ["absolute_error", "squared_error"])
@pytest.mark.parametrize("given", [np.nan, np.inf, -np.inf])
def test_an_answer_that_is_no_number_is_the_worst_one(option, given):
    def spoilt(value):
        return {"y": np.full(2, given, np.float32)}

    with a_graph(branches={"a": spoilt}, scorer=option, reward_range=[-9, 0]).mock() as server:
        server.infer(x=X, id="r")
        assert {"score": "taken"} == server.feedback("r", truth=[1.0, 2.0])
        report = server.router("score").report()
    assert (-9.0, 1) == (report["rewards"]["a"]["mean"], report["feedback"]["clipped"])


@pytest.mark.parametrize("given", [np.nan, np.inf])
def test_without_a_range_an_answer_that_is_no_number_has_no_reward(given):
    def spoilt(value):
        return {"y": value["x"] * given}

    with a_graph(branches={"a": spoilt}, scorer="absolute_error", reward_range="real").mock() as server:
        server.infer(x=X, id="r")
        with pytest.raises(StepFailed, match="the scorer gave -inf, which is no reward"):
            server.feedback("r", truth=[1.0])
        assert {"score": "taken"} == server.feedback("r", reward=-5.0)
        assert -5.0 == server.router("score").report()["rewards"]["a"]["mean"]


@pytest.mark.parametrize("option", ["accuracy", "absolute_error", "squared_error"])
def test_a_truth_without_elements_or_numbers_teaches_nothing(option):
    with a_graph(branches={"a": a}, scorer=option, reward_range=[-9, 1]).mock() as server:
        server.infer(x=np.zeros(0, np.float32), id="empty")
        server.infer(x=X, id="r")
        with pytest.raises(InvalidRequest, match="the truth of 'y' has no element"):
            server.feedback("empty", truth=[])
        if option != "accuracy":
            with pytest.raises(InvalidRequest, match="the truth of 'y' is not a finite number somewhere"):
                server.feedback("r", truth=[np.nan])
        assert 0 == server.router("score").report()["rewards"]["a"]["count"]


def test_a_scorer_that_fails_is_told_and_the_feedback_may_come_again():
    def scorer(answer, truth):
        return 1 / truth

    with a_graph(scorer=scorer).mock() as server:
        server.infer(x=X, id="r")
        with pytest.raises(StepFailed, match="node 'score': the scorer failed: ZeroDivisionError"):
            server.feedback("r", truth=0)
        assert {"score": "taken"} == server.feedback("r", truth=2)


def test_answers_are_kept_within_their_bytes_and_the_oldest_go_first():
    with a_graph(branches={"a": a}, scorer="accuracy", window={"max_bytes": 10_000}).mock() as server:
        big = np.zeros(1000, np.float32)
        for number in range(5):
            server.infer(x=big, id=str(number))
        report = server.router("score").report()["feedback"]
        assert report["remembered_bytes"] <= 10_000
        assert 5 == report["remembered"]
        with pytest.raises(RequestNotFound):
            server.feedback("0", truth=big.tolist())
        assert {"score": "taken"} == server.feedback("0", reward=1.0)  # which needs no answer
        assert {"score": "taken"} == server.feedback("4", truth=big.tolist())


def test_with_a_key_a_caller_stays_with_its_variant_for_the_window(run, manual_clock):
    async def check():
        async with a_graph("epsilon_greedy", epsilon=1.0, key="header:x-user", window={"age_s": 60}).mock() as server:

            async def ask(user):
                return (await server.infer(x=X, headers={"x-user": user})).parameters["score.variant"]

            first = {str(user): await ask(str(user)) for user in range(20)}
            assert {"a", "b"} == set(first.values())
            assert first == {user: await ask(user) for user in first}
            await manual_clock.advance(61)
            assert first != {user: await ask(user) for user in first}
            await server.adjust("score", {"enabled": {"a": False}})
            assert {"b"} == {await ask(user) for user in first}

    run(check())


def test_a_failure_counts_where_the_graph_says_so():
    with a_graph("ucb1", {"a": a, "b": broken}, failure_reward=0.0).mock() as server:
        failures = 0
        for number in range(60):
            try:
                server.infer(x=X, id=str(number))
                server.feedback(str(number), reward=0.9)
            except StepFailed:
                failures += 1
        rewards = server.router("score").report()["rewards"]
        assert {"count": failures, "mean": 0.0} == {name: rewards["b"][name] for name in ("count", "mean")}
        assert 0 < failures < 15


def test_an_answer_that_comes_too_late_is_a_failure_and_a_caller_who_leaves_is_none(run, manual_clock):
    async def slow(value):
        await asyncio.sleep(10)

    async def check():
        async with a_graph("ucb1", {"a": slow}, failure_reward=0.0).mock() as server:
            rewards = server.router("score").report
            request = asyncio.ensure_future(server.infer(x=X, timeout_s=1))
            await manual_clock.advance(2)
            assert isinstance(request.exception(), DeadlineExceeded)
            assert 1 == rewards()["rewards"]["a"]["count"]
            request = asyncio.ensure_future(server.infer(x=X, timeout_s=1))
            await manual_clock.settle()
            request.cancel()
            await asyncio.wait([request])
            assert (2, 1) == tuple(rewards()["rewards"]["a"][name] for name in ("requests", "count"))

    run(check())


def test_a_request_without_feedback_counts_where_the_graph_says_so(run, manual_clock):
    async def check():
        options = {"missing_reward": 0.0, "window": {"age_s": 60, "size": 3}}
        async with a_graph("ucb1", {"a": a}, **options).mock() as server:

            def rewards():
                return server.router("score").report()["rewards"]["a"]

            for number in range(4):
                await server.infer(x=X, id=str(number))
            assert (4, 1, 0.0) == (rewards()["requests"], rewards()["count"], rewards()["mean"])  # the window has three
            await server.feedback("1", reward=1.0)
            await manual_clock.advance(61)
            with pytest.raises(RequestNotFound):
                await server.feedback("2", reward=1.0)
            assert (4, 0.25) == (rewards()["count"], rewards()["mean"])
            await server.infer(x=X)  # without an id no feedback is waited for
            await manual_clock.advance(61)
            await server.infer(x=X)
            assert (6, 4) == (rewards()["requests"], rewards()["count"])

    run(check())


def test_a_callers_mistake_is_no_failure_of_the_variant():
    def refusing(value):
        raise InvalidRequest("no")

    with a_graph("ucb1", {"a": refusing}, failure_reward=0.0).mock() as server:
        with pytest.raises(InvalidRequest):
            server.infer(x=X, id="r")
        assert 0 == server.router("score").report()["rewards"]["a"]["count"]
        with pytest.raises(RequestNotFound):  # what was not answered gets no reward
            server.feedback("r", reward=1.0)


def test_settings_change_between_two_requests_and_everything_can_be_forgotten():
    with a_graph("epsilon_greedy", epsilon=1.0).mock() as server:
        server.feedback(variant="a", reward=1.0)
        settings = {"epsilon": 0.0, "decay": 0.0, "enabled": {"a": True, "b": False}, "resets": 0}
        assert settings == server.adjust("score", {"epsilon": 0, "enabled": {"b": False}})
        assert {"a"} == {server.infer(x=X).parameters["score.variant"] for _ in range(20)}
        assert 1 == server.adjust("score", {"resets": 1})["resets"]
        forgotten = {"requests": 0, "count": 0, "mean": None, "deviation": None}
        assert forgotten == server.router("score").report()["rewards"]["a"]
        assert 20 == server.router("score").report()["decisions"]["a"]  # which is a count of this process, and no knowledge


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"epsilon": 2}, "'epsilon' is a number from 0 to 1, got 2"),
        ({"decay": -1}, "from 0 on"),
        ({"epsilon": True}, "got True"),
        ({"epsilon": 0.5, "enabled": {"c": True}}, "'c', which is no branch"),
        ({"enabled": {"a": False, "b": False}}, "at least one"),
        ({"enabled": ["a"]}, "mapping"),
        ({"enabled": {"a": 1}}, "true or false"),
        ({"resets": -1}, "0 times: one more forgets it now, got -1"),
        ({"resets": True}, "got True"),
        ({"alpha": 1}, "no setting 'alpha'"),
    ],
)
def test_settings_that_cannot_be_are_refused_and_change_nothing(changes, text):
    with a_graph("epsilon_greedy").mock() as server:
        before = server.router("score").settings()
        with pytest.raises(InvalidRequest, match=text):
            server.adjust("score", changes)
        assert before == server.router("score").settings()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"policy": "ucb1", "epsilon": 0.1}, "belongs to policy epsilon_greedy, not to ucb1"),
        ({"policy": "thompson", "alpha": 0.1}, "belongs to policy ucb1 and linucb"),
        ({"policy": "ucb1", "reward_range": "real"}, "needs a lowest and a highest reward"),
        ({"policy": "thompson", "reward_range": [1, 0]}, "the lowest and the highest"),
        ({"policy": "thompson", "reward_range": [0, 1, 2]}, "the lowest and the highest"),
        ({"policy": "epsilon_greedy", "epsilon": 1.5}, "from 0 to 1"),
        ({"policy": "linucb"}, "name their tensor"),
        ({"policy": "thompson", "features": "x"}, "belongs to policy linucb"),
        ({"policy": "thompson", "key": "cookie:x"}, "no place of a key"),
        ({"policy": "thompson", "scorer": "acuracy"}, "no scorer 'acuracy'; did you mean 'accuracy'"),
        ({"policy": "thompson", "scorer": "no.such:thing"}, "no module"),
        ({"policy": "thompson", "failure_reward": -1.0}, "outside of reward_range"),
        ({"policy": "thompson", "missing_reward": 2}, "2.0 is outside of reward_range"),
        ({"policy": "best"}, "'best'"),
        ({"policy": "thompson", "seed": -1}, "'seed': expected greater than or equal to 0, got -1"),
        ({"policy": "thompson", "metric": ""}, "'metric'"),
        ({"policy": "linucb", "features": "z", "branches": {"a": total}, "inputs": dict.fromkeys("xy", ("FP32", [1]))}, "'z'"),
    ],
)
def test_definitions_that_cannot_work_are_refused(options, text):
    with pytest.raises(GraphInvalid, match=text):
        a_graph(**options).compile()


@pytest.mark.parametrize("policy", ["thompson", "linucb"])
def test_what_was_learned_survives_a_restart(tmp_path, policy):
    options = {"features": "x"} if policy == "linucb" else {}
    graph = a_graph(policy, state=str(tmp_path / "state.json"), **options)
    with graph.mock() as server:
        for number in range(40):
            server.infer(x=X * number / 40, id=str(number))
            server.feedback(str(number), reward=number / 40)
        server.adjust("score", {"enabled": {"a": False}})
        before = server.router("score").remember()
    with graph.mock() as server:
        router = server.router("score")
        assert before == router.remember()
        assert 40 == sum(rewards["count"] for rewards in router.report()["rewards"].values())
        assert {"b"} == {server.infer(x=X).parameters["score.variant"] for _ in range(5)}

    # An arm more, and one less: what is known of the others stays.
    grown = a_graph(policy, {"b": b, "c": a}, state=str(tmp_path / "state.json"), **options)
    with grown.mock() as server:
        counts = {name: rewards["count"] for name, rewards in server.router("score").report()["rewards"].items()}
    assert {"b": before["learned"]["b"][1], "c": 0} == counts


@pytest.mark.parametrize("sums", [[1], [1, 2, 3, "4"], {"count": 1}, [-1, 1, 1, 1], [1, -1, 0, 0]])
def test_saved_sums_that_are_none_are_refused(tmp_path, sums):
    path = tmp_path / "state.json"
    path.write_text(json.dumps({"g/1/score": {"learned": {"a": sums}}}))
    with pytest.raises(StepFailed, match="does not fit the graph any more: what 'a' learned is no list of numbers"):
        a_graph(state=str(path)).mock().__enter__()


def test_the_answer_is_compared_as_it_was_given_whatever_becomes_of_it_later():
    def spoil(value):
        value["y"] += 1
        return value

    graph = Graph("g", {"x": ("FP32", [-1])})
    graph.to(routers.Bandit({"a": lambda value: {"y": value["x"] * 2}}, "ucb1", scorer="accuracy"), "score").to(spoil).respond()
    with graph.mock() as server:
        assert [3.0] == server.infer(x=X, id="r").outputs["y"].tolist()
        server.feedback("r", truth=[2.0])
        assert 1.0 == server.router("score").report()["rewards"]["a"]["mean"]


def test_rewards_that_would_break_the_sums_are_refused():
    with a_graph(reward_range="real").mock() as server:
        with pytest.raises(InvalidRequest, match="takes rewards up to 1e100, got 1e.300"):
            server.feedback(variant="a", reward=1e300)
        assert {"score": "taken"} == server.feedback(variant="a", reward=-1e100)
        server.infer(x=X)


def test_saved_rewards_of_another_range_are_refused(tmp_path):
    place = str(tmp_path / "state.json")
    with a_graph(state=place, reward_range=[0, 10]).mock() as server:
        server.feedback(variant="a", reward=8.0)
    with pytest.raises(StepFailed, match=r"mean reward of 'a' was 8, outside of reward_range; remove it"):
        a_graph(state=place).mock().__enter__()


def test_a_bandit_in_yaml_and_in_python_is_one_graph(tmp_path):
    built = a_graph("linucb", {"a": steps.Onnx("a.onnx"), "b": steps.Onnx("b.onnx")}, features="x", window={"size": 10})
    built.save(tmp_path / "graph.yaml")
    assert Graph.load(tmp_path / "graph.yaml") == built


def line(value):
    return {"y": value["x"]}


F = {"x": ("FP32", [-1, 2])}


def test_linucb_learns_who_is_better_for_whom():
    chance = np.random.default_rng(5)
    with a_graph("linucb", {"a": line, "b": line}, F, features="x", alpha=0.5).mock() as server:
        right = 0
        for number in range(500):
            features = chance.normal(size=(1, 2)).astype(np.float32)
            better = "a" if features[0, 0] > features[0, 1] else "b"
            variant = server.infer(x=features, id=str(number)).parameters["score.variant"]
            server.feedback(str(number), reward=float(variant == better))
            right += number >= 250 and variant == better
    assert right > 225


@pytest.mark.parametrize(
    ("features", "text"),
    [
        (np.zeros((2, 2), np.float32), "'x', by which router 'score' decides, has 2 rows"),
        (np.full((1, 2), np.nan, np.float32), "not finite"),
        (np.full((1, 2), 1e7, np.float32), "beyond 1e.06: scale it"),
        (np.zeros((1, 0), np.float32), "features are 1 to 128"),
        (np.zeros((1, 129), np.float32), "features are 1 to 128"),
    ],
)
def test_features_that_cannot_be_are_refused(features, text):
    with a_graph("linucb", {"a": line}, {"x": ("FP32", [-1, -1])}, features="x").mock() as server:
        with pytest.raises(InvalidRequest, match=text):
            server.infer(x=features)
        server.infer(x=np.zeros((1, 2), np.float32), id="r")
        with pytest.raises(InvalidRequest, match="learns from a request's features"):
            server.feedback(variant="a", reward=1.0)
        assert {"score": "taken"} == server.feedback("r", reward=1.0)


def test_features_are_as_many_as_those_that_were_learned_from():
    def row(size):
        return np.ones((1, size), np.float32)

    with a_graph("linucb", {"a": line, "b": line}, {"x": ("FP32", [-1, -1])}, features="x").mock() as server:
        server.infer(x=row(5), id="stray")  # nothing is learned yet, so one caller's mistake binds nobody
        for number in range(4):
            server.infer(x=row(3), id=str(number))
            server.feedback(str(number), reward=1.0)
        with pytest.raises(InvalidRequest, match="'x', .* has 2 values, those before it had 3"):
            server.infer(x=row(2))
        with pytest.raises(InvalidRequest, match="has learned from 3 features, these are 5"):
            server.feedback("stray", reward=1.0)


def test_once_everything_is_forgotten_features_may_be_of_another_number():
    def row(size):
        return np.ones((1, size), np.float32)

    with a_graph("linucb", {"a": line, "b": line}, {"x": ("FP32", [-1, -1])}, features="x").mock() as server:
        server.infer(x=row(3), id="r")
        server.feedback("r", reward=1.0)
        server.adjust("score", {"resets": 1})
        server.infer(x=row(5), id="s")
        assert {"score": "taken"} == server.feedback("s", reward=1.0)


def test_features_may_be_a_field_of_a_body():
    graph = Graph("g", "body")
    graph.to(routers.Bandit({"a": lambda body: body["user"]}, "linucb", features="user", seed=1), "score").respond()
    with graph.mock() as server:
        assert [1, 2.5] == server.invoke({"user": [1, 2.5]})
        for wrong in ("text", ["1", "2"], [[1], [2, 3]], None, {}):
            with pytest.raises(InvalidRequest):
                server.invoke({"user": wrong})


def test_features_are_kept_within_the_windows_bytes():
    window = {"max_bytes": 1000}
    with a_graph("linucb", {"a": line}, F, features="x", window=window).mock() as server:
        for number in range(20):
            server.infer(x=np.zeros((1, 2), np.float32), id=str(number))
        assert 0 < server.router("score").report()["feedback"]["remembered_bytes"] <= 1000
        with pytest.raises(RequestNotFound):
            server.feedback("0", reward=1.0)
        assert {"score": "taken"} == server.feedback("19", reward=1.0)
        assert {"score": "duplicate"} == server.feedback("19", reward=1.0)
