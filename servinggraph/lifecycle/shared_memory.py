"""Shared memory regions that clients have registered, for all front ends.

Source: Triton, extension_shared_memory.
"""

from __future__ import annotations

import weakref
from typing import Any, Final, Literal

from servinggraph.accelerators import CudaDriver, cuda_driver
from servinggraph.errors import InvalidRequest, LimitExceeded, RegionNotFound, Unsupported
from servinggraph.lifecycle.regions import CudaRegion, Region, SystemRegion

__all__ = ["Kind", "SharedMemory"]

Kind = Literal["system", "cuda"]

_TITLE: Final = {"system": "system", "cuda": "CUDA"}


class SharedMemory:
    """Registered regions by name; system and CUDA regions share the names.

    Args:
        allowed: whether clients may register regions.
        limit: most regions, those included that were unregistered but are in use.
        driver: the CUDA driver; by default this machine's, None if it has none.
    """

    def __init__(self, *, allowed: bool, limit: int, driver: CudaDriver | None = None) -> None:
        self._allowed = allowed
        self._limit = limit
        self._driver = driver if driver is not None or not allowed else cuda_driver()
        self._regions: dict[str, Region] = {}
        self._leaving: list[tuple[Kind, dict[str, Any], weakref.ref[Any]]] = []

    @property
    def extensions(self) -> tuple[str, ...]:
        """Names of the protocol extensions that can be used."""
        if not self._allowed:
            return ()
        return ("system_shared_memory",) if self._driver is None else ("system_shared_memory", "cuda_shared_memory")

    def register_system(self, name: str, key: str, offset: int, byte_size: int) -> None:
        """Register a part of a POSIX shared memory object.

        Raises:
            Unsupported: clients may not.
            InvalidRequest: the name is taken, or what `SystemRegion` raises.
            LimitExceeded: there are as many regions as there may be.
        """
        self._check_new(name)
        self._regions[name] = SystemRegion(name, key, offset, byte_size)

    def register_cuda(self, name: str, raw_handle: bytes, device_id: int, byte_size: int) -> None:
        """Register GPU memory by its CUDA IPC handle.

        Raises:
            Unsupported: clients may not, or there is no GPU.
            InvalidRequest: the name is taken, or what `CudaRegion` raises.
            LimitExceeded: there are as many regions as there may be.
        """
        self._check_new(name)
        if self._driver is None:
            raise Unsupported(f"failed to register CUDA shared memory region: '{name}', GPUs not supported: there is none here")
        self._regions[name] = CudaRegion(name, raw_handle, device_id, byte_size, self._driver)

    def status(self, kind: Kind, name: str = "") -> list[dict[str, Any]]:
        """Describe one region, or all of a kind; those too that were unregistered and are still in use.

        Raises:
            RegionNotFound: there is no region of this name, or it is of the other kind.
        """
        found = [(region.kind, region.describe()) for region in self._regions.values()]
        found += [(of_kind, description) for of_kind, description, _ in self._in_use()]
        if not name:
            return [description for of_kind, description in found if of_kind == kind]
        named = [(of_kind, description) for of_kind, description in found if description["name"] == name]
        if not named:
            raise RegionNotFound(f"Unable to find {kind} shared memory region: '{name}'")
        for of_kind, description in named:
            if of_kind == kind:
                return [description]
        raise RegionNotFound(
            f"The region named '{name}' is registered as {_TITLE[named[0][0]]} shared memory, not {_TITLE[kind]} shared memory"
        )

    def unregister(self, kind: Kind, name: str = "") -> None:
        """Unregister one region, or all of a kind; one that is not there is no error.

        No later request can use it, and its name is free. Its memory is let go when the last
        request that uses it has ended.

        Raises:
            Unsupported: clients may not.
        """
        self.check_allowed()
        leaving = [region.name for region in self._regions.values() if region.kind == kind and name in ("", region.name)]
        for known in leaving:
            self._leave(self._regions.pop(known))
        self._in_use()  # most are let go at once

    def read(self, name: str, offset: int, byte_size: int) -> memoryview:
        """Return the bytes of a part of a region, read-only.

        System memory is not copied: the client can still change it. It stays mapped as long as
        the view, or an array over it, lives.

        Raises:
            RegionNotFound: no such region.
            InvalidRequest: the part goes beyond the region.
        """
        return self._region(name, offset, byte_size).read(offset, byte_size)

    def destination(self, name: str, offset: int, byte_size: int) -> RegionPart:
        """Return a part of a region to write an output into; raises as `read`."""
        return RegionPart(self._region(name, offset, byte_size), offset, byte_size)

    def _region(self, name: str, offset: int, byte_size: int) -> Region:
        region = self._regions.get(name)
        if region is None:
            hint = "" if self._allowed else "; client shared memory is disabled"
            raise RegionNotFound(f"Unable to find shared memory region: '{name}'{hint}")
        if offset > region.byte_size or (offset == region.byte_size and byte_size):
            raise InvalidRequest(
                f"Invalid offset for shared memory region: '{name}' (offset {offset}; the region has {region.byte_size} bytes)"
            )
        if offset + byte_size > region.byte_size:
            raise InvalidRequest(
                f"Invalid offset + byte size for shared memory region: '{name}' "
                f"(offset {offset}, byte size {byte_size}; the region has {region.byte_size} bytes)"
            )
        return region

    def check_allowed(self) -> None:
        """Raise `Unsupported` where clients may not register or unregister regions."""
        if not self._allowed:
            raise Unsupported("Client shared memory is disabled")

    def _check_new(self, name: str) -> None:
        self.check_allowed()
        if not name:
            raise InvalidRequest("a shared memory region needs a name")
        if name in self._regions:
            raise InvalidRequest(f"shared memory region '{name}' already in manager")
        if len(self._regions) + len(self._in_use()) >= self._limit:
            raise LimitExceeded(f"there are {self._limit} shared memory regions (limit 'max_shm_regions' = {self._limit})")

    def _leave(self, region: Region) -> None:
        self._leaving.append((region.kind, region.describe(), weakref.ref(region.memory)))

    def _in_use(self) -> list[tuple[Kind, dict[str, Any], weakref.ref[Any]]]:
        """Forget unregistered regions whose memory was let go, and return the others."""
        self._leaving = [entry for entry in self._leaving if entry[2]() is not None]
        return self._leaving


class RegionPart:
    """Where an output goes; holds the region mapped until it is dropped."""

    __slots__ = ("_region", "byte_size", "offset", "region")

    def __init__(self, region: Region, offset: int, byte_size: int) -> None:
        self._region = region
        self.region = region.name
        self.offset = offset
        self.byte_size = byte_size

    def write(self, data: memoryview | bytes) -> None:
        """Write at its beginning; `data` has at most `byte_size` bytes."""
        self._region.write(self.offset, data)
