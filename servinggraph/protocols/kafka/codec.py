"""Record values into requests, answers into record values: the codecs of HTTP and gRPC, chosen by format and content type.

| format | value of the record | answer |
|---|---|---|
| `v2-json` | V2 JSON; binary tensors behind it where the header says so | V2 JSON; binary where the request asks for it |
| `v2-binary` | V2 JSON and binary tensors | the same |
| `v2-protobuf` | `inference.ModelInferRequest` | `inference.ModelInferResponse` |
| `raw` | the bytes of the only tensor, or of a body | as `v2-binary`; a body as it is |
| `json`, `msgpack` | a document, as `POST /invocations` takes it | by `accept`, else like the request |
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

from servinggraph.errors import InvalidRequest, StepFailed
from servinggraph.kafka import headers as names
from servinggraph.messages import Body, InferenceRequest, InferenceResponse
from servinggraph.plan import Plan
from servinggraph.protocols.freeform import decode_body, decode_tensors, encode_answer
from servinggraph.protocols.freeform.body import media_of
from servinggraph.protocols.freeform.media import JSON, MSGPACK, OCTETS, Media, kind_of
from servinggraph.protocols.v2 import RequestLimits, encode_response, parse_request

__all__ = ["Answer", "Decoded", "decode"]

PROTOBUF: Final = frozenset({"application/x-protobuf", "application/protobuf", "application/vnd.google.protobuf"})
_FREEFORM: Final = "freeform"
_DIGITS: Final = re.compile(rb"[0-9]{1,18}")
_V2: Final = re.compile(rb'"inputs"\s*:\s*\[')


class Answer(NamedTuple):
    """An encoded answer."""

    value: bytes
    """The bytes."""
    headers: list[tuple[str, bytes | None]]
    """What they are."""


class Decoded(NamedTuple):
    """A request, and how its answer is written."""

    request: InferenceRequest
    """The request."""
    encode: Callable[[InferenceResponse], Answer]
    """Encodes its answer; raises `ServingGraphError` when that cannot be sent."""


def decode(value: bytes, headers: Mapping[str, bytes], form: str, plan: Plan, limits: RequestLimits) -> Decoded:
    """Decode a record's value, and check it against what the graph declares.

    Args:
        value: the value, without content coding.
        headers: the record's headers.
        form: the format that the graph's `kafka:` block says.
        plan: the graph.
        limits: bounds.

    Raises:
        ServingGraphError: whatever is wrong with the request.
    """
    content_type = headers.get(names.CONTENT_TYPE, b"").decode("latin-1")
    if form == "auto":
        form = _FREEFORM if plan.body else _recognized(value, headers, content_type)
    if form in ("json", "msgpack"):
        content_type = content_type or (JSON if form == "json" else MSGPACK[0])
        form = _FREEFORM
    if plan.body or form == _FREEFORM:
        return _freeform(value, headers, plan, content_type)
    if form == "v2-protobuf":
        return _protobuf(value, plan, limits)
    length = 0 if form == "raw" else _header_length(headers, len(value))
    if form == "v2-binary" and length is None:
        raise InvalidRequest(f"'format: v2-binary' needs the header '{names.HEADER_LENGTH}': bytes of JSON before the tensors")
    request = parse_request(value, length, plan.name, plan.inputs, plan.outputs, limits)
    return Decoded(request, lambda response: _encode_v2(response, request))


def _recognized(value: bytes, headers: Mapping[str, bytes], content_type: str) -> str:
    """Return the format of a record for a graph that takes tensors."""
    if names.HEADER_LENGTH in headers:
        return "v2-json"
    name = content_type.partition(";")[0].strip().lower()
    if name in PROTOBUF:
        return "v2-protobuf"
    if name == OCTETS:
        return "raw"
    if name and kind_of(name) != "json":
        return _FREEFORM
    # A document may have tensors by name, which V2 never has at the top: there 'inputs' is a list of them.
    return "v2-json" if not name or _V2.search(value) else _FREEFORM


def _header_length(headers: Mapping[str, bytes], value_length: int) -> int | None:
    text = headers.get(names.HEADER_LENGTH)
    if text is None:
        return None
    if not _DIGITS.fullmatch(text):
        raise InvalidRequest(f"header '{names.HEADER_LENGTH}' is a whole number, got {text[:40].decode('latin-1')!r}")
    length = int(text)
    if length > value_length:
        raise InvalidRequest(f"inference header size should be in range (0, {value_length}), got: {length}")
    return length


def _encode_v2(response: InferenceResponse, request: InferenceRequest) -> Answer:
    encoded = encode_response(response, request)
    if encoded.header_length is None:
        return Answer(encoded.body, [(names.CONTENT_TYPE, JSON.encode())])
    length = str(encoded.header_length).encode()
    return Answer(encoded.body, [(names.CONTENT_TYPE, OCTETS.encode()), (names.HEADER_LENGTH, length)])


def _protobuf(value: bytes, plan: Plan, limits: RequestLimits) -> Decoded:
    # Imported here: protobuf comes with the extra `grpc`.
    from servinggraph.protocols.protobuf.codec import decode_request, encode_response as encode_message
    from servinggraph.protocols.protobuf.wire import split_request

    message, raw = split_request(value)
    request = decode_request(message, raw, plan.name, plan.inputs, plan.outputs, limits)
    kind: list[tuple[str, bytes | None]] = [(names.CONTENT_TYPE, b"application/x-protobuf")]
    return Decoded(request, lambda response: Answer(encode_message(response, request), kind.copy()))


def _freeform(value: bytes, headers: Mapping[str, bytes], plan: Plan, content_type: str) -> Decoded:
    media = media_of(content_type)
    inputs: Any = (
        Body(decode_body(value, media), content_type) if plan.body else decode_tensors(value, media, plan.inputs, plan.name)
    )
    accept = headers.get(names.ACCEPT, b"").decode("latin-1") or _like(media)

    def encode(response: InferenceResponse) -> Answer:
        outputs: Any = response.outputs
        encoded = encode_answer(outputs if type(outputs) is Body else Body(outputs), accept)
        fields: list[tuple[str, bytes | None]] = [(names.CONTENT_TYPE, encoded.content_type.encode("latin-1"))]
        if response.parameters:
            fields.append((names.RESPONSE_PARAMETERS, _parameters(response.parameters)))
        return Answer(encoded.body, fields)

    return Decoded(InferenceRequest(inputs), encode)


def _like(media: Media) -> str:
    """Return what a request that says nothing of it accepts: its own type first, and any other."""
    return f"{media.name}, */*;q=0.5" if kind_of(media.name) in ("json", "msgpack") else ""


def _parameters(parameters: Mapping[str, Any]) -> bytes:
    try:
        return json.dumps(dict(parameters), default=lambda value: value.item()).encode()
    except Exception as error:
        raise StepFailed(f"set response parameters that JSON cannot carry: {error}") from error
