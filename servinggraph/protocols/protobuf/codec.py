"""Inference messages into requests, and responses into messages: pure functions.

Source: Open Inference Protocol (gRPC); Triton for the rules of raw and typed contents, of parameters,
and for error texts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, Final

from servinggraph.context import ParameterValue
from servinggraph.errors import InvalidRequest, StepFailed, Unsupported
from servinggraph.messages import Destination, InferenceRequest, InferenceResponse, RequestedOutput
from servinggraph.protocols.protobuf.contents import decode_contents
from servinggraph.protocols.protobuf.generated import grpc_service_pb2 as pb
from servinggraph.protocols.protobuf.wire import Data, field, varint
from servinggraph.protocols.v2.binary_data import decode_bytes, encode_bytes
from servinggraph.protocols.v2.checks import check_input, check_names, check_sizes
from servinggraph.protocols.v2.classification import classifier
from servinggraph.protocols.v2.request import RequestLimits
from servinggraph.protocols.v2.response import known_datatype, plain_parameters
from servinggraph.protocols.v2.shared_memory import REGION, Regions, check_fits, input_in_region, output_in_region
from servinggraph.tensors import DATATYPES, Array, TensorSpec

__all__ = [
    "EMPTY_FINAL",
    "FINAL",
    "MAX_MESSAGE_BYTES",
    "decode_request",
    "empty_answer",
    "encode_response",
    "error_item",
    "stream_item",
]

EMPTY_FINAL: Final = "triton_enable_empty_final_response"
"""Request parameter: a graph that gives any number of answers says with an empty one that there are no more."""

FINAL: Final = "triton_final_response"
"""Response parameter of every answer over a stream: whether it is the last one to its request."""

_FINAL: Final = {
    last: pb.ModelInferResponse(parameters={FINAL: pb.InferParameter(bool_param=last)}).SerializeToString()
    for last in (False, True)
}

MAX_MESSAGE_BYTES: Final = 2**31 - 1
"""Largest message that gRPC carries."""

_MAX_ANSWER_BYTES: Final = MAX_MESSAGE_BYTES - 64
"""Largest answer: as an item of a stream it has a few bytes more around it."""

Parameters = Mapping[str, pb.InferParameter]


def decode_request(
    message: pb.ModelInferRequest,
    raw: Sequence[Data],
    model: str,
    declared: Mapping[str, TensorSpec],
    known_outputs: Mapping[str, TensorSpec] | None,
    limits: RequestLimits,
    regions: Regions | None = None,
) -> InferenceRequest:
    """Decode and check an inference request.

    Args:
        message: the request; its raw contents are not looked at.
        raw: its raw contents; arrays are views of them.
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
    try:
        request = InferenceRequest(_inputs(message, raw, model, declared, limits, regions), message.id, binary=True)
        if message.parameters:
            request.parameters = _request_parameters(message.parameters)
        if message.outputs:
            request.outputs = _outputs(message.outputs, model, known_outputs, limits, regions)
    except InvalidRequest as error:
        if message.id:
            error.message = f"[request id: {message.id}] {error.message}"
        raise
    return request


def _inputs(
    message: pb.ModelInferRequest,
    raw: Sequence[Data],
    model: str,
    declared: Mapping[str, TensorSpec],
    limits: RequestLimits,
    regions: Regions | None,
) -> dict[str, Array]:
    if len(message.inputs) > limits.tensors:
        raise InvalidRequest(f"the request has {len(message.inputs)} inputs (limit 'max_tensors' = {limits.tensors})")
    inputs: dict[str, Array] = {}
    used = 0
    for entry in message.inputs:
        name, datatype, shape = _head(entry, model, declared)
        if name in inputs:
            raise InvalidRequest(f"input '{name}' already exists in request")
        if entry.parameters:
            parameters = _tensor_parameters(f"input '{name}'", entry.parameters)
            if REGION in parameters:
                if entry.HasField("contents") and entry.contents.ListFields():
                    raise InvalidRequest(f"unexpected 'content' provided when using shared memory for input tensor '{name}'")
                inputs[name] = input_in_region(name, model, datatype, shape, parameters, _offered(regions, f"input '{name}'"))
                continue
        if not raw:
            if not entry.HasField("contents"):
                raise _no_data(name, model)
            inputs[name] = decode_contents(name, model, datatype, shape, entry.contents)
            continue
        if entry.HasField("contents") and entry.contents.ListFields():
            raise InvalidRequest(
                f"contents field must not be specified when using raw_input_contents for '{name}' for model '{model}'"
            )
        if used == len(raw):
            raise _no_data(name, model)
        inputs[name] = decode_bytes(name, model, datatype, shape, memoryview(raw[used]))
        used += 1
    if used != len(raw):
        raise InvalidRequest(
            f"unexpected additional input data for model '{model}': raw_input_contents has {len(raw)} entries for {used} inputs"
        )
    if len(inputs) != len(declared):
        check_names(inputs, declared, model)
    return inputs


