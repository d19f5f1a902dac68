"""Sequences with an unmodified tritonclient over HTTP, and at the end of a server process."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tritonclient.http as triton
import tritonclient.http.aio as triton_aio
from tritonclient.utils import InferenceServerException

from servinggraph import Graph


def total(value, state):
    for row, x in zip(state, value["INPUT"], strict=True):
        row["sum"] = row.get("sum", 0) + int(x[0])
    return {"OUTPUT": np.array([[row["sum"]] for row in state], np.int32)}


@pytest.fixture
def server(http_server):
    graph = Graph("simple_sequence", {"INPUT": ("INT32", [-1, 1])}, sequences={"idle_ms": 60_000})
    graph.to(total, "total", batch=True).respond()
    return http_server(graph)


def the_input(module, value, *, binary=True):
    tensor = module.InferInput("INPUT", [1, 1], "INT32")
    tensor.set_data_from_numpy(np.array([[value]], np.int32), binary_data=binary)
    return [tensor]


@pytest.mark.parametrize("keys", [(1000, 1001), ("anna", "bert"), (5, "5")])
@pytest.mark.parametrize("binary", [True, False])
def test_two_sequences_at_once_as_in_tritons_example(server, keys, binary):
    values = [11, 7, 5, 3, 2, 0, 1]
    answers = {key: [] for key in keys}
    with triton.InferenceServerClient(server.url) as client:
        for count, value in enumerate(values):
            for sign, key in zip((1, -1), keys, strict=True):
                flags = {"sequence_start": count == 0, "sequence_end": count == len(values) - 1}
                inputs = the_input(triton, sign * value, binary=binary)
                result = client.infer("simple_sequence", inputs, sequence_id=key, **flags)
                answers[key].append(int(result.as_numpy("OUTPUT")[0, 0]))
                assert {"sequence_id": key, **flags} == result.get_response()["parameters"]
        with pytest.raises(InferenceServerException, match="must specify the START flag on the first request of the sequence"):
            client.infer("simple_sequence", the_input(triton, 1), sequence_id=keys[0])
        with pytest.raises(InferenceServerException, match="must specify a non-zero or non-empty correlation ID"):
            client.infer("simple_sequence", the_input(triton, 1))
    expected = np.cumsum(values)
    assert [expected.tolist(), (-expected).tolist()] == [answers[key] for key in keys]


def test_200_sequences_of_50_steps_over_http(server):
    async def main():
        async with triton_aio.InferenceServerClient(server.url, conn_limit=64) as client:

            async def sequence(key):
                answers = []
                for n in range(50):
                    flags = {"sequence_start": n == 0, "sequence_end": n == 49}
                    result = await client.infer("simple_sequence", the_input(triton_aio, key + n), sequence_id=key, **flags)
                    answers.append(int(result.as_numpy("OUTPUT")[0, 0]))
                return answers

            return await asyncio.gather(*(sequence(key) for key in range(1, 201)))

    answers = asyncio.run(main())
    assert [np.cumsum(key + np.arange(50)).tolist() for key in range(1, 201)] == answers


def test_sequences_are_named_in_the_metadata(server):
    with triton.InferenceServerClient(server.url) as client:
        assert {"sequence", "sequence(string_id)"} <= set(client.get_server_metadata()["extensions"])


GRAPH = """\
graph: total
sequences: {idle_ms: 60000}
inputs: {x: {datatype: FP32, shape: [1]}}
nodes:
  total: {step: python, call: "steps:total"}
answer: total
"""
STEPS = """\
def total(value, state):
    state["sum"] = state.get("sum", 0) + value["x"]
    return {"y": state["sum"]}
"""


@pytest.mark.slow
def test_on_sigterm_a_sequence_under_way_may_end_and_none_begins(tmp_path, until):
    (tmp_path / "graph.yaml").write_text(GRAPH)
    (tmp_path / "steps.py").write_text(STEPS)
    command = [sys.executable, "-c", "from servinggraph.cli import main; main()", "serve", "graph.yaml", "--http-port", "0"]
    with (
        subprocess.Popen(
            [*command, "--grpc-port", "off", "--grace-s", "60"], cwd=tmp_path, stderr=subprocess.STDOUT, stdout=subprocess.PIPE
        ) as process,
        ThreadPoolExecutor(1) as reader,
    ):
        try:
            lines = []

            def read():
                lines.extend(line.decode() for line in process.stdout)

            for line in process.stdout:
                if b"HTTP on http://" in line:
                    url = line.decode().split("http://")[1].split()[0].rstrip("/,")
                    break
            reader.submit(read)
            with triton.InferenceServerClient(url) as client:

                def send(key, **flags):
                    tensor = triton.InferInput("x", [1], "FP32")
                    tensor.set_data_from_numpy(np.ones(1, np.float32))
                    return client.infer("total", [tensor], sequence_id=key, **flags).as_numpy("y").tolist()

                assert [1] == send(7, sequence_start=True)
                process.send_signal(signal.SIGTERM)
                until(lambda: not client.is_server_ready())
                with pytest.raises(InferenceServerException, match="shutting down: sequence 8 cannot start any more"):
                    send(8, sequence_start=True)
                assert [[2], [3]] == [send(7), send(7, sequence_end=True)]
            assert 0 == process.wait(60)
        finally:
            process.kill()


def test_wrong_parameters_are_told_over_http(server):
    document = {"inputs": [{"name": "INPUT", "datatype": "INT32", "shape": [1, 1], "data": [1]}]}
    for parameters, text in (
        ({"sequence_id": -1}, "'sequence_id' is a number from 0 to 2^64-1"),
        ({"sequence_id": 1.5}, "'sequence_id' is a whole number or text"),
        ({"sequence_id": 1, "sequence_start": "true"}, "'sequence_start' is true or false"),
    ):
        answer = server.post("/v2/models/simple_sequence/infer", {**document, "parameters": parameters})
        assert 400 == answer.status
        assert text in json.loads(answer.body)["error"]
