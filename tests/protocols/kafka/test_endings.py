"""Records about which something is odd: each ends in one place, once, and none keeps the others waiting."""

from __future__ import annotations

import gc
import gzip
import json
import sys
from collections import Counter
from pathlib import Path

import pytest
from aiokafka import AIOKafkaProducer

from servinggraph.clients.dead_letters import Selection, replay
from servinggraph.kafka import ConnectionOptions
from servinggraph.protocols.kafka import delivery as deliveries

pytestmark = pytest.mark.anyio

path = str(Path(__file__).with_name("conftest.py"))
here = next(module for module in sys.modules.values() if getattr(module, "__file__", None) == path)
body, values, header, until, double = here.body, here.values, here.header, here.until, here.double
numbers = here.numbers


@pytest.mark.parametrize("partition", [b"7", b"abc"])
async def test_the_reply_partition_of_a_reply_that_is_not_allowed_means_nothing(kit, partition):
    kafka = await kit.options()
    del kafka["errors"]
    headers = [("x-reply-topic", b"anywhere"), ("x-reply-partition", partition)]
    async with kit.serve(double, kafka) as served:
        await kit.send(served.input, {"key": b"odd", "value": body(1), "headers": headers}, (b"other", body(2)))
        answers = await kit.read(served.output, 2)
        assert 0 == served.report["reconnects"]

    assert {b"odd": "invalid_request", b"other": "ok"} == {answer.key: header(answer, "x-status") for answer in answers}


async def test_an_event_whose_content_type_has_no_value_is_answered(kit):
    kafka = await kit.options()
    headers = [("ce_id", b"e-1"), ("ce_specversion", b"1.0"), ("content-type", None)]
    async with kit.serve(double, kafka) as served:
        await kit.send(served.input, {"value": body(1), "headers": headers})
        (answer,) = await kit.read(served.output, 1)
        assert 0 == served.report["reconnects"]

    assert "e-1" == header(answer, "ce_causeid")


async def test_what_a_request_says_of_its_own_body_is_not_said_of_the_answer(kit):
    kafka = await kit.options()
    chained = [("ce_id", b"e-2"), ("ce_specversion", b"1.0"), ("ce_causeid", b"e-1")]
    async with kit.serve(double, kafka) as served:
        packed = {"key": b"packed", "value": gzip.compress(body(1)), "headers": [("content-encoding", b"gzip")]}
        await kit.send(served.input, packed, {"key": b"event", "value": body(2), "headers": chained})
        answers = {answer.key: answer for answer in await kit.read(served.output, 2)}

    assert [2.0] == values(answers[b"packed"])
    assert "content-encoding" not in dict(answers[b"packed"].headers)
    assert [b"e-2"] == [content for name, content in answers[b"event"].headers if name == "ce_causeid"]


async def test_an_id_in_a_header_may_have_any_characters(kit):
    kafka = await kit.options()
    async with kit.serve(double, kafka) as served:
        await kit.send(
            served.input, *({"value": body(1), "headers": [("x-request-id", name)]} for name in ("ü-1".encode(), b"\xff"))
        )
        answers = await kit.read(served.output, 2)

    assert {"ü-1", "ÿ"} == {json.loads(answer.value)["id"] for answer in answers}


async def test_odd_keys_and_headers_come_back_as_they_were(kit):
    kafka = await kit.options()
    odd = [("n", None), ("n", b"1"), ("n", b"\xff"), ("", b"2"), ("ü", b"3")]
    async with kit.serve(double, kafka) as served:
        await kit.send(served.input, {"key": None, "value": body(1), "headers": odd})
        await kit.send(
            served.input, {"key": b"", "value": None}, {"key": b"t", "value": None, "headers": [("x-deadline", b"-5")]}
        )
        (answer,) = await kit.read(served.output, 1)
        letters = {letter.key: letter for letter in await kit.read(served.dead, 2)}
        assert 0 == served.report["reconnects"]

    assert (None, odd) == (answer.key, list(answer.headers[-len(odd) :]))
    assert {b"", b"t"} == set(letters)
    assert "got '-5'" in header(letters[b"t"], "x-dead-message")


