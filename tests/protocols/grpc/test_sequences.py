"""Sequences with an unmodified tritonclient over gRPC: unary, and over one stream as in Triton's example."""

from __future__ import annotations

import queue

import numpy as np
import pytest
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

from servinggraph import Graph

VALUES = [11, 7, 5, 3, 2, 0, 1]


def total(value, state):
    for row, x in zip(state, value["INPUT"], strict=True):
        row["sum"] = row.get("sum", 0) + int(x[0])
    return {"OUTPUT": np.array([[row["sum"]] for row in state], np.int32)}


@pytest.fixture
def server(grpc_server):
    graph = Graph("simple_sequence", {"INPUT": ("INT32", [-1, 1])}, sequences={"idle_ms": 60_000})
    graph.to(total, "total", batch=True).respond()
    return grpc_server(graph)


def the_input(value):
    tensor = triton.InferInput("INPUT", [1, 1], "INT32")
    tensor.set_data_from_numpy(np.array([[value]], np.int32))
    return [tensor]


@pytest.mark.parametrize("key", [1000, "anna"])
def test_a_sequence_of_single_calls(server, key):
    with triton.InferenceServerClient(server.url) as client:
        answers = []
        for count, value in enumerate(VALUES):
            flags = {"sequence_start": count == 0, "sequence_end": count == len(VALUES) - 1}
            result = client.infer("simple_sequence", the_input(value), sequence_id=key, **flags)
            answers.append(int(result.as_numpy("OUTPUT")[0, 0]))
        with pytest.raises(InferenceServerException, match="must specify the START flag"):
            client.infer("simple_sequence", the_input(1), sequence_id=key)
    assert np.cumsum(VALUES).tolist() == answers


@pytest.mark.parametrize("keys", [(1000, 1001), ("anna", "bert"), (5, "5")])
def test_two_sequences_over_one_stream_keep_their_order(server, keys):
    answers: queue.Queue = queue.Queue()
    with triton.InferenceServerClient(server.url) as client:
        client.start_stream(lambda result, error: answers.put((result, error)))
        for sign, key in zip((1, -1), keys, strict=True):
            for count, value in enumerate(VALUES):
                client.async_stream_infer(
                    "simple_sequence",
                    the_input(sign * value),
                    request_id=f"{sign}_{count}",
                    sequence_id=key,
                    sequence_start=count == 0,
                    sequence_end=count == len(VALUES) - 1,
                )
        got: dict[str, list[int]] = {"1": [], "-1": []}
        for _ in range(2 * len(VALUES)):
            result, error = answers.get(timeout=30)
            assert error is None
            got[result.get_response().id.split("_")[0]].append(int(result.as_numpy("OUTPUT")[0, 0]))
        client.stop_stream()
    expected = np.cumsum(VALUES)
    assert {"1": expected.tolist(), "-1": (-expected).tolist()} == got


def test_an_error_of_a_sequence_leaves_the_stream_open(server):
    answers: queue.Queue = queue.Queue()
    with triton.InferenceServerClient(server.url) as client:
        client.start_stream(lambda result, error: answers.put((result, error)))
        client.async_stream_infer("simple_sequence", the_input(1), sequence_id=7)
        assert "must specify the START flag" in str(answers.get(timeout=30)[1])
        client.async_stream_infer("simple_sequence", the_input(1), sequence_id=7, sequence_start=True)
        assert [[1]] == answers.get(timeout=30)[0].as_numpy("OUTPUT").tolist()
        client.stop_stream()
