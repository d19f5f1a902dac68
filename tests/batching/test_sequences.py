"""Batches across sequences: each row has its own state, and no sequence is in a batch twice."""

import asyncio
import random

import numpy as np
import pytest

from servinggraph import Graph, InvalidRequest, RowErrors
from servinggraph.errors import GraphInvalid, StepFailed

X = {"x": ("FP32", [-1])}


class Totals:
    """A running total for each row; knows how large its batches were and who was in them."""

    def __init__(self, wait_s=0.0):
        self.batches = []
        self._wait_s = wait_s

    async def __call__(self, value, state, context):
        self.batches.append([turn.id for turn in context.sequences])
        await asyncio.sleep(self._wait_s)
        for row, x in zip(state, value["x"], strict=True):
            row["sum"] = row.get("sum", 0) + float(x)
        return {"y": np.array([row["sum"] for row in state])}


def graph_of(step, **batch):
    graph = Graph("g", X, sequences={})
    graph.to(step, "step", batch=batch or True).respond()
    return graph


async def send(server, key, x, timeout_s=None, **flags):
    parameters = {"sequence_id": key, **{f"sequence_{name}": flag for name, flag in flags.items()}}
    reply = await server.infer(x=[x], parameters=parameters, timeout_s=timeout_s)
    return reply.outputs["y"].tolist()[0]


def soon(awaitable):
    return asyncio.ensure_future(awaitable)


async def settled(request, clock, seconds=0.1):
    while not request.done():
        await clock.advance(seconds)
    return request.result()


def test_requests_of_different_sequences_share_a_batch(run, manual_clock):
    async def check():
        totals = Totals(wait_s=0.01)
        async with graph_of(totals.__call__).mock() as server:
            starts = soon(asyncio.gather(*(send(server, key, key, start=True) for key in range(1, 9))))
            await settled(starts, manual_clock)
            more = soon(asyncio.gather(*(send(server, key, 100) for key in range(1, 9))))
            assert [100 + key for key in range(1, 9)] == await settled(more, manual_clock)
            assert max(map(len, totals.batches)) >= 7

    run(check())


def test_random_sequences_never_mix_and_never_meet_themselves(run, manual_clock):
    pick = random.Random(3)

    async def sequence(server, key):
        requests = []
        for n in range(20):
            requests.append(soon(send(server, key, key * 1000 + n, start=n == 0, end=n == 19)))
            if pick.random() < 0.3:
                await asyncio.sleep(pick.random() / 20)
        return await asyncio.gather(*requests)

    async def check():
        totals = Totals(wait_s=0.003)
        async with graph_of(totals.__call__, max_rows=8, max_delay_ms=2, instances=2).mock(max_in_flight=5000) as server:
            answers = await settled(soon(asyncio.gather(*(sequence(server, key) for key in range(1, 41)))), manual_clock)
        expected = [np.cumsum(key * 1000 + np.arange(20)).tolist() for key in range(1, 41)]
        assert expected == answers
        assert all(len(ids) == len(set(ids)) for ids in totals.batches)
        assert 800 == sum(map(len, totals.batches))
        assert np.mean([len(ids) for ids in totals.batches]) > 3

    run(check())


def test_padding_has_a_state_that_goes_nowhere(run):
    def step(value, state):
        assert 4 == len(state) == len(value["x"])
        for row in state:
            row["n"] = row.get("n", 0) + 1
        return {"y": np.array([row["n"] for row in state])}

    async def check():
        async with graph_of(step, max_rows=4, pad_to=[4]).mock() as server:
            assert [1, 2] == [await send(server, 7, 1, start=True), await send(server, 7, 1)]

    run(check())


def test_a_request_has_one_row(run):
    async def check():
        async with graph_of(Totals().__call__).mock() as server:
            with pytest.raises(InvalidRequest, match="must specify batch-size 1 due to requirements of sequence batcher"):
                await server.infer(x=[1, 2], parameters={"sequence_id": 1, "sequence_start": True})

    run(check())


def test_a_batch_that_fails_is_run_again_from_the_states_before_it(run, manual_clock):
    calls = []

    async def step(value, state):
        calls.append(len(state))
        await asyncio.sleep(0.01)
        for row, x in zip(state, value["x"], strict=True):
            row["sum"] = row.get("sum", 0) + float(x)
        if (value["x"] < 0).any():
            raise ValueError("negative")
        return {"y": np.array([row["sum"] for row in state])}

    async def check():
        async with graph_of(step).mock() as server:
            await settled(soon(asyncio.gather(*(send(server, key, key, start=True) for key in (1, 2, 3)))), manual_clock)
            xs = {1: 10, 2: -1, 3: 10}
            requests = soon(
                asyncio.gather(*(send(server, key, xs[key]) for key in (1, 2, 3)), return_exceptions=True),
            )
            first, bad, third = await settled(requests, manual_clock)
            assert ([11, 13], StepFailed) == ([first, third], type(bad))
            again = soon(asyncio.gather(*(send(server, key, 1) for key in (1, 2, 3))))
            assert [12, 3, 14] == await settled(again, manual_clock)
            assert max(calls) >= 2

    run(check())


