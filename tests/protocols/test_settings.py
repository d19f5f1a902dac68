"""Trace and log settings, read and changed by Triton's own clients over both protocols."""

import json
import logging

import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http
from tritonclient.utils import InferenceServerException

from servinggraph import Graph


@pytest.fixture(params=["http", "grpc"])
def connected(request, http_server, grpc_server, tmp_path):
    """Return the client's module, a client and the server."""
    graph = Graph("g", {"x": ("FP32", [-1])}).to(lambda value: value, name="n").respond()
    module, start = (tritonclient.http, http_server) if request.param == "http" else (tritonclient.grpc, grpc_server)
    server = start(graph, trace_file=str(tmp_path / "t.json"))
    with module.InferenceServerClient(server.url) as client:
        yield module, client, server


def plain(settings):
    """Return settings as the HTTP client gives them."""
    if isinstance(settings, dict):
        return settings
    return {
        key: list(setting.value) if key == "trace_level" else setting.value[0] for key, setting in settings.settings.items()
    }


def logged(settings):
    if isinstance(settings, dict):
        return settings
    return {key: getattr(setting, setting.WhichOneof("parameter_choice")) for key, setting in settings.settings.items()}


def test_trace_settings_are_text_and_null_clears_them(connected, tmp_path):
    _, client, _ = connected
    start = {
        "trace_level": ["OFF"], "trace_rate": "1000", "trace_count": "-1", "log_frequency": "0",
        "trace_file": str(tmp_path / "t.json"), "trace_mode": "triton",
    }  # fmt: skip
    assert start == plain(client.get_trace_settings())
    assert start == plain(client.update_trace_settings(settings={}))
    changed = {"trace_level": ["TIMESTAMPS", "TENSORS"], "trace_rate": "2"}
    assert start | changed == plain(client.update_trace_settings(model_name="g", settings=changed))
    assert start == plain(client.get_trace_settings())
    assert start | {"trace_rate": "5"} == plain(client.update_trace_settings(settings={"trace_rate": "5"}))
    assert start | changed == plain(client.get_trace_settings(model_name="g"))
    cleared = client.update_trace_settings(model_name="g", settings={"trace_level": None, "trace_rate": None})
    assert start | {"trace_rate": "5"} == plain(cleared)


def test_a_traced_request_is_in_the_file(connected, tmp_path, until):
    module, client, _ = connected
    client.update_trace_settings(model_name="g", settings={"trace_level": ["TIMESTAMPS"], "trace_rate": "1"})
    tensor = module.InferInput("x", [1], "FP32")
    tensor.set_data_from_numpy(np.zeros(1, np.float32))
    client.infer("g", [tensor], request_id="r-7")
    file = tmp_path / "t.json"
    until(lambda: file.exists() and file.read_text().endswith("]"))  # it is there before what is in it
    (about,) = [entry for entry in json.loads(file.read_text()) if entry.get("request_id")]
    assert ("g", 1, "r-7") == (about["model_name"], about["model_version"], about["request_id"])


@pytest.mark.parametrize(
    "model, settings, http, grpc",
    [
        ("", {"trace_file": "x"}, "501", "UNIMPLEMENTED"),
        ("", {"trace_rate": "x"}, "400", "INVALID_ARGUMENT"),
        ("nope", {"trace_rate": "1"}, "400", "INVALID_ARGUMENT"),
    ],
)
def test_a_wrong_trace_setting_is_refused(connected, model, settings, http, grpc):
    module, client, _ = connected
    with pytest.raises(InferenceServerException) as info:
        client.update_trace_settings(model_name=model, settings=settings)
    assert (http if module is tritonclient.http else f"StatusCode.{grpc}") == info.value.status()


def test_log_settings_change_what_is_logged(connected):
    _, client, _ = connected
    start = logged(client.get_log_settings())
    assert {"log_file", "log_info", "log_warning", "log_error", "log_verbose_level", "log_format"} == set(start)
    assert start == logged(client.update_log_settings({}))
    assert start | {"log_verbose_level": 1} == logged(client.update_log_settings({"log_verbose_level": 1}))
    assert logging.getLogger("servinggraph.lifecycle").isEnabledFor(logging.DEBUG)
    changes = {"log_info": False, "log_verbose_level": 0, "log_format": "ISO8601"}
    assert start | changes == logged(client.update_log_settings(changes))
    assert not logging.getLogger("servinggraph.lifecycle").isEnabledFor(logging.INFO)


@pytest.mark.parametrize("settings", [{"log_file": "x"}, {"log_format": "iso"}])
def test_a_wrong_log_setting_is_refused(connected, settings):
    with pytest.raises(InferenceServerException):
        connected[1].update_log_settings(settings)


def test_what_is_no_json_object_is_refused(http_server):
    server = http_server(Graph("g", {"x": ("FP32", [-1])}).to(lambda value: value, name="n").respond())
    for path in ("/v2/trace/setting", "/v2/models/g/trace/setting", "/v2/logging"):
        assert 400 == server.post(path, b"[1]").status
        assert 200 == server.post(path, b"").status
    assert 404 == server.get("/v2/models/g/versions/1/trace/setting").status
