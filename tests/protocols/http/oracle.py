"""A second, slow and simple reading of V2 requests, for the fuzzer: is it valid, and what does an echo answer?

Shares no code with servinggraph: element by element, with `json` and `struct` of the standard library.
Written from the rules (the protocol's specification and this project's reference), not from the codec.
"""

from __future__ import annotations

import json
import math
import re
import struct
import zlib
from typing import Any

CODES = {
    "UINT8": "B", "UINT16": "H", "UINT32": "I", "UINT64": "Q", "INT8": "b", "INT16": "h", "INT32": "i", "INT64": "q",
    "FP16": "e", "FP32": "f", "FP64": "d", "BOOL": "?",
}  # fmt: skip
SIZES = {**{name: struct.calcsize("<" + code) for name, code in CODES.items()}, "BF16": 2}


class Invalid(Exception):
    """The request has to be refused."""


class Unclear(Exception):
    """Either answer is right."""


def need(condition: object, why: str) -> None:
    if not condition:
        raise Invalid(why)


def parse(text: bytes) -> Any:
    """Strict JSON, with the tokens NaN, Infinity and -Infinity, numbers within a double."""

    def real(token: str) -> float:
        number = float(token)
        need(math.isfinite(number), "number out of range")
        return number

    def whole(token: str) -> int | float:
        if len(token) > 400:
            raise Invalid("number out of range")
        number = int(token)
        return number if -(2**63) <= number < 2**64 else real(token)

    try:
        decoded = text.decode("utf-8")
        depth = deepest = 0
        for character in decoded:
            depth += (character in "[{") - (character in "]}")
            deepest = max(deepest, depth)
        if deepest > 900:
            raise Unclear("limits of nesting differ")
        document = json.loads(decoded, parse_float=real, parse_int=whole)
        json.dumps(document, ensure_ascii=False).encode("utf-8")  # halves of surrogate pairs
    except (ValueError, RecursionError) as error:
        raise Invalid(str(error)) from None
    return document


def unpack(body: bytes, coding: str, limit: int) -> bytes:
    coding = coding.strip().lower()
    if coding in ("", "identity"):
        return body
    need(coding in ("gzip", "x-gzip", "deflate"), "coding")
    out = b""
    while True:
        decoder = zlib.decompressobj(15 if coding == "deflate" else 31)
        try:
            out += decoder.decompress(body) + decoder.flush()
        except zlib.error:
            raise Invalid("corrupt") from None
        need(decoder.eof, "cut off")
        need(len(out) <= limit, "too large")
        body = decoder.unused_data
        if not body:
            return out
        need(coding != "deflate", "surplus")


def number_bits(datatype: str, item: Any) -> bytes:
    """One element of JSON data as its bytes on the wire."""
    if datatype == "BYTES":
        need(type(item) is str, "text")
        return item.encode()  # type: ignore[no-any-return]
    if datatype == "BOOL":
        need(type(item) is bool, "boolean")
        return b"\1" if item else b"\0"
    floating = datatype in ("FP16", "FP32", "FP64", "BF16")
    need(type(item) is int or (floating and type(item) is float), "number")
    try:
        if datatype != "BF16":
            return struct.pack("<" + CODES[datatype], item)
        (bits,) = struct.unpack("<I", struct.pack("<f", item))
    except (struct.error, OverflowError):
        raise Invalid("out of range") from None
    if item != item:
        return b"\xc0\x7f"
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    need((rounded & 0x7FFF) != 0x7F80 or math.isinf(item), "out of range")
    return struct.pack("<H", rounded)


def flatten(data: Any) -> list[Any]:
    need(type(data) is list, "data is no array")
    for _ in range(100):
        if not any(type(item) is list for item in data):
            return data  # type: ignore[no-any-return]
        need(all(type(item) is list for item in data), "ragged")
        need(len({len(item) for item in data}) == 1, "ragged")
        data = [inner for item in data for inner in item]
        if not data:
            return data  # type: ignore[no-any-return]
    raise Invalid("too deep")