@pytest.mark.parametrize("dead", [True, False])
@pytest.mark.parametrize("large", ["headers", "key"])
async def test_what_is_too_large_to_be_given_back_is_left_out_so_that_others_go_on(kit, dead, large):
    """Headers and keys go along with errors and dead letters, whose topics may take less than the input's."""
    kafka = await kit.options()
    if not dead:
        del kafka["errors"]
    wide = await kit.broker.topic("wide", settings={"max.message.bytes": "9000000"})
    kafka["input"]["topics"] = [wide]
    parts = {"headers": [("mine", b"x" * 3_000_000), ("x-request-id", b"r-1")], "key": b"k"}
    if large == "key":
        parts = {"headers": [("x-request-id", b"r-1")], "key": b"x" * 3_000_000}
    async with kit.serve(double, kafka) as served:
        async with AIOKafkaProducer(bootstrap_servers=kit.address, max_request_size=9_000_000) as producer:
            await producer.send_and_wait(wide, body(1), **parts)
            await producer.send_and_wait(wide, body(2), key=b"other")
        answers = await kit.read(served.output, 1 if dead else 2)
        told = await kit.read(served.dead, 1) if dead else [each for each in answers if header(each, "x-status") != "ok"]

    assert [4.0] == next(values(answer) for answer in answers if answer.key == b"other")
    (record,) = told
    assert "too_large" == header(record, "x-dead-error" if dead else "x-status")
    assert "r-1" == header(record, "x-request-id")
    assert (b"k" if large == "headers" else None) == record.key
    assert "mine" not in dict(record.headers)
    if dead:
        assert str(len(body(1))) == header(record, "x-dead-left-out")


@pytest.mark.timeout(150)
@pytest.mark.parametrize("delivery", ["at_least_once", "exactly_once"])
async def test_many_answers_that_the_topic_finds_too_large_are_given_up_once_each_and_none_is_answered_twice(
    kit, delivery, caplog, monkeypatch
):
    monkeypatch.setattr(deliveries, "_KEEP_S", 20.0)  # else what a slow machine has not committed comes twice

    def grow(value):
        return {"y": value["x"].repeat(20_000 if value["x"][0] < 8 else 1)}

    gc.collect()  # what others have left
    caplog.clear()
    kafka = await kit.options(delivery=delivery, transaction={"interval_ms": 20})
    kafka["output"] = {"topic": await kit.broker.topic("small", settings={"max.message.bytes": "20000"})}
    async with kit.serve(grow, kafka) as served:
        await kit.send(served.input, *(body(number) for number in range(30)))
        letters = await kit.read(served.dead, 8, patience_s=60)  # each costs a connection
        answers = await kit.read(served.output, 22, patience_s=60)

    assert [body(number) for number in range(8)] == sorted(letter.value for letter in letters)
    assert {"too_large"} == {header(letter, "x-dead-error") for letter in letters}
    assert Counter(map(float, range(8, 30))) == Counter(numbers(answers))
    gc.collect()
    unseen = [record.getMessage() for record in caplog.records if "never retrieved" in record.getMessage()]
    assert [] == [text for text in unseen if "MessageSizeTooLarge" in text]


async def test_a_dead_letter_that_is_sent_back_is_no_duplicate(kit):
    mended = []

    def broken_at_first(value):
        if not mended:
            raise ValueError("no such column")
        return {"y": value["x"]}

    kafka = await kit.options(duplicates=100)
    async with kit.serve(broken_at_first, kafka) as served:
        record = {"key": b"k", "value": body(7), "headers": [("x-request-id", b"r-1")]}
        await kit.send(served.input, record)
        await kit.read(served.dead, 1, quiet_s=0)
        mended.append(True)
        assert 1 == (await replay(ConnectionOptions(brokers=kit.address), served.dead, Selection())).sent.total()
        await kit.read(served.output, 1, quiet_s=0)
        await kit.send(served.input, record)  # answered by now
        await until(lambda: served.report["duplicates"] == 1, lambda: served.report)
        assert [[7.0]] == [values(answer) for answer in await kit.read(served.output, 1)]
