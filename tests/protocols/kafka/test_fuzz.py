"""Whatever is in a record, it is answered or given up with a reason: no value and no header is a defect of ours."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from servinggraph import Graph
from servinggraph.errors import ErrorCode, ServingGraphError
from servinggraph.kafka import KafkaOptions, headers as names
from servinggraph.lifecycle import Serving
from servinggraph.protocols.kafka.addressing import Addressing
from servinggraph.protocols.kafka.exchange import Exchange
from servinggraph.protocols.kafka.records import Outgoing, Partition, Work

LEAST = {
    "brokers": "h:1", "input": {"topics": ["in"], "group": "g"}, "output": {"topic": "out", "reply_topics": ["r*"]},
    "errors": {"topic": "dead"},
}  # fmt: skip
V2 = json.dumps({"inputs": [{"name": "x", "datatype": "FP32", "shape": [2], "data": [1, 2]}]}).encode()
EVENT = json.dumps({"specversion": "1.0", "id": "1", "source": "/s", "type": "t", "data": json.loads(V2)}).encode()
TYPES = [
    b"application/json", b"application/x-protobuf", b"application/octet-stream", b"application/msgpack", b"text/csv",
    b"application/cloudevents+json", b"text/plain; charset=nonsense", b"multipart/form-data", b"\xff", b"",
]  # fmt: skip
NAMES = sorted(
    {value for name, value in vars(names).items() if name.isupper() and isinstance(value, str)} | {"ce_id", "content-encoding"}
)

texts = st.one_of(st.binary(max_size=20), st.integers(-5, 10**14).map(lambda number: b"%d" % number), st.none())
headers = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(NAMES), texts), st.tuples(st.just("content-type"), st.sampled_from(TYPES)),
        st.tuples(st.text(max_size=5), texts),
    ),
    max_size=6,
)  # fmt: skip


def cut(value):
    return st.builds(
        lambda start, end, middle: value[:start] + middle + value[end:],
        *[st.integers(0, len(value))] * 2,
        st.binary(max_size=4),
    )


values = st.one_of(st.none(), st.binary(max_size=60), cut(V2), cut(EVENT), st.just(V2), st.just(b"\0\0\0\0\1" + V2))


@pytest.fixture(scope="module")
def ways():
    """Exchanges and addressings of graphs of tensors and of bodies, in every format, on a loop of their own."""
    with asyncio.Runner() as runner:

        async def make():
            serving = Serving()
            graphs = [
                Graph(name, inputs).to(lambda value: value, "step").respond()
                for name, inputs in (("t", {"x": ("FP32", [-1])}), ("b", "body"))
            ]
            await serving.catalog.load([graph.compile() for graph in graphs])
            found = {}
            for form in ("auto", "v2-json", "v2-binary", "v2-protobuf", "msgpack", "json", "raw"):
                for framing in ("none", "confluent"):
                    options = KafkaOptions.model_validate({**LEAST, "format": form, "framing": framing})
                    for name in ("t", "b"):
                        exchange = Exchange(serving, name, options)
                        found[form, framing, name] = exchange, Addressing(options, name, exchange)
            return serving, found

        serving, found = runner.run(make())
        yield runner, found
        runner.run(serving.catalog.stop())


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_every_record_is_answered_or_given_up_with_a_reason(ways, data):
    runner, found = ways
    exchange, addressing = found[data.draw(st.sampled_from(sorted(found)))]
    value, fields = data.draw(values), data.draw(headers)
    record = SimpleNamespace(topic="in", partition=0, offset=1, timestamp=0, key=b"k", value=value, headers=tuple(fields))
    work = Work(Partition(None), record)

    async def run():
        try:
            addressing.checked(work)
            return addressing.answer(work, await exchange.answer(work))
        except ServingGraphError as error:
            assert error.code is not ErrorCode.INTERNAL, error  # noqa: PT017
            work.no_reply = names.REPLY_PARTITION in work.headers  # looked at elsewhere
            return addressing.failure(work, error)

    outgoing = runner.run(run())

    assert isinstance(outgoing, Outgoing)
    assert outgoing.topic
    for name, content in outgoing.headers:
        assert isinstance(name, str)
        assert content is None or isinstance(content, bytes)
