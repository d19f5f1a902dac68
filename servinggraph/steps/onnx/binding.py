"""Runs a model on a GPU through I/O binding, with inputs in page-locked memory where there is some.

Without it ONNX Runtime copies from pageable memory, which the driver copies a second time.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from typing import Any, Final

import numpy as np
import onnxruntime as ort

from servinggraph.accelerators import Placement
from servinggraph.tensors import Array

__all__ = ["BoundSession"]

logger = logging.getLogger("servinggraph.steps.onnx")

_KEPT_SHAPES: Final = 16
"""Page-locked buffers kept for each input and thread; batches have few different sizes."""


class BoundSession:
    """A session whose inputs and outputs are bound.

    Args:
        session: the session.
        outputs: names of the outputs to fetch.
        place: the device that it runs on.
    """

    def __init__(self, session: ort.InferenceSession, outputs: list[str], place: Placement) -> None:
        self._session = session
        self._outputs = outputs
        self._pinned_memory = _pinned_memory(place)
        # A buffer may be written only when the run before has ended: one set for each thread.
        self._local = threading.local()

    def run(self, feeds: dict[str, Array]) -> list[Any]:
        """Run the model; returns its outputs in the order given at construction, in host memory."""
        binding = self._session.io_binding()
        for name, array in feeds.items():
            if self._pinned_memory is None or array.dtype == np.object_ or array.size == 0:
                binding.bind_cpu_input(name, np.ascontiguousarray(array))
            else:
                binding.bind_ortvalue_input(name, self._pinned(name, array))
        for name in self._outputs:
            binding.bind_output(name, "cpu")
        self._session.run_with_iobinding(binding)
        return list(binding.copy_outputs_to_cpu())

    def _pinned(self, name: str, array: Array) -> Any:
        """Return a page-locked value that holds the array's contents."""
        buffers: OrderedDict[Any, Any] | None = getattr(self._local, "buffers", None)
        if buffers is None:
            buffers = self._local.buffers = OrderedDict()
        key = (name, array.dtype, array.shape)
        value = buffers.pop(key, None)
        if value is None:
            if len(buffers) >= _KEPT_SHAPES:
                buffers.popitem(last=False)
            value = ort.OrtValue.ortvalue_from_shape_and_type(
                list(array.shape), array.dtype.type, memory_info=self._pinned_memory
            )
        buffers[key] = value
        value.update_inplace(np.ascontiguousarray(array))
        return value


def _pinned_memory(place: Placement) -> Any:
    """Return ONNX Runtime's description of the device's host-accessible memory; None where it has none."""
    if not place.is_nvidia:
        return None
    try:
        devices = [device for device in ort.get_ep_devices() if device.device.type == ort.OrtHardwareDeviceType.GPU]
        return devices[place.index].memory_info(ort.OrtDeviceMemoryType.HOST_ACCESSIBLE)
    except Exception as error:  # older builds, or a provider that does not offer it: pageable memory works, too
        logger.info("no page-locked memory for %s: %s", place, error)
        return None
