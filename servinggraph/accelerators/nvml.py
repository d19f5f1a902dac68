"""How full GPUs are, as the driver's management library says; only the driver is needed.

Source: NVML API reference (nvmlDeviceGetMemoryInfo, nvmlDeviceGetUtilizationRates); CUDA driver API (cuDeviceGetUuid), for
which of the machine's GPUs are this process' own.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any, NamedTuple
from uuid import UUID

from servinggraph.accelerators.devices import cuda_device_count

__all__ = ["GpuState", "gpu_states"]


class GpuState(NamedTuple):
    """One GPU now, all processes on it together."""

    device: str
    """`cuda:0`, as in graph files."""
    uuid: str
    """The driver's name for it."""
    total_bytes: int
    """Memory that it has."""
    used_bytes: int
    """Memory that is taken."""
    utilization: float
    """Share of the last sample period in which anything ran, 0 to 1."""


class _Memory(ctypes.Structure):
    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


class _Utilization(ctypes.Structure):
    _fields_ = (("gpu", ctypes.c_uint), ("memory", ctypes.c_uint))


def gpu_states() -> list[GpuState]:
    """Return the state of each GPU that this process may use; none where there is no driver. May block for a moment."""
    opened = _opened()
    if opened is None:
        return []
    library, handles = opened
    states: list[GpuState] = []
    for device, uuid, handle in handles:
        memory, utilization = _Memory(), _Utilization()
        if library.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory)):
            continue
        library.nvmlDeviceGetUtilizationRates(handle, ctypes.byref(utilization))  # 0 where a GPU does not say
        states.append(GpuState(device, uuid, memory.total, memory.used, utilization.gpu / 100))
    return states


@cache
def _opened() -> tuple[Any, list[tuple[str, str, ctypes.c_void_p]]] | None:
    """Return the library and a handle for each GPU of this process."""
    count = cuda_device_count()
    if not count:
        return None
    try:
        driver, library = ctypes.CDLL("libcuda.so.1"), ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    if library.nvmlInit_v2():
        return None
    handles: list[tuple[str, str, ctypes.c_void_p]] = []
    for index in range(count):
        raw, handle = (ctypes.c_ubyte * 16)(), ctypes.c_void_p()
        if driver.cuDeviceGetUuid(ctypes.byref(raw), ctypes.c_int(index)):
            continue
        uuid = f"GPU-{UUID(bytes=bytes(raw))}"
        if not library.nvmlDeviceGetHandleByUUID(uuid.encode(), ctypes.byref(handle)):
            handles.append((f"cuda:{index}", uuid, handle))
    return library, handles
