"""Traces are recorded as the settings say, and written as Triton writes them."""

from __future__ import annotations

import asyncio
import json
import logging

import numpy as np
import pytest

from servinggraph import Graph
from servinggraph.errors import InvalidRequest, StepFailed, Unsupported
from servinggraph.lifecycle import traces

NODE = [
    "REQUEST_START",
    "QUEUE_START",
    "COMPUTE_START",
    "COMPUTE_INPUT_END",
    "COMPUTE_OUTPUT_START",
    "COMPUTE_END",
    "REQUEST_END",
]
BODY = json.dumps({"id": "r-1", "inputs": [{"name": "x", "datatype": "FP32", "shape": [2], "data": [1, 2]}]}).encode()


def double(value):
    if (value["x"] < 0).any():
        raise RuntimeError("negative")
    return {"x": value["x"] * 2}


def a_graph(name="g"):
    return (
        Graph(name, {"x": ("FP32", [-1])}).to(double, name="batched", batch={"max_rows": 8}).to(double, name="alone").respond()
    )


async def infer(server, count=1, body=BODY):
    for _ in range(count):
        await server.request("POST", "/v2/models/g/infer", body)


def read(path):
    return json.loads(path.read_text())


def traced(entries):
    """Return request ids of the traces in a file."""
    return [entry.get("request_id", "") for entry in entries if "model_name" in entry and "parent_id" not in entry]


def test_a_trace_has_the_moments_of_the_request_and_of_each_node_in_order(run, tmp_path):
    async def check():
        async with a_graph().mock(trace_file=str(tmp_path / "t.json")) as server:
            server.serving.tracing.update({"trace_level": ["TIMESTAMPS"], "trace_rate": "1"})
            await infer(server)
            await server.serving.tracing.flush()
            entries = read(tmp_path / "t.json")
            about = [entry for entry in entries if "model_name" in entry]
            assert [("g", 1, "r-1"), ("g.batched", 1, None), ("g.alone", 1, None)] == [
                (entry["model_name"], entry["model_version"], entry.get("request_id")) for entry in about
            ]
            assert [about[0]["id"]] * 2 == [entry["parent_id"] for entry in about[1:]]
            names = {
                entry["id"]: [stamp["name"] for stamp in entry["timestamps"]] for entry in entries if "timestamps" in entry
            }
            own = (
                "HTTP_RECV_START HTTP_RECV_END REQUEST_START INFER_RESPONSE_COMPLETE REQUEST_END HTTP_SEND_START HTTP_SEND_END"
            )
            assert [own.split(), NODE, NODE] == [names[entry["id"]] for entry in about]
            for entry in entries:
                moments = [stamp["ns"] for stamp in entry.get("timestamps", [])]
                assert sorted(moments) == moments

    run(check())


def test_tensors_are_recorded_when_asked_for(run, tmp_path):
    async def check():
        async with a_graph().mock(trace_file=str(tmp_path / "t.json")) as server:
            server.serving.tracing.update({"trace_level": ["TENSORS"], "trace_rate": "1"})
            await infer(server)
            await server.serving.tracing.flush()
            assert [
                ("TENSOR_QUEUE_INPUT", {"name": "x", "data": "1.0,2.0", "shape": "2", "dtype": "float32"}),
                ("TENSOR_BACKEND_OUTPUT", {"name": "x", "data": "4.0,8.0", "shape": "2", "dtype": "float32"}),
            ] == [(entry["activity"], entry["tensor"]) for entry in read(tmp_path / "t.json") if "activity" in entry]

    run(check())


def test_every_nth_request_is_traced_until_the_count_is_used_up(run, tmp_path):
    async def check():
        async with a_graph().mock(trace_file=str(tmp_path / "t.json")) as server:
            tracing = server.serving.tracing
            tracing.update({"trace_level": "TIMESTAMPS", "trace_rate": "3", "trace_count": "2"})
            await infer(server, 5)
            assert "1" == tracing.settings()["trace_count"]
            await infer(server, 20)
            await tracing.flush()
            assert 2 == len(traced(read(tmp_path / "t.json")))
            assert "0" == tracing.settings()["trace_count"]
            assert server.serving.catalog.get("g").tracer is None  # nothing is looked at any more

    run(check())


