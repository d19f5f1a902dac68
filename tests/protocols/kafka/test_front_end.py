"""From topic to topic, on a real broker."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

import pytest
from aiokafka import AIOKafkaProducer

from servinggraph import Graph
from servinggraph.errors import Unavailable

pytestmark = pytest.mark.anyio


def _conftest():
    # By path: tests are imported with importlib, which gives files of a folder no common package.
    path = Path(__file__).with_name("conftest.py")
    return next(module for module in sys.modules.values() if getattr(module, "__file__", None) == str(path))


here = _conftest()
body, values, header, until, double = here.body, here.values, here.header, here.until, here.double


async def test_a_request_in_the_input_topic_has_its_answer_in_the_output_topic(kit):
    kafka = await kit.options()
    async with kit.serve(double, kafka) as served:
        await kit.send(served.input, {"key": b"k", "value": body(1, 2, id="7"), "headers": [("mine", b"\x00\xff")]})
        (answer,) = await kit.read(served.output, 1)

    assert (b"k", [2.0, 4.0], "7") == (answer.key, values(answer), json.loads(answer.value)["id"])
    assert [("content-type", b"application/json"), ("x-status", b"ok"), ("mine", b"\x00\xff")] == list(answer.headers)


async def test_records_that_end_in_any_order_are_committed_only_up_to_the_first_that_has_not(kit):
    gates = {}

    async def wait(value):
        x = value["x"]
        await gates.setdefault(x[0], asyncio.Event()).wait()
        return {"y": x}

    kafka = await kit.options(commit={"interval_ms": 20})
    async with kit.serve(wait, kafka) as served:
        await kit.send(served.input, *((bytes([i]), body(i)) for i in range(4)))
        await until(lambda: len(gates) == 4)
        gates[2].set(), gates[0].set()
        await until(lambda: served.report["produced"] == 2)
        assert [1, 1] == [await served.committed(at_least=1), served.report["positions"][f"{served.input}/0"]]
        gates[1].set()
        assert 3 == await served.committed(at_least=3)
        gates[3].set()
        await kit.read(served.output, 4)

    assert 4 == await served.committed()


async def test_what_cannot_be_answered_is_a_dead_letter_and_harms_nobody(kit):
    def strict(value):
        x = value["x"]
        if x[0] < 0:
            raise ValueError("negative")
        return {"y": x}

    kafka = await kit.options()
    async with kit.serve(strict, kafka) as served:
        poison = {"key": b"b", "value": b"{nonsense", "headers": [("mine", b"1")]}
        await kit.send(served.input, (b"a", body(1)), poison, (b"c", body(-1)), (b"d", body(2)))
        answers = await kit.read(served.output, 2)
        letters = await kit.read(served.dead, 2)

    assert {(b"a", 1.0), (b"d", 2.0)} == {(answer.key, values(answer)[0]) for answer in answers}
    undecoded, failed = sorted(letters, key=lambda letter: letter.key)
    assert (b"{nonsense", "1", "invalid_request") == (
        undecoded.value,
        header(undecoded, "mine"),
        header(undecoded, "x-dead-error"),
    )
    assert ("internal", "step", "ValueError: negative") == tuple(
        header(failed, name) for name in ("x-dead-error", "x-dead-node", "x-dead-message")
    )
    assert ("2", "0", served.input, "1", "g", "1") == tuple(
        header(failed, f"x-dead-{name}") for name in ("offset", "partition", "topic", "attempts", "graph", "graph-version")
    )
    assert "test_front_end.py" in header(failed, "x-dead-stack")
    assert body(-1) == failed.value
    assert 4 == await served.committed()


async def test_a_failure_that_may_pass_is_tried_again_and_holds_up_only_its_own_key(kit):
    tries, passed = [], asyncio.Event()

    async def shaky(value):
        x = value["x"]
        tries.append(x[0])
        if x[0] == 1:
            if tries.count(1) < 3:
                raise Unavailable("the store is down")
            await passed.wait()
        return {"y": x}

    kafka = await kit.options(retry={"first_ms": 100.0})
    async with kit.serve(shaky, kafka) as served:
        await kit.send(served.input, (b"a", body(1)), (b"a", body(2)), *((b"b", body(10 + i)) for i in range(5)))
        await kit.read(served.output, 5, quiet_s=0)
        passed.set()
        answers = [values(answer)[0] for answer in await kit.read(served.output, 7)]

    assert [1.0, 2.0] == [value for value in answers if value < 10]
    assert 3 == tries.count(1)
    assert set(answers[:5]) == {10, 11, 12, 13, 14}


async def test_a_failure_that_does_not_pass_is_given_up_after_its_attempts(kit):
    def down(value):
        raise Unavailable("the store is down")

    kafka = await kit.options(retry={"attempts": 3})
    async with kit.serve(down, kafka) as served:
        await kit.send(served.input, body(1))
        (letter,) = await kit.read(served.dead, 1)

    assert ("3", "unavailable") == (header(letter, "x-dead-attempts"), header(letter, "x-dead-error"))


async def test_a_stop_finishes_what_runs_commits_it_and_leaves_the_rest(kit):
    begun, gate = [], asyncio.Event()

    async def slow(value):
        x = value["x"]
        begun.append(x[0])
        await gate.wait()
        return {"y": x}

    kafka = await kit.options(max_in_flight=2, commit={"interval_ms": 60_000})
    async with kit.serve(slow, kafka) as served:
        await kit.send(served.input, *((bytes([i]), body(i)) for i in range(6)))
        await until(lambda: len(begun) == 2)
        (stream,) = served.front_end._streams.values()
        stopping = asyncio.ensure_future(served.front_end.stop(60))
        await until(lambda: stream._session.runner._leaving)
        gate.set()
        await stopping
    answers = await kit.read(served.output, 2)

    assert {0.0, 1.0} == {values(answer)[0] for answer in answers}
    assert 2 == await served.committed()


async def test_the_server_is_ready_once_its_member_has_joined_and_not_while_topics_are_missing(kit):
    kafka = await kit.options()
    missing = {**kafka, "errors": {"topic": "dead-that-is-not-there"}}
    async with kit.serve(double, missing, ready=False) as served:
        await until(lambda: "no topic" in served.report["state"], lambda: served.report)
        assert "there is no topic 'dead-that-is-not-there' (for dead letters)" in served.report["state"]
        assert not served.serving.catalog.ready
        await kit.broker.create_topics({"dead-that-is-not-there": 1})
        await served.ready()
        assert served.serving.catalog.ready


async def test_a_reply_that_cannot_be_written_is_a_dead_letter_and_ends_nothing_else(kit):
    kafka = await kit.options()
    replies = await kit.broker.topic("replies", 2)
    kafka["output"]["reply_topics"] = ["replies*"]

    def asked(topic, **more):
        headers = [("x-reply-topic", topic.encode()), *((f"x-reply-{name}", text.encode()) for name, text in more.items())]
        return {"key": topic.encode(), "value": body(1), "headers": headers}

    async with kit.serve(double, kafka) as served:
        wrong = [asked("replies-nowhere"), asked(replies, partition="7"), asked(replies, partition="x"), asked("replies/../")]
        await kit.send(served.input, *wrong, asked(replies, partition="1"), {"key": b"k", "value": body(2)})
        letters = await kit.read(served.dead, 4)
        (reply,) = await kit.read(replies, 1)
        assert [4.0] == values((await kit.read(served.output, 1))[0])
        assert 0 == served.report["reconnects"]

    assert 1 == reply.partition
    assert {"invalid_request"} == {header(letter, "x-dead-error") for letter in letters}
    texts = " ".join(header(letter, "x-dead-message") for letter in letters)
    assert "topic 'replies-nowhere', which is not there" in texts
    assert f"'x-reply-partition' is '7', and topic '{replies}' has partitions [0, 1]" in texts


async def test_a_stop_does_not_wait_for_brokers_that_cannot_be_reached(kit):
    kafka = {**await kit.options(), "brokers": "127.0.0.1:1"}
    async with kit.serve(double, kafka, ready=False) as served:
        await until(lambda: "not connected to 127.0.0.1:1" in served.report["state"], lambda: served.report)
        assert "Connect call failed" in served.report["state"]
        assert not served.serving.catalog.ready
        began = asyncio.get_running_loop().time()
    assert asyncio.get_running_loop().time() - began < 15  # a request has fifteen seconds, and there are several


async def test_http_may_be_ready_without_kafka(kit):
    kafka = {**await kit.options(input={"readiness": "ignored"}), "brokers": "127.0.0.1:1"}
    async with kit.serve(double, kafka, ready=False) as served:
        assert served.serving.catalog.ready


async def test_two_graphs_that_would_take_each_other_s_records_are_not_both_read(kit, caplog):
    kafka = await kit.options()
    other = Graph("other", {"x": ("FP32", [-1])}, kafka=kafka).to(double, "step").respond()
    async with kit.serve(double, kafka) as served:
        await served.serving.catalog.load([other.compile()])
        assert ["g"] == [report["graph"] for report in served.front_end.report()]

    assert f"read in the same group '{kafka['input']['group']}'" in caplog.text


async def test_a_graph_that_comes_later_is_read_and_one_that_goes_is_read_no_more(kit):
    first, second = await kit.options(), await kit.options()
    later = Graph("later", {"x": ("FP32", [-1])}, kafka=second).to(double, "step").respond()
    async with kit.serve(double, first) as served:
        catalog = served.serving.catalog
        await catalog.load([later.compile()])
        await kit.send(second["input"]["topics"][0], body(3))
        assert [6.0] == values((await kit.read(second["output"]["topic"], 1))[0])
        catalog.swap([], [catalog.get("later")])
        await until(lambda: ["g"] == [report["graph"] for report in served.front_end.report()])
        await kit.send(second["input"]["topics"][0], body(4))
        await kit.send(first["input"]["topics"][0], body(5))
        assert [10.0] == values((await kit.read(served.output, 1))[0])
        assert 1 == len(await kit.read(second["output"]["topic"], 1))
    assert [] == await kit.read(second["errors"]["topic"], 0)


async def test_a_reply_topic_that_the_brokers_say_nothing_of_is_looked_up_again(kit):
    gate = asyncio.Event()

    async def wait(value):
        if value["x"][0] == 1:
            await gate.wait()
        return {"y": value["x"]}

    kafka = await kit.options(retry={"first_ms": 500.0})
    replies = await kit.broker.topic("replies")
    kafka["output"]["reply_topics"] = ["replies*"]
    asking = {"key": b"k", "value": body(2), "headers": [("x-reply-topic", replies.encode())]}
    async with kit.serve(wait, kafka) as served:
        await kit.send(served.input, (b"first", body(0)), (b"k", body(1)), asking)
        await until(lambda: (served.report["consumed"], served.report["produced"]) == (3, 1))
        kit.broker.pause()
        try:
            gate.set()
            await until(lambda: served.report["retries"] >= 1)
        finally:
            kit.broker.resume()
        assert [2.0] == [values(reply)[0] for reply in await kit.read(replies, 1)]


async def test_reply_topics_that_are_not_there_are_not_asked_for_again_and_again(kit):
    kafka = await kit.options(max_in_flight=20)
    kafka["output"]["reply_topics"] = ["replies*"]
    async with kit.serve(double, kafka) as served:
        asking = ({"value": body(1), "headers": [("x-reply-topic", b"replies-not-%d" % number)]} for number in range(20))
        await kit.send(served.input, *asking)
        await kit.read(served.dead, 20, quiet_s=0)
        (stream,) = served.front_end._streams.values()
        client = stream._session.consumer._client
        await until(lambda: not any(topic.startswith("replies-not") for topic in client._topics), lambda: client._topics)


async def test_gaps_that_transactions_leave_are_no_lag(kit):
    kafka = await kit.options(input={"max_lag": 5})
    async with kit.serve(double, kafka) as served:
        async with AIOKafkaProducer(bootstrap_servers=kit.address, transactional_id=served.input) as producer:
            async with producer.transaction():
                await producer.send(served.input, body(1))
            with pytest.raises(ZeroDivisionError):
                async with producer.transaction():
                    for _ in range(10):
                        await producer.send_and_wait(served.input, body(1))
                    raise ZeroDivisionError
        await until(lambda: served.report["produced"] == 1)
        await until(lambda: served.report["lag"] == 0 and served.report["ready"], lambda: served.report)
        assert 1 == served.report["consumed"]
