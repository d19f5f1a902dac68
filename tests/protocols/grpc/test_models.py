"""Statistics, configuration and classification, asked by Triton's own client."""

import numpy as np
import pytest
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

from servinggraph import Graph, signature


def score(value):
    return {"scores": np.array([[0.1, 0.7, 0.2]] * len(value["x"]), np.float32)}


@pytest.fixture
def client(grpc_server, tmp_path):
    (tmp_path / "labels.txt").write_text("cat\ndog\n")
    outputs = {"scores": {"datatype": "FP32", "shape": [-1, 3], "labels": str(tmp_path / "labels.txt")}}
    graph = Graph("g", {"x": ("FP32", [-1, 4])}, version=2, outputs=outputs)
    with triton.InferenceServerClient(grpc_server(graph.to(score, name="n", batch={"max_rows": 8}).respond()).url) as client:
        yield client


def infer(client, rows=2, **asked):
    tensor = triton.InferInput("x", [rows, 4], "FP32")
    tensor.set_data_from_numpy(np.zeros((rows, 4), np.float32))
    return client.infer("g", [tensor], outputs=[triton.InferRequestedOutput("scores", **asked)])


def test_statistics_are_those_of_http(client):
    infer(client)
    graph, node = client.get_inference_statistics("g", "2").model_stats
    assert ("g", "g.n", "2") == (graph.name, node.name, node.version)
    assert (2, 1, 1) == (node.inference_count, node.execution_count, node.inference_stats.success.count)
    assert node.inference_stats.compute_infer.ns > 0
    assert [2] == [batch.batch_size for batch in node.batch_stats]
    assert 2 == len(client.get_inference_statistics().model_stats)


def test_the_configuration_is_that_of_http(client):
    config = client.get_model_config("g").config
    assert ("g", 8, [4]) == (config.name, config.max_batch_size, list(config.input[0].dims))
    assert [8] == list(config.dynamic_batching.preferred_batch_size)
    assert "labels.txt" == config.output[0].label_filename.rpartition("/")[2]
    as_json = client.get_model_config("g", as_json=True)["config"]
    assert "TYPE_FP32" == as_json["input"][0]["data_type"]


def test_classes_come_as_text(client):
    assert [[b"0.700000:1:dog", b"0.200000:2"]] * 2 == infer(client, class_count=2).as_numpy("scores").tolist()


@pytest.mark.parametrize(
    "ask, status",
    [
        (lambda client: client.get_inference_statistics("nope"), "INVALID_ARGUMENT"),
        (lambda client: client.get_inference_statistics("g", "1"), "INVALID_ARGUMENT"),
        (lambda client: client.get_model_config("nope"), "NOT_FOUND"),
    ],
)
def test_what_is_not_there_is_refused(client, ask, status):
    with pytest.raises(InferenceServerException) as info:
        ask(client)
    assert f"StatusCode.{status}" == info.value.status()


def test_sequences_and_ensembles_fit_the_message_too(grpc_server):
    two = Graph("two", {"x": ("FP32", [-1, 4])}, outputs={"scores": ("FP32", [-1, 3])})
    two = two.to(signature(outputs={"x": ("FP32", [-1, 4])})(lambda value: value), name="a").to(score, name="b").respond()
    talk = Graph("talk", {"x": ("FP32", [-1, 4])}, sequences={"idle_ms": 20, "max": 3}).to(score, name="n").respond()
    with triton.InferenceServerClient(grpc_server(two, talk).url) as client:
        batching = client.get_model_config("talk").config.sequence_batching
        assert (20000, 3) == (batching.max_sequence_idle_microseconds, batching.oldest.max_candidate_sequences)
        assert not client.get_model_config("two").config.HasField("ensemble_scheduling")  # what `b` gives is not known
        assert "two.a" == client.get_model_config("two.a").config.name