def elements(datatype: str, count: int, raw: bytes) -> list[bytes]:
    """The elements of binary data."""
    if datatype != "BYTES":
        size = SIZES[datatype]
        need(len(raw) == count * size, "byte size")
        found = [raw[at : at + size] for at in range(0, len(raw), size)]
        need(datatype != "BOOL" or all(item in (b"\0", b"\1") for item in found), "boolean")
        return found
    found = []
    while raw:
        need(len(raw) >= 4, "length indicator")
        (length,) = struct.unpack_from("<I", raw)
        need(len(raw) >= 4 + length, "string data")
        found.append(raw[4 : 4 + length])
        raw = raw[4 + length :]
    need(len(found) == count, "count")
    return found


def is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


class Expected:
    """What an echo graph answers: tensors as (datatype, shape, elements), and how each is sent."""

    def __init__(self, id: str, tensors: dict[str, tuple[str, list[int], list[bytes]]], wanted: list[tuple[str, bool]]) -> None:
        self.id = id
        self.tensors = tensors
        self.wanted = wanted


def expected(declared: dict[str, tuple[str, list[int], bool]], headers: dict[str, str], body: bytes, limit: int) -> Expected:
    """Say what an echo of the inputs answers.

    Raises:
        Invalid: the request has to be refused.
        Unclear: it may be refused.
    """
    need(len(body) <= limit, "too large")
    body = unpack(body, headers.get("content-encoding", ""), limit)
    for name in ("x-request-timeout-ms", "x-envoy-expected-rq-timeout-ms"):
        if name in headers:
            need(re.fullmatch(r"[0-9]+(\.[0-9]*)?([eE][+-]?[0-9]{1,3})?", headers[name]), "timeout")
            need(0 < float(headers[name]) < 1e12, "timeout")
    length = headers.get("inference-header-content-length")
    binary: bytes | None = None
    if length is not None:
        length = length.strip()
        need(re.fullmatch(r"[+-]?[0-9]{1,19}", length, re.ASCII) and len(length) <= 19, "header length")
        need(0 <= int(length) <= len(body), "header length")
        if int(length) == 0:
            return raw(declared, body)
        body, binary = body[: int(length)], body[int(length) :]
    document = parse(body)
    need(type(document) is dict, "object")
    need(document.get("id") is None or type(document["id"]) is str, "id")
    need(type(document.get("inputs")) is list, "inputs")
    tensors: dict[str, tuple[str, list[int], list[bytes]]] = {}
    rest = binary
    for entry in document["inputs"]:
        name, tensor, rest = one_input(entry, declared, rest)
        need(name not in tensors, "twice")
        tensors[name] = tensor
    need(not rest, "surplus")
    need(all(name in tensors or optional for name, (_, _, optional) in declared.items()), "missing")
    parameters = document.get("parameters")
    if parameters is None:
        parameters = {}
    need(type(parameters) is dict, "parameters")
    for key, value in parameters.items():
        need(not key.startswith("triton_") and type(value) in (str, int, float, bool), "parameter")
    need(type(parameters.get("binary_data_output", False)) is bool, "flag")
    for key in ("timeout", "priority"):
        # JSON has 0.0 and -0.0 beside 0; a timeout of 0 in any form is none.
        need(is_count(parameters.get(key, 0)) or (key == "timeout" and parameters[key] == 0), key)
    wanted = requested(document.get("outputs"), parameters.get("binary_data_output", False), tensors)
    for name, in_binary in wanted:
        if not in_binary and tensors[name][0] == "BYTES":
            for item in tensors[name][2]:
                try:
                    item.decode("utf-8")
                except UnicodeDecodeError:
                    raise Invalid("not UTF-8") from None
    if 0 < parameters.get("timeout", 0) < 1_000_000:
        raise Unclear("may be over")
    return Expected(document.get("id") or "", tensors, wanted)


def one_input(entry: Any, declared: Any, rest: bytes | None) -> tuple[str, tuple[str, list[int], list[bytes]], bytes | None]:
    need(type(entry) is dict, "input")
    name, datatype, shape, parameters = (entry.get(key) for key in ("name", "datatype", "shape", "parameters"))
    need(type(name) is str and name in declared, "name")
    need(type(shape) is list and len(shape) <= 64 and all(is_count(size) for size in shape), "shape")
    need(datatype == declared[name][0], "datatype")
    expected_shape = declared[name][1]
    need(len(shape) == len(expected_shape), "rank")
    need(all(b in (-1, a) for a, b in zip(shape, expected_shape, strict=True)), "shape")
    count = math.prod(shape)
    need(count < 2**63, "count")
    if 0 in shape and max(shape) > 2**30:
        raise Unclear("numpy's own limits")
    need(parameters is None or type(parameters) is dict, "parameters")
    parameters = parameters or {}
    need(not any(key.startswith("triton_") or key == "shared_memory_region" for key in parameters), "parameter")
    size = parameters.get("binary_data_size")
    data = entry.get("data")
    need((size is None) != (data is None), "one source")
    if size is None:
        flat = flatten(data)
        need(len(flat) == count, "count")
        return name, (datatype, shape, [number_bits(datatype, item) for item in flat]), rest
    need(is_count(size), "size")
    need(rest is not None and size <= len(rest), "short")
    assert rest is not None
    return name, (datatype, shape, elements(datatype, count, rest[:size])), rest[size:]


