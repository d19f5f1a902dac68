"""Device names of graph files, and what of them this machine has."""

from __future__ import annotations

import ctypes
import re
from dataclasses import dataclass
from functools import cache

__all__ = ["DEVICE_PATTERN", "Placement", "cuda_device_count", "placement"]

DEVICE_PATTERN = r"^(auto|cpu|(cuda|tensorrt|openvino)(:[0-9]+)?)$"


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a model runs.

    Attributes:
        kind: "auto", "cpu", "cuda", "tensorrt" or "openvino".
        index: number of the device among those of its kind.
    """

    kind: str
    index: int = 0

    @property
    def is_nvidia(self) -> bool:
        """True when the model's tensors live on an NVIDIA GPU."""
        return self.kind in ("cuda", "tensorrt")

    def __str__(self) -> str:
        return f"{self.kind}:{self.index}" if self.is_nvidia else self.kind


def placement(device: str) -> Placement:
    """Read a `device:` value, `cuda:1` say.

    Raises:
        ValueError: not a device name.
    """
    if not re.fullmatch(DEVICE_PATTERN, device):
        raise ValueError(f"'{device}' is no device: expected auto, cpu, cuda, tensorrt or openvino, or cuda:1 and the like")
    kind, _, index = device.partition(":")
    return Placement(kind, int(index or 0))


@cache
def cuda_device_count() -> int:
    """Return the number of CUDA devices that this process may use; 0 without a driver.

    Asks the driver itself, so CUDA_VISIBLE_DEVICES and containers are respected and no
    toolkit is needed. Source: CUDA driver API, cuInit and cuDeviceGetCount.
    """
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value
