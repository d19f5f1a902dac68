"""Triton's metrics, for dashboards and autoscalers that know those. Source: Triton, docs/user_guide/metrics.md."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Literal

from servinggraph.metrics.families import Family
from servinggraph.metrics.readings import Readings

__all__ = ["TRITON", "read_model", "reason_of"]

_MODEL: Final = ("model", "version")


def _family(
    name: str, unit: str, text: str, kind: Literal["counter", "gauge"] = "counter", labels: tuple[str, ...] = _MODEL
) -> Family:
    return Family(name, kind, unit, labels, text)


SUCCESS: Final = _family("nv_inference_request_success", "requests", "Requests that were answered.")
FAILURE: Final = _family(
    "nv_inference_request_failure", "requests", "Requests that were not, by reason: REJECTED, CANCELED, BACKEND, OTHER.",
    labels=(*_MODEL, "reason"),
)  # fmt: skip
COUNT: Final = _family("nv_inference_count", "rows", "Inferences: a request with n rows counts n times.")
EXECUTIONS: Final = _family("nv_inference_exec_count", "batches", "Executions, each of a batch.")
REQUEST_US: Final = _family("nv_inference_request_duration_us", "microseconds", "Time of answered requests.")
QUEUE_US: Final = _family("nv_inference_queue_duration_us", "microseconds", "Of that, in queues.")
INPUT_US: Final = _family("nv_inference_compute_input_duration_us", "microseconds", "Of that, joining inputs to batches.")
INFER_US: Final = _family("nv_inference_compute_infer_duration_us", "microseconds", "Of that, computing.")
OUTPUT_US: Final = _family("nv_inference_compute_output_duration_us", "microseconds", "Of that, splitting outputs.")
PENDING: Final = _family("nv_inference_pending_request_count", "requests", "Requests that wait for a batch now.", "gauge")
HITS: Final = _family("nv_cache_num_hits_per_model", "requests", "Requests that a cache answered.")
MISSES: Final = _family("nv_cache_num_misses_per_model", "requests", "Looks into a cache that found nothing.")
HIT_US: Final = _family("nv_cache_hit_duration_per_model", "microseconds", "Time of answers from a cache.")
MISS_US: Final = _family("nv_cache_miss_duration_per_model", "microseconds", "Time for looking in vain and for keeping.")
GPU_TOTAL: Final = _family("nv_gpu_memory_total_bytes", "bytes", "Memory of a GPU.", "gauge", ("gpu_uuid",))
GPU_USED: Final = _family("nv_gpu_memory_used_bytes", "bytes", "Of that, taken by anybody.", "gauge", ("gpu_uuid",))
GPU_BUSY: Final = _family("nv_gpu_utilization", "ratio", "Share of time in which a GPU ran anything.", "gauge", ("gpu_uuid",))

TRITON: Final = (
    SUCCESS, FAILURE, COUNT, EXECUTIONS, REQUEST_US, QUEUE_US, INPUT_US, INFER_US, OUTPUT_US, PENDING,
    HITS, MISSES, HIT_US, MISS_US, GPU_TOTAL, GPU_USED, GPU_BUSY,
)  # fmt: skip

_REASONS: Final = {"limit_exceeded": "REJECTED", "unavailable": "REJECTED", "cancelled": "CANCELED", "internal": "BACKEND"}
_DURATIONS: Final = {
    "success": REQUEST_US, "queue": QUEUE_US,
    "compute_input": INPUT_US, "compute_infer": INFER_US, "compute_output": OUTPUT_US,
}  # fmt: skip


def reason_of(code: str) -> str:
    """Return Triton's reason for a failure's code."""
    return _REASONS.get(code, "OTHER")


def read_model(readings: Readings, labels: tuple[str, str], report: Mapping[str, Any]) -> None:
    """Read a graph's or node's statistics, as the statistics extension has them."""
    readings.count(COUNT, labels, report["inference_count"])
    readings.count(EXECUTIONS, labels, report["execution_count"])
    stats = report["inference_stats"]
    for part, family in _DURATIONS.items():
        readings.count(family, labels, stats[part]["ns"] // 1000)
    hit, miss = stats["cache_hit"], stats["cache_miss"]
    if hit["count"] or miss["count"]:
        for family, value in ((HITS, hit["count"]), (MISSES, miss["count"])):
            readings.count(family, labels, value)
        for family, value in ((HIT_US, hit["ns"]), (MISS_US, miss["ns"])):
            readings.count(family, labels, value // 1000)
