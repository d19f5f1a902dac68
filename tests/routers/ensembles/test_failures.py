"""What a member's failure is: the request's, nothing, or a declared default."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

import numpy as np
import pytest

from servinggraph import Graph, InvalidRequest, routers, steps
from servinggraph.errors import GraphInvalid, StepFailed, Unavailable
from servinggraph.testing import ManualClock

Run = Callable[[Coroutine[Any, Any, None]], None]
X = np.array([[1.0], [2.0]], np.float32)


def good(value: Any) -> Any:
    return {"y": value["x"] * 2}


def bad(value: Any) -> Any:
    raise ValueError("no")


def ensemble(members: Mapping[str, Any], combine: Any = "mean", **options: Any) -> Graph:
    return Graph("g", {"x": ("FP32", [-1, 1])}).to(routers.Ensemble(members, combine, **options), "n").respond()


def test_by_default_a_failure_is_the_requests() -> None:
    with ensemble({"a": good, "b": bad}).mock() as server, pytest.raises(StepFailed, match=r"n\.b.*no"):
        server.infer(x=X)


def test_reweight_needs_one_member_where_no_quorum_is_given() -> None:
    options = {"weights": {"a": 1, "b": 3}, "on_failure": "reweight"}
    with ensemble({"a": good, "b": bad}, "weighted_mean", **options).mock() as server:
        reply = server.infer(x=X)
        assert [[2.0], [4.0]] == reply.outputs["y"].tolist()
        assert {"n.members": "a", "n.weights": "a=1"} == reply.parameters
    with (
        ensemble({"a": bad, "b": bad}, on_failure="reweight").mock() as server,
        pytest.raises(Unavailable, match="only 0 of 2 members answered, quorum is 1"),
    ):
        server.infer(x=X)


@pytest.mark.parametrize(("default", "expected"), [(8, [[5.0], [6.0]]), ([0.0], [[1.0], [2.0]])])
def test_a_default_stands_in_with_its_members_weight_and_is_marked(default: Any, expected: Any) -> None:
    options = {"on_failure": "default", "defaults": {"b": {"y": default}}, "weights": {"a": 1, "b": 1}}
    with ensemble({"a": good, "b": bad}, "weighted_mean", **options).mock() as server:
        reply = server.infer(x=X)
    assert (expected, np.dtype("f4")) == (reply.outputs["y"].tolist(), reply.outputs["y"].dtype)
    assert {"n.members": "a", "n.weights": "a=0.5,b=0.5", "n.defaulted": "b"} == reply.parameters


def test_where_all_answer_no_default_stands_in() -> None:
    with ensemble({"a": good, "b": good}, on_failure="default", defaults={"b": {"y": 8}}).mock() as server:
        reply = server.infer(x=X)
    assert ([[2.0], [4.0]], {"n.members": "a,b"}) == (reply.outputs["y"].tolist(), reply.parameters)


def test_a_member_without_a_default_may_not_fail() -> None:
    with (
        ensemble({"a": bad, "b": good}, on_failure="default", defaults={"b": {"y": 8}}).mock() as server,
        pytest.raises(StepFailed, match=r"n\.a.*no"),
    ):
        server.infer(x=X)


def test_a_default_may_be_a_label() -> None:
    def text(*labels: bytes) -> Any:
        return lambda value: {"y": np.array(labels, object)}

    options = {"on_failure": "default", "defaults": {"c": {"y": "cat"}}}
    with ensemble({"a": text(b"dog", b"cat"), "b": text(b"cat", b"dog"), "c": bad}, "vote", **options).mock() as server:
        assert [b"cat", b"cat"] == server.infer(x=X).outputs["y"].tolist()


def test_a_function_gets_defaults_in_the_shape_that_the_member_declares() -> None:
    def own(members: Any) -> Any:
        assert (np.dtype("i8"), (2, 3)) == (members["b"]["z"].dtype, members["b"]["z"].shape)
        return {"y": members["a"]["y"] + members["b"]["z"][:, :1]}

    members = {"a": good, "b": steps.Python(bad, outputs={"z": ("INT64", [-1, 3])})}
    with ensemble(members, own, on_failure="default", defaults={"b": {"z": [1, 2, 3]}}).mock() as server:
        reply = server.infer(x=X)
    assert ([[3.0], [5.0]], "b") == (reply.outputs["y"].tolist(), reply.parameters["n.defaulted"])


def test_in_a_batch_only_the_request_at_fault_gets_the_default(run: Run) -> None:
    def poisoned(value: Any) -> Any:
        if (value["x"] < 0).any():
            raise ValueError("poison")
        return {"y": value["x"]}

    graph = ensemble({"a": poisoned, "b": good}, on_failure="default", defaults={"a": {"y": 100}}, batch={"max_rows": 4})

    async def check() -> None:
        async with graph.mock() as server:
            numbers = (2, 4, -1)
            replies = await asyncio.gather(*(server.infer(x=np.full((1, 1), n, np.float32)) for n in numbers))
            assert [3.0, 6.0, 49.0] == [reply.outputs["y"].item() for reply in replies]
            assert [None, None, "a"] == [reply.parameters.get("n.defaulted") for reply in replies]

    run(check())


def test_a_late_member_gets_its_default_where_the_quorum_is_there(run: Run, manual_clock: ManualClock) -> None:
    async def slow(value: Any) -> Any:
        await asyncio.sleep(60)

    options = {"on_failure": "default", "defaults": {"slow": {"y": 0}}, "quorum": 1, "wait": "quorum"}

    async def check() -> None:
        async with ensemble({"a": good, "slow": slow}, **options).mock() as server:
            reply = await asyncio.wait_for(server.infer(x=X), 1)
            assert ([[1.0], [2.0]], "slow") == (reply.outputs["y"].tolist(), reply.parameters["n.defaulted"])

    run(check())


def test_with_fail_and_wait_quorum_who_is_late_is_left_out_and_who_fails_is_not(run: Run, manual_clock: ManualClock) -> None:
    def after(seconds: float, work: Any) -> Any:
        async def member(value: Any) -> Any:
            await asyncio.sleep(seconds)
            return work(value)

        return member

    async def check() -> None:
        late = {"a": after(1, good), "b": after(2, bad)}
        early = {"a": after(2, good), "b": after(1, bad)}
        for members, seconds in ((late, 1), (early, 1)):
            graph = ensemble(members, quorum=1, wait="quorum", on_failure="fail")
            async with graph.mock() as server:
                request = asyncio.ensure_future(server.infer(x=X))
                await manual_clock.advance(seconds)
                if members is late:
                    assert "a" == (await request).parameters["n.members"]
                else:
                    assert isinstance(request.exception(), StepFailed)
                assert 0 == server.in_flight

    run(check())


def test_the_callers_mistake_stays_the_callers_mistake() -> None:
    def refuses(value: Any) -> Any:
        raise InvalidRequest("x must be positive")

    with (
        ensemble({"a": refuses, "b": refuses}, on_failure="reweight").mock() as server,
        pytest.raises(InvalidRequest, match="x must be positive"),
    ):
        server.infer(x=X)


def test_a_default_that_fits_no_answer_is_an_error_and_no_answer() -> None:
    for default, text in (([1.0, 2.0, 3.0], "does not fit"), ("text", "expected float32")):
        with (
            ensemble({"a": good, "b": bad}, on_failure="default", defaults={"b": {"y": default}}).mock() as server,
            pytest.raises(StepFailed, match=text),
        ):
            server.infer(x=X)
    with (
        ensemble({"a": good, "b": bad}, on_failure="default", defaults={"b": {"z": 1}}).mock() as server,
        pytest.raises(StepFailed, match=r"'defaults' gives 'z' for 'b', but members give \['y'\]"),
    ):
        server.infer(x=X)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"on_failure": "default"}, "belong together"),
        ({"defaults": {"b": {"y": 1}}}, "belong together"),
        ({"quorum": 1, "on_failure": "fail"}, "'on_failure: fail' needs every member"),
        ({"on_failure": "default", "defaults": {"c": {"y": 1}}}, "names 'c', which is no member"),
        ({"on_failure": "default", "defaults": {"b": {"z": 1}}}, "has none for y"),
        ({"on_failure": "default", "defaults": {"b": {"y": 1, "z": 1}}}, "names 'z'"),
        ({"on_failure": "default", "defaults": {"b": {"y": "one"}}}, "its values are <U3, expected float32"),
        ({"on_failure": "default", "defaults": {"b": {"y": [1, [2]]}}}, "does not fit"),
        ({"on_failure": "default", "defaults": {"b": {"y": [[1, 2]]}}}, r"its shape is \[1, 2\], expected \[-1, 1\]"),
        ({"on_failure": "ignore"}, "on_failure"),
    ],
)
def test_policies_that_make_no_sense_are_refused(options: Any, text: str) -> None:
    members = {name: steps.Python(good, outputs={"y": ("FP32", [-1, 1])}) for name in "ab"}
    with pytest.raises(GraphInvalid, match=text):
        ensemble(members, **options).compile()


@pytest.mark.parametrize(
    ("outputs", "value", "text"),
    [
        (None, 1, "needs its outputs, which are not known"),
        (("FP32", [-1, -1]), 1, "have to be known, all but the first axis"),
        (("UINT8", [-1]), 300, "go beyond uint8"),
        (("FP16", [-1]), [1.0, 1e6], "go beyond float16"),
        (("BF16", [-1]), 1e300, "go beyond bfloat16"),
        (("INT64", [-1]), 1.5, "its values are float64, expected int64"),
    ],
)
def test_defaults_for_a_function_need_declared_outputs(outputs: Any, value: Any, text: str) -> None:
    b = bad if outputs is None else steps.Python(bad, outputs={"y": outputs})
    with pytest.raises(GraphInvalid, match=text):
        ensemble(
            {"a": good, "b": b}, lambda members: members["a"], on_failure="default", defaults={"b": {"y": value}}
        ).compile()


def test_weights_change_between_two_requests_and_the_report_says_who_was_missing() -> None:
    state = {"fails": False}

    def sometimes(value: Any) -> Any:
        if state["fails"]:
            raise ValueError("no")
        return {"y": value["x"] * 4}

    graph = ensemble({"a": good, "b": sometimes}, "weighted_mean", weights={"a": 1, "b": 1}, quorum=1)
    with graph.mock() as server:
        assert [[3.0], [6.0]] == server.infer(x=X).outputs["y"].tolist()
        assert {"weights": {"a": 0.0, "b": 3}} == server.adjust("n", {"weights": {"b": 3}})
        assert [[4.0], [8.0]] == server.infer(x=X).outputs["y"].tolist()
        state["fails"] = True
        with pytest.raises(Unavailable, match="only members of weight 0 answered: a"):
            server.infer(x=X)
        assert {"requests": 3, "missing": {"a": 0, "b": 1}, "shares": {"a": 0.0, "b": 1.0}} == server.router("n").report()
        for change in ({"weights": {"c": 1}}, {"weights": {"a": -1}}, {"weights": {"a": 0}}, {"quorum": 2}):
            with pytest.raises(InvalidRequest):
                server.adjust("n", change)
        assert {"weights": {"a": 0.0, "b": 3}} == server.router("n").settings()


def test_an_ensemble_without_weights_has_no_settings_and_may_be_pure() -> None:
    members = {name: steps.Python(good, pure=True) for name in "ab"}
    with ensemble(members, pure=True, cache={"max_bytes": 10_000}).mock() as server:
        assert {} == server.router("n").settings()
        with pytest.raises(InvalidRequest, match="no settings"):
            server.adjust("n", {"weights": {"a": 1}})
    with pytest.raises(GraphInvalid, match="settings that can be changed"):
        ensemble(members, "weighted_mean", weights={"a": 1, "b": 2}, pure=True).compile()


@pytest.mark.parametrize("options", [{"quorum": 2}, {"quorum": 2, "wait": "quorum"}, {"quorum": 2, "on_failure": "reweight"}])
def test_where_nobody_can_be_spared_a_failure_is_told_as_it_is(options: Any) -> None:
    with ensemble({"a": good, "b": bad}, **options).mock() as server, pytest.raises(StepFailed, match=r"n\.b.*no"):
        server.infer(x=X)
