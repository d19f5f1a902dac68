"""Decodes an inference request: JSON, JSON followed by binary tensors, or one raw tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from servinggraph.context import ParameterValue
from servinggraph.errors import InvalidRequest, Unsupported
from servinggraph.messages import InferenceRequest, RequestedOutput
from servinggraph.protocols.v2.binary_data import decode_bytes
from servinggraph.protocols.v2.checks import check_input, check_names, check_sizes
from servinggraph.protocols.v2.classification import classifier
from servinggraph.protocols.v2.json_data import decode_data, parse_json, shown
from servinggraph.protocols.v2.shared_memory import REGION, Regions, input_in_region, output_in_region
from servinggraph.tensors import DATATYPES, Array, TensorSpec, element_count

__all__ = ["RequestLimits", "parse_request", "request_parameters"]

_SOURCES: Final = "Input must set only one of the following fields: 'data', 'binary_data_size', 'shared_memory_region'"


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """Bounds of what a request may hold.

    Attributes:
        tensors: most inputs, and most requested outputs.
    """

    tensors: int = 1024


def parse_request(
    body: bytes,
    header_length: int | None,
    model: str,
    declared: Mapping[str, TensorSpec],
    known_outputs: Mapping[str, TensorSpec] | None,
    limits: RequestLimits,
    regions: Regions | None = None,
) -> InferenceRequest:
    """Decode and check the body of an inference request.

    Args:
        body: the body, uncompressed.
        header_length: bytes of JSON before the binary tensors; 0 for one raw tensor, None for
            nothing but JSON.
        model: the graph's name, for error texts.
        declared: its inputs.
        known_outputs: its outputs; None when they are not known before it runs.
        limits: bounds.
        regions: shared memory of clients; None where it is not offered.

    Raises:
        RegionNotFound: a tensor is in a shared memory region that is not registered.
        Unsupported: it is in shared memory, which is not offered.
        InvalidRequest: with Triton's texts where it has one, and always the field at fault.
    """
    if header_length == 0:
        return _raw(body, model, declared)
    if header_length is None:
        document, binary = parse_json(body), None
    else:
        if not 0 < header_length <= len(body):
            raise InvalidRequest(f"inference header size should be in range (0, {len(body)}), got: {header_length}")
        document, binary = parse_json(body[:header_length]), memoryview(body)[header_length:]
    if type(document) is not dict:
        raise InvalidRequest("failed to parse the request JSON buffer: expected an object at the top")
    # Null stands for absent in all that is optional: MLServer's types write it for what is not set.
    request_id = document.get("id")
    if request_id is None:
        request_id = ""
    elif type(request_id) is not str:
        raise InvalidRequest(f"Unable to parse 'id': expected text, got {shown(request_id)}")
    try:
        return _parse(document, request_id, binary, model, declared, known_outputs, limits, regions)
    except InvalidRequest as error:
        if request_id:
            error.message = f"[request id: {request_id}] {error.message}"
        raise


def _parse(
    document: dict[str, Any],
    request_id: str,
    binary: memoryview | None,
    model: str,
    declared: Mapping[str, TensorSpec],
    known_outputs: Mapping[str, TensorSpec] | None,
    limits: RequestLimits,
    regions: Regions | None,
) -> InferenceRequest:
    inputs: dict[str, Array] = {}
    at = 0
    for entry in _input_entries(document, limits):
        name, datatype, shape, parameters = _input_head(entry)
        if name in inputs:
            raise InvalidRequest(f"input '{name}' already exists in request")
        spec = declared.get(name)
        if spec is None:
            check_names({name: None}, declared, model)
        else:
            check_input(name, datatype, shape, spec, model)
        size = None if parameters is None else _binary_size(name, parameters)
        data = entry.get("data")
        if parameters is not None and REGION in parameters:
            _check_only_source(name, data, size)
            inputs[name] = input_in_region(name, model, datatype, shape, parameters, _offered(regions, f"input '{name}'"))
            continue
        if size is None:
            if data is None:
                raise InvalidRequest(f"{_SOURCES}; '{name}' sets none")
            inputs[name] = decode_data(name, datatype, shape, data)
            continue
        if data is not None:
            raise InvalidRequest(f"{_SOURCES}; '{name}' sets 'data' and 'binary_data_size'")
        left = 0 if binary is None else len(binary) - at
        if binary is None or size > left:
            raise InvalidRequest(
                f"unexpected size for input '{name}', expecting {size - left} additional bytes for model '{model}'"
            )
        inputs[name] = decode_bytes(name, model, datatype, shape, binary[at : at + size])
        at += size
    if binary is not None and at != len(binary):
        raise InvalidRequest(f"unexpected additional input data for model '{model}': {len(binary) - at} bytes are left over")
    if len(inputs) != len(declared):
        check_names(inputs, declared, model)
    request = InferenceRequest(inputs, request_id)
    parameters = document.get("parameters")
    if parameters is not None:
        request.parameters = request_parameters(parameters)
        request.binary = _flag("binary_data_output", request.parameters.get("binary_data_output", False))
    outputs = document.get("outputs")
    if outputs is not None:
        request.outputs = _outputs(outputs, model, known_outputs, limits, regions)
    return request


def _input_entries(document: dict[str, Any], limits: RequestLimits) -> list[Any]:
    entries = document.get("inputs")
    if type(entries) is not list:
        raise InvalidRequest("Unable to parse 'inputs': attempt to access JSON non-array as array")
    if len(entries) > limits.tensors:
        raise InvalidRequest(f"the request has {len(entries)} inputs (limit 'max_tensors' = {limits.tensors})")
    return entries


def _input_head(entry: Any) -> tuple[str, str, tuple[int, ...], dict[str, Any] | None]:
    """Return name, datatype, shape and parameters of an `inputs` entry."""
    try:
        name, datatype, sizes = entry["name"], entry["datatype"], entry["shape"]
    except (KeyError, TypeError):
        raise _bad_head(entry) from None
    if type(name) is not str or type(sizes) is not list:
        raise _bad_head(entry)
    if type(datatype) is not str or datatype not in DATATYPES:
        raise InvalidRequest(f"input '{name}': unknown datatype {shown(datatype)}; expected one of {', '.join(DATATYPES)}")
    for size in sizes:
        if type(size) is not int or size < 0:
            text = f"Unable to parse 'shape' of input '{name}': sizes are whole numbers from 0 on, got {shown(size)}"
            raise InvalidRequest(text)
    check_sizes(name, sizes)
    parameters = entry.get("parameters")
    if parameters is not None and type(parameters) is not dict:
        raise InvalidRequest(f"Unable to parse 'parameters' of input '{name}': expected an object")
    return name, datatype, tuple(sizes), parameters


def _bad_head(entry: Any) -> InvalidRequest:
    if type(entry) is not dict:
        return InvalidRequest("Unable to parse 'inputs': attempt to access JSON non-object as object")
    name = entry.get("name")
    if type(name) is not str:
        return InvalidRequest("Unable to parse 'inputs': an input has no 'name', or it is no text")
    for key in ("datatype", "shape"):
        if key not in entry:
            return InvalidRequest(f"Unable to parse '{key}': input '{name}' has none")
    return InvalidRequest(f"Unable to parse 'shape' of input '{name}': expected an array, got {shown(entry['shape'])}")


def _binary_size(name: str, parameters: dict[str, Any]) -> int | None:
    """Return an input's `binary_data_size`; None when its data is in the JSON."""
    for key in parameters:
        if key.startswith("triton_"):
            raise InvalidRequest(f"parameter keys starting with 'triton_' are reserved, got '{key}' on input '{name}'")
    size = parameters.get("binary_data_size")
    if size is not None and (type(size) is not int or size < 0):
        raise InvalidRequest(f"'binary_data_size' of input '{name}' is a whole number from 0 on, got {shown(size)}")
    return size


