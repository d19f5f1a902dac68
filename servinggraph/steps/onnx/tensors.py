"""Where V2 and ONNX Runtime see tensors differently: types, text, maps of scikit-learn exports."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Final

import numpy as np

from servinggraph.tensors import Array, TensorSpec

__all__ = ["decode_text", "output_converter", "tensor_spec"]

_DATATYPE: Final = {
    "bool": "BOOL", "uint8": "UINT8", "uint16": "UINT16", "uint32": "UINT32", "uint64": "UINT64",
    "int8": "INT8", "int16": "INT16", "int32": "INT32", "int64": "INT64",
    "float16": "FP16", "float": "FP32", "double": "FP64", "string": "BYTES",
}  # fmt: skip
_TENSOR: Final = re.compile(r"tensor\((\w+)\)")
_MAP: Final = re.compile(r"(?P<rows>seq\()?map\((?:int64|string),\s*tensor\((?P<value>\w+)\)\)\)?")


def tensor_spec(kind: str, shape: list[Any]) -> TensorSpec | None:
    """Return what an ONNX Runtime type and shape mean in V2; None for what V2 cannot carry.

    Symbolic and unknown axes become -1. A map of class to probability, as scikit-learn
    exports give, becomes a matrix with one column for each class.
    """
    tensor = _TENSOR.fullmatch(kind)
    if tensor and tensor[1] in _DATATYPE:
        return TensorSpec(_DATATYPE[tensor[1]], tuple(size if isinstance(size, int) else -1 for size in shape))
    mapped = _MAP.fullmatch(kind)
    if mapped and mapped["value"] in _DATATYPE:
        return TensorSpec(_DATATYPE[mapped["value"]], (-1, -1))
    return None


def output_converter(kind: str) -> Callable[[Any], Array] | None:
    """Return what turns one of ONNX Runtime's outputs into a V2 array; None where it is one already."""
    mapped = _MAP.fullmatch(kind)
    if mapped is None:
        return None
    dtype = {"float": np.float32, "double": np.float64, "int64": np.int64}.get(mapped["value"], np.float32)

    def matrix(rows: Any) -> Array:
        rows = rows if isinstance(rows, list) else [rows]
        # Sorted keys: the order of scikit-learn's classes_, hence of predict_proba's columns.
        columns = sorted(rows[0]) if rows else []
        return np.array([[row[column] for column in columns] for row in rows], dtype=dtype).reshape(len(rows), -1)

    return matrix


def decode_text(array: Array) -> Array:
    """Return a BYTES tensor as ONNX Runtime wants text: objects of `str`.

    Raises:
        UnicodeDecodeError: an element is not UTF-8.
    """
    flat = [item.decode("utf-8") if isinstance(item, bytes) else str(item) for item in array.ravel().tolist()]
    result = np.empty(len(flat), dtype=np.object_)
    result[:] = flat
    return result.reshape(array.shape)
