"""What a request that fails in a batch had goes with it: its tensors wait for no garbage collection."""

from __future__ import annotations

import asyncio
import gc
import logging
import time
import weakref

import pytest

from servinggraph import Graph

BODY = b'{"inputs": [{"name": "x", "shape": [2], "datatype": "FP32", "data": [1.0, 2.0]}]}'
TOGETHER = {"max_rows": 4, "max_delay_ms": 60_000, "wait_when_idle": True}
WAYS = {
    "alone": (1, {"max_rows": 4}),
    "alone, from the queue": (1, {"max_rows": 2, "max_delay_ms": 60_000, "wait_when_idle": True}),
    "in pieces": (1, {"max_rows": 1}),
    "together, and then each again": (2, TOGETHER),
    "together": (2, {**TOGETHER, "isolate": False}),
}


@pytest.mark.parametrize("suspends", [False, True], ids=["at once", "after a while"])
@pytest.mark.parametrize("way", WAYS)
def test_a_request_that_fails_lets_go_of_its_tensors(way, suspends, caplog):
    caplog.set_level(logging.CRITICAL, "servinggraph")  # the log of a test keeps errors, with their tracebacks
    requests, batch = WAYS[way]
    had = []

    def fails(value):
        had.append(weakref.ref(value["x"]))
        raise ValueError("no")

    async def fails_later(value):
        await asyncio.sleep(0)
        fails(value)

    async def main():
        graph = Graph("g", {"x": ("FP32", [-1])})
        graph.to(fails_later if suspends else fails, "score", batch=batch).respond()
        async with graph.mock() as server:
            gc.collect()
            gc.disable()
            try:
                asked = [server.request("POST", "/v2/models/g/infer", BODY) for _ in range(requests)]
                assert {500} == {reply.status for reply in await asyncio.gather(*asked)}
                end = time.monotonic() + 30
                while not had or any(left() is not None for left in had):
                    assert time.monotonic() < end, [gc.get_referrers(left()) for left in had]
                    await asyncio.sleep(0.001)
            finally:
                gc.enable()

    asyncio.run(main())
