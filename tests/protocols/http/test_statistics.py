"""Statistics as clients read them."""

import numpy as np
import pytest
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException

from servinggraph import Context, Graph


def double(value):
    if (value["x"] < 0).any():
        raise RuntimeError("negative")
    return {"y": value["x"] * 2}


def odd(value, context: Context):
    return {"y": np.array([b"\xff"], object)}


@pytest.fixture
def client(http_server):
    one = Graph("double", {"x": ("FP32", [-1])}, version=3)
    one.to(double, name="model", batch={"max_rows": 8}).respond()
    other = Graph("odd", {"x": ("FP32", [-1])})
    other.to(odd, name="model").respond()
    with triton.InferenceServerClient(http_server(one, other).url) as client:
        yield client


def infer(client, model, *values, binary=True):
    tensor = triton.InferInput("x", [len(values)], "FP32")
    tensor.set_data_from_numpy(np.array(values, np.float32))
    return client.infer(model, [tensor], outputs=[triton.InferRequestedOutput("y", binary_data=binary)])


def test_a_graph_comes_before_its_nodes_and_counts_rows(client):
    infer(client, "double", 1, 2)
    with pytest.raises(InferenceServerException):
        infer(client, "double", -1)
    graph, node = client.get_inference_statistics("double")["model_stats"]
    assert ("double", "3", "double.model", "3") == (graph["name"], graph["version"], node["name"], node["version"])
    for entry in (graph, node):
        stats = entry["inference_stats"]
        assert [1, 1, 1, 1] == [stats[key]["count"] for key in ("success", "fail", "queue", "compute_infer")]
        assert stats["success"]["ns"] >= stats["queue"]["ns"] + stats["compute_infer"]["ns"] > 0
        assert (2, 1) == (entry["inference_count"], entry["execution_count"])
        assert [2] == [batch["batch_size"] for batch in entry["batch_stats"]]


def test_all_graphs_one_version_or_one_node_can_be_asked_for(client):
    names = [entry["name"] for entry in client.get_inference_statistics()["model_stats"]]
    assert ["double", "double.model", "odd", "odd.model"] == names
    assert 2 == len(client.get_inference_statistics("double", "3")["model_stats"])
    (node,) = client.get_inference_statistics("double.model")["model_stats"]
    assert "double.model" == node["name"]


def test_an_answer_that_cannot_be_encoded_counts_as_failure(client):
    with pytest.raises(InferenceServerException):
        infer(client, "odd", 1, binary=False)
    stats = client.get_inference_statistics("odd")["model_stats"][0]["inference_stats"]
    assert [0, 1] == [stats[key]["count"] for key in ("success", "fail")]
    assert 0 == stats["success"]["ns"]


@pytest.mark.parametrize(
    "asked, text",
    [(("nope",), "requested model 'nope' is not available"), (("double", "1"), "requested model version is not available")],
)
def test_what_is_not_there_is_refused(client, asked, text):
    with pytest.raises(InferenceServerException, match=text) as info:
        client.get_inference_statistics(*asked)
    assert "400" == info.value.status()
