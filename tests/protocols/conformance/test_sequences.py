"""The rules of sequences, whatever wire the requests came over. Runs through every front end."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from servinggraph import Context, Graph, InvalidRequest
from servinggraph.errors import Cancelled, DeadlineExceeded, LimitExceeded, StepFailed, Unavailable

pytestmark = pytest.mark.anyio


async def total(value, state):
    await asyncio.sleep(0)
    state["sum"] = state.get("sum", 0) + float(value["x"][0])
    if state["sum"] < 0:
        raise ValueError("below zero")
    return {"y": np.array([state["sum"]], np.float32)}


def a_graph(work=total, sequences=None, **options):
    graph = Graph("g", {"x": ("FP32", [-1])}, sequences=sequences or {"idle_ms": 60_000})
    graph.to(work, "step", **options).respond()
    return graph


async def send(client, key, x, timeout_s=None, **flags):
    parameters = {"sequence_id": key, **{f"sequence_{name}": flag for name, flag in flags.items()}}
    reply = await client.infer({"x": np.array([x], np.float32)}, parameters=parameters, timeout_s=timeout_s)
    return reply.outputs["y"].tolist()[0]


class Held:
    """A running total that waits until it is let go."""

    def __init__(self):
        self.go = asyncio.Event()
        self.began = []

    async def __call__(self, value, state, context: Context):
        self.began.append(float(value["x"][0]))
        await self.go.wait()
        return await total(value, state)


async def until(condition):
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.001)


@pytest.mark.parametrize("key", [7, 2**63 - 1, "anna", "é☃"])
async def test_state_is_kept_between_requests_of_a_sequence(front_end, key):
    async with front_end.open(a_graph()) as client:
        assert [1, 3, 6] == [
            await send(client, key, 1, start=True),
            await send(client, key, 2),
            await send(client, key, 3, end=True),
        ]
        with pytest.raises(InvalidRequest, match="must specify the START flag on the first request of the sequence"):
            await send(client, key, 1)


async def test_flags_come_back_as_response_parameters(front_end):
    async with front_end.open(a_graph()) as client:
        for key, flags in ((5, {"sequence_start": True}), (5, {"sequence_end": True}), ("5", {"sequence_start": True})):
            reply = await client.infer({"x": np.ones(1, np.float32)}, parameters={"sequence_id": key, **flags})
            expected = {"sequence_id": key, "sequence_start": False, "sequence_end": False} | flags
            assert expected == dict(reply.parameters)


@pytest.mark.parametrize("key", [None, 0, ""])
async def test_a_request_that_names_no_sequence_is_refused(front_end, key):
    async with front_end.open(a_graph()) as client:
        parameters = {} if key is None else {"sequence_id": key}
        with pytest.raises(InvalidRequest, match="must specify a non-zero or non-empty correlation ID"):
            await client.infer({"x": np.ones(1, np.float32)}, parameters={"sequence_start": True, **parameters})


async def totals(value, state):
    await asyncio.sleep(0)
    for row, x in zip(state, value["x"], strict=True):
        row["sum"] = row.get("sum", 0) + float(x)
    return {"y": np.array([row["sum"] for row in state], np.float32)}


async def test_many_interleaved_sequences_stay_apart(front_end):
    async def sequence(client, key):
        return [await send(client, key, n, start=n == 0, end=n == 9) for n in range(10)]

    async with front_end.open(a_graph(totals, batch=True)) as client:
        answers = await asyncio.gather(*(sequence(client, key) for key in [*range(1, 11), *map(str, range(1, 11))]))

    assert [np.cumsum(np.arange(10)).tolist()] * 20 == answers


async def test_starting_a_running_sequence_begins_it_anew(front_end, caplog):
    async with front_end.open(a_graph()) as client:
        await send(client, 7, 1, start=True)
        assert [5, 6] == [await send(client, 7, 5, start=True), await send(client, 7, 1)]
    assert "sequence 7 starts anew" in caplog.text


async def test_a_failed_request_leaves_the_sequence_as_it_was(front_end):
    async with front_end.open(a_graph()) as client:
        await send(client, 7, 1, start=True)
        with pytest.raises(StepFailed, match="below zero"):
            await send(client, 7, -10)
        assert 3 == await send(client, 7, 2)


async def test_requests_of_a_sequence_wait_for_each_other(front_end):
    held = Held()
    async with front_end.open(a_graph(held.__call__)) as client:
        first = asyncio.ensure_future(send(client, 7, 1, start=True))
        await until(lambda: held.began)
        with pytest.raises(DeadlineExceeded):
            await send(client, 7, 2, timeout_s=1)  # enough to get there: a call that ends before is given up by its caller
        await until(lambda: client.in_flight == 1)
        last = asyncio.ensure_future(send(client, 7, 3))
        await until(lambda: client.in_flight == 2)
        held.go.set()
        assert ([1, 4], [1, 3]) == (await asyncio.gather(first, last), held.began)


async def test_a_caller_that_goes_away_cancels_its_sequence(front_end):
    if not getattr(front_end, "callers_leave", True):
        return  # a record that was written is not taken back
    held = Held()
    async with front_end.open(a_graph(held.__call__)) as client:
        first = asyncio.ensure_future(send(client, 7, 1, start=True))
        await until(lambda: held.began)
        second = asyncio.ensure_future(send(client, 7, 2))
        await until(lambda: client.in_flight == 2)
        third = asyncio.ensure_future(send(client, 7, 3))
        await until(lambda: client.in_flight == 3)
        second.cancel()
        with pytest.raises(Cancelled, match="sequence 7 was cancelled: the caller of one of its requests went away"):
            await third
        held.go.set()
        assert 1 == await first
        with pytest.raises(InvalidRequest, match="START"):
            await send(client, 7, 4)
        await until(lambda: client.in_flight == 0)


async def test_too_many_sequences_are_refused_by_the_limits_name(front_end):
    async with front_end.open(a_graph(sequences={"max": 1, "max_backlog": 0, "idle_ms": 60_000})) as client:
        await send(client, 7, 1, start=True)
        with pytest.raises(LimitExceeded, match="too many .limit 'sequences.max' = 1"):
            await send(client, 8, 1, start=True)


async def test_a_sequence_that_waits_for_a_place_is_refused_when_its_time_is_up(front_end):
    async with front_end.open(a_graph(sequences={"max": 1, "idle_ms": 60_000})) as client:
        await send(client, 7, 1, start=True)
        parameters = {"sequence_id": 8, "sequence_start": True, "timeout": 50_000}
        with pytest.raises(Unavailable, match="timeout of the corresponding sequence has been expired"):
            await client.infer({"x": np.ones(1, np.float32)}, parameters=parameters)


async def test_a_request_for_a_batched_node_has_one_row(front_end):
    def rows(value, state):
        return {"y": value["x"]}

    async with front_end.open(a_graph(rows, batch=True)) as client:
        with pytest.raises(InvalidRequest, match="must specify batch-size 1 due to requirements of sequence batcher"):
            await client.infer({"x": np.ones(2, np.float32)}, parameters={"sequence_id": 1, "sequence_start": True})


async def test_a_graph_without_sequences_ignores_the_parameters(front_end):
    graph = Graph("g", {"x": ("FP32", [-1])})
    graph.to(lambda value: {"y": value["x"]}, "step").respond()
    async with front_end.open(graph) as client:
        reply = await client.infer({"x": np.ones(1, np.float32)}, parameters={"sequence_id": 7, "sequence_end": True})

    assert {} == dict(reply.parameters)
