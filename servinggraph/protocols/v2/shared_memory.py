"""References to shared memory in inference requests: which region, from where, how many bytes.

Source: Triton, extension_shared_memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Protocol

from servinggraph.errors import InvalidRequest
from servinggraph.messages import Destination
from servinggraph.protocols.v2.binary_data import decode_bytes
from servinggraph.protocols.v2.json_data import shown
from servinggraph.tensors import Array

__all__ = ["REGION", "Regions", "check_fits", "input_in_region", "output_in_region"]

REGION: Final = "shared_memory_region"
"""The parameter that puts a tensor into shared memory."""
_SIZE: Final = "shared_memory_byte_size"
_OFFSET: Final = "shared_memory_offset"


class Regions(Protocol):
    """Where regions are found; `lifecycle.SharedMemory` is one."""

    def read(self, name: str, offset: int, byte_size: int) -> memoryview:
        """Return the bytes of a part of a region, read-only."""
        ...

    def destination(self, name: str, offset: int, byte_size: int) -> Destination:
        """Return a part of a region to write an output into."""
        ...


def input_in_region(
    name: str, model: str, datatype: str, shape: tuple[int, ...], parameters: Mapping[str, Any], regions: Regions
) -> Array:
    """Return an input that lies in shared memory, as a read-only view of it.

    BOOL and BYTES are copied out: their bytes are checked, and the client could change them
    after the check.

    Raises:
        InvalidRequest: size or offset is missing, no number, out of range, or does not fit the shape.
        RegionNotFound: no such region.
    """
    data = regions.read(*_reference("input", name, parameters))
    if datatype == "BOOL":
        data = memoryview(bytes(data))
    return decode_bytes(name, model, datatype, shape, data)


def output_in_region(name: str, parameters: Mapping[str, Any], regions: Regions) -> Destination:
    """Return where an output goes that is asked for in shared memory.

    Raises:
        InvalidRequest: size or offset is missing, no number or out of range.
        RegionNotFound: no such region.
    """
    return regions.destination(*_reference("output", name, parameters))


def check_fits(name: str, data: memoryview | bytes, memory: Destination) -> None:
    """Check that an output's data fit where they are asked for.

    Raises:
        InvalidRequest: they do not; Triton's text, which has it as a fault of the server's.
    """
    if len(data) > memory.byte_size:
        raise InvalidRequest(
            f"shared memory size specified with the request for output '{name}' ({memory.byte_size} bytes) "
            f"should be at least {len(data)} bytes to hold the results"
        )


def _reference(what: str, name: str, parameters: Mapping[str, Any]) -> tuple[str, int, int]:
    region = parameters[REGION]
    if type(region) is not str or not region:
        raise InvalidRequest(f"'{REGION}' of {what} '{name}' is the name of a region, got {shown(region)}")
    return region, _number(what, name, _OFFSET, parameters.get(_OFFSET, 0)), _number(what, name, _SIZE, parameters.get(_SIZE))


def _number(what: str, name: str, key: str, value: Any) -> int:
    if type(value) is not int or value < 0:
        raise InvalidRequest(f"'{key}' of {what} '{name}' is a whole number from 0 on, got {shown(value)}")
    return value
