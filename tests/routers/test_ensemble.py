"""The ensemble router: what members' answers become, and which members have to answer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from servinggraph import Graph, routers, steps
from servinggraph.context import Context
from servinggraph.errors import GraphInvalid, InvalidRequest, LimitExceeded, StepFailed, Unavailable
from servinggraph.executor import Executor
from servinggraph.testing import FakeModel, ManualClock

Run = Callable[[Coroutine[Any, Any, None]], None]
X = {"x": np.zeros((2, 1), "f4")}


def gives(*numbers: Any, dtype: Any = "f4") -> Callable[[Any], Any]:
    def member(value: Any) -> Any:
        return {"y": np.array(numbers, dtype)}

    return member


def fails(error: BaseException) -> Callable[[Any], Any]:
    def member(value: Any) -> Any:
        raise error

    return member


def graph_of(members: Mapping[str, Any], combine: Any = "mean", **options: Any) -> Graph:
    graph = Graph("g", inputs={"x": ("FP32", [-1, 1])})
    return graph.to(routers.Ensemble(members, combine=combine, **options), name="score").respond()


async def started(graph: Graph) -> Executor:
    executor = Executor(graph.compile())
    await executor.start()
    return executor


async def answer(graph: Graph, context: Context | None = None, value: Any = None) -> Any:
    executor = await started(graph)
    try:
        return await executor.run(X if value is None else value, context or Context())
    finally:
        await executor.stop()


def combined(members: Mapping[str, Any], combine: Any = "mean", **options: Any) -> np.ndarray:
    result = asyncio.run(answer(graph_of(members, combine, **options)))
    assert ["y"] == list(result)
    return result["y"]


def refused(members: Mapping[str, Any], combine: Any = "mean", **options: Any) -> str:
    with pytest.raises(GraphInvalid) as caught:
        graph_of(members, combine, **options).compile()
    return str(caught.value)


# What the members' answers become.


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", ml_dtypes.bfloat16])
def test_the_mean_has_the_members_datatype(dtype: Any) -> None:
    result = combined({"a": gives(1, 2, dtype=dtype), "b": gives(3, 5, dtype=dtype), "c": gives(5, 8, dtype=dtype)})
    assert np.dtype(dtype) == result.dtype
    assert [3, 5] == result.tolist()


def test_the_mean_of_half_precision_does_not_overflow_on_the_way() -> None:
    assert [60000.0] == combined({name: gives(60000, dtype="f2") for name in "abc"}).tolist()


def test_weights_need_not_sum_up_to_one() -> None:
    members = {"a": gives(10), "b": gives(10)}
    assert [10.0] == combined(members, "weighted_mean", weights={"a": 2, "b": 2}).tolist()
    assert [10.0] == combined(members, "weighted_mean", weights={"a": 0.2, "b": 0.2}).tolist()
    members = {"a": gives(3, dtype="f8"), "b": gives(9, dtype="f8")}
    assert [5.0] == combined(members, "weighted_mean", weights={"a": 2, "b": 1}).tolist()


def test_a_member_of_weight_0_is_left_out_even_if_it_gives_nan() -> None:
    members = {"a": gives(1), "b": gives(np.nan), "c": gives(3)}
    assert [2.0] == combined(members, "weighted_mean", weights={"a": 1, "b": 0, "c": 1}).tolist()


def test_a_nan_that_counts_is_passed_on() -> None:
    assert np.isnan(combined({"a": gives(1), "b": gives(np.nan)})).all()


@pytest.mark.parametrize("dtype", ["i4", "i8", "u1", "?", "O", "<U1", ">i4"])
def test_a_vote_elects_each_elements_label_and_the_smallest_of_equals(dtype: str) -> None:
    members = {"a": gives(1, 0, 1, dtype=dtype), "b": gives(1, 0, 0, dtype=dtype), "c": gives(0, 1, 0, dtype=dtype)}
    result = combined(members, "vote")
    assert np.dtype(dtype) == result.dtype
    assert np.array([1, 0, 0], dtype).tolist() == result.tolist()
    tie = combined({"a": gives(1, dtype=dtype), "b": gives(0, dtype=dtype)}, "vote")
    assert np.array([0], dtype).tolist() == tie.tolist()


def test_a_vote_takes_weights_and_sums_of_them_can_tie() -> None:
    members = {name: gives(label, dtype="i8") for name, label in {"a": 5, "b": 7, "c": 5, "d": 7}.items()}
    assert [7] == combined(members, "vote", weights={"a": 1, "b": 5, "c": 1, "d": 0}).tolist()
    assert [5] == combined(members, "vote", weights={"a": 0.1, "b": 0.3, "c": 0.2, "d": 0}).tolist()


def test_a_vote_knows_negative_labels_and_far_apart_ones() -> None:
    members = {"a": gives(-1, 2**62, dtype="i8"), "b": gives(-1, 3, dtype="i8"), "c": gives(4, 2**62, dtype="i8")}
    assert [-1, 2**62] == combined(members, "vote").tolist()


def test_a_vote_over_many_different_labels_needs_little_memory() -> None:
    labels = np.arange(50_000)
    members = {"a": gives(*labels, dtype="i8"), "b": gives(*labels[::-1], dtype="i8"), "c": gives(*labels, dtype="i8")}
    np.testing.assert_array_equal(labels, combined(members, "vote"))


def test_a_vote_over_text_takes_bytes_and_str_and_every_width() -> None:
    cat, dog = gives(b"cat", dtype=object), gives("dog", dtype=object)
    assert [b"cat"] == combined({"a": cat, "b": dog, "c": gives("cat", dtype=object)}, "vote").tolist()
    assert ["horse"] == combined({"a": gives("cat"[:3], dtype="<U3"), "b": gives("horse", dtype="<U5"),
                                  "c": gives("horse", dtype="<U9")}, "vote").tolist()  # fmt: skip


def test_a_scalar_and_an_empty_output_can_be_voted_over() -> None:
    assert 3 == combined({"a": lambda value: {"y": np.array(3)}, "b": lambda value: {"y": np.array(3)}}, "vote")
    assert (0,) == combined({"a": gives(dtype="i8"), "b": gives(dtype="i8")}, "vote").shape


def test_every_output_is_combined_or_those_that_tensors_lists() -> None:
    def member(number: float) -> Callable[[Any], Any]:
        return lambda value: {
            "y": np.array([float(number)]),
            "z": np.array([number + 1.0]),
            f"own{int(number)}": np.array([0.0]),
        }

    assert [2.0] == combined({"a": member(1), "b": member(3)}, tensors=["y"]).tolist()
    with pytest.raises(StepFailed, match=r"node 'score': member 'a' gave .*own1.*, but 'b' gave"):
        combined({"a": member(1), "b": member(3)})
    with pytest.raises(StepFailed, match="but no w"):
        combined({"a": member(1), "b": member(3)}, tensors=["w"])


def test_a_function_of_ones_own_gets_all_that_the_members_gave() -> None:
    def most(members: Mapping[str, Any]) -> Any:
        assert ["a", "b"] == list(members)
        return {"y": np.maximum(members["a"]["y"], members["b"]["y"])}

    async def most_later(members: Mapping[str, Any]) -> Any:
        await asyncio.sleep(0)
        return most(members)

    for combine in (most, most_later):
        assert [3.0, 4.0] == combined({"a": gives(1, 4), "b": gives(3, 2)}, combine).tolist()


def test_what_a_function_of_ones_own_raises_names_the_node_and_the_members() -> None:
    def fail(members: Any) -> Any:
        raise KeyError("k")

    with pytest.raises(StepFailed, match="node 'score': cannot combine a, b: KeyError: 'k'") as caught:
        combined({"a": gives(1), "b": gives(1)}, fail)
    assert isinstance(caught.value.__cause__, KeyError)


@pytest.mark.parametrize(
    ("a", "b", "combine", "text"),
    [
        (gives(1), gives(1, 2), "mean", r"outputs 'y' differ in shape: a \[1\], b \[2\]"),
        (gives(1), gives(1, dtype="f8"), "mean", "differ in datatype: a float32, b float64"),
        (gives(1, dtype="i4"), gives(1, dtype="i8"), "vote", "differ in datatype"),
        (gives(1, dtype="i4"), gives("1", dtype=object), "vote", "differ in datatype"),
        (gives(1, dtype="i8"), gives(2, dtype="i8"), "mean", "a mean of labels is no label"),
        (gives(1), gives(2), "vote", "vote over labels"),
        (gives(1), lambda value: [1], "mean", "member 'b' gave a list"),
        (gives(1), lambda value: {"z": np.zeros(1, "f4")}, "mean", "but 'b' gave"),
    ],
)
def test_members_that_do_not_fit_each_other_are_an_error_and_never_coerced(a: Any, b: Any, combine: str, text: str) -> None:
    with pytest.raises(StepFailed, match=text) as caught:
        combined({"a": a, "b": b}, combine)
    assert "score" == caught.value.node


# Who has to answer.


def test_without_a_quorum_one_failing_member_fails_the_request_by_name(run: Run) -> None:
    async def check() -> None:
        hanging = FakeModel({"y": np.zeros(1)}, delay_s=1000)
        with pytest.raises(StepFailed, match="node 'score.b': ValueError: v") as caught:
            await answer(graph_of({"a": hanging, "b": fails(ValueError("v")), "c": gives(1)}))
        assert isinstance(caught.value.__cause__, ValueError)

    run(check())


def test_with_a_quorum_the_members_that_answered_are_weighted_anew_and_named() -> None:
    context = Context()
    members = {"a": gives(1, dtype="f8"), "b": fails(ValueError()), "c": gives(4, dtype="f8")}
    graph = graph_of(members, "weighted_mean", weights={"a": 2, "b": 5, "c": 1}, quorum=2)
    result = asyncio.run(answer(graph, context))
    assert [2.0] == result["y"].tolist()
    assert {"score.members": "a,c", "score.weights": "a=0.6667,c=0.3333"} == context.response_parameters


def test_all_answers_are_named_where_all_answered() -> None:
    context = Context()
    asyncio.run(answer(graph_of({"a": gives(1), "b": gives(1)}), context))
    assert {"score.members": "a,b"} == context.response_parameters


def test_a_slow_member_is_missing_after_its_timeout(run: Run, manual_clock: ManualClock) -> None:
    async def check() -> None:
        slow = steps.Python(FakeModel({"y": np.full(1, 9.0, "f4")}, delay_s=10), timeout_ms=50)
        context = Context()
        graph = graph_of({"a": gives(1), "slow": slow, "c": gives(3)}, quorum=2)
        executor = await started(graph)
        running = asyncio.ensure_future(executor.run(X, context))
        await manual_clock.advance(0.049)
        assert not running.done()
        await manual_clock.advance(0.001)
        assert [2.0] == (await running)["y"].tolist()
        assert "a,c" == context.response_parameters["score.members"]
        await executor.stop()

    run(check())


def test_too_few_answers_are_unavailable_and_say_why() -> None:
    members = {"a": gives(1), "b": fails(ValueError("v")), "c": fails(KeyError("k"))}
    text = r"only 1 of 3 members answered, quorum is 2 \(b: node 'score.b': ValueError: v; c: .*KeyError"
    with pytest.raises(Unavailable, match=text) as caught:
        combined(members, quorum=2)
    assert "score" == caught.value.node
    assert caught.value.retryable


def test_all_missing_is_an_error_and_no_zero() -> None:
    with pytest.raises(Unavailable, match="only 0 of 2"):
        combined({"a": fails(ValueError()), "b": fails(ValueError())}, quorum=1)


def test_only_members_of_weight_0_left_is_an_error() -> None:
    with pytest.raises(Unavailable, match="only members of weight 0 answered: b"):
        combined({"a": fails(ValueError()), "b": gives(1)}, "weighted_mean", weights={"a": 1, "b": 0}, quorum=1)


def test_the_callers_mistake_is_no_reason_to_try_again() -> None:
    with pytest.raises(InvalidRequest, match="wrong"):
        combined({"a": fails(InvalidRequest("wrong")), "b": fails(InvalidRequest("wrong"))}, quorum=1)


@pytest.mark.parametrize("error", [SystemExit(1), asyncio.CancelledError(), StopIteration()])
def test_a_member_that_raises_the_unusual_is_missing_like_any_other(error: BaseException) -> None:
    assert [1.0] == combined({"a": gives(1), "b": fails(error)}, quorum=1).tolist()


def test_a_batched_member_that_refuses_is_missing_like_any_other(run: Run, manual_clock: ManualClock) -> None:
    """A full queue, say: its refusal must not keep the others from being asked."""

    async def check() -> None:
        slow = steps.Python(FakeModel({"y": np.array([[9.0]])}, delay_s=1), batch={"max_queue": 1, "max_rows": 1})
        fine = lambda value: {"y": np.array([[1.0]])}  # noqa: E731
        executor = await started(graph_of({"slow": slow, "fine": fine}, quorum=1))
        contexts = [Context() for _ in range(4)]
        value = {"x": np.zeros((1, 1), "f4")}
        running = [asyncio.ensure_future(executor.run(value, context)) for context in contexts]
        await manual_clock.advance(5)
        results = [(await request)["y"].tolist() for request in running]
        answered = [context.response_parameters["score.members"] for context in contexts]
        assert {"slow,fine": [[5.0]], "fine": [[1.0]]} == dict(zip(answered, results, strict=True))
        strict = await started(graph_of({"slow": slow, "fine": fine}))
        running = [asyncio.ensure_future(strict.run(value, Context())) for _ in range(4)]
        await manual_clock.advance(5)
        outcomes = await asyncio.gather(*running, return_exceptions=True)
        assert any(isinstance(outcome, LimitExceeded) and outcome.node == "score.slow" for outcome in outcomes)
        await executor.stop()
        await strict.stop()

    run(check())


def test_the_first_failure_cancels_the_other_members(run: Run, manual_clock: ManualClock) -> None:
    cancelled: list[str] = []

    async def hang(value: Any) -> Any:
        try:
            await asyncio.sleep(1000)
        except asyncio.CancelledError:
            cancelled.append("hang")
            raise

    async def fail(value: Any) -> Any:
        await asyncio.sleep(0.010)
        raise ValueError("v")

    async def check() -> None:
        executor = await started(graph_of({"a": hang, "b": fail}))
        running = asyncio.ensure_future(executor.run(X, Context()))
        await manual_clock.advance(0.010)
        with pytest.raises(StepFailed, match="score.b"):
            await running
        assert ["hang"] == cancelled
        await executor.stop()

    run(check())


@pytest.mark.parametrize("quorum", [None, 1])
def test_a_cancelled_request_cancels_every_member(run: Run, manual_clock: ManualClock, quorum: int | None) -> None:
    cancelled: list[str] = []

    def member(name: str) -> Any:
        async def hang(value: Any) -> Any:
            try:
                await asyncio.sleep(1000)
            finally:
                cancelled.append(name)

        return hang

    async def check() -> None:
        executor = await started(graph_of({"a": member("a"), "b": member("b")}, quorum=quorum))
        running = asyncio.ensure_future(executor.run(X, Context()))
        await manual_clock.settle()
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert ["a", "b"] == sorted(cancelled)
        await executor.stop()

    run(check())


# Members share their input.


def test_a_member_cannot_change_the_others_input() -> None:
    def adds_a_tensor(value: Any) -> Any:
        value["extra"] = value.pop("x")
        return {"y": np.zeros(1, "f4")}

    def writes(value: Any) -> Any:
        value["x"][:] = 7
        return {"y": np.zeros(1, "f4")}

    def looks(value: Any) -> Any:
        assert ["x"] == list(value)
        return {"y": value["x"][0]}

    async def looks_later(value: Any) -> Any:
        await asyncio.sleep(0)
        return looks(value)

    assert [0.0] == combined({"a": adds_a_tensor, "b": looks, "c": looks_later}).tolist()
    context = Context()
    value = {"x": np.zeros((1, 1), "f4")}
    result = asyncio.run(answer(graph_of({"a": writes, "b": looks}, quorum=1), context, value))
    assert [0.0] == result["y"].tolist()
    assert "b" == context.response_parameters["score.members"]
    with pytest.raises(StepFailed, match=r"score\.a.*read-only"):
        combined({"a": writes, "b": looks})


# What is refused before the first request.


@pytest.mark.parametrize(
    ("combine", "options", "text"),
    [
        ("weighted_mean", {}, "needs 'weights'"),
        ("weighted_mean", {"weights": {"a": 1, "z": 1}}, "'weights' names z, but the branches are a, b"),
        ("weighted_mean", {"weights": {"a": 1}}, "'weights' has none for b"),
        ("weighted_mean", {"weights": {"a": 1, "b": -1}}, "must be 0 or more"),
        ("weighted_mean", {"weights": {"a": 0, "b": 0}}, "not all 0"),
        ("weighted_mean", {"weights": {"a": float("nan"), "b": 1}}, "must be 0 or more"),
        ("mean", {"weights": {"a": 1, "b": 1}}, "'combine: mean' does not take it"),
        ("mean", {"quorum": 3}, "'quorum' is 3, but there are 2 members"),
        ("mean", {"quorum": 0}, "quorum"),
        ("mean", {"tensors": []}, "tensors"),
        ("mode", {}, "unknown rule 'mode'"),
        ("medain", {}, "did you mean 'median'"),
        ("no.such:thing", {}, "no"),
        (print, {"weights": {"a": 1, "b": 1}}, "'weights' is for"),
        (print, {"tensors": ["y"]}, "'tensors' is for"),
        ("mean", {"wieghts": {}}, "did you mean 'weights'"),
    ],
)
def test_options_that_make_no_sense_are_refused_at_start(combine: Any, options: dict[str, Any], text: str) -> None:
    assert text in refused({"a": gives(1), "b": gives(1)}, combine, **options)


@pytest.mark.parametrize(
    ("a", "b", "combine", "options", "text"),
    [
        (("FP32", [-1, 2]), ("FP32", [-1, 3]), "mean", {}, "members do not fit"),
        (("FP32", [-1, 2]), ("FP64", [-1, 2]), "mean", {}, "members do not fit"),
        (("INT64", [-1]), ("INT64", [-1]), "mean", {}, "a mean of labels is no label"),
        (("FP32", [-1]), ("FP32", [-1]), "mean", {"tensors": ["z"]}, "'tensors' names z"),
    ],
)
def test_members_known_not_to_fit_are_refused_at_start(a: Any, b: Any, combine: str, options: Any, text: str) -> None:
    members = {name: steps.Python(gives(1), outputs={"y": spec}) for name, spec in (("a", a), ("b", b))}
    assert text in refused(members, combine, **options)


# In batches, and in pieces.


def poisoned(value: Any) -> Any:
    if (value["x"] < 0).any():
        raise ValueError("poison")
    return {"y": value["x"] * 1}


def nine(value: Any) -> Any:
    return {"y": np.full_like(value["x"], 9)}


def test_in_a_batched_ensemble_with_quorum_one_callers_row_costs_no_other_caller_a_member(run: Run) -> None:
    async def check() -> None:
        executor = await started(graph_of({"a": poisoned, "b": nine}, quorum=1, batch={"max_rows": 4}))
        contexts = [Context() for _ in range(5)]
        values = [{"x": np.full((1, 1), number, "f4")} for number in (5, 1, 3, -1, 7)]
        results = await asyncio.gather(*(executor.run(value, context) for value, context in zip(values, contexts, strict=True)))
        assert [7.0, 5.0, 6.0, 9.0, 8.0] == [result["y"].item() for result in results]
        answered = [context.response_parameters["score.members"] for context in contexts]
        assert ["a,b", "a,b", "a,b", "b", "a,b"] == answered
        await executor.stop()

    run(check())


def test_a_request_in_pieces_tells_all_its_members_where_the_pieces_differ() -> None:
    context = Context()
    value = {"x": np.array([[1], [1], [-1]], "f4")}
    graph = graph_of({"a": poisoned, "b": nine}, quorum=1, batch={"max_rows": 2})
    result = asyncio.run(answer(graph, context, value))
    assert [5.0, 5.0, 9.0] == result["y"][:, 0].tolist()
    assert {"score.members": "a,b; b"} == context.response_parameters


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", ml_dtypes.bfloat16])
@pytest.mark.parametrize(
    ("combine", "options", "expected"),
    [
        ("median", {}, [2.0, 5.0]),
        ("max", {}, [64.0, 8.0]),
        ("trimmed_mean", {"trim": 0.2}, [2.0, 5.0]),
        ("trimmed_mean", {"trim": 0.45}, [2.0, 5.0]),
        ("trimmed_mean", {"trim": 0.1}, [14.2, 5.0]),
    ],
)
def test_rules_that_order_what_members_gave(dtype: Any, combine: str, options: Any, expected: list[float]) -> None:
    columns = [(1.0, 2.0), (2.0, 5.0), (64.0, 5.0), (1.0, 5.0), (3.0, 8.0)]
    members = {f"m{i}": gives(*numbers, dtype=dtype) for i, numbers in enumerate(columns)}
    graph = Graph("g", {"x": ("FP32", [-1, 1])})
    graph.to(routers.Ensemble(members, combine=combine, **options), "n").respond()
    with graph.mock() as server:
        y = server.infer(X).outputs["y"]
    assert np.dtype(dtype) == y.dtype
    np.testing.assert_allclose(y.astype("f8"), expected, rtol=0.01)


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", ml_dtypes.bfloat16])
@pytest.mark.parametrize(("combine", "options"), [("median", {}), ("max", {}), ("trimmed_mean", {"trim": 0.25})])
def test_a_member_that_gives_no_number_is_not_left_out_as_the_largest(dtype: Any, combine: str, options: Any) -> None:
    rows = [(1.0, 1.0), (2.0, 2.0), (3.0, 3.0), (np.nan, 4.0)]
    members = {f"m{i}": gives(*numbers, dtype=dtype) for i, numbers in enumerate(rows)}
    assert [True, False] == np.isnan(combined(members, combine, **options)).tolist()


def test_what_members_give_has_to_be_arrays() -> None:
    members = {"a": gives(1), "b": lambda value: {"y": [1.0]}}
    with pytest.raises(StepFailed, match="members' outputs 'y' must be arrays: a gave a ndarray, b gave a list"):
        combined(members)


def test_weights_have_a_sum() -> None:
    members = {"a": gives(1), "b": gives(3)}
    assert "'weights' are too large to be added up" in refused(members, "weighted_mean", weights={"a": 1e308, "b": 1e308})
    graph = graph_of(members, "weighted_mean", weights={"a": 1, "b": 1})
    with graph.mock() as server:
        with pytest.raises(InvalidRequest, match="the weights are too large to be added up"):
            server.adjust("score", {"weights": {"a": 1e308, "b": 1e308}})
        assert [2.0] == server.infer(X).outputs["y"].tolist()


def test_labels_have_no_median() -> None:
    graph = Graph("g", {"x": ("FP32", [-1, 1])})
    graph.to(routers.Ensemble({"a": gives(1, dtype="i8"), "b": gives(2, dtype="i8")}, combine="median"), "n").respond()
    with graph.mock() as server, pytest.raises(StepFailed, match="labels have no order"):
        server.infer(X)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"combine": "trimmed_mean"}, "'combine: trimmed_mean' needs 'trim'"),
        ({"combine": "median", "trim": 0.1}, "'trim' is for trimmed_mean; 'combine: median' does not take it"),
        ({"combine": "median", "weights": {"a": 1, "b": 1}}, "'weights' is for weighted_mean, vote, soft_vote"),
        ({"combine": "mean", "wait": "quorum"}, "needs 'quorum'"),
        ({"combine": "trimmed_mean", "trim": 0.5}, "trim"),
    ],
)
def test_rules_and_options_that_do_not_fit_are_refused(options: Any, text: str) -> None:
    graph = Graph("g", {"x": ("FP32", [-1, 1])})
    graph.to(routers.Ensemble({"a": gives(1), "b": gives(2)}, **options), "n").respond()
    with pytest.raises(GraphInvalid, match=text):
        graph.compile()


def test_with_wait_quorum_the_first_answers_are_enough_and_the_others_are_cancelled(
    run: Run, manual_clock: ManualClock
) -> None:
    ended: list[str] = []

    def member(number: float, seconds: float) -> Callable[[Any], Any]:
        async def work(value: Any) -> Any:
            try:
                await asyncio.sleep(seconds)
            finally:
                ended.append(f"{number:g}")
            return {"y": np.array([number], "f4")}

        return work

    members = {"slow": member(100, 5), "one": member(1, 0.1), "two": member(3, 0.2)}
    graph = Graph("g", {"x": ("FP32", [-1, 1])})
    graph.to(routers.Ensemble(members, combine="mean", quorum=2, wait="quorum"), "n").respond()

    async def check() -> None:
        async with graph.mock() as server:
            request = asyncio.ensure_future(server.infer(X))
            await manual_clock.advance(0.15)
            assert not request.done()
            await manual_clock.advance(0.06)
            reply = await request
            assert ([2.0], "one,two") == (reply.outputs["y"].tolist(), reply.parameters["n.members"])
            assert (["1", "3", "100"], 0) == (ended, server.in_flight)

    run(check())


def test_a_member_that_does_not_end_at_once_keeps_the_slot_and_not_the_caller(run: Run, manual_clock: ManualClock) -> None:
    async def stubborn(value: Any) -> Any:
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(1)

    graph = Graph("g", {"x": ("FP32", [-1, 1])})
    members = {"stubborn": stubborn, "one": gives(1, 1), "two": FakeModel({"y": np.array([3, 3], "f4")}, delay_s=0.005)}
    graph.to(routers.Ensemble(members, combine="mean", quorum=2, wait="quorum"), "n").respond()

    async def check() -> None:
        async with graph.mock() as server:
            request = asyncio.ensure_future(server.infer(X))
            await manual_clock.advance(0.01)
            assert [2.0, 2.0] == (await request).outputs["y"].tolist()
            assert 1 == server.in_flight
            await manual_clock.advance(2)
            assert 0 == server.in_flight

    run(check())


def test_with_wait_quorum_too_many_failures_end_it_at_once(run: Run, manual_clock: ManualClock) -> None:
    async def slow(value: Any) -> Any:
        await asyncio.sleep(60)

    graph = Graph("g", {"x": ("FP32", [-1, 1])})
    members = {"a": fails(ValueError("no")), "b": fails(ValueError("no")), "slow": slow}
    graph.to(routers.Ensemble(members, combine="mean", quorum=2, wait="quorum"), "n").respond()

    async def check() -> None:
        async with graph.mock() as server:
            request = asyncio.ensure_future(server.infer(X))
            await manual_clock.advance(0.01)
            assert isinstance(request.exception(), Unavailable)
            assert 0 == server.in_flight

    run(check())
