"""Bodies in: what each content type becomes, and what is refused."""

import struct
import tracemalloc
from datetime import UTC, datetime

import msgpack
import numpy as np
import pytest

from servinggraph.errors import InvalidRequest, RequestTooLarge, UnsupportedType
from servinggraph.protocols.freeform import bounds, decode_body
from servinggraph.protocols.freeform.body import media_of
from servinggraph.protocols.freeform.packing import ARRAY, encode_msgpack


def decoded(data, content_type):
    return decode_body(data, media_of(content_type))


@pytest.mark.parametrize(
    "content_type", ["application/json", "Application/JSON; charset=UTF-8", "application/vnd.api+json", "text/json"]
)
def test_json_becomes_python_objects(content_type):
    assert {"a": [1, 2.5, None, True, "é"]} == decoded('{"a":[1,2.5,null,true,"é"]}'.encode(), content_type)


def test_json_may_hold_what_is_not_a_number():
    assert [float("inf"), -float("inf")] == decoded(b"[Infinity,-Infinity]", "application/json")
    assert np.isnan(decoded(b"NaN", "application/json"))


@pytest.mark.parametrize("content_type", ["application/msgpack", "application/x-msgpack", "application/vnd.x+msgpack"])
def test_msgpack_becomes_python_objects(content_type):
    value = {"a": [1, -2.5, None, True, "é", b"\xff"], "at": datetime(2024, 1, 2, tzinfo=UTC)}
    assert value == decoded(msgpack.packb(value, datetime=True), content_type)


def test_text_is_read_in_its_charset():
    assert "é€" == decoded("é€".encode(), "text/plain")
    assert "é" == decoded("é".encode("latin-1"), "text/plain; charset=ISO-8859-1")
    assert "é" == decoded("é".encode("utf-16"), 'text/html; charset="utf-16"')


def test_a_byte_order_mark_is_no_part_of_a_text():
    assert "a" == decoded(b"\xef\xbb\xbfa", "text/plain")
    assert ["n"] == list(decoded(b"\xef\xbb\xbfn\r\n1\r\n", "text/csv"))


@pytest.mark.parametrize("content_type", ["image/png", "application/octet-stream", "application/pdf", "", None])
def test_anything_else_stays_bytes(content_type):
    assert b"\x00\xff" == decoded(b"\x00\xff", content_type)


def test_a_table_becomes_columns_of_numbers_and_text():
    table = decoded(b'amount,n,zip,name,gap\r\n1.5,1,01234,"a, b",\r\n-2e3,-20,99999,,7\r\n', "text/csv")

    assert ["amount", "n", "zip", "name", "gap"] == list(table)
    assert [np.float64, np.int64, object, object, np.float64] == [column.dtype for column in table.values()]
    assert [1.5, -2000.0] == table["amount"].tolist()
    assert [1, -20] == table["n"].tolist()
    assert ["01234", "99999"] == table["zip"].tolist()
    assert ["a, b", ""] == table["name"].tolist()
    assert np.isnan(table["gap"][0])
    assert 7.0 == table["gap"][1]


def test_a_table_without_header_has_numbered_columns():
    assert {"0": [1, 3], "1": [2, 4]} == {
        name: column.tolist() for name, column in decoded(b"1,2\n3,4\n", "text/csv; header=absent").items()
    }


def test_numbers_beyond_64_bits_stay_text():
    assert [str(2**70)] == decoded(f"n\n{2**70}\n".encode(), "text/csv")["n"].tolist()


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6, dtype="f4").reshape(2, 3),
        np.array(7, "u1"),
        np.zeros((0, 3), "i8"),
        np.array([[True, False]]),
        np.array([b"a", b"", b"\xff"], object),
    ],
    ids=str,
)
def test_arrays_travel_in_msgpack(array):
    got = decoded(encode_msgpack({"x": array}), "application/msgpack")["x"]

    assert array.dtype == got.dtype
    assert array.shape == got.shape
    assert array.tolist() == got.tolist()


def test_a_decoded_array_is_a_view_that_cannot_be_written():
    got = decoded(encode_msgpack(np.arange(1000)), "application/msgpack")

    assert not got.flags.writeable
    assert not got.flags.owndata


def extension(datatype=b"FP32", axes=None, shape=(2,), data=bytes(8), code=ARRAY):
    axes = len(shape) if axes is None else axes
    payload = bytes([len(datatype)]) + datatype + bytes([axes]) + struct.pack(f"<{len(shape)}Q", *shape) + data
    return msgpack.packb(msgpack.ExtType(code, payload))


