"""The state of GPUs: a library that stands in for the driver's, and a real GPU where there is one."""

import ctypes
import uuid

import pytest

from servinggraph.accelerators import nvml
from servinggraph.accelerators.devices import cuda_device_count

UUIDS = [uuid.UUID(int=1), uuid.UUID(int=2)]


class Driver:
    def cuDeviceGetUuid(self, raw, index):
        raw._obj[:] = UUIDS[index.value].bytes
        return 0


class Library:
    def nvmlInit_v2(self):
        return 0

    def nvmlDeviceGetHandleByUUID(self, name, handle):
        handle._obj.value = [f"GPU-{known}" for known in UUIDS].index(name.decode()) + 1
        return 0

    def nvmlDeviceGetMemoryInfo(self, handle, memory):
        memory._obj.total, memory._obj.used = 1000, 100 * handle.value
        return 0

    def nvmlDeviceGetUtilizationRates(self, handle, utilization):
        utilization._obj.gpu = 50
        return 0


@pytest.fixture(autouse=True)
def _forget():
    nvml._opened.cache_clear()
    yield
    nvml._opened.cache_clear()


def test_each_gpu_of_the_process_is_found_by_its_own_name(monkeypatch):
    monkeypatch.setattr(nvml, "cuda_device_count", lambda: 2)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver() if "cuda" in name else Library())
    states = nvml.gpu_states()
    assert [("cuda:0", 100), ("cuda:1", 200)] == [(state.device, state.used_bytes) for state in states]
    assert all((1000, 0.5) == (state.total_bytes, state.utilization) for state in states)
    assert f"GPU-{UUIDS[0]}" == states[0].uuid


def test_without_a_driver_or_its_library_there_is_nothing_to_say(monkeypatch):
    monkeypatch.setattr(nvml, "cuda_device_count", lambda: 0)
    assert [] == nvml.gpu_states()
    nvml._opened.cache_clear()
    monkeypatch.setattr(nvml, "cuda_device_count", lambda: 1)

    def missing(name):
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert [] == nvml.gpu_states()


@pytest.mark.gpu
@pytest.mark.skipif(not cuda_device_count(), reason="no NVIDIA GPU")
def test_a_real_gpu_says_what_it_has():
    states = nvml.gpu_states()
    assert cuda_device_count() == len(states)
    assert all(0 < state.used_bytes <= state.total_bytes and 0 <= state.utilization <= 1 for state in states)
