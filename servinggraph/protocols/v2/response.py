"""Encodes an inference response: JSON, or JSON followed by binary tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

import numpy as np
import orjson

from servinggraph.context import ParameterValue
from servinggraph.errors import InvalidRequest, StepFailed
from servinggraph.messages import Destination, InferenceRequest, InferenceResponse
from servinggraph.protocols.v2.binary_data import encode_bytes
from servinggraph.protocols.v2.json_data import encodable, encode_data
from servinggraph.protocols.v2.shared_memory import check_fits
from servinggraph.tensors import Array, datatype_of

__all__ = ["EncodedResponse", "dump_json", "encode_response", "known_datatype", "plain_parameters"]

_OPTIONS: Final = orjson.OPT_SERIALIZE_NUMPY


class EncodedResponse(NamedTuple):
    """An encoded response."""

    body: bytes
    """The whole body."""
    header_length: int | None
    """Bytes of JSON before the binary tensors; None when the body is nothing but JSON."""


def encode_response(response: InferenceResponse, request: InferenceRequest) -> EncodedResponse:
    """Encode the answer to a request, each output as the request asked for it.

    Outputs that the request asked for in shared memory are written there, once everything
    else is known to be right; the answer then has their datatype and shape alone.

    Raises:
        InvalidRequest: the request asked for an output that is not there, or gave it too little shared memory.
        StepFailed: an output has a dtype without a V2 datatype, or text that JSON cannot carry.
    """
    outputs = response.outputs
    entries: list[dict[str, Any]] = []
    parts: list[memoryview | bytes] = []
    writes: list[tuple[Destination, memoryview | bytes]] = []
    if request.outputs:
        for wanted in request.outputs:
            if wanted.name not in outputs:
                raise InvalidRequest(
                    f"unexpected inference output '{wanted.name}' for model '{response.model}', it gave {', '.join(outputs)}"
                )
            if wanted.memory is not None:
                entries.append(_in_memory(wanted.name, outputs[wanted.name], wanted.memory, writes))
                continue
            array = outputs[wanted.name]
            if wanted.classify is not None:
                array = wanted.classify(array, response.batched)
            binary = request.binary if wanted.binary is None else wanted.binary
            entries.append(_entry(wanted.name, array, binary, parts))
    else:
        for name, array in outputs.items():
            entries.append(_entry(name, array, request.binary, parts))
    document: dict[str, Any] = {"model_name": response.model, "model_version": response.version}
    if response.id:
        document["id"] = response.id
    if response.parameters:
        document["parameters"] = plain_parameters(response.parameters)
    document["outputs"] = entries
    text = dump_json(document)
    for memory, data in writes:
        memory.write(data)
    if any(len(part) for part in parts):
        return EncodedResponse(b"".join([text, *parts]), len(text))
    return EncodedResponse(text, None)


def plain_parameters(parameters: Mapping[str, Any]) -> dict[str, ParameterValue]:
    """Return response parameters as JSON has them: numpy scalars as numbers.

    Raises:
        StepFailed: a value is none that a V2 parameter can have.
    """
    plain: dict[str, ParameterValue] = {}
    for name, value in parameters.items():
        item = value.item() if isinstance(value, np.generic) else value
        if type(name) is not str or not isinstance(item, str | int | float):
            raise StepFailed(
                f"set response parameter {name!r} to a {type(value).__name__}; names are text, values text, numbers or booleans"
            )
        if isinstance(item, int) and not -(2**63) <= item < 2**64:
            raise StepFailed(f"set response parameter '{name}' to a number beyond 64 bits")
        if not encodable(name) or (isinstance(item, str) and not encodable(item)):
            raise StepFailed(f"response parameter {name!r} holds half of a surrogate pair, which UTF-8 cannot carry")
        plain[name] = item
    return plain


def known_datatype(name: str, array: Array) -> str:
    """Return an output's datatype.

    Raises:
        StepFailed: V2 has none for its dtype.
    """
    datatype = datatype_of(array)
    if datatype is None:
        raise StepFailed(f"output '{name}' has dtype {array.dtype}, which no V2 datatype stands for; convert it in the graph")
    return datatype


def _in_memory(
    name: str, array: Array, memory: Destination, writes: list[tuple[Destination, memoryview | bytes]]
) -> dict[str, Any]:
    datatype = known_datatype(name, array)
    data = encode_bytes(name, datatype, array)
    check_fits(name, data, memory)
    writes.append((memory, data))
    return {"name": name, "datatype": datatype, "shape": array.shape}


def _entry(name: str, array: Array, binary: bool, parts: list[memoryview | bytes]) -> dict[str, Any]:
    datatype = known_datatype(name, array)
    if not binary:
        return {"name": name, "datatype": datatype, "shape": array.shape, "data": encode_data(name, datatype, array)}
    data = encode_bytes(name, datatype, array)
    parts.append(data)
    return {"name": name, "datatype": datatype, "shape": array.shape, "parameters": {"binary_data_size": len(data)}}


def dump_json(document: dict[str, Any]) -> bytes:
    """Write JSON; not-a-number and infinities as the bare tokens that V2 clients read."""
    text = orjson.dumps(document, option=_OPTIONS)
    # orjson writes null for them. Nothing else in a response is null, so a hit is one of them,
    # or text that holds the word, for which the slow way is right as well.
    if b"null" not in text:
        return text
    return json.dumps(document, default=_plain, ensure_ascii=False, separators=(",", ":")).encode()


def _plain(value: Any) -> Any:
    return value.tolist()
