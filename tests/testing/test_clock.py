"""Time in tests: deadlines and delays without waiting for them."""

from __future__ import annotations

import asyncio
import time

import numpy as np
import pytest

from servinggraph import Graph, steps
from servinggraph.errors import DeadlineExceeded
from servinggraph.testing import FakeModel

X = np.ones((1, 1), np.float32)


def a_graph(work, **options):
    graph = Graph("g", {"x": ("FP32", [-1, 1])})
    graph.to(work, "model", **options).respond()
    return graph


def test_time_stands_still_until_it_is_moved(manual_clock):
    begun = manual_clock.time()

    async def check():
        waiting = asyncio.ensure_future(asyncio.sleep(3600))
        await manual_clock.settle()
        assert begun == asyncio.get_running_loop().time()
        await manual_clock.advance(3599)
        assert not waiting.done()
        await manual_clock.advance(1)
        assert waiting.done()

    real = time.monotonic()
    manual_clock.run(check())
    assert time.monotonic() - real < 1800
    assert begun + 3600 == manual_clock.time()


def test_every_timer_on_the_way_fires_at_its_own_moment(manual_clock):
    moments = []

    async def tick():
        for _ in range(3):
            await asyncio.sleep(1)
            moments.append(asyncio.get_running_loop().time())

    async def check():
        ticking = asyncio.ensure_future(tick())
        await manual_clock.advance(10)
        assert ticking.done()

    begun = manual_clock.time()
    manual_clock.run(check())
    assert [begun + 1, begun + 2, begun + 3] == moments


def test_a_deadline_is_exact(manual_clock):
    async def check():
        async with a_graph(FakeModel({"y": [0]}, delay_s=1.0)).mock() as server:
            late = asyncio.ensure_future(server.infer(x=X, timeout_s=0.5))
            in_time = asyncio.ensure_future(server.infer(x=X, timeout_s=1.5))
            await manual_clock.advance(0.499)
            assert not late.done()
            await manual_clock.advance(0.001)
            with pytest.raises(DeadlineExceeded):
                await late
            await manual_clock.advance(0.5)
            assert [0] == (await in_time).outputs["y"].tolist()

    manual_clock.run(check())


def test_threads_are_waited_for_while_time_stands_still(manual_clock):
    def blocking(value):
        time.sleep(0.02)
        return {"y": value["x"]}

    async def check():
        async with a_graph(steps.Python(blocking, run="thread")).mock() as server:
            assert [[1]] == (await server.infer(x=X, timeout_s=0.001)).outputs["y"].tolist()

    manual_clock.run(check())


def test_a_fake_model_gives_a_row_for_each_row_and_remembers(fake_model):
    fake = fake_model({"label": np.array([1]), "pair": np.array([1, 2]), "scalar": np.float32(5)})
    with a_graph(fake).mock() as server:
        outputs = server.infer(x=np.ones((3, 1), np.float32)).outputs

    assert [1, 1, 1] == outputs["label"].tolist()
    assert [[1, 2]] * 3 == outputs["pair"].tolist()
    assert [5, 5, 5] == outputs["scalar"].tolist()
    assert 1 == len(fake.calls)


def test_the_mock_server_fixture_takes_graphs_and_files(mock_server, tmp_path):
    text = "graph: f\ninputs: {x: {datatype: FP32, shape: [-1]}}\nnodes:\n  pass: {step: python, call: 'copy:copy'}\nanswer: pass\n"
    (tmp_path / "graph.yaml").write_text(text)

    assert [1] == mock_server(tmp_path / "graph.yaml").infer(x=[1]).outputs["x"].tolist()
    assert [[0]] == mock_server(a_graph(FakeModel({"y": [0]})), max_in_flight=1).infer(x=X).outputs["y"].reshape(1, 1).tolist()