def _head(
    entry: pb.ModelInferRequest.InferInputTensor, model: str, declared: Mapping[str, TensorSpec]
) -> tuple[str, str, tuple[int, ...]]:
    """Return name, datatype and shape of an input."""
    name, datatype, shape = entry.name, entry.datatype, tuple(entry.shape[:])  # a slice is quicker than to iterate
    if datatype not in DATATYPES:
        raise InvalidRequest(f"input '{name}': unknown datatype '{datatype[:40]}'; expected one of {', '.join(DATATYPES)}")
    if shape and min(shape) < 0:
        raise InvalidRequest(
            f"Unable to parse 'shape' of input '{name}': sizes are whole numbers from 0 on, got {list(shape)[:8]}"
        )
    check_sizes(name, shape)
    spec = declared.get(name)
    if spec is None:
        check_names({name: None}, declared, model)
    else:
        check_input(name, datatype, shape, spec, model)
    return name, datatype, shape


def _no_data(name: str, model: str) -> InvalidRequest:
    return InvalidRequest(f"unable to find data for input tensor '{name}' for model '{model}' in request.")


def _tensor_parameters(what: str, parameters: Parameters) -> dict[str, ParameterValue]:
    values: dict[str, ParameterValue] = {}
    for key, parameter in parameters.items():
        if key.startswith("triton_"):
            raise InvalidRequest(f"parameter keys starting with 'triton_' are reserved, got '{key}' on {what}")
        choice = parameter.WhichOneof("parameter_choice")
        if choice is None:
            raise InvalidRequest(f"parameter '{key}' of {what} has no value")
        values[key] = getattr(parameter, choice)
    return values


def _offered(regions: Regions | None, what: str) -> Regions:
    if regions is None:
        raise Unsupported(f"{what} is in shared memory ('{REGION}'), which is not offered here; use 'raw_input_contents'")
    return regions


def _request_parameters(parameters: Parameters) -> dict[str, ParameterValue]:
    values: dict[str, ParameterValue] = {}
    for key, parameter in parameters.items():
        choice = parameter.WhichOneof("parameter_choice")
        if choice is None or (choice == "uint64_param" and key != "priority"):
            expected = "'int', 'bool', 'double' or 'string'"
            raise InvalidRequest(f"parameter '{key}' has invalid type. It should be either {expected}")
        if key.startswith("triton_") and not (key == EMPTY_FINAL and choice == "bool_param"):
            if key == EMPTY_FINAL:
                raise InvalidRequest(f"parameter '{key}' has invalid type. It should be 'bool'")
            raise InvalidRequest(
                f"parameter keys starting with 'triton_' are reserved for Triton usage and should not be specified, got '{key}'"
            )
        values[key] = getattr(parameter, choice)
    return values


def _outputs(
    entries: Sequence[pb.ModelInferRequest.InferRequestedOutputTensor],
    model: str,
    known: Mapping[str, TensorSpec] | None,
    limits: RequestLimits,
    regions: Regions | None,
) -> tuple[RequestedOutput, ...]:
    if len(entries) > limits.tensors:
        raise InvalidRequest(f"the request asks for {len(entries)} outputs (limit 'max_tensors' = {limits.tensors})")
    requested: dict[str, RequestedOutput] = {}
    for entry in entries:
        name = entry.name
        if known is not None and name not in known:
            raise InvalidRequest(f"unexpected inference output '{name}' for model '{model}', it has {', '.join(known)}")
        parameters = _tensor_parameters(f"output '{name}'", entry.parameters) if entry.parameters else {}
        wanted = RequestedOutput(name, True, parameters)
        if "classification" in parameters:
            wanted.classify = classifier(name, parameters, known)
        if REGION in parameters:
            wanted.memory = output_in_region(name, parameters, _offered(regions, f"output '{name}'"))
        requested.setdefault(name, wanted)
    return tuple(requested.values())


