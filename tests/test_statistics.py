"""Counters of graphs and nodes: every request is counted once, whatever becomes of it, and the figures fit each other."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from servinggraph import Context, Graph, InvalidRequest, RowErrors, routers
from servinggraph.errors import StepFailed
from servinggraph.executor import Executor
from servinggraph.lifecycle import stream
from servinggraph.messages import InferenceRequest
from servinggraph.statistics import MOST_RESPONSES, NodeStatistics

INPUTS = {"x": ("FP32", [-1])}


def x(*values: float) -> dict[str, Any]:
    return {"x": np.array(values, np.float32)}


def double(value):
    return {"x": value["x"] * 2}


def refuse_negative(value):
    if (value["x"] < 0).any():
        raise InvalidRequest("negative")
    return value


def check_invariants(report: dict[str, Any]) -> None:
    stats = report["inference_stats"]
    computed = stats["success"]["count"] - stats["cache_hit"]["count"]
    assert stats["success"]["count"] == stats["queue"]["count"]
    assert [computed] * 3 == [stats[f"compute_{part}"]["count"] for part in ("input", "infer", "output")]
    assert all(duration["ns"] >= 0 and (duration["count"] > 0 or duration["ns"] == 0) for duration in stats.values()), stats
    assert report["execution_count"] == sum(batch["compute_infer"]["count"] for batch in report["batch_stats"])
    assert report["inference_count"] >= report["execution_count"] or report["inference_count"] == 0


def counts(report: dict[str, Any]) -> tuple[int, int]:
    return report["inference_stats"]["success"]["count"], report["inference_stats"]["fail"]["count"]


async def started(graph: Graph) -> Executor:
    executor = Executor(graph.compile())
    await executor.start()
    return executor


def test_a_batched_node_counts_requests_rows_executions_and_sizes(run):
    async def check():
        executor = await started(Graph("g", INPUTS).to(double, name="n", batch={"max_rows": 8}).respond())
        await asyncio.gather(*(executor.run(x(1, 2), Context()) for _ in range(3)))
        await executor.stop()
        report = executor.statistics.nodes["n"].report()
        check_invariants(report)
        assert (3, 0) == counts(report)
        assert (6, 2) == (report["inference_count"], report["execution_count"])  # the first found the node idle
        assert [2, 4] == [batch["batch_size"] for batch in report["batch_stats"]]
        assert report["inference_stats"]["compute_input"]["ns"] > 0
        assert report["last_inference"] > 1_600_000_000_000

    run(check())


def test_a_request_in_pieces_is_one_request_in_several_executions(run):
    async def check():
        executor = await started(Graph("g", INPUTS).to(double, name="n", batch={"max_rows": 2}).respond())
        await executor.run(x(1, 2, 3, 4, 5), Context())
        await executor.stop()
        report = executor.statistics.nodes["n"].report()
        check_invariants(report)
        assert (1, 0) == counts(report)
        assert (5, 3) == (report["inference_count"], report["execution_count"])

    run(check())


def test_padding_counts_as_executed_but_not_as_inferred(run):
    async def check():
        executor = await started(Graph("g", INPUTS).to(double, name="n", batch={"max_rows": 8, "pad_to": [8]}).respond())
        await executor.run(x(1), Context())
        await executor.stop()
        report = executor.statistics.nodes["n"].report()
        assert [8] == [batch["batch_size"] for batch in report["batch_stats"]]
        assert 1 == report["inference_count"]

    run(check())


@pytest.mark.parametrize("options", [{}, {"batch": {"max_rows": 8}}], ids=["alone", "batched"])
def test_a_failure_counts_as_failure(options, run):
    async def check():
        executor = await started(Graph("g", INPUTS).to(refuse_negative, name="n", **options).respond())
        results = await asyncio.gather(*(executor.run(x(value), Context()) for value in (1, -1, 2)), return_exceptions=True)
        await executor.stop()
        assert 1 == sum(isinstance(result, InvalidRequest) for result in results)
        report = executor.statistics.nodes["n"].report()
        check_invariants(report)
        assert (2, 1) == counts(report)

    run(check())


def test_a_bad_row_and_an_answer_that_its_node_may_not_give_count_as_failures(run):
    def half(value):
        return RowErrors(value, {row: "bad" for row in np.flatnonzero(value["x"] < 0)})

    async def check():
        rows = Graph("g", INPUTS).to(half, name="rows", batch={"max_rows": 8})
        graph = rows.to(double, name="typed", batch={"max_rows": 8}, outputs={"x": ("FP64", [-1])}).respond()
        executor = await started(graph)
        results = [executor.run(x(value), Context()) for value in (1, -1)]
        await asyncio.gather(*results, return_exceptions=True)
        await executor.stop()
        rows, typed = (executor.statistics.nodes[name].report() for name in ("rows", "typed"))
        assert (1, 1) == counts(rows)
        assert (0, 1) == counts(typed)

    run(check())


def test_who_leaves_before_during_or_after_a_batch_is_counted_once(run):
    async def check():
        gate = asyncio.Event()

        async def wait(value):
            await gate.wait()
            return value

        executor = await started(Graph("g", INPUTS).to(wait, name="n", batch={"max_rows": 4}).respond())
        running = [asyncio.ensure_future(executor.run(x(1), Context())) for _ in range(2)]
        for _ in range(5):
            await asyncio.sleep(0)
        waiting = [asyncio.ensure_future(executor.run(x(1), Context())) for _ in range(3)]
        await asyncio.sleep(0)
        running[0].cancel()
        waiting[1].cancel()
        gate.set()
        await asyncio.gather(*running, *waiting, return_exceptions=True)
        await executor.stop()
        report = executor.statistics.nodes["n"].report()
        check_invariants(report)
        assert (3, 2) == counts(report)

    run(check())


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_the_counters_fit_each_other_whatever_happens(data: st.DataObject):
    batch = data.draw(
        st.sampled_from([None, {"max_rows": 1}, {"max_rows": 3}, {"max_rows": 4, "pad_to": [2, 4], "isolate": False}])
    )
    is_async = data.draw(st.booleans())
    requests = data.draw(st.lists(st.tuples(st.integers(1, 6), st.sampled_from("+-c ")), min_size=1, max_size=12))

    def plain(value):
        return refuse_negative(value)

    async def slow(value):
        await asyncio.sleep(0)
        return refuse_negative(value)

    async def main():
        executor = await started(
            Graph("g", INPUTS).to(slow if is_async else plain, name="n", **({"batch": batch} if batch else {})).respond()
        )
        tasks = []
        for rows, what in requests:
            task = asyncio.ensure_future(executor.run(x(*[-1.0 if what == "-" else 1.0] * rows), Context()))
            tasks.append(task)
            if what in "c ":
                await asyncio.sleep(0)
            if what == "c":
                task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        await executor.stop()
        report = executor.statistics.nodes["n"].report()
        check_invariants(report)
        answered = sum(isinstance(result, dict) for result in results)
        success, fail = counts(report)
        assert success >= answered
        assert success + fail <= len(results)  # one cancelled before it began has never reached the node
        assert fail >= sum(isinstance(result, InvalidRequest) for result in results)

    asyncio.run(main())


def test_an_ensemble_and_its_members_are_counted_apart(run):
    async def check():
        graph = Graph("g", INPUTS)
        graph.to(routers.Ensemble({"a": double, "b": refuse_negative}, combine="mean"), name="vote").respond()
        executor = await started(graph)
        await executor.run(x(1), Context())
        await executor.stop()
        nodes = executor.statistics.nodes
        assert ["vote", "vote.a", "vote.b"] == list(nodes)
        assert [(1, 0)] * 3 == [counts(node.report()) for node in nodes.values()]

    run(check())


@pytest.mark.parametrize("batched", [False, True])
def test_a_cache_adds_hits_and_misses(batched):
    node = NodeStatistics()
    node.batched = batched
    node.cache_miss(5)
    node.success += 1
    node.busy_ns += 100
    node.cache_hit(10)
    if not batched:  # what counts is around the cache
        node.success += 1
        node.busy_ns += 10
    report = node.report()["inference_stats"]
    assert {"count": 2, "ns": 110} == report["success"]
    assert {"count": 2, "ns": 0} == report["queue"]
    assert {"count": 1, "ns": 100} == report["compute_infer"]
    assert {"count": 1, "ns": 10} == report["cache_hit"]
    assert {"count": 1, "ns": 5} == report["cache_miss"]


def test_answers_of_a_decoupled_node_are_told_apart_up_to_a_bound():
    node = NodeStatistics()
    for index in (0, 1, 1, 10_000):
        node.response(index).success += 1
    stats = node.report()["response_stats"]
    assert MOST_RESPONSES == len(stats)
    assert [1, 2, 1] == [stats[key]["success"]["count"] for key in ("0", "1", str(MOST_RESPONSES - 1))]


@pytest.mark.parametrize("how", ["fails", "closed", "cancelled"])
def test_a_stream_that_does_not_come_to_its_end_is_a_failure(how, run):
    async def check():
        def count(value):
            yield {"x": value["x"]}
            if how == "fails":
                raise RuntimeError("broken")
            yield {"x": value["x"]}

        graph = Graph("g", INPUTS).to(count, name="n").respond()
        async with graph.mock() as server:
            served = server.serving.catalog.get("g")
            answers = stream(served, InferenceRequest(x(1)), Context())
            await anext(answers)
            if how == "fails":
                with pytest.raises(StepFailed):
                    await anext(answers)
            elif how == "cancelled":
                with pytest.raises(asyncio.CancelledError):
                    await answers.athrow(asyncio.CancelledError())
            await answers.aclose()
            report = served.executor.statistics.report()
            check_invariants(report)
            assert (0, 1) == counts(report)
            kind = "fail" if how == "fails" else "cancel"
            assert [1, 1] == [report["response_stats"][key][what]["count"] for key, what in (("0", "success"), ("1", kind))]
            if how == "fails":
                assert (0, 1) == counts(served.executor.statistics.nodes["n"].report())

    run(check())
