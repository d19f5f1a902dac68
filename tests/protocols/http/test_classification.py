"""Classes asked for by clients."""

import numpy as np
import pytest
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException

from servinggraph import Graph


def score(value):
    return {
        "scores": np.array([[0.1, 0.7, 0.2]] * len(value["x"]), np.float32),
        "name": np.array([b"a"] * len(value["x"]), object),
    }


@pytest.fixture
def client(http_server, tmp_path):
    (tmp_path / "labels.txt").write_text("cat\ndog\nfish\n")
    outputs = {
        "scores": {"datatype": "FP32", "shape": [-1, 3], "labels": str(tmp_path / "labels.txt")},
        "name": ("BYTES", [-1]),
    }
    graphs = [
        Graph(name, {"x": ("FP32", [-1])}, outputs=outputs).to(score, name="n", **options).respond()
        for name, options in (("batched", {"batch": {"max_rows": 8}}), ("alone", {}))
    ]
    with triton.InferenceServerClient(http_server(*graphs).url) as client:
        yield client


def infer(client, model, output):
    tensor = triton.InferInput("x", [2], "FP32")
    tensor.set_data_from_numpy(np.zeros(2, np.float32))
    return client.infer(model, [tensor], outputs=[output])


@pytest.mark.parametrize("binary", [True, False])
def test_each_row_of_a_batch_has_its_classes(client, binary):
    reply = infer(client, "batched", triton.InferRequestedOutput("scores", binary_data=binary, class_count=2))
    expected = ["0.700000:1:dog", "0.200000:2:fish"]
    got = reply.as_numpy("scores").astype(bytes).astype(str).tolist()
    assert [expected, expected] == got
    assert {"datatype": "BYTES", "shape": [2, 2]} == {key: reply.get_output("scores")[key] for key in ("datatype", "shape")}


def test_without_batching_the_tensor_is_one_list_of_classes(client):
    reply = infer(client, "alone", triton.InferRequestedOutput("scores", class_count=3))
    assert [b"0.700000:1:dog", b"0.700000:4", b"0.200000:2:fish"] == reply.as_numpy("scores").tolist()


def test_a_type_without_classes_is_refused_before_the_graph_runs(client):
    with pytest.raises(
        InferenceServerException, match="class result not available for output due to unsupported type 'BYTES'"
    ) as info:
        infer(client, "alone", triton.InferRequestedOutput("name", class_count=1))
    assert "400" == info.value.status()
    assert 0 == client.get_inference_statistics("alone")["model_stats"][0]["inference_stats"]["fail"]["count"]
