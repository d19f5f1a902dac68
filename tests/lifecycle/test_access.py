"""The access log: a line for each request, answered or not."""

from __future__ import annotations

import asyncio
import json

import numpy as np
import pytest

from servinggraph import Graph
from servinggraph.errors import ServingGraphError
from servinggraph.lifecycle import access

X = {"x": np.ones(1, np.float32)}


def a_graph():
    def work(value):
        if value["x"][0] < 0:
            raise RuntimeError("negative")
        return {"y": value["x"]}

    return Graph("g", {"x": ("FP32", [-1])}).to(work, name="n").respond()


async def requests(server):
    await server.infer(X, id="r 1\n2")
    with pytest.raises(ServingGraphError):
        await server.infer(x=np.array([-1], np.float32), id="bad")
    await server.request("POST", "/v2/models/nobody/infer", b"{}")


def test_lines_of_text_have_time_protocol_graph_code_milliseconds_and_id(tmp_path):
    async def check():
        async with a_graph().mock(access_log=str(tmp_path / "access")) as server:
            await requests(server)

    asyncio.run(check())
    first, second, third = (tmp_path / "access").read_text().splitlines()
    moment, *rest, took, name = first.split(" ")
    assert moment.endswith("Z")
    assert ["mock", "g/1", "ok"] == rest
    assert 0 < float(took) < 10_000
    assert "r\\x201\\n2" == name
    assert second.split(" ")[1:4] == ["mock", "g/1", "internal"]
    assert "bad" == second.split(" ")[-1]
    assert third.split(" ")[1:] == ["http", "-", "not_found", "0.000", "-"]


def test_lines_of_json_have_the_same(tmp_path):
    async def check():
        async with a_graph().mock(access_log=str(tmp_path / "access"), log_format="json", metrics="off") as server:
            await requests(server)

    asyncio.run(check())
    entries = [json.loads(line) for line in (tmp_path / "access").read_text().splitlines()]
    keys = ("protocol", "graph", "version", "code", "request")
    assert [
        ("mock", "g", "1", "ok", "r 1\n2"), ("mock", "g", "1", "internal", "bad"), ("http", "", "", "not_found", ""),
    ] == [tuple(entry[key] for key in keys) for entry in entries]  # fmt: skip


def test_standard_output_can_be_asked_for(capsys):
    async def check():
        async with a_graph().mock(access_log="-") as server:
            await server.infer(X)

    asyncio.run(check())
    assert " mock g/1 ok " in capsys.readouterr().out


def test_it_is_off_by_default_and_a_file_that_cannot_be_written_is_said_at_the_start(tmp_path):
    async def check():
        async with a_graph().mock() as server:
            assert server.serving.access is None
            assert server.serving.catalog.get("g").traffic["mock"].told is None
        with pytest.raises(ServingGraphError, match="--access-log .*: Is a directory"):
            async with a_graph().mock(access_log=str(tmp_path)):
                pass

    asyncio.run(check())


def test_what_comes_faster_than_it_can_be_written_is_dropped_and_counted(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(access, "MOST_WAITING", 5)

    async def check():
        log = access.AccessLog(str(tmp_path / "access"), "text")
        for _ in range(20):
            log.add(access.Entry(0, "http", "g", "1", "ok", 1, ""))
        await log.close()

    asyncio.run(check())
    assert 5 == len((tmp_path / "access").read_text().splitlines())
    assert "15 lines of the access log were dropped" in caplog.text
