"""Kept answers of pure nodes: what is a hit, what is kept, who computes, and what is refused."""

from __future__ import annotations

import asyncio
import mmap
import random
from collections.abc import Callable, Coroutine
from typing import Any

import numpy as np
import pytest

from servinggraph import Graph, routers, steps
from servinggraph.context import Context
from servinggraph.errors import DeadlineExceeded, GraphInvalid, InvalidRequest, LimitExceeded, StepFailed
from servinggraph.executor import Executor
from servinggraph.testing import FakeModel, ManualClock

Run = Callable[[Coroutine[Any, Any, None]], None]
ROOM = {"max_bytes": 1 << 20}


class Count:
    """Doubles, and counts how often."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, value: Any) -> Any:
        self.calls += 1
        return {"y": value["x"] * 2}


class Slow:
    """Gives 7 for each row after a second, and counts how often."""

    def __init__(self) -> None:
        self.calls = 0

    async def __call__(self, value: Any) -> Any:
        self.calls += 1
        await asyncio.sleep(1)
        return {"y": np.full(len(value["x"]), 7.0)}


def graph_of(work: Any, cache: Any = ROOM, **options: Any) -> Graph:
    graph = Graph("g", {"x": ("FP32", [-1])})
    graph.to(work, "node", pure=True, cache=cache, **options).respond()
    return graph


def x(*numbers: float) -> dict[str, np.ndarray[Any, Any]]:
    return {"x": np.array(numbers or (1,), "f4")}


async def started(graph: Graph) -> Executor:
    executor = Executor(graph.compile())
    await executor.start()
    return executor


def counts(executor: Executor, name: str = "node") -> tuple[int, int]:
    statistics = executor.statistics.nodes[name]
    return statistics.hits, statistics.misses


def problems(graph: Graph) -> str:
    with pytest.raises(GraphInvalid) as caught:
        graph.compile()
    return str(caught.value)


def answers_of(work: Any, values: list[Any], cache: Any = ROOM) -> tuple[list[Any], tuple[int, int]]:
    """Run requests one after the other."""

    async def main() -> tuple[list[Any], tuple[int, int]]:
        executor = await started(graph_of(work, cache))
        answers = [await executor.run(value, Context()) for value in values]
        await executor.stop()
        return answers, counts(executor)

    return asyncio.run(main())


def test_an_equal_request_is_answered_without_computing():
    count = Count()
    with graph_of(count).mock() as server:
        for _ in range(3):
            assert [2, 4] == server.infer(x=[1.0, 2.0]).outputs["y"].tolist()
        assert [6] == server.infer(x=[3.0]).outputs["y"].tolist()
    assert 2 == count.calls


F4 = np.array([1, 2, 3, 4], "f4")
DIFFERENT: list[Any] = [
    {"x": F4},
    {"x": F4.reshape(2, 2)},
    {"x": F4.reshape(4, 1)},
    {"x": F4.view("i4")},
    {"x": F4.view("u1")},
    {"x": F4.astype("f2")},
    {"z": F4},
    {"x": F4[:2], "z": F4[2:]},
    {"x": F4[:3], "z": F4[3:]},
    {"x": F4, "z": F4[:0]},
    {"x": F4 * -0.0},
    {"x": F4 * 0.0},
    {"x": np.zeros((0, 4), "f4")},
    {"x": np.zeros((4, 0), "f4")},
    {"x": np.array([b"a", b"bc"], object)},
    {"x": np.array([b"ab", b"c"], object)},
    {"x": np.array(["ab", "c"], object)},
    {"x": np.array([b"ab", "c"], object)},
    {"x": np.array(["ab", "c"])},
    {"x": np.array([b"ab", b"c"])},
    {"x": np.array([b"abc", b""], object)},
]


def test_requests_that_differ_in_anything_are_different():
    seen: list[Any] = []

    def work(value: Any) -> Any:
        seen.append(value)
        return {"y": np.array([len(seen)])}

    answers, hits = answers_of(work, [*DIFFERENT, *DIFFERENT])
    first, second = answers[: len(DIFFERENT)], answers[len(DIFFERENT) :]
    assert list(range(1, len(DIFFERENT) + 1)) == [answer["y"][0] for answer in first]
    assert [answer["y"][0] for answer in first] == [answer["y"][0] for answer in second]
    assert (len(DIFFERENT), len(DIFFERENT)) == hits


def test_how_an_array_lies_in_memory_makes_no_difference():
    count = Count()
    square = np.arange(9, dtype="f4").reshape(3, 3)
    values = [{"x": square}, {"x": np.asfortranarray(square)}, {"x": np.repeat(square, 2, axis=1)[:, ::2]}]
    answers, hits = answers_of(count, values)
    assert [(square * 2).tolist()] * 3 == [answer["y"].tolist() for answer in answers]
    assert (2, 1) == hits


@pytest.mark.parametrize(
    "value",
    [
        {"x": "text"},
        "text",
        {"x": np.array([{}], object)},
        {"x": np.array(["2020"], "M8[Y]")},
        {"x": F4.astype(">f4")},
        {1: F4},
    ],
)
def test_what_is_no_tensor_passes_by(value):
    answers, hits = answers_of(lambda value: {"y": np.ones(1)}, [value, value])
    assert [1.0] == answers[1]["y"].tolist()
    assert (0, 0) == hits


@pytest.mark.parametrize("result", [{"y": [1]}, 3, {"y": np.array([[]], object), "z": np.array([{}], object)}])
def test_an_answer_that_is_no_tensor_is_not_kept(result):
    answers, hits = answers_of(lambda value: result, [x(), x()])
    assert (2, (0, 2)) == (len(answers), hits)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_answers_are_read_only_and_mappings_the_takers_own(asynchronous):
    made: list[Any] = []

    def work(value: Any) -> Any:
        made.append({"y": value["x"] + 1})
        return made[-1]

    async def later(value: Any) -> Any:
        return work(value)

    (first, second, large), hits = answers_of(later if asynchronous else work, [x(), x(), x(*range(300))], {"max_bytes": 1500})
    made[0]["y"][0] = 100  # a step that uses its buffer again
    assert ([2], [2], (1, 2)) == (first["y"].tolist(), second["y"].tolist(), hits)
    assert not first["y"].flags.writeable
    assert not second["y"].flags.writeable
    assert not large["y"].flags.writeable
    assert first["y"] is second["y"]
    first["more"] = 1
    assert ["y"] == list(second)


def test_a_step_that_writes_into_its_input_is_found_out_at_once():
    def work(value: Any) -> Any:
        value["x"][0] = 0
        return value

    with pytest.raises(StepFailed, match="read-only"):
        answers_of(work, [x()])


def test_the_least_recently_used_answers_go_first():
    """An answer of 1 float takes 512 + 256 + 4 bytes."""
    count = Count()

    async def main() -> None:
        executor = await started(graph_of(count, {"max_bytes": 2 * 772}))
        for number in (1, 2, 1, 3, 1, 3):  # 2 goes when 3 comes
            await executor.run(x(number), Context())
        assert 3 == count.calls
        await executor.run(x(2), Context())
        assert 4 == count.calls
        cache = executor.caches["node"]
        assert (2, 2 * 772, (3, 4)) == (len(cache), cache.size, counts(executor))
        await executor.stop()

    asyncio.run(main())


def test_memory_is_bounded_whatever_comes():
    draw = random.Random(3)

    async def main() -> None:
        executor = await started(graph_of(Count(), {"max_bytes": 20_000}))
        cache = executor.caches["node"]
        for _ in range(500):
            await executor.run(x(*[draw.randrange(50)] * draw.randrange(1, 2000)), Context())
            assert cache.size <= 20_000
        assert 0 < len(cache) <= 20_000 // 772
        await executor.stop()

    asyncio.run(main())


def test_text_counts_by_its_length():
    graph = Graph("g", {"x": ("BYTES", [-1])})
    graph.to(lambda value: {"y": value["x"]}, "node", pure=True, cache={"max_bytes": 10_000}).respond()

    async def main() -> None:
        executor = await started(graph)
        for _ in range(2):
            await executor.run({"x": np.array([b"x" * 20_000], object)}, Context())
            await executor.run({"x": np.array([b"x" * 2_000], object)}, Context())
        assert (1, 3) == counts(executor)
        assert 2_000 < executor.caches["node"].size < 10_000
        await executor.stop()

    asyncio.run(main())


def test_an_answer_expires(run: Run, manual_clock: ManualClock):
    count = Count()

    async def main() -> None:
        executor = await started(graph_of(count, {"max_bytes": 10_000, "ttl_s": 5}))
        await executor.run(x(), Context())
        await manual_clock.advance(4.9)
        await executor.run(x(), Context())
        assert 1 == count.calls
        await manual_clock.advance(0.2)
        await executor.run(x(), Context())
        assert (2, (1, 2), 772) == (count.calls, counts(executor), executor.caches["node"].size)
        await executor.stop()

    run(main())


@pytest.mark.parametrize("asynchronous", [False, True])
def test_an_error_is_never_kept(asynchronous):
    calls: list[int] = []

    def work(value: Any) -> Any:
        calls.append(1)
        if len(calls) < 3:
            raise InvalidRequest("not yet")
        return {"y": value["x"]}

    async def later(value: Any) -> Any:
        return work(value)

    with graph_of(later if asynchronous else work).mock() as server:
        for _ in range(2):
            with pytest.raises(InvalidRequest, match="node 'node': not yet"):
                server.infer(x=[1.0])
        assert [1] == server.infer(x=[1.0]).outputs["y"].tolist()
        assert [1] == server.infer(x=[1.0]).outputs["y"].tolist()
    assert 3 == len(calls)


def test_an_answer_that_its_node_must_not_give_is_not_kept():
    count = Count()
    graph = graph_of(count, outputs={"y": {"datatype": "FP32", "shape": [2]}})
    with graph.mock() as server:
        for calls in (1, 2):
            with pytest.raises(StepFailed, match="has shape"):
                server.infer(x=[1.0])
            assert calls == count.calls


def test_equal_requests_at_once_share_one_computation(run: Run, manual_clock: ManualClock):
    model = Slow()

    async def main() -> None:
        async with graph_of(model).mock() as server:
            requests = [asyncio.ensure_future(server.infer(x=[1.0])) for _ in range(5)]
            await manual_clock.advance(1.1)
            assert [[7.0]] * 5 == [(await request).outputs["y"].tolist() for request in requests]
            assert 1 == model.calls
            assert 0 == server.in_flight

    run(main())


@pytest.mark.parametrize("gone", [[0], [0, 1], [1, 3], [4], [0, 1, 2, 3, 4]])
def test_a_request_that_is_cancelled_fails_no_other(run: Run, manual_clock: ManualClock, gone: list[int]):
    model = Slow()

    async def main() -> None:
        async with graph_of(model).mock() as server:
            requests = [asyncio.ensure_future(server.infer(x=[1.0])) for _ in range(5)]
            await manual_clock.advance(0.5)
            for number in gone:
                requests[number].cancel()
                await manual_clock.settle()
            await manual_clock.advance(1.1)
            for number, request in enumerate(requests):
                if number in gone:
                    assert request.cancelled()
                else:
                    assert [7.0] == (await request).outputs["y"].tolist()
            assert (
                len([number for number in gone if number == 0 or number - 1 in gone and 0 in gone]) + (len(gone) < 5)
                >= model.calls
            )
            assert 0 == server.in_flight

    run(main())


def test_the_deadline_of_the_first_is_not_that_of_the_others(run: Run, manual_clock: ManualClock):
    model = Slow()

    async def main() -> None:
        async with graph_of(model).mock() as server:
            first = asyncio.ensure_future(server.infer(x=[1.0], timeout_s=0.5))
            second = asyncio.ensure_future(server.infer(x=[1.0], timeout_s=0.7))
            third = asyncio.ensure_future(server.infer(x=[1.0]))
            await manual_clock.advance(0.6)
            assert isinstance(first.exception(), DeadlineExceeded)
            assert not second.done()
            await manual_clock.advance(0.2)
            assert isinstance(second.exception(), DeadlineExceeded)
            await manual_clock.advance(1.1)
            assert [7.0] == third.result().outputs["y"].tolist()

    run(main())


def test_a_failure_of_the_first_is_its_own(run: Run, manual_clock: ManualClock):
    """The others are computed as they would be without a cache: the reason may have been the first one's."""
    calls: list[int] = []

    async def work(value: Any) -> Any:
        calls.append(1)
        number = len(calls)
        await asyncio.sleep(1)
        if number == 1:
            raise LimitExceeded("full")
        return {"y": value["x"]}

    async def main() -> None:
        async with graph_of(work).mock() as server:
            requests = [asyncio.ensure_future(server.infer(x=[1.0])) for _ in range(4)]
            await manual_clock.advance(1.1)
            await manual_clock.advance(1.1)
            assert isinstance(requests[0].exception(), LimitExceeded)
            assert [[1.0]] * 3 == [request.result().outputs["y"].tolist() for request in requests[1:]]
            assert 4 == len(calls)

    run(main())


