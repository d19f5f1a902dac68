"""`jsonl`: whole lines, in order, and a request that knows whether its own is there."""

import json

import numpy as np
import pytest

from servinggraph import Graph
from servinggraph.errors import GraphInvalid, StepFailed
from servinggraph.steps import Jsonl
from servinggraph.steps.sinks.files import LineFile

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend():
    return "asyncio"


def graph_of(step, inputs=None):
    graph = Graph("g", inputs=inputs or {"x": ("FP32", [-1])})
    graph.to(step).respond()
    return graph


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


async def test_a_request_leaves_a_line_and_its_value_goes_on(tmp_path):
    async with graph_of(Jsonl(tmp_path / "log" / "a.jsonl")).mock() as server:
        answer = await server.infer({"x": np.array([1, 2], "f4")}, id="r-1")

        (line,) = lines(tmp_path / "log" / "a.jsonl")

    assert [1, 2] == answer.outputs["x"].tolist()
    assert ("r-1", "g", {"x": [1.0, 2.0]}) == (line["id"], line["graph"], line["value"])
    assert line["time"].endswith("+00:00")


async def test_a_body_is_a_line_as_it_is(tmp_path):
    async with graph_of(Jsonl(tmp_path / "a.jsonl"), "body").mock() as server:
        await server.invoke({"text": "one\ntwo"})

    assert [{"text": "one\ntwo"}] == [line["value"] for line in lines(tmp_path / "a.jsonl")]


@pytest.mark.parametrize("on_failure", ["fail", "drop"])
async def test_lines_of_many_requests_are_whole_and_in_order(tmp_path, on_failure):
    async with graph_of(Jsonl(tmp_path / "a.jsonl", on_failure=on_failure, sync=True)).mock() as server:
        for number in range(200):
            await server.infer(x=[1.0], id=str(number))

    assert [str(number) for number in range(200)] == [line["id"] for line in lines(tmp_path / "a.jsonl")]


async def test_a_file_that_cannot_be_written_is_said_at_the_start(tmp_path):
    (tmp_path / "folder").mkdir()

    with pytest.raises(StepFailed, match="cannot be written: Is a directory"):
        async with graph_of(Jsonl(tmp_path / "folder")).mock():
            pass


async def test_a_full_disk_fails_the_request_or_drops_the_line(caplog):
    full = "/dev/full"  # takes nothing
    async with graph_of(Jsonl(full)).mock() as server:
        with pytest.raises(StepFailed, match="file '/dev/full' cannot be written: No space left on device"):
            await server.infer(x=[1.0])
    async with graph_of(Jsonl(full, on_failure="drop")).mock() as server:
        assert [1.0] == (await server.infer(x=[1.0])).outputs["x"].tolist()

    assert ["node 'full': 1 dropped, the last one because: file '/dev/full' cannot be written: No space left on device"] == [
        record.getMessage() for record in caplog.records if record.name == "servinggraph.steps"
    ]


async def test_a_value_that_json_cannot_carry_fails_the_request_or_drops_the_line(tmp_path, caplog):
    def odd(value):
        return {"x": {1, 2}}

    for on_failure in ("fail", "drop"):
        graph = Graph("g", inputs="body")
        graph.to(odd).to(Jsonl(tmp_path / "a", on_failure=on_failure)).to(lambda value: len(value["x"]), "last").respond()
        async with graph.mock() as server:
            if on_failure == "fail":
                with pytest.raises(StepFailed, match="holds a builtins.set"):
                    await server.invoke(1)
            else:
                assert 2 == await server.invoke(1)

    (line,) = [record.getMessage() for record in caplog.records if record.name == "servinggraph.steps"]
    assert "node 'a': 1 dropped" in line
    assert b"" == (tmp_path / "a").read_bytes()


async def test_bytes_that_are_no_text_are_not_the_callers_choice_of_a_type(tmp_path):
    graph = Graph("g", inputs="body")
    graph.to(lambda value: b"\xff").to(Jsonl(tmp_path / "a")).respond()
    async with graph.mock() as server:
        with pytest.raises(StepFailed, match="the value holds bytes that are not UTF-8, which JSON cannot carry"):
            await server.invoke(1)


async def test_joined_requests_would_be_one_line(tmp_path):
    with pytest.raises(GraphInvalid, match="step 'a' writes each request by itself"):
        graph_of(Jsonl(tmp_path / "a", batch=True)).compile()


def test_half_a_line_of_a_process_that_was_killed_stays_alone(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b'{"whole": 1}\n{"hal')
    file = LineFile(path)
    file.open()
    file.write(b'{"next": 2}\n')
    file.close()

    assert [b'{"whole": 1}', b'{"hal', b'{"next": 2}'] == path.read_bytes().splitlines()


def test_a_large_file_is_set_aside_and_the_oldest_goes(tmp_path):
    file = LineFile(tmp_path / "a", max_bytes=20, kept=2)
    file.open()
    for number in range(8):
        file.write(f"line-{number}--\n".encode())  # nine bytes: two in a file
    file.close()

    assert ["a", "a.1", "a.2"] == sorted(path.name for path in tmp_path.iterdir())
    assert ["line-2--", "line-3--"] == (tmp_path / "a.2").read_text().splitlines()
    assert ["line-6--", "line-7--"] == (tmp_path / "a").read_text().splitlines()


def test_a_file_that_could_not_be_set_aside_is_written_to_when_it_can(tmp_path):
    file = LineFile(tmp_path / "a", max_bytes=10, kept=1)
    file.open()
    file.write(b"first---\n")
    (tmp_path / "a.1").mkdir()  # in the way
    for _ in range(2):
        with pytest.raises(OSError, match="Is a directory"):
            file.write(b"second--\n")
    (tmp_path / "a.1").rmdir()
    file.write(b"third---\n")
    file.close()

    assert ["first---\n", "third---\n"] == [(tmp_path / name).read_text() for name in ("a.1", "a")]


def test_a_new_file_that_could_not_be_made_is_made_when_it_can(tmp_path):
    folder = tmp_path / "folder"
    file = LineFile(folder / "a", max_bytes=10)
    file.open()
    file.write(b"first---\n")
    folder.rename(tmp_path / "moved")
    folder.touch()  # no folder any more
    with pytest.raises(OSError, match="Not a directory"):
        file.write(b"second--\n")
    folder.unlink()
    (tmp_path / "moved").rename(folder)
    file.write(b"third---\n")
    file.close()

    assert "third---\n" == (folder / "a").read_text()