def requested(outputs: Any, default: bool, tensors: Any) -> list[tuple[str, bool]]:
    if outputs is None or outputs == []:
        return [(name, default) for name in tensors]
    need(type(outputs) is list, "outputs")
    wanted: dict[str, bool] = {}
    for entry in outputs:
        need(type(entry) is dict and type(entry.get("name")) is str, "output")
        need(entry["name"] in tensors, "unknown output")
        parameters = entry.get("parameters")
        need(parameters is None or type(parameters) is dict, "parameters")
        parameters = parameters or {}
        need(not parameters.get("shared_memory_region"), "not offered")
        classes = parameters.get("classification")
        need(classes is None or (type(classes) is int and classes >= 0), "classification")
        if classes:
            raise Unclear("what classes look like is tested elsewhere")
        flag = parameters.get("binary_data")
        need(flag is None or type(flag) is bool, "flag")
        wanted.setdefault(entry["name"], default if flag is None else flag)
    return list(wanted.items())


def raw(declared: dict[str, tuple[str, list[int], bool]], body: bytes) -> Expected:
    """A body that is the only input."""
    need(len(declared) == 1 and body, "raw")
    ((name, (datatype, shape, _)),) = declared.items()
    if datatype == "BYTES":
        need(len(shape) <= 2 and all(size in (1, -1) for size in shape), "raw")
        return Expected("", {name: (datatype, [1] * len(shape), [body])}, [(name, True)])
    sizes = list(shape)
    if len(sizes) > 1 and sizes[0] == -1:
        sizes[0] = 1
    free = [at for at, size in enumerate(sizes) if size == -1]
    need(len(free) <= 1, "raw")
    if free:
        unit = SIZES[datatype] * math.prod(size for size in sizes if size != -1)
        need(unit and len(body) % unit == 0, "raw")
        sizes[free[0]] = len(body) // unit
    return Expected("", {name: (datatype, sizes, elements(datatype, math.prod(sizes), body))}, [(name, True)])


def difference(want: Expected, headers: dict[str, str], body: bytes) -> str | None:
    """Say in what an answer is not the one expected; None when it is."""
    length = headers.get("inference-header-content-length")
    text, rest = (body, b"") if length is None else (body[: int(length)], body[int(length) :])
    document = json.loads(text)
    if document.get("id", "") != want.id:
        return f"id is {document.get('id')!r}"
    if [output["name"] for output in document["outputs"]] != [name for name, _ in want.wanted]:
        return "outputs are others"
    for output, (name, in_binary) in zip(document["outputs"], want.wanted, strict=True):
        datatype, shape, items = want.tensors[name]
        if (output["datatype"], output["shape"]) != (datatype, shape):
            return f"'{name}' is {output['datatype']} {output['shape']}"
        if in_binary:
            size = output["parameters"]["binary_data_size"]
            got, rest = elements(datatype, len(items), rest[:size]), rest[size:]
            if got != items:
                return f"'{name}' differs"
            continue
        got = [number_bits(datatype, item) for item in output["data"]]
        if any(
            a != b and not (not_a_number(datatype, a) and not_a_number(datatype, b)) for a, b in zip(got, items, strict=True)
        ):
            return f"'{name}' differs"
    return "bytes are left over" if rest else None


def not_a_number(datatype: str, item: bytes) -> bool:
    if datatype == "BF16":
        datatype, item = "FP32", b"\0\0" + item
    if datatype not in ("FP16", "FP32", "FP64"):
        return False
    (number,) = struct.unpack("<" + CODES[datatype], item)
    return bool(number != number)
