"""Answers out: which type the caller gets, and what it looks like."""

import dataclasses
import enum
import uuid
from datetime import date

import ml_dtypes
import msgpack
import numpy as np
import pytest

from servinggraph import Body
from servinggraph.errors import NotAcceptable, StepFailed
from servinggraph.protocols.freeform import decode_body, encode_answer
from servinggraph.protocols.freeform.body import media_of


def encoded(value, accept=""):
    answer = encode_answer(value if isinstance(value, Body) else Body(value), accept)
    return answer.content_type, answer.body


@pytest.mark.parametrize("accept", ["", "*/*", "application/json", "application/*;q=0.5, image/png"])
def test_documents_are_json_unless_something_else_is_asked_for(accept):
    assert ("application/json", b'{"a":[1,null,"x"]}') == encoded({"a": [1, None, "x"]}, accept)


@pytest.mark.parametrize(
    ("value", "accept", "content_type"),
    [
        ("a", "", "text/plain; charset=utf-8"),
        ("a", "application/json", "application/json"),
        ("a", "text/*", "text/plain; charset=utf-8"),
        ("a", "application/json, text/plain;q=0.9", "application/json"),
        ("a", "application/json;q=0.1, */*;q=0.2", "text/plain; charset=utf-8"),
        ("a", "text/plain;q=0, */*", "application/json"),
        (b"a", "", "application/octet-stream"),
        (b"a", "application/x-msgpack", "application/x-msgpack"),
        ({}, "application/msgpack", "application/msgpack"),
        ({}, "application/vnd.msgpack, application/json;q=0.5", "application/vnd.msgpack"),
        ({}, "application/json;q=0.5, application/msgpack;q=0.500", "application/json"),
        ({}, "APPLICATION/JSON;Q=1.0", "application/json"),
        ({}, "application/json;q=x, application/msgpack;q=0.1", "application/msgpack"),
        ({"a": [1]}, "text/csv", "text/csv; charset=utf-8"),
        ({"a": 1}, "text/csv, application/json;q=0.1", "application/json"),
    ],
)
def test_the_accept_header_chooses(value, accept, content_type):
    assert content_type == encoded(value, accept)[0]


@pytest.mark.parametrize(
    ("value", "accept", "text"),
    [
        ({"a": 1}, "image/png", "application/json, application/msgpack"),
        ({"a": 1}, "text/csv", "application/json, application/msgpack"),
        ({"a": 1}, "*/*;q=0", "application/json"),
        (b"a", "application/json", "application/octet-stream"),
        (Body(b"a", "image/png"), "image/jpeg, application/json", "can be given as image/png"),
        ({"a": b"\xff"}, "application/json", "not UTF-8.*accept application/msgpack"),
        ({"a": [b"\xff"]}, "text/csv", "not UTF-8"),
    ],
)
def test_what_the_caller_does_not_take_is_refused_with_what_there_is(value, accept, text):
    with pytest.raises(NotAcceptable, match=text):
        encoded(value, accept)


def test_a_step_may_give_the_type_of_its_content():
    assert ("image/png", b"\x89PNG") == encoded(Body(b"\x89PNG", "image/png"), "image/*")
    assert ("text/html; charset=utf-8", "é".encode()) == encoded(Body("é", "text/html"))
    assert ("application/problem+json", b'{"title":"x"}') == encoded(Body({"title": "x"}, "application/problem+json"))


@pytest.mark.parametrize(
    "body", [Body(b"", "png"), Body(b"", "a/b\r\nX: y"), Body({}, "image/png"), Body("\ud800", "text/plain")]
)
def test_a_type_that_cannot_be_sent_is_the_steps_failure(body):
    with pytest.raises(StepFailed):
        encoded(body)


class Colour(enum.Enum):
    RED = "red"


@dataclasses.dataclass
class Point:
    x: float
    y: object


