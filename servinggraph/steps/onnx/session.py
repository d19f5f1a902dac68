"""Opens an ONNX model: session options, execution providers, and which device really took it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import onnxruntime as ort

from servinggraph.accelerators import Placement, cuda_device_count

if TYPE_CHECKING:
    from servinggraph.steps.onnx.step import OnnxOptions

__all__ = ["DeviceMissing", "open_session", "placed"]

logger = logging.getLogger("servinggraph.steps.onnx")

_PROVIDER: Final = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
}
_INSTALL: Final = {
    "cuda": "pip install 'servinggraph[onnx-gpu]'",
    "tensorrt": "pip install 'servinggraph[onnx-gpu]' and TensorRT",
    "openvino": "pip install onnxruntime-openvino",
}
_LEVEL: Final = {
    "disable": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "basic": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "extended": ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
}


class DeviceMissing(Exception):
    """The machine, or this ONNX Runtime, does not have the device."""


def placed(wanted: Placement) -> Placement:
    """Return where a model goes: `wanted`, or for `auto` the best that is there.

    TensorRT is never chosen by `auto`: building its engines can take minutes.

    Raises:
        DeviceMissing: names what is missing and how to get it.
    """
    available = ort.get_available_providers()
    if wanted.kind == "auto":
        return Placement("cuda") if _PROVIDER["cuda"] in available and cuda_device_count() else Placement("cpu")
    if wanted.is_nvidia and cuda_device_count() <= wanted.index:
        count = cuda_device_count()
        has = f"this machine has {count} CUDA device{'s' if count != 1 else ''}" if count else "this machine has no CUDA device"
        raise DeviceMissing(f"device '{wanted}' is not there: {has}; use 'device: auto' to fall back to the CPU")
    if _PROVIDER[wanted.kind] not in available:
        raise DeviceMissing(
            f"ONNX Runtime {ort.__version__} has no {_PROVIDER[wanted.kind]} for device '{wanted}': "
            f"{_INSTALL[wanted.kind]}, or use 'device: auto'"
        )
    return wanted


def open_session(path: Path, options: OnnxOptions, place: Placement, cache: Path) -> ort.InferenceSession:
    """Open a model on a device.

    Args:
        path: the model file.
        options: the step's options.
        place: the device, already known to be there.
        cache: folder for TensorRT engines.

    Raises:
        DeviceMissing: ONNX Runtime has the provider but could not start it, a library is missing, say.
        Exception: ONNX Runtime's own, when the file is no model it can run.
    """
    if place.is_nvidia and hasattr(ort, "preload_dlls"):
        ort.preload_dlls()  # finds CUDA and cuDNN that were installed as Python packages
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = options.threads
    settings.inter_op_num_threads = options.inter_threads
    if options.inter_threads > 1:
        settings.execution_mode = ort.ExecutionMode.ORT_PARALLEL
    settings.graph_optimization_level = _LEVEL[options.optimization]
    settings.log_severity_level = 4  # the rest goes to stderr past our logging, and is in the exceptions anyway
    for key, value in options.session_config.items():
        settings.add_session_config_entry(key, value)
    if options.allow_spinning is False:
        settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = ort.InferenceSession(str(path), settings, providers=_providers(options, place, cache))
    # ONNX Runtime falls back to the CPU with nothing but a line on stderr.
    if _PROVIDER[place.kind] not in session.get_providers():
        raise DeviceMissing(
            f"ONNX Runtime could not start {_PROVIDER[place.kind]} (CUDA, cuDNN or TensorRT libraries missing?); "
            f"it runs {', '.join(session.get_providers())}"
        )
    return session


def _providers(options: OnnxOptions, place: Placement, cache: Path) -> list[tuple[str, dict[str, Any]]]:
    """Return providers in order of preference, each with its options; the user's override ours."""
    cpu: tuple[str, dict[str, Any]] = (_PROVIDER["cpu"], {})
    if place.kind == "cpu":
        return [(cpu[0], dict(options.provider_options))]
    chosen: dict[str, Any] = {}
    if place.kind == "tensorrt":
        rt = options.tensorrt
        chosen = {
            "device_id": place.index,
            "trt_fp16_enable": rt.fp16,
            "trt_int8_enable": rt.int8,
            "trt_engine_cache_enable": rt.engine_cache,
            "trt_engine_cache_path": str(cache),
            "trt_timing_cache_enable": rt.engine_cache,
            "trt_timing_cache_path": str(cache),
        }
        if rt.workspace_mb is not None:
            chosen["trt_max_workspace_size"] = rt.workspace_mb * 2**20
        if rt.int8 and rt.calibration_table is not None:
            chosen["trt_int8_calibration_table_name"] = rt.calibration_table
        chosen |= options.provider_options
        # What TensorRT cannot run goes to CUDA before it goes to the CPU.
        return [(_PROVIDER["tensorrt"], chosen), (_PROVIDER["cuda"], {"device_id": place.index}), cpu]
    if place.kind == "cuda":
        chosen = {"device_id": place.index}
    return [(_PROVIDER[place.kind], chosen | options.provider_options), cpu]