def _check_only_source(name: str, data: Any, size: int | None) -> None:
    if size is not None or data is not None:
        other = "data" if size is None else "binary_data_size"
        raise InvalidRequest(f"{_SOURCES}; '{name}' sets '{other}' and '{REGION}'")


def _offered(regions: Regions | None, what: str) -> Regions:
    if regions is None:
        raise Unsupported(f"{what} is in shared memory ('{REGION}'), which is not offered here; use 'data' or binary data")
    return regions


def request_parameters(parameters: Any) -> Mapping[str, ParameterValue]:
    """Return the parameters of a request.

    Raises:
        InvalidRequest: no object, a reserved name, or a value that no parameter can have.
    """
    if type(parameters) is not dict:
        raise InvalidRequest("Unable to parse 'parameters': attempt to access JSON non-object as object")
    for key, value in parameters.items():
        if key.startswith("triton_"):
            raise InvalidRequest(
                f"parameter keys starting with 'triton_' are reserved for Triton usage and should not be specified, got '{key}'"
            )
        if type(value) not in (str, int, float, bool):
            raise InvalidRequest(f"parameter '{key}' has invalid type. It should be either 'int', 'bool', 'double' or 'string'")
    return parameters


def _flag(name: str, value: Any) -> bool:
    if type(value) is not bool:
        raise InvalidRequest(f"parameter '{name}' is true or false, got {shown(value)}")
    return value


