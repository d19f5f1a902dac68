"""Typed tensor contents as arrays: the right field, the right count, every element within its datatype."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from servinggraph.errors import InvalidRequest
from servinggraph.protocols.protobuf.generated import grpc_service_pb2 as pb
from servinggraph.protocols.protobuf.wire import varint
from servinggraph.tensors import DATATYPES, Array, element_count

__all__ = ["decode_contents"]

_FIELD: Final = {
    "BOOL": "bool_contents",
    "INT8": "int_contents", "INT16": "int_contents", "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents", "UINT16": "uint_contents", "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}  # fmt: skip
_WIDEST: Final = {
    "bool_contents": "BOOL", "int_contents": "INT32", "int64_contents": "INT64", "uint_contents": "UINT32",
    "uint64_contents": "UINT64", "fp32_contents": "FP32", "fp64_contents": "FP64", "bytes_contents": "BYTES",
}  # fmt: skip
_PACKED: Final = {"BOOL": 1, "FP32": 6, "FP64": 7}
"""Datatypes whose elements lie in the message just as in an array, and their field's number."""
_NARROW: Final = frozenset({"INT8", "INT16", "UINT8", "UINT16"})


def decode_contents(name: str, model: str, datatype: str, shape: Sequence[int], contents: pb.InferTensorContents) -> Array:
    """Turn an input's typed contents into an array.

    Args:
        name: the input, for error texts.
        model: the graph, for error texts.
        datatype: V2 datatype.
        shape: its shape, sizes 0 and more.
        contents: its elements, flat and row-major.

    Returns:
        A read-only array; for BYTES one of `bytes` objects.

    Raises:
        InvalidRequest: elements in the field of another datatype, a datatype that only raw contents
            carry, another number of elements than the shape says, a value out of range.
    """
    field = _FIELD.get(datatype)
    if field is None:
        raise InvalidRequest(f"input '{name}' is {datatype}, which has no typed contents; send it in 'raw_input_contents'")
    for descriptor, _ in contents.ListFields():
        if descriptor.name != field:
            raise InvalidRequest(
                f"unexpected explicit tensor data for input tensor '{name}' for model '{model}' "
                f"of type '{_WIDEST[descriptor.name]}', expected datatype '{datatype}'"
            )
    elements = getattr(contents, field)
    count = element_count(shape)
    if len(elements) != count:
        raise _miscount(name, model, datatype, count, len(elements))
    if datatype == "BYTES":
        array: Array = np.empty(count, np.object_)
        array[:] = list(elements)
    else:
        array = _numbers(name, datatype, contents, elements, count)
        array.flags.writeable = False
    try:
        return array.reshape(shape)
    except (ValueError, OverflowError) as error:
        raise InvalidRequest(f"input '{name}' has an impossible shape {list(shape)[:8]}: {error}") from None


def _numbers(name: str, datatype: str, contents: pb.InferTensorContents, elements: Sequence[Any], count: int) -> Array:
    dtype = DATATYPES[datatype]
    number = _PACKED.get(datatype)
    if number is not None and count:
        # Written again, the elements lie there as an array wants them, which is far quicker than one by one.
        data = contents.SerializeToString()
        head = bytes((number << 3 | 2,)) + varint(count * dtype.itemsize)
        if data.startswith(head):
            return np.frombuffer(data, dtype, count, len(head))
    if datatype not in _NARROW:
        return np.fromiter(elements, dtype, count)
    wide = np.fromiter(elements, np.int64, count)
    array = wide.astype(dtype)
    if (array != wide).any():
        index = int((array != wide).argmax())
        raise InvalidRequest(f"input '{name}' element {index} is {wide[index]}, out of range for {datatype}")
    return array


def _miscount(name: str, model: str, datatype: str, count: int, got: int) -> InvalidRequest:
    if datatype == "BYTES":
        return InvalidRequest(f"expected {count} string elements for inference input '{name}' for model '{model}', got {got}")
    size = DATATYPES[datatype].itemsize
    return InvalidRequest(
        f"input byte size mismatch for input '{name}' for model '{model}'. Expected {count * size}, got {got * size} "
        f"({got} elements of {datatype})"
    )