def encode_response(response: InferenceResponse, request: InferenceRequest) -> bytes:
    """Encode the answer to a request as a `ModelInferResponse`; tensors always as raw contents, as in Triton.

    Raises:
        InvalidRequest: the request asked for an output that is not there, or the answer is larger than gRPC carries.
        StepFailed: an output has a dtype without a V2 datatype, or holds what a message cannot.
    """
    outputs = response.outputs
    parts: list[Data] = [_model_head(response.model, response.version)]
    if response.id:
        parts.append(field(3, response.id.encode()))
    if response.parameters:
        parts.append(_parameters(response.parameters))
    tensors: list[Data] = []
    writes: list[tuple[Destination, Data]] = []
    if request.outputs:
        for wanted in request.outputs:
            if wanted.name not in outputs:
                raise InvalidRequest(
                    f"unexpected inference output '{wanted.name}' for model '{response.model}', it gave {', '.join(outputs)}"
                )
            array = outputs[wanted.name]
            if wanted.classify is not None:
                array = wanted.classify(array, response.batched)
            if wanted.memory is None:
                _output(wanted.name, array, parts, tensors)
            else:
                writes.append((wanted.memory, _in_memory(wanted, wanted.memory, array, parts, tensors)))
    else:
        for name, array in outputs.items():
            _output(name, array, parts, tensors)
    parts += tensors
    size = sum(map(len, parts))
    if size > _MAX_ANSWER_BYTES:
        raise InvalidRequest(f"the answer has {size} bytes, and gRPC carries at most {_MAX_ANSWER_BYTES} in a message")
    for memory, data in writes:
        memory.write(data)
    return b"".join(parts)


def _output(name: str, array: Array, parts: list[Data], tensors: list[Data]) -> None:
    datatype = known_datatype(name, array)
    data = encode_bytes(name, datatype, array)
    parts.append(_output_head(name, datatype, array.shape))
    tensors.append(_RAW_TAG + varint(len(data)))
    tensors.append(data)


def _in_memory(wanted: RequestedOutput, memory: Destination, array: Array, parts: list[Data], tensors: list[Data]) -> Data:
    """Note an output that goes into shared memory, and return its bytes; its place in the raw contents stays empty."""
    datatype = known_datatype(wanted.name, array)
    data = encode_bytes(wanted.name, datatype, array)
    check_fits(wanted.name, data, memory)
    entry = pb.ModelInferResponse().outputs.add(name=wanted.name, datatype=datatype, shape=array.shape)
    entry.parameters[REGION].string_param = str(wanted.parameters[REGION])
    entry.parameters["shared_memory_byte_size"].int64_param = len(data)
    parts.append(field(5, entry.SerializeToString()))
    tensors.append(_RAW_TAG + varint(0))
    return data


_RAW_TAG: Final = b"\x32"  # ModelInferResponse.raw_output_contents


def stream_item(answer: bytes, *, final: bool) -> bytes:
    """Return an encoded answer as an item of a stream; `final` when no more answers to its request follow."""
    # A field may stand anywhere in a message, and whoever reads it puts the parameters together.
    end = _FINAL[final]
    return b"\x12%b%b%b" % (varint(len(answer) + len(end)), answer, end)


def empty_answer(request: InferenceRequest, model: str, version: str) -> bytes:
    """Encode an answer without outputs, which says that there are no more."""
    return encode_response(InferenceResponse(model, version, {}, request.id), InferenceRequest({}))


def error_item(text: str, message: pb.ModelInferRequest) -> bytes:
    """Return what a stream says of a request that failed: the text, and which request that was."""
    item = pb.ModelStreamInferResponse(error_message=text)
    item.infer_response.model_name = message.model_name
    item.infer_response.model_version = message.model_version
    item.infer_response.id = message.id
    item.infer_response.parameters[FINAL].bool_param = True
    return item.SerializeToString()


@lru_cache(maxsize=1024)
def _model_head(model: str, version: str) -> bytes:
    return field(1, model.encode()) + field(2, version.encode())


@lru_cache(maxsize=1024)
def _output_head(name: str, datatype: str, shape: tuple[int, ...]) -> bytes:
    try:
        text = name.encode()
    except UnicodeEncodeError:
        raise StepFailed(f"output {name!r} has half of a surrogate pair in its name, which UTF-8 cannot carry") from None
    sizes = field(3, b"".join(map(varint, shape))) if shape else b""
    return field(5, field(1, text) + field(2, datatype.encode()) + sizes)


def _parameters(parameters: Mapping[str, Any]) -> bytes:
    message = pb.ModelInferResponse()
    for name, value in plain_parameters(parameters).items():
        parameter = message.parameters[name]
        if isinstance(value, bool):
            parameter.bool_param = value
        elif isinstance(value, int):
            if value < 2**63:
                parameter.int64_param = value
            else:
                parameter.uint64_param = value
        elif isinstance(value, float):
            parameter.double_param = value
        else:
            parameter.string_param = str(value)
    return message.SerializeToString()