def test_a_hit_needs_no_place_in_the_queue(run: Run, manual_clock: ManualClock):
    model = Slow()

    async def main() -> None:
        graph = graph_of(model, batch={"max_rows": 1, "max_queue": 1})
        async with graph.mock() as server:
            known = asyncio.ensure_future(server.infer(x=[1.0]))
            await manual_clock.advance(1.1)
            assert [7.0] == known.result().outputs["y"].tolist()
            others = [asyncio.ensure_future(server.infer(x=[float(number)])) for number in (2, 3)]
            await manual_clock.settle()
            with pytest.raises(LimitExceeded):
                await server.infer(x=[4.0])
            assert [7.0] == (await server.infer(x=[1.0])).outputs["y"].tolist()
            await manual_clock.advance(2.2)
            assert [[7.0]] * 2 == [other.result().outputs["y"].tolist() for other in others]

    run(main())


def test_one_row_of_a_batch_does_not_keep_the_whole_batch(run: Run, manual_clock: ManualClock):
    async def main() -> None:
        executor = await started(graph_of(Count(), batch={"max_rows": 64}))
        answers = await asyncio.gather(*(executor.run(x(number), Context()) for number in range(20)))
        assert [[2 * number] for number in range(20)] == [answer["y"].tolist() for answer in answers]
        assert all(answer["y"].base is None for answer in answers)
        await executor.stop()

    run(main())