def _outputs(
    entries: Any,
    model: str,
    known: Mapping[str, TensorSpec] | None,
    limits: RequestLimits,
    regions: Regions | None,
) -> tuple[RequestedOutput, ...]:
    if type(entries) is not list:
        raise InvalidRequest("Unable to parse 'outputs': attempt to access JSON non-array as array")
    if len(entries) > limits.tensors:
        raise InvalidRequest(f"the request asks for {len(entries)} outputs (limit 'max_tensors' = {limits.tensors})")
    requested: dict[str, RequestedOutput] = {}
    for entry in entries:
        name = entry.get("name") if type(entry) is dict else None
        if type(name) is not str:
            raise InvalidRequest("Unable to parse 'outputs': an output has no 'name', or it is no text")
        if known is not None and name not in known:
            raise InvalidRequest(f"unexpected inference output '{name}' for model '{model}', it has {', '.join(known)}")
        parameters = entry.get("parameters")
        if parameters is None:
            requested.setdefault(name, RequestedOutput(name, None, {}))
            continue
        if type(parameters) is not dict:
            raise InvalidRequest(f"Unable to parse 'parameters' of output '{name}': expected an object")
        binary = parameters.get("binary_data")
        if binary is not None:
            binary = _flag("binary_data", binary)
        wanted = RequestedOutput(name, binary, parameters)
        if "classification" in parameters:
            wanted.classify = classifier(name, parameters, known)
        if REGION in parameters:
            wanted.memory = output_in_region(name, parameters, _offered(regions, f"output '{name}'"))
        requested.setdefault(name, wanted)
    return tuple(requested.values())


def _raw(body: bytes, model: str, declared: Mapping[str, TensorSpec]) -> InferenceRequest:
    """Decode a body that is nothing but the bytes of the only input; its shape is deduced."""
    if len(declared) != 1:
        raise InvalidRequest(
            f"Raw request must only have 1 input (found {len(declared)}) to be deduced but model '{model}' has {len(declared)}"
        )
    if not body:
        raise InvalidRequest(f"the raw request for model '{model}' has an empty body")
    ((name, spec),) = declared.items()
    sizes = spec.shape or ()
    if spec.datatype == "BYTES":
        if any(size not in (1, -1) for size in sizes) or len(sizes) > 2:
            raise InvalidRequest(
                f"For BYTES datatype raw input, the model must have input shape [1], '{name}' has {list(sizes)}"
            )
        element = len(body).to_bytes(4, "little") + body
        array = decode_bytes(name, model, "BYTES", (1,) * len(sizes), memoryview(element))
        return InferenceRequest({name: array}, binary=True)
    # A free first axis is the batch, and a raw request is a batch of one.
    fixed = [1, *sizes[1:]] if sizes and sizes[0] == -1 and len(sizes) > 1 else list(sizes)
    free = [index for index, size in enumerate(fixed) if size == -1]
    if len(free) > 1:
        raise InvalidRequest(
            f"The shape of Raw input '{name}' can not be deduced because there are more than one variable-sized dimension"
        )
    if free:
        item = DATATYPES[spec.datatype or "UINT8"].itemsize * element_count([size for size in fixed if size != -1])
        if item == 0 or len(body) % item:
            raise InvalidRequest(
                f"input byte size mismatch for input '{name}' for model '{model}'. "
                f"Expected a multiple of {item}, got {len(body)}"
            )
        fixed[free[0]] = len(body) // item
    array = decode_bytes(name, model, spec.datatype or "UINT8", fixed, memoryview(body))
    return InferenceRequest({name: array}, binary=True)
