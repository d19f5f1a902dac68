"""GPU memory of other processes, through the CUDA driver library.

Only the driver is needed, no toolkit: the functions are called by ctypes.
Source: CUDA driver API, cuIpcOpenMemHandle and cuMemcpy; handles are those that the runtime's
cudaIpcGetMemHandle gives.
"""

from __future__ import annotations

import ctypes
import weakref
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any, Final

import numpy as np

from servinggraph.accelerators.devices import cuda_device_count
from servinggraph.errors import StepFailed

__all__ = ["CudaDriver", "CudaMemory", "cuda_driver"]

HANDLE_BYTES: Final = 64
_LAZY_PEER_ACCESS: Final = 1


class _Handle(ctypes.Structure):
    """CUipcMemHandle, which is passed by value."""

    _fields_ = (("reserved", ctypes.c_byte * HANDLE_BYTES),)


class CudaDriver:
    """The functions of libcuda that shared memory needs.

    Args:
        library: the loaded library, initialised.
        devices: how many GPUs there are.
    """

    def __init__(self, library: Any, devices: int) -> None:
        self._library = library
        self.devices = devices
        self._contexts: dict[int, ctypes.c_void_p] = {}

    def open(self, raw_handle: bytes, device: int) -> CudaMemory:
        """Open memory of another process.

        Args:
            raw_handle: the handle's 64 bytes.
            device: number of the GPU that it is on.

        Raises:
            ValueError: no such GPU, or the driver does not take the handle.
        """
        if not 0 <= device < self.devices:
            raise ValueError(f"there is no GPU {device}, this machine has {self.devices}")
        if len(raw_handle) != HANDLE_BYTES:
            raise ValueError(f"a CUDA IPC handle has {HANDLE_BYTES} bytes, got {len(raw_handle)}")
        pointer, base, size = ctypes.c_uint64(0), ctypes.c_uint64(0), ctypes.c_size_t(0)
        with self._on(device):
            handle = _Handle.from_buffer_copy(raw_handle)
            code = self._library.cuIpcOpenMemHandle_v2(ctypes.byref(pointer), handle, ctypes.c_uint(_LAZY_PEER_ACCESS))
            if code:
                raise ValueError(f"failed to open CUDA IPC handle: {self._text(code)}")
            code = self._library.cuMemGetAddressRange_v2(ctypes.byref(base), ctypes.byref(size), pointer)
            if code:
                self._library.cuIpcCloseMemHandle(pointer)
                raise ValueError(f"failed to get the CUDA address range: {self._text(code)}")
        return CudaMemory(self, device, pointer.value, base.value + size.value - pointer.value)

    def close(self, device: int, pointer: int) -> None:
        """Close opened memory; a failure cannot be mended and is not told."""
        with suppress(StepFailed), self._on(device):
            self._library.cuIpcCloseMemHandle(ctypes.c_uint64(pointer))

    def to_host(self, device: int, pointer: int, byte_size: int) -> memoryview:
        """Return a copy of GPU memory in host memory.

        Raises:
            StepFailed: the driver refused.
        """
        data = bytearray(byte_size)
        if byte_size:
            buffer = (ctypes.c_char * byte_size).from_buffer(data)
            with self._on(device):
                self._check(self._library.cuMemcpyDtoH_v2(buffer, ctypes.c_uint64(pointer), ctypes.c_size_t(byte_size)))
        return memoryview(data).toreadonly()

    def to_device(self, device: int, pointer: int, data: memoryview | bytes) -> None:
        """Copy bytes to GPU memory; they are there when this returns.

        Raises:
            StepFailed: the driver refused.
        """
        if not len(data):
            return
        source = ctypes.c_char_p(data) if isinstance(data, bytes) else _address(data)
        with self._on(device):
            self._check(self._library.cuMemcpyHtoD_v2(ctypes.c_uint64(pointer), source, ctypes.c_size_t(len(data))))

    @contextmanager
    def _on(self, device: int) -> Any:
        """Make the GPU's primary context, which the CUDA runtime uses as well, the thread's for a while."""
        context = self._contexts.get(device)
        if context is None:
            context = ctypes.c_void_p()
            self._check(self._library.cuDevicePrimaryCtxRetain(ctypes.byref(context), ctypes.c_int(device)))
            self._contexts[device] = context
        self._check(self._library.cuCtxPushCurrent_v2(context))
        try:
            yield
        finally:
            self._library.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))

    def _check(self, code: int) -> None:
        if code:
            raise StepFailed(f"the CUDA driver failed: {self._text(code)}")

    def _text(self, code: int) -> str:
        text = ctypes.c_char_p()
        if self._library.cuGetErrorString(ctypes.c_int(code), ctypes.byref(text)) or text.value is None:
            return f"error {code}"
        return text.value.decode(errors="replace")


class CudaMemory:
    """GPU memory of another process, closed when nobody refers to it any more.

    Attributes:
        byte_size: bytes from where the handle points to the end of the allocation.
    """

    def __init__(self, driver: CudaDriver, device: int, pointer: int, byte_size: int) -> None:
        self._driver, self._device, self._pointer = driver, device, pointer
        self.byte_size = byte_size
        weakref.finalize(self, driver.close, device, pointer).atexit = False

    def read(self, offset: int, byte_size: int) -> memoryview:
        """Return a copy in host memory."""
        return self._driver.to_host(self._device, self._pointer + offset, byte_size)

    def write(self, offset: int, data: memoryview | bytes) -> None:
        """Copy bytes there."""
        self._driver.to_device(self._device, self._pointer + offset, data)


@cache
def cuda_driver() -> CudaDriver | None:
    """Return the CUDA driver of this machine; None without one, or without a GPU."""
    count = cuda_device_count()
    return CudaDriver(ctypes.CDLL("libcuda.so.1"), count) if count else None


def _address(data: memoryview) -> ctypes.c_void_p:
    return ctypes.c_void_p(np.frombuffer(data, np.uint8).ctypes.data)