def test_response_parameters_are_given_again():
    count = Count()
    graph = Graph("g", {"x": ("FP32", [-1])})
    members = {name: _pure(work) for name, work in (("a", count), ("b", lambda value: {"y": value["x"] * 4}))}
    graph.to(routers.Ensemble(members, combine="mean"), "score", pure=True, cache=ROOM).respond()
    with graph.mock() as server:
        for _ in range(3):
            answer = server.infer(x=[1.0])
            assert ([3], {"score.members": "a,b"}) == (answer.outputs["y"].tolist(), answer.parameters)
    assert 1 == count.calls


def test_response_parameters_of_others_are_not_kept():
    graph = Graph("g", {"x": ("FP32", [-1])})
    graph.to(routers.Ensemble({"a": _pure(Count())}, combine="mean"), "score", pure=True, cache=ROOM).respond()

    async def main() -> None:
        executor = await started(graph)
        first, second = Context(), Context()
        first.response_parameters["of another node"] = 1
        await executor.run(x(), first)
        await executor.run(x(), second)
        assert {"of another node": 1, "score.members": "a"} == first.response_parameters
        assert {"score.members": "a"} == second.response_parameters
        await executor.stop()

    asyncio.run(main())


def _pure(work: Any) -> Any:
    return steps.Python(work, pure=True)