def test_objects_of_many_kinds_are_json():
    value = {
        "matrix": np.arange(4, dtype="f4").reshape(2, 2).T,
        "scalar": np.float64(0.5),
        "flag": np.bool_(True),  # noqa: FBT003
        "words": np.array(["a", "é"]),
        "bytes": np.array([b"a"], object),
        "brain": np.array([1.5], ml_dtypes.bfloat16),
        "pair": (1, 2),
        "point": Point(1.0, np.int64(3)),
        "colour": Colour.RED,
        "day": date(2024, 1, 2),
        "id": uuid.UUID(int=1),
    }
    assert {
        "matrix": [[0, 2], [1, 3]], "scalar": 0.5, "flag": True, "words": ["a", "é"], "bytes": ["a"], "brain": [1.5],
        "pair": [1, 2], "point": {"x": 1.0, "y": 3}, "colour": "red", "day": "2024-01-02",
        "id": "00000000-0000-0000-0000-000000000001",
    } == decode_body(encoded(value)[1], media_of("application/json"))  # fmt: skip
    strange = decode_body(encoded({**value, "none": None, "nan": np.array([np.nan, np.inf])})[1], media_of("application/json"))
    assert None is strange.pop("none")
    assert "[nan, inf]" == str(strange.pop("nan"))
    assert strange == decode_body(encoded(value)[1], media_of("application/json"))


def test_not_a_number_goes_out_as_a_bare_token():
    assert b"[NaN,Infinity,null]" == encoded([float("nan"), float("inf"), None])[1]


def test_arrays_go_out_as_arrays_in_msgpack_and_scalars_as_numbers():
    got = decode_body(
        encoded({"a": np.ones((1, 2), "f2"), "b": np.int8(3)}, "application/msgpack")[1], media_of("application/msgpack")
    )

    assert np.float16 == got["a"].dtype
    assert 3 == got["b"]


def test_a_client_without_the_extension_can_read_the_rest():
    got = msgpack.unpackb(encoded({"a": np.zeros(1, "u1"), "b": "x"}, "application/msgpack")[1])
    assert {"a": msgpack.ExtType(86, b"\x05UINT8\x01\x01" + bytes(7) + b"\x00"), "b": "x"} == got


@pytest.mark.parametrize(
    "value", [{1: "a"}, {"a": 1j}, {"a": {1, 2}}, [2**70], "\ud800" * 2, {"a": np.zeros(1, "c8")}, object()]
)
@pytest.mark.parametrize("accept", ["application/json", "application/msgpack"])
def test_what_a_format_cannot_carry_is_the_steps_failure(value, accept):
    if value == {1: "a"} and accept.endswith("msgpack"):
        assert {1: "a"} == msgpack.unpackb(encoded(value, accept)[1], strict_map_key=False)
        return
    with pytest.raises(StepFailed):
        encoded(value, accept)


def test_a_value_that_holds_itself_is_the_steps_failure():
    ring = []
    ring.append(ring)
    for accept in ("application/json", "application/msgpack"):
        with pytest.raises(StepFailed, match="cannot carry"):
            encoded(ring, accept)


@pytest.mark.parametrize(
    ("value", "table"),
    [
        ({"a": np.array([1, 2]), "b": ["x", 'y"z']}, 'a,b\r\n1,x\r\n2,"y""z"\r\n'),
        ({"a": np.array([[1.5], [np.nan]])}, 'a\r\n1.5\r\n""\r\n'),
        ({"p": np.array([[1, 2], [3, 4]])}, "p.0,p.1\r\n1,2\r\n3,4\r\n"),
        ([{"a": 1, "b": None}, {"a": True, "b": b"z"}], "a,b\r\n1,\r\ntrue,z\r\n"),
    ],
)
def test_tables_go_out_as_csv(value, table):
    assert table.encode() == encoded(value, "text/csv")[1]


@pytest.mark.parametrize("value", [{"a": [1], "b": [1, 2]}, {"a": [[1]]}, [{"a": 1}, {"b": 1}], [1], 1, {}, []])
def test_what_is_no_table_is_not_sent_as_one(value):
    with pytest.raises(NotAcceptable):
        encoded(value, "text/csv")