def test_so_many_traces_go_into_one_file(run, tmp_path):
    async def check():
        async with a_graph().mock(trace_file=str(tmp_path / "t.json")) as server:
            server.serving.tracing.update({"trace_level": ["TIMESTAMPS"], "trace_rate": "1", "log_frequency": "2"})
            for _ in range(5):
                await infer(server)
                await server.serving.tracing.flush()
            assert [2, 2, 1] == [len(traced(read(tmp_path / f"t.json.{index}"))) for index in range(3)]
            assert not (tmp_path / "t.json").exists()

    run(check())


def test_the_file_is_whole_after_each_writing_and_a_failed_request_is_in_it(run, tmp_path):
    async def check():
        async with a_graph().mock(trace_file=str(tmp_path / "t.json")) as server:
            server.serving.tracing.update({"trace_level": ["TIMESTAMPS"], "trace_rate": "1"})
            for number in range(3):
                await infer(server, body=BODY.replace(b"1, 2", b"-1, 2"))
                await server.serving.tracing.flush()
                assert number + 1 == len(traced(read(tmp_path / "t.json")))

    run(check())


def test_without_a_file_traces_go_to_the_log(run, caplog):
    async def check():
        async with a_graph().mock() as server:
            server.serving.tracing.update({"trace_level": ["TIMESTAMPS"], "trace_rate": "1"})
            await infer(server)
            await server.serving.tracing.flush()

    with caplog.at_level(logging.INFO, "servinggraph.trace"):
        run(check())
    (told,) = [record.message for record in caplog.records if record.name == "servinggraph.trace"]
    assert ["r-1"] == traced(json.loads(told))


def test_what_ends_faster_than_it_can_be_written_is_dropped_and_counted(run, caplog, monkeypatch, tmp_path):
    monkeypatch.setattr(traces, "MOST_WAITING", 2)

    async def check():
        async with a_graph().mock(trace_file=str(tmp_path / "t.json")) as server:
            server.serving.tracing.update({"trace_level": ["TIMESTAMPS"], "trace_rate": "1"})
            await infer(server, 5)
            await server.serving.tracing.flush()

    run(check())
    assert 2 == len(traced(read(tmp_path / "t.json")))
    assert "3 traces were dropped" in caplog.text


def test_a_file_that_cannot_be_written_is_told_and_requests_go_on(run, caplog, tmp_path):
    async def check():
        async with a_graph().mock(trace_file=str(tmp_path / "no" / "t.json")) as server:
            server.serving.tracing.update({"trace_level": ["TIMESTAMPS"], "trace_rate": "1"})
            await infer(server)
            await server.serving.tracing.flush()
            assert [2.0] == (await server.infer(x=np.float32([0.5]))).outputs["x"].tolist()

    run(check())
    assert "traces could not be written" in caplog.text


def test_a_graph_of_its_own_settings_follows_the_others_in_the_rest(run):
    async def check():
        async with a_graph().mock() as server:
            tracing = server.serving.tracing
            assert "2" == tracing.update({"trace_rate": "2"}, "g")["trace_rate"]
            assert ["TIMESTAMPS"] == tracing.update({"trace_level": ["TIMESTAMPS"], "trace_rate": "7"})["trace_level"]
            assert (["TIMESTAMPS"], "2") == (tracing.settings("g")["trace_level"], tracing.settings("g")["trace_rate"])
            assert server.serving.catalog.get("g").tracer is not None
            assert ["OFF"] == tracing.update({"trace_level": ["OFF"]}, "g")["trace_level"]
            assert server.serving.catalog.get("g").tracer is None
            assert "7" == tracing.update({"trace_rate": None, "trace_level": None}, "g")["trace_rate"]
            assert ["OFF"] == tracing.update({"trace_level": None})["trace_level"]  # as the server started

    run(check())