@pytest.mark.parametrize("batch", [None, {"max_rows": 8}])
def test_statistics_count_hits_and_misses(run: Run, manual_clock: ManualClock, batch: Any):
    """Two computed, two hits, one that fails, one cancelled while it waited for an equal one."""

    async def work(value: Any) -> Any:
        await asyncio.sleep(1)
        if value["x"][0] == 3:
            raise InvalidRequest("three")
        return {"y": value["x"]}

    async def main() -> None:
        async with graph_of(work, **({"batch": batch} if batch else {})).mock() as server:

            def ask(number: float) -> asyncio.Future[Any]:
                return asyncio.ensure_future(server.infer(x=[number]))

            requests = [ask(1), ask(1), ask(1)]
            await manual_clock.settle()
            requests[1].cancel()
            await manual_clock.advance(1.1)
            requests += [ask(1)]
            await manual_clock.settle()
            for number in (2, 3):
                requests.append(ask(number))
                await manual_clock.advance(1.1)
            await asyncio.wait(requests)
            assert isinstance(requests[-1].exception(), InvalidRequest)
            graph, node = (await server.request("GET", "/v2/models/stats")).json()["model_stats"]
            counted = {name: entry["count"] for name, entry in node["inference_stats"].items()}
            expected = {"success": 4, "fail": 2, "queue": 4, "cache_hit": 2, "cache_miss": 3}
            assert {**dict.fromkeys(("compute_input", "compute_infer", "compute_output"), 2), **expected} == counted
            assert (2, 2) == (node["inference_count"], node["execution_count"])
            assert (4, 2) == tuple(graph["inference_stats"][name]["count"] for name in ("success", "fail"))
            assert node["inference_stats"]["cache_hit"]["ns"] > 0
            assert node["inference_stats"]["cache_miss"]["ns"] > 0

    run(main())


