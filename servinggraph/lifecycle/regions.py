"""One region of shared memory: opened, read and written.

A region is mapped once and unmapped when nobody refers to its memory any more: the
registration, a tensor that is a view of it, or an output that goes there.
"""

from __future__ import annotations

import mmap
import os
import re
import stat
from typing import Any, ClassVar, Final, Literal

from servinggraph.accelerators import CudaDriver, CudaMemory
from servinggraph.errors import InvalidRequest, Unsupported

__all__ = ["CudaRegion", "Region", "SystemRegion"]

_KEY: Final = re.compile(r"/?[^/\0]{1,254}")
_RESERVED: Final = "triton_python_backend_shm_region_"


class SystemRegion:
    """A part of a POSIX shared memory object that a client has made.

    It is attached to and never created, resized or unlinked: it stays the client's.

    Args:
        name: name under which it is registered.
        key: the object's name, with or without the slash in front.
        offset: where in the object the region begins, bytes.
        byte_size: its length.

    Attributes:
        memory: what keeps the region mapped.

    Raises:
        InvalidRequest: the key is no name of an object, there is none, or the region goes beyond its end.
    """

    kind: ClassVar[Literal["system"]] = "system"

    def __init__(self, name: str, key: str, offset: int, byte_size: int) -> None:
        self.name, self.key, self.offset, self.byte_size = name, key, offset, byte_size
        _check_key(name, key)
        _check_number(name, "offset", offset, 0)
        _check_number(name, "byte_size", byte_size, 1)
        try:
            from _posixshmem import shm_open  # not multiprocessing's class: that one would unlink the client's object
        except ImportError:
            raise Unsupported("system shared memory is not supported on this system") from None
        try:
            descriptor = shm_open("/" + key.removeprefix("/"), os.O_RDWR, 0o600)
        except (OSError, ValueError) as error:
            raise InvalidRequest(f"Unable to open shared memory region: '{key}' ({_reason(error)})") from None
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode) or offset + byte_size > status.st_size:
                raise self._beyond(f"the shared memory object has {status.st_size} bytes")
            # A mapping begins at a page.
            self._start = offset % mmap.ALLOCATIONGRANULARITY
            self.memory = mmap.mmap(descriptor, self._start + byte_size, offset=offset - self._start)
        except (OSError, ValueError, OverflowError) as error:
            raise InvalidRequest(f"failed to register shared memory region '{name}': {_reason(error)}") from None
        finally:
            os.close(descriptor)

    def describe(self) -> dict[str, Any]:
        """Return what the status of the region says."""
        return {"name": self.name, "key": self.key, "offset": self.offset, "byte_size": self.byte_size}

    def read(self, offset: int, byte_size: int) -> memoryview:
        """Return a read-only view; the caller has held offset and size against the region."""
        self._check_object()
        start = self._start + offset
        return memoryview(self.memory)[start : start + byte_size].toreadonly()

    def write(self, offset: int, data: memoryview | bytes) -> None:
        """Write bytes; the caller has held offset and size against the region."""
        self._check_object()
        start = self._start + offset
        memoryview(self.memory)[start : start + len(data)] = data

    def _check_object(self) -> None:
        """Refuse to touch what the client has cut off meanwhile: the kernel would end the process for it."""
        if self.memory.size() < self.offset + self.byte_size:
            raise self._beyond(f"the shared memory object has only {self.memory.size()} bytes by now")

    def _beyond(self, found: str) -> InvalidRequest:
        return InvalidRequest(
            f"Invalid offset + byte size for shared memory region: '{self.name}' "
            f"(offset {self.offset}, byte size {self.byte_size}; {found})"
        )


class CudaRegion:
    """GPU memory that a client has shared by a CUDA IPC handle.

    Tensors are copied to and from host memory, so a client may change an input once it has
    been decoded.

    Args:
        name: name under which it is registered.
        raw_handle: the 64 bytes of the handle.
        device_id: number of the GPU.
        byte_size: length of the region.
        driver: the CUDA driver.

    Raises:
        InvalidRequest: there is no such GPU, the handle is none, or the memory behind it is smaller.
    """

    kind: ClassVar[Literal["cuda"]] = "cuda"

    def __init__(self, name: str, raw_handle: bytes, device_id: int, byte_size: int, driver: CudaDriver) -> None:
        self.name, self.device_id, self.byte_size = name, device_id, byte_size
        _check_number(name, "byte_size", byte_size, 1)
        try:
            self.memory: CudaMemory = driver.open(raw_handle, device_id)
        except ValueError as error:
            raise InvalidRequest(f"failed to register CUDA shared memory region '{name}': {error}") from None
        if byte_size > self.memory.byte_size:
            raise InvalidRequest(
                f"Invalid offset + byte size for shared memory region: '{name}' (byte size {byte_size}; "
                f"the memory behind the handle has {self.memory.byte_size} bytes)"
            )

    def describe(self) -> dict[str, Any]:
        """Return what the status of the region says."""
        return {"name": self.name, "device_id": self.device_id, "byte_size": self.byte_size}

    def read(self, offset: int, byte_size: int) -> memoryview:
        """Return a copy in host memory."""
        return self.memory.read(offset, byte_size)

    def write(self, offset: int, data: memoryview | bytes) -> None:
        """Copy bytes into the region; they are there when this returns."""
        self.memory.write(offset, data)


Region = SystemRegion | CudaRegion


def _check_key(name: str, key: str) -> None:
    if key.lstrip("/").startswith(_RESERVED):
        raise InvalidRequest(
            f"cannot register shared memory region '{name}' with key '{key}' as the key contains "
            f"the reserved prefix '{_RESERVED}'"
        )
    if not _KEY.fullmatch(key) or key.removeprefix("/") in (".", ".."):
        raise InvalidRequest(
            f"Unable to open shared memory region: '{key[:300]}' (a key is a name of up to 254 characters, "
            "with at most one '/', in front)"
        )


def _check_number(name: str, what: str, number: int, least: int) -> None:
    if not least <= number < 2**63:
        raise InvalidRequest(
            f"Invalid offset + byte size for shared memory region: '{name}' ('{what}' is {number}, "
            f"expected a whole number from {least} to 2^63 - 1)"
        )


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