def test_the_layout_of_an_array_is_the_documented_one():
    array = np.array([[1.0, 2.0]], "f4")
    assert extension(shape=(1, 2), data=array.tobytes()) == encode_msgpack(array)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (extension(datatype=b"FP12"), "datatype 'FP12'"),
        (extension(shape=(3,)), "that is 12 bytes, but 8 came"),
        (extension(shape=(2**63, 2**63)), "impossible shape"),
        (extension(shape=(0, 2**63), data=b""), "impossible shape"),
        (extension(axes=200), "200 axes"),
        (extension(axes=3), "cut off within its shape"),
        (extension(datatype=b"BYTES", shape=(1,), data=b"\xff\xff\xff\xffab"), "incomplete string data"),
        (extension(datatype=b"BYTES", shape=(2**60,), data=b"\x01\x00\x00\x00a"), "string elements"),
        (extension(datatype=b"BOOL", data=b"\x00\x02"), "neither 0 nor 1"),
        (msgpack.packb(msgpack.ExtType(ARRAY, b"")), "cut off before its shape"),
        (msgpack.packb(msgpack.ExtType(ARRAY, b"\xffFP32")), "cut off before its shape"),
        (msgpack.packb(msgpack.ExtType(5, b"abc")), "extension type 5"),
    ],
)
def test_an_array_that_does_not_fit_its_payload_is_refused(data, text):
    with pytest.raises(InvalidRequest, match=text):
        decoded(data, "application/msgpack")


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", "cut off after 0 bytes"),
        (b"\xc1", "no msgpack"),
        (b"\x92\x01", "cut off after 2 bytes"),
        (b"\x01\x02", "1 bytes follow"),
        (b"\x81\x01\x02", "key"),
        (b"\x81\xc4\x01a\x02", "keys that are no text"),
        (b"\xa1\xff", "no msgpack"),
        (b"\xd7\xff" + b"\xff" * 8, "no msgpack"),
        (b"\x91" * 101 + b"\x01", "nesting exceeds"),
        (b"\x91" * 100_000, "no msgpack"),
    ],
)
def test_what_is_no_msgpack_is_refused(data, text):
    with pytest.raises(InvalidRequest, match=text):
        decoded(data, "application/msgpack")


def test_a_list_that_claims_more_than_there_is_costs_nothing():
    # 500 lists, one in the other, each claiming 4 million elements: 16 GB if they were made.
    bomb = b"\xdd\x00\x40\x00\x00" * 500 + bytes(4_200_000)
    tracemalloc.start()
    with pytest.raises(InvalidRequest, match="cut off"):
        decoded(bomb, "application/msgpack")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert peak < 5 * len(bomb)


def test_documents_with_too_many_containers_are_refused(monkeypatch):
    count = bounds.MAX_CONTAINERS + 1
    with pytest.raises(RequestTooLarge, match="more than 1000000 arrays"):
        decoded(b"\xdd" + count.to_bytes(4, "big") + b"\x90" * count, "application/msgpack")
    with pytest.raises(RequestTooLarge, match="more than 1000000 arrays"):
        decoded(b"[" + b"[]," * count + b"1]", "application/json")


def test_a_document_of_100_levels_is_read_and_one_of_101_is_not():
    for content_type, opening, closing in (("application/json", b"[", b"]"), ("application/msgpack", b"\x91", b"")):
        innermost = b"1" if closing else b"\x01"
        assert decoded(opening * 100 + innermost + closing * 100, content_type)
        with pytest.raises(InvalidRequest, match="maximum allowed depth"):
            decoded(opening * 101 + innermost + closing * 101, content_type)


@pytest.mark.parametrize("data", [b"", b"{", b'{"a":1}}', b"\xff", b"[1,]", b'{"a":\x00}'])
def test_what_is_no_json_is_refused(data):
    with pytest.raises(InvalidRequest, match="JSON"):
        decoded(data, "application/json")


@pytest.mark.parametrize(
    ("content_type", "text"),
    [
        ("json", "no media type"),
        ("application/", "no media type"),
        ("a/b c", "no media type"),
        ("x/" + "y" * 2000, "no media type"),
        ("text/plain; charset=klingon", "charset 'klingon' is unknown"),
        ("text/plain; charset=punycode", "charset 'punycode' is unknown"),
        ("text/plain; charset=base64", "charset 'base64' is unknown"),
        ('text/plain; charset="\\\x00"', "charset|media type"),
        ("application/json; charset=latin-1", "JSON is UTF-8"),
        ("text/csv; header=maybe", "present or absent"),
        ("application/x-www-form-urlencoded", "-H 'Content-Type: application/json'"),
        ("multipart/form-data; boundary=x", "forms"),
    ],
)
def test_types_and_charsets_that_cannot_be_taken_are_named(content_type, text):
    with pytest.raises(UnsupportedType, match=text):
        decoded(b"1", content_type)


def test_bytes_that_a_charset_does_not_have_are_placed():
    with pytest.raises(InvalidRequest, match="no text in utf-8: invalid start byte at byte 1"):
        decoded(b"a\xff", "text/plain")


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", "the table is empty"),
        (b"\n\n", "the table is empty"),
        (b"a,a\n1,2\n", "two columns of the table are called 'a'"),
        (b"a,b\n1\n", "line 2 of the table has 1 cells, expected 2"),
        (b'a\n"x', "no CSV"),
        (b'a\n"x"y\n', "no CSV"),
        (b"," * 10_001, "10002 columns"),
    ],
)
def test_what_is_no_table_is_refused(data, text):
    with pytest.raises(InvalidRequest, match=text):
        decoded(data, "text/csv")


def test_a_table_with_too_many_cells_is_refused():
    with pytest.raises(RequestTooLarge, match="more than 4000000 cells"):
        decoded((b"1," * 999 + b"1\n") * 4001, "text/csv; header=absent")
