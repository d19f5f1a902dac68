"""Health and metadata, asked by Triton's own client."""

import numpy as np
import pytest
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

from servinggraph import Graph


def a_graph(name="g", version=3):
    inputs = {"x": ("FP32", [-1, 4]), "text": {"datatype": "BYTES", "shape": [], "optional": True}}
    graph = Graph(name, inputs, outputs={"y": ("FP32", [-1])}, version=version)
    return graph.to(lambda value: {"y": np.zeros(1, np.float32)}, "step").respond()


@pytest.fixture(scope="module")
def server(shared_grpc_server):
    return shared_grpc_server(a_graph(), server_name="ours", server_version="1.2.3")


@pytest.fixture
def client(server):
    with triton.InferenceServerClient(server.url) as client:
        yield client


def test_a_server_that_serves_is_live_and_ready(client):
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("g")
    assert client.is_model_ready("g", "3")


def test_what_is_not_served_is_not_ready_and_no_error(client):
    assert not client.is_model_ready("nope")
    assert not client.is_model_ready("g", "4")


def test_a_server_that_drains_is_live_and_not_ready(grpc_server):
    server = grpc_server(a_graph())
    server.catalog.draining = True
    with triton.InferenceServerClient(server.url) as client:
        assert client.is_server_live()
        assert not client.is_server_ready()
        assert not client.is_model_ready("g")


def test_the_server_says_its_name_version_and_extensions(client):
    metadata = client.get_server_metadata()

    assert ("ours", "1.2.3") == (metadata.name, metadata.version)
    assert "binary_tensor_data" in metadata.extensions


def test_a_model_says_its_tensors_and_versions(client):
    metadata = client.get_model_metadata("g")

    assert ("g", ["3"]) == (metadata.name, list(metadata.versions))
    assert [("x", "FP32", [-1, 4]), ("text", "BYTES", [])] == [(t.name, t.datatype, list(t.shape)) for t in metadata.inputs]
    assert [("y", "FP32", [-1])] == [(t.name, t.datatype, list(t.shape)) for t in metadata.outputs]
    assert ["3"] == list(client.get_model_metadata("g", "3").versions)


@pytest.mark.parametrize(
    ("name", "version", "status", "text"),
    [
        ("nope", "", "NOT_FOUND", "Request for unknown model: 'nope' is not found"),
        ("g", "4", "NOT_FOUND", "Request for unknown model: 'g' version 4 is not found"),
        ("g", "x", "INVALID_ARGUMENT", "failed to get model version from specified version string 'x'"),
        ("g", "-1", "INVALID_ARGUMENT", "invalid model version specified"),
        ("g", "٣", "INVALID_ARGUMENT", "failed to get model version"),
    ],
)  # fmt: skip
def test_metadata_of_what_is_not_served_is_an_error(client, name, version, status, text):
    with pytest.raises(InferenceServerException, match=text) as error:
        client.get_model_metadata(name, version)

    assert f"StatusCode.{status}" == error.value.status()


def test_a_version_may_have_leading_zeros(client):
    assert "g" == client.get_model_metadata("g", "003").name


def test_an_rpc_that_nobody_has_built_is_unimplemented(client):
    with pytest.raises(InferenceServerException) as error:
        client.unregister_cuda_shared_memory()

    assert "StatusCode.UNIMPLEMENTED" == error.value.status()