def test_hits_of_a_whole_graph_are_the_graphs():
    graph = Graph("g", {"x": ("FP32", [-1])}, cache=ROOM)
    graph.to(fine, "node", pure=True).respond()
    with graph.mock() as server:
        for _ in range(3):
            server.infer(x=[1.0])
        whole, node = server.request("GET", "/v2/models/stats").json()["model_stats"]
        assert (3, 2, 1) == tuple(whole["inference_stats"][name]["count"] for name in ("success", "cache_hit", "cache_miss"))
        assert (1, 0, 0) == tuple(node["inference_stats"][name]["count"] for name in ("success", "cache_hit", "cache_miss"))


def test_a_whole_graph_can_keep_its_answers():
    count = Count()
    graph = Graph("g", {"x": ("FP32", [-1])}, cache=ROOM)
    graph.to(count, "first", pure=True).to(lambda value: {"z": value["y"] + 1}, "second", pure=True).respond()
    with graph.mock() as server:
        for _ in range(3):
            assert [3] == server.infer(x=[1.0]).outputs["z"].tolist()
    assert 1 == count.calls


def test_kept_and_renamed_tensors_are_not_part_of_the_answer():
    """`keep` passes a tensor around the node: another one there is the same request to the node."""
    count = Count()
    graph = Graph("g", {"a": ("FP32", [-1])})
    graph.to(count, "node", pure=True, cache=ROOM, rename={"inputs": {"a": "x"}, "outputs": {"y": "b"}}, keep=["a"]).respond()
    with graph.mock() as server:
        for _ in range(2):
            answer = server.infer(a=[1.0]).outputs
            assert {"a": [1], "b": [2]} == {name: array.tolist() for name, array in answer.items()}
    assert 1 == count.calls


