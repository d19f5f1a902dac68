"""Triton's names beside our own, with `metrics_compat="triton"`."""

import asyncio

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from servinggraph import Graph
from servinggraph.errors import ServingGraphError
from servinggraph.metrics.triton import GPU_BUSY, GPU_TOTAL, GPU_USED, TRITON

X = {"x": np.ones(2, np.float32)}


def double(value):
    if value["x"][0] < 0:
        raise RuntimeError("negative")
    return {"y": value["x"] * 2}


def test_every_name_is_there_and_its_numbers_are_those_of_the_statistics():
    graph = Graph("g", {"x": ("FP32", [-1])}, outputs={"y": ("FP32", [-1])})
    graph.to(double, name="n", batch={"max_rows": 4}, cache={"max_bytes": 10_000}, pure=True).respond()

    async def check():
        async with graph.mock(metrics_compat="triton") as server:
            await server.infer(X)
            await server.infer(X)
            with pytest.raises(ServingGraphError):
                await server.infer(x=np.array([-1], np.float32))
            with pytest.raises(ServingGraphError):
                await server.infer(z=[1])
            page = (await server.request("GET", "/metrics")).body.decode()
            stats = (await server.request("GET", "/v2/models/g/stats")).json()["model_stats"]
        found = {
            (sample.name, sample.labels["model"], sample.labels.get("reason")): sample.value
            for family in text_string_to_metric_families(page)
            for sample in family.samples
            if sample.name.startswith("nv_")
        }
        assert {family.name for family in TRITON} - {name for name, *_ in found} == {
            f.name for f in (GPU_TOTAL, GPU_USED, GPU_BUSY)
        }
        for entry in stats:
            assert entry["inference_count"] == found["nv_inference_count", entry["name"], None]
            assert entry["execution_count"] == found["nv_inference_exec_count", entry["name"], None]
            infer_us = entry["inference_stats"]["compute_infer"]["ns"] // 1000
            assert infer_us == found["nv_inference_compute_infer_duration_us", entry["name"], None]
        assert 2 == found["nv_inference_request_success", "g", None]
        assert 1 == found["nv_inference_request_failure", "g", "BACKEND"]
        assert 1 == found["nv_inference_request_failure", "g", "OTHER"]
        assert 1 == found["nv_cache_num_hits_per_model", "g.n", None]

    asyncio.run(check())
