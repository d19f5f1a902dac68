"""The generate extension: a JSON object whose keys are inputs, and an answer whose keys are outputs.

Source: Triton, extension_generate; Open Inference Protocol, generate_rest.yaml.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from servinggraph.context import ParameterValue
from servinggraph.errors import InvalidRequest, StepFailed
from servinggraph.messages import InferenceRequest, InferenceResponse
from servinggraph.protocols.v2.checks import check_input, check_names
from servinggraph.protocols.v2.json_data import MAX_NESTING, decode_data, encode_data, parse_unique, shown
from servinggraph.protocols.v2.request import request_parameters
from servinggraph.protocols.v2.response import dump_json, known_datatype, plain_parameters
from servinggraph.tensors import Array, Shape, TensorSpec, element_count

__all__ = ["NOT_ONE", "encode_generated", "event", "parse_generate"]

NOT_ONE: Final = (
    "generate expects model to produce exactly 1 response, "
    "use generate stream for model that generates various number of responses"
)
"""What `generate` says of any other number of answers; Triton's text."""


def parse_generate(body: bytes, model: str, declared: Mapping[str, TensorSpec]) -> InferenceRequest:
    """Decode and check the body of a generate request.

    A key that is an input's name becomes that tensor: a nested array has its own shape, a
    scalar or a flat array the declared one, in which the innermost free axis takes what the
    others leave and further free axes are 1. The object `parameters` and all other keys become
    request parameters, `id` the request's id.

    Args:
        body: the body, uncompressed.
        model: the graph's name, for error texts.
        declared: its inputs.

    Raises:
        InvalidRequest: always with the key at fault.
    """
    document = parse_unique(body)
    if type(document) is not dict:
        raise InvalidRequest("failed to parse the request JSON buffer: expected an object at the top")
    inputs: dict[str, Array] = {}
    parameters: dict[str, Any] = {}
    request_id = ""
    for key, value in document.items():
        spec = declared.get(key)
        if value is None:
            continue  # null stands for absent, as in inference requests
        if spec is not None:
            inputs[key] = _tensor(key, value, spec, model)
        elif key == "id":
            if type(value) is not str:
                raise InvalidRequest(f"Unable to parse 'id': expected text, got {shown(value)}")
            request_id = value
        elif key == "parameters":
            if type(value) is not dict:
                raise InvalidRequest(f"Unable to parse 'parameters': expected an object, got {shown(value)}")
            _join(parameters, {name: item for name, item in value.items() if item is not None})
        else:
            _join(parameters, {key: value})
    try:
        if len(inputs) != len(declared):
            check_names(inputs, declared, model)
        return InferenceRequest(inputs, request_id, request_parameters(parameters))
    except InvalidRequest as error:
        if request_id:
            error.message = f"[request id: {request_id}] {error.message}"
        raise


def encode_generated(response: InferenceResponse) -> bytes:
    """Encode an answer: outputs and response parameters by their names; a tensor of one element as a scalar.

    Raises:
        StepFailed: an output has a dtype without a V2 datatype, or a name that stands for something else.
        InvalidRequest: an output that JSON cannot carry.
    """
    document: dict[str, Any] = {"model_name": response.model, "model_version": response.version}
    if response.id:
        document["id"] = response.id
    fields: dict[str, Any] = {name: _field(name, array) for name, array in response.outputs.items()}
    for part in (fields, plain_parameters(response.parameters)):
        for name, value in part.items():
            if name in document:
                raise StepFailed(f"the answer has '{name}' twice: give the output, or the response parameter, another name")
            document[name] = value
    return dump_json(document)


def event(data: bytes) -> bytes:
    """Return JSON as a server-sent event (WHATWG HTML §9.2); it has no line breaks."""
    return b"data: %b\n\n" % data


def _join(parameters: dict[str, Any], more: Mapping[str, ParameterValue]) -> None:
    for name in more:
        if name in parameters:
            raise InvalidRequest(f"parameter '{name}' is there twice, at the top and in 'parameters'")
    parameters.update(more)


def _tensor(name: str, value: Any, spec: TensorSpec, model: str) -> Array:
    if type(value) is dict:
        raise InvalidRequest(f"Unable to parse '{name}': it is an input, so expected a scalar or an array, got an object")
    datatype, declared = spec.datatype or "BYTES", spec.shape or ()
    data = value if type(value) is list else [value]
    shape = _nested(data) if data and type(data[0]) is list else _derived(name, declared, len(data))
    check_input(name, datatype, shape, spec, model)
    return decode_data(name, datatype, shape, data)


def _nested(data: Any) -> Shape:
    """Return the shape of nested arrays by their first elements; `decode_data` finds out whether they are ragged."""
    shape: list[int] = []
    while type(data) is list and len(shape) <= MAX_NESTING:
        shape.append(len(data))
        data = data[0] if data else None
    return tuple(shape)


def _derived(name: str, declared: Shape, count: int) -> Shape:
    """Return the shape that a number of elements has, by the declared one."""
    fixed = element_count([size for size in declared if size != -1])
    free = [axis for axis, size in enumerate(declared) if size == -1]
    if (count % fixed if free and fixed else count != fixed) or (fixed == 0 and count):
        raise InvalidRequest(
            f"The schema can not convert input '{name}' to tensor with proper shape: "
            f"{count} elements do not fill {list(declared)}"
        )
    shape = [1 if size == -1 else size for size in declared]
    if free:
        shape[free[-1]] = count // fixed if fixed else 1
    return tuple(shape)


def _field(name: str, array: Array) -> Any:
    try:
        elements = encode_data(name, known_datatype(name, array), array)
    except InvalidRequest:
        text = f"output '{name}' has an element that is not UTF-8, which JSON cannot carry: infer can give it as binary data"
        raise InvalidRequest(text) from None
    return elements[0] if array.size == 1 else elements