@pytest.mark.parametrize(
    "changes, kind, text",
    [
        ({"trace_file": "x"}, Unsupported, "trace file location can not be updated"),
        ({"trace_mode": "opentelemetry"}, Unsupported, "trace mode can not be updated"),
        ({"trace_rate": "x"}, InvalidRequest, "Unable to parse 'trace_rate', got: x"),
        ({"trace_rate": "0"}, InvalidRequest, "Unable to parse 'trace_rate', got: 0"),
        ({"trace_count": "-2"}, InvalidRequest, "Unable to parse 'trace_count', got: -2"),
        ({"log_frequency": ["1", "2"]}, InvalidRequest, "expect 1 value for 'log_frequency'"),
        ({"trace_level": ["MORE"]}, InvalidRequest, "unsupported trace level 'MORE'"),
        ({"trace_level": ["OFF", "TENSORS"]}, InvalidRequest, "OFF does not go with TENSORS"),
        ({"trace_level": {"a": 1}}, InvalidRequest, "'trace_level' is text or a list of texts"),
        ({"trace_rates": "1"}, InvalidRequest, "did you mean 'trace_rate'"),
    ],
)
def test_what_is_no_setting_is_refused_and_nothing_changes(run, changes, kind, text):
    async def check():
        async with a_graph().mock() as server:
            before = server.serving.tracing.settings()
            with pytest.raises(kind, match=text):
                server.serving.tracing.update({"trace_count": "5", **changes})
            assert before == server.serving.tracing.settings()
            with pytest.raises(InvalidRequest, match="Request for unknown model : nope"):
                server.serving.tracing.update({}, "nope")

    run(check())


def test_a_request_that_is_cancelled_has_a_trace_as_well(run, tmp_path):
    async def wait(value):
        await asyncio.Event().wait()

    async def check():
        graph = Graph("g", {"x": ("FP32", [-1])}).to(wait, name="n").respond()
        async with graph.mock(trace_file=str(tmp_path / "t.json")) as server:
            server.serving.tracing.update({"trace_level": ["TIMESTAMPS"], "trace_rate": "1"})
            request = asyncio.ensure_future(infer(server))
            for _ in range(10):
                await asyncio.sleep(0)
            request.cancel()
            await asyncio.wait([request])
            await asyncio.sleep(0)
            await server.serving.tracing.flush()
            assert ["r-1"] == traced(read(tmp_path / "t.json"))

    run(check())


def test_a_step_that_fails_fails_as_without_a_trace(run):
    async def check():
        async with a_graph().mock() as server:
            server.serving.tracing.update({"trace_level": ["TIMESTAMPS", "TENSORS"], "trace_rate": "1"})
            with pytest.raises(StepFailed, match="negative"):
                await server.infer(x=[-1.0])

    run(check())


def test_a_stream_has_a_moment_for_each_answer(run, tmp_path):
    def count(value):
        for number in value["x"]:
            yield {"x": np.float32([number])}

    async def check():
        graph = Graph("g", {"x": ("FP32", [-1])}).to(count, name="n").respond()
        async with graph.mock(trace_file=str(tmp_path / "t.json")) as server:
            server.serving.tracing.update({"trace_level": ["TIMESTAMPS"], "trace_rate": "1"})
            await server.request("POST", "/v2/models/g/generate_stream", b'{"x": [1, 2]}')
            await server.serving.tracing.flush()
            (stamps, *_) = [entry["timestamps"] for entry in read(tmp_path / "t.json") if "timestamps" in entry]
            assert ["REQUEST_START", *["INFER_RESPONSE_COMPLETE"] * 2, "REQUEST_END"] == [
                stamp["name"] for stamp in stamps if not stamp["name"].startswith("HTTP")
            ]
            report = server.serving.catalog.get("g").executor.statistics.report()
            assert [1, 0] == [report["inference_stats"][key]["count"] for key in ("success", "fail")]
            assert [(1, 0), (1, 0), (0, 1)] == [
                (answer["success"]["count"], answer["empty_response"]["count"]) for answer in report["response_stats"].values()
            ]

    run(check())