def test_what_a_client_may_still_change_is_copied_before_it_is_looked_up():
    memory = mmap.mmap(-1, 4096)
    array = np.frombuffer(memoryview(memory).toreadonly()[:4], "f4")
    memoryview(memory)[:4] = np.array([1], "f4").tobytes()

    def work(value: Any) -> Any:
        memoryview(memory)[:4] = np.array([5], "f4").tobytes()  # the client writes while the step runs
        return {"y": value["x"] * 2}

    answers, hits = answers_of(work, [{"x": array}, {"x": np.array([1], "f4")}, {"x": np.array([5], "f4")}])
    assert [[2], [2], [10]] == [answer["y"].tolist() for answer in answers]
    assert (1, 2) == hits
    del array


def test_large_values_are_looked_up_off_the_event_loop():
    async def work(value: Any) -> Any:
        return {"y": value["x"][:1]}

    big = np.ones(1 << 20, "f4")
    answers, hits = answers_of(work, [{"x": big}, {"x": big.copy()}])
    assert ([1.0], (1, 1)) == (answers[1]["y"].tolist(), hits)


def takes_context(value, context):
    return value


def makes_many(value):
    yield value


def fine(value):
    return value


@pytest.mark.parametrize(
    ("work", "options", "reason"),
    [
        (fine, {"cache": ROOM}, "'cache' is for nodes whose answer depends on nothing but their input: promise it with 'pure: true'"),
        (takes_context, {"cache": ROOM, "pure": True}, "is not pure: it takes the context"),
        (takes_context, {"pure": True}, "is not pure: it takes the context"),
        (makes_many, {"cache": ROOM, "pure": True}, "is not pure: it gives any number of answers"),
        (fine, {"cache": {}, "pure": True}, "missing key 'cache.max_bytes'"),
        (fine, {"cache": {"max_bytes": 0}, "pure": True}, "'cache.max_bytes'"),
        (fine, {"cache": {"max_bytes": 5, "ttl_s": 0}, "pure": True}, "'cache.ttl_s'"),
        (fine, {"cache": {"max_bytes": 5, "tll_s": 3}, "pure": True}, "unknown key 'cache.tll_s'; did you mean 'ttl_s'?"),
        (fine, {"cache": True, "pure": True}, "'cache': expected a mapping"),
        (routers.Ab({"a": _pure(fine), "b": _pure(fine)}, weights={"a": 1, "b": 1}), {"cache": ROOM, "pure": True}, "is not pure: it has settings that can be changed"),
        (routers.Ensemble({"a": fine, "b": fine}), {"cache": ROOM, "pure": True}, "is not pure: branch 'a' does not say 'pure: true'"),
        (routers.Ensemble({"a": _pure(fine), "b": _pure(fine)}, quorum=1), {"cache": ROOM, "pure": True}, "is not pure: it answers without members that fail"),
    ],
)  # fmt: skip
def test_what_can_change_the_answer_is_refused(work, options, reason):
    graph = Graph("g", {"x": ("FP32", [-1])})
    graph.to(work, "node", **options).respond()
    assert reason in problems(graph)


def test_a_router_says_itself_that_it_can_be_pure(monkeypatch):
    count = Count()
    graph = Graph("g", {"x": ("FP32", [-1])})
    graph.to(routers.Chain({"a": _pure(count), "b": _pure(fine)}), "chain", pure=True, cache=ROOM).respond()
    with graph.mock() as server:
        for _ in range(2):
            assert [2] == server.infer(x=[1.0]).outputs["y"].tolist()
    assert 1 == count.calls
    monkeypatch.delattr("servinggraph.routers.chain.Chain.impurity")
    assert "is not pure: it may decide differently for each request" in problems(graph)


def test_a_graph_with_a_node_that_is_not_pure_cannot_keep_answers():
    graph = Graph("g", {"x": ("FP32", [-1])}, cache=ROOM)
    graph.to(fine, "first", pure=True).to(fine, "second").respond()
    assert "'cache' keeps the graph's answers, and node 'second' does not say 'pure: true'" in problems(graph)


