"""Finds the files that hold the tensors of an ONNX model which are too large for the model's own file."""

from __future__ import annotations

import mmap
import re
from pathlib import Path
from typing import Final

__all__ = ["external_data"]

_LOCATION: Final = re.compile(rb"\n\x08location\x12(.)", re.DOTALL)
"""A StringStringEntryProto with key "location", up to its value's length."""


def external_data(model: Path) -> list[Path]:
    """Return the files that a model's external tensors are in, in order of their names.

    The model is searched for the entries and not parsed: a model's file may have gigabytes.

    Source: onnx.proto, TensorProto.external_data; docs/ExternalData.md of ONNX.
    """
    if model.stat().st_size == 0:
        return []
    names: set[str] = set()
    with model.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        for found in _LOCATION.finditer(content):
            length = found[1][0]  # a name of 128 bytes or more has a longer length; no tool writes one
            names.add(bytes(content[found.end() : found.end() + length]).decode("utf-8", "replace"))
    return [model.parent / name for name in sorted(names) if (model.parent / name).is_file()]
