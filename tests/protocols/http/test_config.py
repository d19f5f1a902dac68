"""Model configuration as clients read it."""

import numpy as np
import pytest
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException

from servinggraph import Graph, signature


@signature(inputs={"x": ("FP32", [-1, 4])}, outputs={"h": ("FP32", [-1, 2])})
def first(value):
    return {"h": value["x"][:, :2]}


@signature(inputs={"h": ("FP32", [-1, 2])}, outputs={"y": ("BYTES", [-1])})
def second(value):
    return {"y": np.array([b"a"] * len(value["h"]), object)}


POLICY = {
    "max_rows": 16,
    "max_delay_ms": 1.5,
    "priorities": 3,
    "queue_timeout_ms": 20,
    "on_timeout": "continue",
    "max_queue": 7,
    "instances": 2,
}


@pytest.fixture
def client(http_server):
    one = Graph("one.graph", {"x": ("FP32", [-1, 4])}, version=2, timeout_ms=50).to(first, name="n", batch=POLICY).respond()
    two = Graph("two", {"x": {"datatype": "FP32", "shape": [-1, 4]}})
    two = two.to(first, name="a", batch={"max_rows": 8}).to(second, name="b").respond()
    fixed = (
        Graph("fixed", {"x": {"datatype": "FP32", "shape": [4], "optional": True}}).to(lambda value: value, name="n").respond()
    )
    with triton.InferenceServerClient(http_server(one, two, fixed).url) as client:
        yield client


def test_a_batched_node_alone_is_a_model_with_a_dynamic_batcher(client):
    config = client.get_model_config("one.graph", "2")
    assert 16 == config["max_batch_size"]
    (given,) = config["input"]
    assert ("x", "TYPE_FP32", [4], False, "FORMAT_NONE") == tuple(
        given[key] for key in ("name", "data_type", "dims", "optional", "format")
    )
    assert [{"h": [2]}] == [{output["name"]: output["dims"]} for output in config["output"]]
    assert {
        "preferred_batch_size": [16],
        "max_queue_delay_microseconds": 1500,
        "preserve_ordering": False,
        "priority_levels": 3,
        "default_priority_level": 3,
        "default_queue_policy": {
            "timeout_action": "DELAY",
            "default_timeout_microseconds": 20000,
            "allow_timeout_override": True,
            "max_queue_size": 7,
        },
        "priority_queue_policy": {},
    } == config["dynamic_batching"]
    assert [("KIND_CPU", 2)] == [(group["kind"], group["count"]) for group in config["instance_group"]]
    assert {"decoupled": False} == config["model_transaction_policy"]
    assert {"enable": False} == config["response_cache"]
    assert {"timeout_ms": {"string_value": "50"}} == config["parameters"]
    assert "ensemble_scheduling" not in config


def test_the_configuration_fits_the_metadata(client):
    """Clients that batch put one axis before `dims`; the metadata have it already."""
    for model in ("one.graph", "two", "fixed"):
        config, metadata = client.get_model_config(model), client.get_model_metadata(model)
        batch = [-1] if config["max_batch_size"] else []
        for side in ("input", "output"):
            assert [batch + tensor["dims"] for tensor in config[side]] == [tensor["shape"] for tensor in metadata[side + "s"]]


def test_several_nodes_are_an_ensemble_whose_steps_can_be_looked_up(client):
    config = client.get_model_config("two")
    assert 8 == config["max_batch_size"]
    assert [
        {"model_name": "two.a", "model_version": -1, "input_map": {"x": "x"}, "output_map": {"h": "a.h"}},
        {"model_name": "two.b", "model_version": -1, "input_map": {"h": "a.h"}, "output_map": {"y": "y"}},
    ] == config["ensemble_scheduling"]["step"]
    assert not {"dynamic_batching", "instance_group"} & set(config)
    node = client.get_model_config("two.a")
    assert ("two.a", 8, [4]) == (node["name"], node["max_batch_size"], node["input"][0]["dims"])
    assert 0 == client.get_model_config("two.b")["max_batch_size"]
    assert "TYPE_STRING" == client.get_model_config("two.b")["output"][0]["data_type"]
    assert "one.graph.n" == client.get_model_config("one.graph.n")["name"]


def test_a_graph_whose_first_axis_is_fixed_has_no_batch(client):
    config = client.get_model_config("fixed")
    assert (0, [4], True) == (config["max_batch_size"], config["input"][0]["dims"], config["input"][0]["optional"])
    assert [] == config["output"]


@pytest.mark.parametrize("asked", [("nope",), ("two", "7"), ("two.c",), ("two.a", "7")])
def test_what_is_not_there_is_not_found(client, asked):
    with pytest.raises(InferenceServerException, match="Request for unknown model: '") as info:
        client.get_model_config(*asked)
    assert "404" == info.value.status()


def test_the_ensemble_is_one_in_protobuf_too(client):
    from google.protobuf.json_format import ParseDict

    from servinggraph.protocols.protobuf.generated import grpc_service_pb2 as pb

    for model in ("one.graph", "two", "two.a", "fixed"):
        assert model == ParseDict({"config": client.get_model_config(model)}, pb.ModelConfigResponse()).config.name