def keeps_state(value, state):
    return value


def test_what_belongs_to_a_sequence_is_not_kept():
    graph = Graph("g", {"x": ("FP32", [-1])}, sequences={})
    graph.to(keeps_state, "node", pure=True, cache=ROOM).respond()
    assert "is not pure: it keeps state for its sequence" in problems(graph)
    graph = Graph("g", {"x": ("FP32", [-1])}, sequences={}, cache=ROOM)
    graph.to(fine, "node", pure=True).respond()
    assert "'cache' keeps the graph's answers, which with 'sequences' depend on what came before" in problems(graph)


def test_a_pure_node_of_a_graph_with_sequences_keeps_its_answers():
    count = Count()
    graph = Graph("g", {"x": ("FP32", [-1])}, sequences={})
    graph.to(count, "node", pure=True, cache=ROOM).respond()
    with graph.mock() as server:
        for start in (True, False):
            answer = server.infer(x=[1.0], parameters={"sequence_id": 7, "sequence_start": start})
            assert [2] == answer.outputs["y"].tolist()
    assert 1 == count.calls


def test_a_stand_in_is_not_kept():
    model = FakeModel({"y": [1.0]})
    with graph_of(fine).mock(replace={"node": model}) as server:
        for _ in range(2):
            server.infer(x=[1.0])
    assert 2 == len(model.calls)


@pytest.mark.parametrize("seed", range(6))
def test_requests_get_the_same_answers_with_a_cache_and_without(run: Run, manual_clock: ManualClock, seed: int):
    """Random requests, many equal, at random times, some cancelled or with short deadlines, over small caches."""
    draw = random.Random(seed)

    async def slow(value: Any) -> Any:
        await asyncio.sleep(0.05)
        if (value["x"] == 3).any():
            raise InvalidRequest("three")
        return {"y": value["x"] * 2}

    def build(cache: Any) -> Graph:
        options: dict[str, Any] = {} if cache is None else {"pure": True, "cache": cache}
        graph = Graph("g", {"x": ("FP32", [-1])})
        batch = {"max_rows": 4} if seed % 2 else None
        node = graph.to(slow, "slow", **options, **({"batch": batch} if batch else {}))
        node.to(lambda value: {"z": value["y"] + 1}, "plain", **options).respond()
        return graph

    plan = [
        ([float(draw.randrange(4))] * draw.randrange(1, 4), draw.choice([None, None, 0.02, 0.3]), draw.random() < 0.1, draw.random() * 0.03)
        for _ in range(150)
    ]  # fmt: skip
    cache = {"max_bytes": draw.choice([800, 3000, 100_000]), "ttl_s": draw.choice([None, 0.1])}

    async def answers(graph: Graph) -> list[Any]:
        async with graph.mock() as server:
            requests = []
            for numbers, timeout_s, cancelled, pause in plan:
                request = asyncio.ensure_future(server.infer(x=numbers, timeout_s=timeout_s))
                requests.append(request)
                await manual_clock.advance(pause)
                if cancelled:
                    request.cancel()
            await manual_clock.advance(5)
            assert all(request.done() for request in requests)
            assert 0 == server.in_flight
            return [_outcome(request) for request in requests]

    async def main() -> None:
        plain, kept = await answers(build(None)), await answers(build(cache))
        for (numbers, timeout_s, cancelled, _), without, with_cache in zip(plan, plain, kept, strict=True):
            if cancelled or timeout_s == 0.02:  # a hit may be in time where a computation was not
                assert with_cache in (without, [number * 2 + 1 for number in numbers])
            elif timeout_s is None:
                assert without == with_cache

    run(main())


def _outcome(request: asyncio.Future[Any]) -> Any:
    if request.cancelled():
        return "cancelled"
    error = request.exception()
    return f"{type(error).__name__}: {error}" if error else request.result().outputs["z"].tolist()
