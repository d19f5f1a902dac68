"""Values of records into requests, and what is wrong with them; without a broker."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest

from servinggraph import Graph
from servinggraph.errors import InvalidRequest, ServingGraphError
from servinggraph.messages import InferenceResponse
from servinggraph.protocols.kafka.cloudevents import event_headers, is_structured, unwrapped
from servinggraph.protocols.kafka.codec import decode
from servinggraph.protocols.kafka.framing import unframed
from servinggraph.protocols.kafka.records import Partition, Work
from servinggraph.protocols.v2 import RequestLimits

V2 = b'{"inputs": [{"name": "x", "datatype": "FP32", "shape": [2], "data": [1, 2]}]}'
X = np.array([1, 2], np.float32)


def plan(inputs=None):
    return Graph("g", inputs or {"x": ("FP32", [-1])}).to(lambda value: value, "step").respond().compile()


def decoded(value, form="auto", inputs=None, **headers):
    fields = {name.replace("_", "-"): text.encode() for name, text in headers.items()}
    return decode(value, fields, form, plan(inputs), RequestLimits())


@pytest.mark.parametrize(
    ("value", "form", "headers"),
    [
        (V2, "auto", {}),
        (V2, "auto", {"content_type": "application/json; charset=utf-8"}),
        (V2, "v2-json", {"content_type": "text/plain"}),
        (X.tobytes(), "auto", {"content_type": "application/octet-stream"}),
        (X.tobytes(), "raw", {}),
        (X.tobytes(), "auto", {"inference_header_content_length": "0"}),
        (b'{"x": [1, 2]}', "json", {}),
        (b'{"x": [1, 2]}', "auto", {"content_type": "application/json"}),
        (b'{"inputs": {"x": [1, 2]}}', "auto", {"content_type": "application/json"}),
        (b"\x81\xa1x\x92\x01\x02", "msgpack", {}),
        (b"\x81\xa1x\x92\x01\x02", "auto", {"content_type": "application/msgpack"}),
        (b"x\n1\n2\n", "auto", {"content_type": "text/csv"}),
    ],
)
def test_a_value_is_understood_by_its_format_or_content_type(value, form, headers):
    assert [1, 2] == decoded(value, form, **headers).request.inputs["x"].tolist()


@pytest.mark.parametrize(
    ("value", "form", "headers", "text"),
    [
        (V2, "v2-binary", {}, "needs the header 'inference-header-content-length'"),
        (V2, "auto", {"inference_header_content_length": "x"}, "is a whole number, got 'x'"),
        (V2, "auto", {"inference_header_content_length": "999"}, "should be in range"),
        (b"{", "auto", {}, "failed to parse the request JSON buffer"),
        (b"\xff", "v2-protobuf", {}, "failed to parse the request as inference.ModelInferRequest"),
        (b"", "auto", {"content_type": "application/octet-stream"}, "has an empty body"),
        (V2, "auto", {"content_type": "image/png"}, "image/png holds none"),
        (V2, "auto", {"content_type": "nonsense"}, "is no media type"),
    ],
)
def test_what_cannot_be_understood_is_the_sender_s_mistake(value, form, headers, text):
    with pytest.raises(InvalidRequest, match=text):
        decoded(value, form, **headers)


def test_an_answer_has_the_form_of_its_request_unless_the_request_accepts_another():
    response = InferenceResponse("g", "1", {"x": X})
    as_document = decoded(b'{"x": [1, 2]}', "json").encode(response)
    as_msgpack = decoded(b'{"x": [1, 2]}', "json", accept="application/msgpack").encode(response)
    like_msgpack = decoded(b"\x81\xa1x\x92\x01\x02", "msgpack").encode(response)

    assert ({"x": [1, 2]}, [("content-type", b"application/json")]) == (json.loads(as_document.value), as_document.headers)
    assert [("content-type", b"application/msgpack")] == as_msgpack.headers == like_msgpack.headers


def test_a_body_comes_as_its_content_type_says():
    assert {"a": 1} == decoded(b'{"a": 1}', inputs="body", content_type="application/json").request.inputs.value
    assert b"\x00" == decoded(b"\x00", inputs="body").request.inputs.value


@pytest.mark.parametrize(
    ("value", "protobuf", "rest"),
    [
        (b"\0\0\0\0\7{}", False, b"{}"),
        (b"\0\0\0\0\7\0abc", True, b"abc"),  # the first message of the file
        (b"\0\0\0\0\7\4\2\0abc", True, b"abc"),  # two indexes
        (b"\0\0\0\0\7\4\x82\2\0abc", True, b"abc"),  # one of them of two bytes
    ],
)
def test_a_schema_id_before_a_value_is_taken_off(value, protobuf, rest):
    assert rest == unframed(value, protobuf=protobuf)


@pytest.mark.parametrize(
    ("value", "protobuf"),
    [(b"{}", False), (b"\1\0\0\0\7{}", False), (b"", False), (b"\0\0\0\0\7", True), (b"\0\0\0\0\7\3", True), (b"\0\0\0\0\7\xff\xff", True)],
)  # fmt: skip
def test_a_value_without_its_schema_id_is_the_sender_s_mistake(value, protobuf):
    with pytest.raises(InvalidRequest):
        unframed(value, protobuf=protobuf)


EVENT = {"specversion": "1.0", "id": "1", "source": "/s", "type": "t", "datacontenttype": "text/plain", "shop": "5"}


def test_an_event_is_unwrapped_to_what_it_would_be_in_binary_mode():
    headers = {"content-type": b"application/cloudevents+json; charset=utf-8", "mine": b"1"}
    assert is_structured(headers)
    for data in ({"data": "text"}, {"data_base64": "dGV4dA=="}):
        value, fields = unwrapped(json.dumps(EVENT | data).encode(), headers)
        assert b"text" == value
        assert {"ce_id": b"1", "ce_shop": b"5", "content-type": b"text/plain", "mine": b"1"}.items() <= fields.items()


@pytest.mark.parametrize(
    "event",
    [b"[]", b"{}", b"{", json.dumps(EVENT).encode(), json.dumps(EVENT | {"data_base64": "?"}).encode(),
     json.dumps(EVENT | {"id": 5, "data": 1}).encode(), json.dumps(EVENT | {"datacontenttype": 5, "data": 1}).encode()],
)  # fmt: skip
def test_what_is_no_event_is_the_sender_s_mistake(event):
    with pytest.raises(ServingGraphError):
        unwrapped(event, {})


def test_an_answer_that_is_written_again_after_a_crash_is_the_same_event():
    record = SimpleNamespace(
        topic="in",
        partition=3,
        offset=9,
        timestamp=0,
        key=b"",
        value=b"",
        headers=[("ce_id", b"1"), ("ce_specversion", b"1.0")],
    )
    work = Work(Partition(None), record)

    assert event_headers(work, "g", "servinggraph.answer") == event_headers(work, "g", "servinggraph.answer")
    assert ("ce_id", b"g:in/3/9") in event_headers(work, "g", "servinggraph.answer")
