"""The client's side of the codec: requests into bytes, responses out of them, always binary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import orjson

from servinggraph.context import ParameterValue
from servinggraph.errors import InvalidRequest
from servinggraph.messages import InferenceResponse
from servinggraph.protocols.v2.binary_data import decode_bytes, encode_bytes
from servinggraph.protocols.v2.json_data import decode_data, parse_json
from servinggraph.tensors import Array, datatype_of

__all__ = ["decode_response", "encode_request"]


def encode_request(
    inputs: Mapping[str, Array],
    id: str = "",
    parameters: Mapping[str, ParameterValue] | None = None,
    outputs: Sequence[str] = (),
) -> tuple[bytes, int]:
    """Encode an inference request with binary tensors that asks for binary answers.

    Returns:
        The body, and the length of its JSON, for the header Inference-Header-Content-Length.

    Raises:
        InvalidRequest: an array has a dtype that no V2 datatype stands for.
    """
    entries = []
    parts: list[memoryview | bytes] = []
    for name, array in inputs.items():
        datatype = datatype_of(array)
        if datatype is None:
            raise InvalidRequest(f"input '{name}' has dtype {array.dtype}, which no V2 datatype stands for")
        data = encode_bytes(name, datatype, array)
        parts.append(data)
        size = {"binary_data_size": len(data)}
        entries.append({"name": name, "datatype": datatype, "shape": array.shape, "parameters": size})
    document: dict[str, Any] = {
        "parameters": {**(parameters or {}), "binary_data_output": True},
        "inputs": entries,
    }
    if id:
        document["id"] = id
    if outputs:
        document["outputs"] = [{"name": name, "parameters": {"binary_data": True}} for name in outputs]
    text = orjson.dumps(document)
    return b"".join([text, *parts]), len(text)


def decode_response(body: bytes, header_length: int | None) -> InferenceResponse:
    """Decode an inference response, JSON or binary tensors in any mix."""
    document = parse_json(body if header_length is None else body[:header_length])
    binary = memoryview(body)[header_length or len(body) :]
    outputs: dict[str, Array] = {}
    at = 0
    for entry in document["outputs"]:
        name, datatype, shape = entry["name"], entry["datatype"], entry["shape"]
        size = entry.get("parameters", {}).get("binary_data_size")
        if size is None:
            outputs[name] = decode_data(name, datatype, shape, entry["data"])
        else:
            outputs[name] = decode_bytes(name, document["model_name"], datatype, shape, binary[at : at + size])
            at += size
    return InferenceResponse(
        document["model_name"],
        document["model_version"],
        outputs,
        document.get("id", ""),
        document.get("parameters"),
    )
