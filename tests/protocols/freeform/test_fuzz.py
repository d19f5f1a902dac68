"""Nonsense in every content type: each body is understood or refused, and what was understood can be sent back.

SEEDS are bodies near the edges of the formats, those that once did harm among them; hypothesis
mutates them, and makes documents of its own.
"""

from __future__ import annotations

import tracemalloc

import msgpack
import numpy as np
from hypothesis import example, given, settings, strategies as st

from servinggraph import Body, Graph
from servinggraph.errors import InvalidRequest, NotAcceptable, RequestTooLarge
from servinggraph.protocols.freeform import decode_body, decode_tensors, encode_answer
from servinggraph.protocols.freeform.body import media_of
from servinggraph.protocols.freeform.packing import encode_msgpack
from servinggraph.tensors import TensorSpec

SEEDS = [
    b"",
    b"null",
    b'{"x": [[1, 2], [3, 4]], "s": ["a"], "b": [true]}',
    b'{"instances": [{"x": [1, 2], "s": "a", "b": true}]}',
    b'{"inputs": {"x": [[NaN, -Infinity]], "s": ["\\ud83d\\ude00"], "b": [false]}}',
    b'{"dataframe_split": {"columns": ["x", "s", "b"], "data": [[[1, 2], "a", true]]}}',
    b'{"a": 1e400, "b": -0, "c": 18446744073709551616, "d": "\\ud800"}',
    b"[" * 300 + b"]" * 300,
    b'{"a":' * 300 + b"1" + b"}" * 300,
    b"x,s,b\n1,a,true\n2,,false\n",
    b'"a\n",b\r\n"1""2",3\r\n',
    b"n\n" + b"9" * 5000 + b"\n",
    b"n\n1e9999\n-inf\nnan\n",
    b"\xef\xbb\xbfa,b\n1,2",
    encode_msgpack({"x": np.ones((2, 2), "f4"), "s": np.array([b"a", "é"], object), "b": np.array([True, False])}),
    encode_msgpack([np.zeros((0, 2**20)), np.array(1, "f2"), None, b"\xff", 2**64 - 1, -(2**63)]),
    encode_msgpack({"inputs": {"x": [[1.5, 2]], "s": ["a"], "b": [True]}}),
    msgpack.packb({"t": msgpack.Timestamp(2**40, 5), "e": msgpack.ExtType(86, b"\x04FP32\x02" + bytes(16))}),
    b"\xdd\xff\xff\xff\xff" * 100,
    b"\xdf\x7f\xff\xff\xff\xa1a" * 50,
    b"\x91" * 1000,
    b"\x81\xc4\x01a\x90",
    b"\x82\xa1a\x01\xa1a\x02",
    b"\xd7\xff" + b"\xff" * 8,
    b"\xc9\xff\xff\xff\xffV",
    b"\xd4\x56\x00",
]
TYPES = [
    "application/json", "application/msgpack", "text/csv", "text/csv; header=absent", "text/plain", "image/png",
    "text/plain; charset=utf-16", "text/plain; charset=shift_jis", "application/x+json; charset=utf-8", "text/csv; charset=utf-32",
]  # fmt: skip
ACCEPTS = ["", "application/json", "application/msgpack", "text/csv", "text/plain;q=0.1, */*;q=0.05", "q=;;,,*/*;q=2,a/b;q"]
DECLARED = {"x": TensorSpec("FP32", (-1, 2)), "s": TensorSpec("BYTES", (-1,)), "b": TensorSpec("BOOL", (-1,), optional=True)}

REFUSALS = (InvalidRequest, RequestTooLarge)


@st.composite
def mutated(draw):
    data = draw(st.sampled_from(SEEDS))
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(data)))
        end = min(len(data), at + draw(st.sampled_from((0, 0, 1, 2, 8))))
        data = data[:at] + draw(st.one_of(st.binary(max_size=6), st.just(data[at:end] * 3))) + data[end:]
    return data


documents = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=5), inner, max_size=5),
    max_leaves=30,
)


def with_seeds(test):
    for data in SEEDS:
        for content_type in ("application/json", "application/msgpack", "text/csv"):
            test = example(data, content_type, "")(test)
    return test


@settings(max_examples=1500, deadline=20_000)
@given(mutated() | st.binary(max_size=200), st.sampled_from(TYPES), st.sampled_from(ACCEPTS))
@with_seeds
def test_a_body_is_read_or_refused_and_what_was_read_can_be_sent(data, content_type, accept):
    media = media_of(content_type)
    try:
        value = decode_body(data, media)
    except REFUSALS:
        return
    try:
        encoded = encode_answer(Body(value), accept)
    except NotAcceptable:
        return
    assert encoded.content_type


@settings(max_examples=1500, deadline=20_000)
@given(mutated() | st.binary(max_size=200), st.sampled_from(TYPES), st.just(""))
@with_seeds
def test_tensors_are_the_declared_ones_or_refused(data, content_type, accept):
    try:
        tensors = decode_tensors(data, media_of(content_type), DECLARED, "g")
    except REFUSALS:
        return
    assert {"x", "s"} <= set(tensors) <= set(DECLARED)
    assert np.float32 == tensors["x"].dtype
    assert 2 == tensors["x"].shape[1]


@settings(max_examples=300, deadline=20_000)
@given(documents)
def test_any_document_survives_msgpack(document):
    packed = encode_answer(Body({"it": document}), "application/msgpack").body
    assert repr({"it": document}) == repr(decode_body(packed, media_of("application/msgpack")))


@settings(max_examples=100, deadline=None)
@given(
    mutated(),
    st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=40),
    st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=40),
)
def test_over_http_no_nonsense_is_the_servers_fault(data, content_type, accept):
    for graph in GRAPHS:
        reply = graph.request("POST", "/invocations", data, {"content-type": content_type, "accept": accept})
        assert reply.status in (200, 400, 406, 413, 415), reply
        assert 0 == graph.in_flight


GRAPHS = []
OPEN = []


def setup_module():
    body = Graph("b", "body")
    body.to(lambda value: value, "echo").respond()
    tensors = Graph("t", {"x": ("FP32", [-1, 2]), "s": ("BYTES", [-1])})
    tensors.to(lambda value: value, "echo").respond()
    OPEN.extend(graph.mock() for graph in (body, tensors))
    GRAPHS.extend(mock.__enter__() for mock in OPEN)


def teardown_module():
    for mock in OPEN:
        mock.__exit__(None, None, None)


def test_no_seed_takes_much_memory():
    for data in SEEDS:
        for content_type in TYPES:
            tracemalloc.start()
            try:
                decode_body(data, media_of(content_type))
            except REFUSALS:
                pass
            _, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
            assert peak < 4 * 2**20 + 100 * len(data), (content_type, data[:20], peak)