def test_a_bad_row_keeps_nothing(run, manual_clock):
    async def step(value, state):
        await asyncio.sleep(0.01)
        for row in state:
            row["n"] = row.get("n", 0) + 1
        return RowErrors(
            {"y": np.array([row["n"] for row in state])}, {n: "negative" for n, x in enumerate(value["x"]) if x < 0}
        )

    async def check():
        async with graph_of(step).mock() as server:
            await settled(soon(asyncio.gather(*(send(server, key, 1, start=True) for key in (1, 2, 3)))), manual_clock)
            second = soon(
                asyncio.gather(*(send(server, key, -1 if key == 2 else 1) for key in (1, 2, 3)), return_exceptions=True)
            )
            first, bad, third = await settled(second, manual_clock)
            assert ([2, 2], StepFailed) == ([first, third], type(bad))
            third = soon(asyncio.gather(*(send(server, key, 1) for key in (1, 2, 3))))
            assert [3, 2, 3] == await settled(third, manual_clock)

    run(check())


def test_a_member_that_leaves_its_batch_ends_its_own_sequence_only(run, manual_clock):
    async def check():
        async with graph_of(Totals(wait_s=0.01).__call__).mock() as server:
            await settled(soon(asyncio.gather(*(send(server, key, key, start=True) for key in (1, 2, 3)))), manual_clock)
            requests = [soon(send(server, key, 10)) for key in (1, 2, 3)]
            await manual_clock.settle()
            requests[1].cancel()
            assert [11, 13] == await settled(soon(asyncio.gather(requests[0], requests[2])), manual_clock)
            with pytest.raises(InvalidRequest, match="START"):
                await send(server, 2, 1)

    run(check())


@pytest.mark.parametrize("left", [[], [1], [None]])
def test_a_step_that_leaves_something_else_than_states_fails(run, left):
    def step(value, state):
        state[:] = left
        return {"y": value["x"]}

    async def check():
        async with graph_of(step).mock() as server:
            with pytest.raises(StepFailed, match="left a list of . states that are not 1 dicts"):
                await send(server, 1, 1, start=True)

    run(check())


def test_a_batch_of_whole_requests_cannot_go_around_a_node_with_state():
    graph = Graph("g", X, sequences={}, batch={})
    graph.to(Totals, "step").respond()
    with pytest.raises(GraphInvalid, match="'batch' for whole requests cannot go around node 'step', which keeps state"):
        graph.compile()


def test_a_batched_router_cannot_have_a_branch_with_state():
    from servinggraph import routers

    graph = Graph("g", X, sequences={})
    graph.to(routers.Ensemble({"a": Totals, "b": Totals}, combine="mean"), "both", batch=True).respond()
    with pytest.raises(GraphInvalid, match="node 'both': 'batch' of a router cannot go around 'both.a', which keeps state"):
        graph.compile()


def test_a_batch_of_whole_requests_may_go_around_nodes_that_only_look_at_the_sequences(run, manual_clock):
    async def step(value, context):
        await asyncio.sleep(0.01)
        return {"y": np.array([turn.id for turn in context.sequences])}

    async def check():
        graph = Graph("g", X, sequences={}, batch={})
        graph.to(step, "step").respond()
        async with graph.mock() as server:
            requests = soon(asyncio.gather(*(send(server, key, 0, start=True) for key in range(1, 6))))
            assert [1, 2, 3, 4, 5] == await settled(requests, manual_clock)

    run(check())


def test_a_batch_of_several_has_no_sequence_of_its_own(run, manual_clock):
    async def step(value, context):
        await asyncio.sleep(0.01)
        return {"y": np.array([context.sequence.id] * len(value["x"]))}

    async def check():
        async with graph_of(step, isolate=False).mock() as server:
            assert 1 == await settled(soon(send(server, 1, 0, start=True)), manual_clock)
            requests = soon(asyncio.gather(*(send(server, key, 0, start=True) for key in range(2, 6)), return_exceptions=True))
            failures = [str(error) for error in await settled(requests, manual_clock) if isinstance(error, StepFailed)]
            assert "`context.sequences` has those of its" in failures[-1]

    run(check())
