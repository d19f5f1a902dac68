"""A second reading of the rules of inference over gRPC: which requests are valid, and what an echo of them is.

Shares no code with the package; plain and slow. Source: Open Inference Protocol (gRPC), Triton's rules of
raw and typed contents.
"""

from __future__ import annotations

import struct
from typing import Any

import tritonclient.grpc.service_pb2 as triton
from google.protobuf.message import DecodeError

WIDTHS = {
    "BOOL": 1, "UINT8": 1, "UINT16": 2, "UINT32": 4, "UINT64": 8, "INT8": 1, "INT16": 2, "INT32": 4, "INT64": 8,
    "FP16": 2, "FP32": 4, "FP64": 8, "BF16": 2, "BYTES": 0,
}  # fmt: skip
TYPED = {
    "BOOL": ("bool_contents", "?"), "UINT8": ("uint_contents", "B"), "UINT16": ("uint_contents", "H"),
    "UINT32": ("uint_contents", "I"), "UINT64": ("uint64_contents", "Q"), "INT8": ("int_contents", "b"),
    "INT16": ("int_contents", "h"), "INT32": ("int_contents", "i"), "INT64": ("int64_contents", "q"),
    "FP32": ("fp32_contents", "f"), "FP64": ("fp64_contents", "d"), "BYTES": ("bytes_contents", ""),
}  # fmt: skip

Declared = dict[str, tuple[str, list[int], bool]]
Echo = dict[str, tuple[str, list[int], bytes]]


class Invalid(Exception):
    """The request has to be refused."""


class Unclear(Exception):
    """Valid or not: the outcome hangs on time, or on what is not fuzzed here."""


def expected(graphs: dict[str, Declared], data: bytes, limit: int) -> tuple[Any, Echo]:
    """Return the request's message and the outputs of its answer.

    Raises:
        Invalid: it has to be refused.
        Unclear: it may be.
    """
    check(len(data) <= limit)
    try:
        message = triton.ModelInferRequest.FromString(data)
    except DecodeError:
        raise Invalid from None
    check(message.model_name in graphs)
    version = message.model_version
    check(version == "" or (version.isascii() and version.lstrip("+0") == "1" and version[1:].isdigit() | (len(version) == 1)))
    declared = graphs[message.model_name]
    echo: Echo = {}
    raw = list(message.raw_input_contents)
    for entry in message.inputs:
        check(entry.name in declared)
        check(entry.name not in echo)
        datatype, sizes, _ = declared[entry.name]
        check(entry.datatype == datatype)
        check(len(entry.shape) == len(sizes))
        check(all(size >= 0 and want in (-1, size) for size, want in zip(entry.shape, sizes, strict=True)))
        for key, value in entry.parameters.items():
            check(not key.startswith("triton_"))
            check(value.WhichOneof("parameter_choice") is not None)
            check(key != "shared_memory_region")
        count = 1
        for size in entry.shape:
            count *= size
        filled = {field.name for field, _ in entry.contents.ListFields()}
        if message.raw_input_contents:
            check(not filled)
            check(len(raw) > 0)
            echo[entry.name] = datatype, list(entry.shape), raw_bytes(datatype, count, raw.pop(0))
        else:
            check(entry.HasField("contents"))
            echo[entry.name] = datatype, list(entry.shape), typed_bytes(datatype, count, entry.contents, filled)
    check(not raw)
    check(all(optional or name in echo for name, (_, _, optional) in declared.items()))
    check_parameters(message)
    return message, outputs(message, echo)


def check(holds: bool) -> None:
    if not holds:
        raise Invalid


def raw_bytes(datatype: str, count: int, data: bytes) -> bytes:
    if datatype != "BYTES":
        check(len(data) == count * WIDTHS[datatype])
        check(datatype != "BOOL" or set(data) <= {0, 1})
        return data
    at = elements = 0
    while at < len(data):
        check(len(data) - at >= 4)
        at += 4 + int.from_bytes(data[at : at + 4], "little")
        check(at <= len(data))
        elements += 1
    check(elements == count)
    return data


def typed_bytes(datatype: str, count: int, contents: Any, filled: set[str]) -> bytes:
    check(datatype in TYPED)
    field, code = TYPED[datatype]
    check(filled <= {field})
    elements = list(getattr(contents, field))
    check(len(elements) == count)
    if datatype == "BYTES":
        return b"".join(len(item).to_bytes(4, "little") + item for item in elements)
    try:
        return struct.pack(f"<{count}{code}", *elements)
    except struct.error:
        raise Invalid from None


def check_parameters(message: Any) -> None:
    late = False
    for key, value in message.parameters.items():
        choice = value.WhichOneof("parameter_choice")
        check(choice is not None)
        check(choice != "uint64_param" or key == "priority")
        if key.startswith("triton_"):
            check(key == "triton_enable_empty_final_response" and choice == "bool_param")
        if key in ("timeout", "priority"):
            check(choice in ("int64_param", "uint64_param") and getattr(value, choice) >= 0)
        late |= key == "timeout" and 0 < value.int64_param < 1_000_000
    if late:
        raise Unclear


def outputs(message: Any, echo: Echo) -> Echo:
    if not message.outputs:
        return echo
    wanted: Echo = {}
    for entry in message.outputs:
        for key, value in entry.parameters.items():
            check(not key.startswith("triton_"))
            check(value.WhichOneof("parameter_choice") is not None)
            check(key != "shared_memory_region")
            if key == "classification":
                raise Unclear
        check(entry.name in echo)
        wanted[entry.name] = echo[entry.name]
    return wanted


def difference(message: Any, want: Echo, answer: bytes) -> str | None:
    """Say what is wrong with an answer, None if nothing is."""
    got = triton.ModelInferResponse.FromString(answer)
    if (got.model_name, got.model_version, got.id) != (message.model_name, "1", message.id):
        return f"is of {got.model_name!r} {got.model_version!r} id {got.id!r}"
    if len(got.raw_output_contents) != len(got.outputs):
        return f"has {len(got.outputs)} outputs and {len(got.raw_output_contents)} raw contents"
    echo = {
        entry.name: (entry.datatype, list(entry.shape), data)
        for entry, data in zip(got.outputs, got.raw_output_contents, strict=True)
    }
    if list(echo) != list(want):
        return f"has outputs {list(echo)}, expected {list(want)}"
    for name in want:
        if echo[name] != want[name]:
            return f"output {name!r} is {str(echo[name])[:200]}, expected {str(want[name])[:200]}"
    return None
