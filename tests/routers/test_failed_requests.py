"""What a request that fails inside a router had goes with it: its tensors wait for no garbage collection."""

from __future__ import annotations

import asyncio
import gc
import time
import weakref

import pytest

from servinggraph import Graph, InvalidRequest, routers

BODY = b'{"inputs": [{"name": "x", "shape": [1], "datatype": "FP32", "data": [1.0]}]}'


def answers(value):
    return {"y": value["x"]}


ROUTERS = {
    "ab": lambda fails: routers.Ab({"a": fails, "b": fails}, {"a": 1, "b": 1}),
    "bandit": lambda fails: routers.Bandit({"a": fails, "b": fails}, "ucb1"),
    "champion, which fails": lambda fails: routers.Champion({"a": fails, "b": answers}, champion="a"),
    "champion, whose challenger fails": lambda fails: routers.Champion({"a": answers, "b": fails}, champion="a"),
    "chain": lambda fails: routers.Chain({"a": fails, "b": answers}),
    "cycle": lambda fails: routers.Cycle(fails, repeat_while="rows < 0", max_iterations=3),
    "ensemble": lambda fails: routers.Ensemble({"a": answers, "b": fails}, "mean"),
    "ensemble with a quorum": lambda fails: routers.Ensemble({"a": answers, "b": fails}, "mean", quorum=1),
    "fallback": lambda fails: routers.Fallback({"a": fails, "b": fails}, on=["invalid_request"]),
    "map": routers.Map,
}


@pytest.mark.parametrize("suspends", [False, True], ids=["at once", "after a while"])
@pytest.mark.parametrize("router", ROUTERS)
def test_a_request_that_fails_lets_go_of_its_tensors(router, suspends):
    had = []

    def fails(value):
        had.append(weakref.ref(value["x"]))
        raise InvalidRequest("a failure of ours would be kept by the log of the test")

    async def fails_later(value):
        await asyncio.sleep(0)
        fails(value)

    graph = Graph("g", {"x": ("FP32", [-1])})
    graph.to(ROUTERS[router](fails_later if suspends else fails), "score").respond()
    with graph.mock() as server:
        gc.collect()
        gc.disable()
        try:
            server.request("POST", "/v2/models/g/infer", BODY)
            end = time.monotonic() + 30  # challengers run later
            while not had or any(left() is not None for left in had):
                assert time.monotonic() < end, [gc.get_referrers(left()) for left in had]
                time.sleep(0.001)
        finally:
            gc.enable()
