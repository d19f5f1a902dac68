"""What of an HTTP request's headers the V2 protocol reads, and the headers of its answers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from servinggraph.context import Context, Headers, ParameterValue
from servinggraph.errors import InvalidRequest
from servinggraph.messages import InferenceRequest
from servinggraph.protocols.v2.parameters import priority_of, timeout_of

__all__ = ["deadline_of", "fill_context", "header_length_of"]

_HEADER_LENGTH: Final = b"inference-header-content-length"
_TIMEOUT_HEADERS: Final = (b"x-request-timeout-ms", b"x-envoy-expected-rq-timeout-ms")
_DIGITS: Final = re.compile(rb"[+-]?[0-9]+")
_NUMBER: Final = re.compile(rb"[0-9]+(\.[0-9]*)?([eE][+-]?[0-9]{1,3})?")

RawHeaders = Mapping[bytes, bytes]


def header_length_of(headers: RawHeaders, body_length: int) -> int | None:
    """Return the length of the JSON before binary tensors; None when the header is not there.

    Raises:
        InvalidRequest: not a whole number, or beyond the body.
    """
    text = headers.get(_HEADER_LENGTH)
    if text is None:
        return None
    text = text.strip()
    if not _DIGITS.fullmatch(text):
        raise InvalidRequest(f"Unable to parse Inference-Header-Content-Length, got: {text[:40].decode('latin-1')}")
    if len(text) > 19:
        raise InvalidRequest("Unable to parse Inference-Header-Content-Length: value is out of range")
    length = int(text)
    if not 0 <= length <= body_length:
        raise InvalidRequest(f"inference header size should be in range (0, {body_length}), got: {length}")
    return length


def deadline_of(headers: RawHeaders, parameters: Mapping[str, ParameterValue], now: float) -> float | None:
    """Return when the answer becomes worthless, on the clock of `now`; None without a limit.

    The earliest of the V2 parameter `timeout` (microseconds), and the headers
    `X-Request-Timeout-Ms` and, as Envoy and Istio set it, `X-Envoy-Expected-Rq-Timeout-Ms`.

    Raises:
        InvalidRequest: one of them is no number, or not above 0.
    """
    seconds = timeout_of(parameters) if parameters else None
    deadline = None if seconds is None else now + seconds
    for name in _TIMEOUT_HEADERS:
        text = headers.get(name)
        if text is None:
            continue
        milliseconds = float(text) if _NUMBER.fullmatch(text) else -1.0
        if not 0 < milliseconds < 1e12:
            raise InvalidRequest(
                f"header {name.decode()} is a number of milliseconds above 0, got {text[:40].decode('latin-1')}"
            )
        end = now + milliseconds / 1e3
        deadline = end if deadline is None else min(deadline, end)
    return deadline


def fill_context(
    context: Context,
    request: InferenceRequest,
    graph: str,
    headers: RawHeaders,
    raw_headers: list[tuple[bytes, bytes]],
    now: float,
) -> None:
    """Note in a request's context what the request says of itself.

    Raises:
        InvalidRequest: a priority or a time limit that is none.
    """
    context.id = request.id
    context.headers = Headers(raw_headers)
    context.graph = graph
    if request.parameters:
        context.parameters = request.parameters
        context.priority = priority_of(request.parameters)
    context.deadline = deadline_of(headers, request.parameters, now)
