"""The fourteen promises of docs/kafka.md, each a test of its own against a real broker."""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc.service_pb2 as triton

from servinggraph import Graph
from servinggraph.errors import Unavailable
from servinggraph.kafka.development import development_broker
from servinggraph.protocols.v2.client import decode_response, encode_request

pytestmark = pytest.mark.anyio

path = str(Path(__file__).with_name("conftest.py"))
here = next(module for module in sys.modules.values() if getattr(module, "__file__", None) == path)
body, values, header, until, double = here.body, here.values, here.header, here.until, here.double
numbers = here.numbers


def requests(first, last):
    return [(b"%d" % (number % 13), body(number)) for number in range(first, last)]


def echo(value):
    return {"y": value["x"]}


async def killed_in_the_middle(kit, kafka, count):
    """Serve `count` records from a process that is killed twice meanwhile; return all answers."""
    process = await kit.process(kafka, "linger")
    later = count * 9 // 10
    await kit.send(kafka["input"]["topics"][0], *requests(0, later))
    for share in (0.2, 0.5):
        await kit.read(kafka["output"]["topic"], int(count * share), quiet_s=0)
        process.kill()
        process.start()
    await kit.send(kafka["input"]["topics"][0], *requests(later, count))  # whose answers only the last one can give
    end = asyncio.get_running_loop().time() + here.PATIENCE_S
    read = count
    while True:  # some of them may have come twice
        answers = await kit.read(kafka["output"]["topic"], read, quiet_s=0)
        if len(set(numbers(answers))) == count:
            break
        assert asyncio.get_running_loop().time() < end, f"{len(set(numbers(answers)))} of {count} are answered"
        read = len(answers) + 1
    assert 0 == process.stop()
    return Counter(numbers(await kit.read(kafka["output"]["topic"], len(answers), quiet_s=1)))


async def test_01_a_killed_server_loses_nothing(kit):
    kafka = await kit.options(partitions=2, max_in_flight=4, input={"session_timeout_ms": 2000}, commit={"interval_ms": 50})
    answers = await killed_in_the_middle(kit, kafka, 300)

    assert {2.0 * number for number in range(300)} == set(answers)


async def test_02_exactly_once_loses_and_doubles_nothing_when_the_server_is_killed(kit):
    kafka = await kit.options(
        partitions=2, delivery="exactly_once", max_in_flight=4, input={"session_timeout_ms": 2000},
        transaction={"interval_ms": 50},
    )  # fmt: skip
    answers = await killed_in_the_middle(kit, kafka, 300)

    assert Counter(2.0 * number for number in range(300)) == answers


@pytest.mark.parametrize("order", ["key", "partition"])
async def test_03_answers_of_a_key_keep_their_order(kit, order):
    dice = random.Random(3)

    async def at_random(value):
        await asyncio.sleep(dice.random() * (0.05 if order == "key" else 0.001))
        return echo(value)

    keys, each = (200, 8) if order == "key" else (20, 10)
    kafka = await kit.options(partitions=4, order=order)
    async with kit.serve(at_random, kafka) as served:
        await kit.send(served.input, *((b"%d" % key, body(number)) for number in range(each) for key in range(keys)))
        answers = await kit.read(served.output, keys * each)

    by_key = {}
    for answer in answers:
        by_key.setdefault(answer.key, []).append(values(answer)[0])
    assert keys == len(by_key)
    assert [list(map(float, range(each)))] * keys == list(by_key.values())


async def test_04_memory_is_bounded_and_a_slow_graph_keeps_its_partitions(kit, running_time):
    go = asyncio.Event()

    async def wait(value):
        await go.wait()
        return echo(value)

    kafka = await kit.options(
        max_in_flight=3, max_waiting=10, max_waiting_bytes=200_000, input={"settings": {"max_poll_interval_ms": 1000}}
    )
    async with kit.serve(wait, kafka) as served:
        large = body(*range(5000))
        await kit.send(served.input, *(large for _ in range(40)))
        await until(lambda: served.report["paused"])
        await running_time.sleep(4)
        report = served.report
        assert report["waiting"] <= 10
        assert report["waiting_bytes"] < 200_000 + 2 * len(large)
        assert (3, 1, True) == (report["in_flight"], report["rebalances"], report["ready"])
        go.set()
        assert 40 == len(await kit.read(served.output, 40))


async def test_05_every_record_ends_in_exactly_one_place(kit):
    def moody(value):
        if value["x"][0] % 5 == 1:
            raise ValueError("not this one")
        return echo(value)

    kafka = await kit.options(partitions=2)
    replies = await kit.broker.topic("replies")
    kafka["output"]["reply_topics"] = ["replies*"]
    asked = [("x-reply-topic", replies.encode())]
    async with kit.serve(moody, kafka) as served:
        records = [
            *({"key": b"%d" % number, "value": body(number)} for number in range(20)),
            {"key": b"poison", "value": b"\xff\x00"},
            {"key": b"tombstone", "value": None},
            {"key": b"empty", "value": b""},
            {"key": b"asked", "value": body(100), "headers": asked},
            {"key": b"asked in vain", "value": body(101), "headers": asked},
            {"key": b"not allowed", "value": body(2), "headers": [("x-reply-topic", b"__consumer_offsets")]},
        ]
        await kit.send(served.input, *records)
        answers = await kit.read(served.output, 16)
        letters = await kit.read(served.dead, 8)
        replied = await kit.read(replies, 2)

    ends = Counter(record.key for record in (*answers, *letters, *replied))
    assert Counter(record["key"] for record in records) == ends
    assert {b"1", b"6", b"11", b"16", b"poison", b"tombstone", b"empty", b"not allowed"} == {letter.key for letter in letters}
    assert [("asked", "ok", None), ("asked in vain", "internal", "step")] == sorted(
        (record.key.decode(), header(record, "x-status"), header(record, "x-error-node")) for record in replied
    )


async def test_06_what_may_pass_is_tried_again_and_what_has_expired_never_runs(kit):
    tries = Counter()
    passed = asyncio.Event()

    async def shaky(value):
        number = value["x"][0]
        tries[number] += 1
        if number == 1 and tries[number] == 3:
            await passed.wait()
        if (number == 1 and tries[number] < 3) or number == 2:
            raise Unavailable("the store is down")
        return echo(value)

    kafka = await kit.options(retry={"attempts": 4, "first_ms": 50.0})
    async with kit.serve(shaky, kafka) as served:
        late = {"key": b"c", "value": body(3), "headers": [("x-deadline", b"%d" % (time.time() * 1e3 - 5))]}
        await kit.send(served.input, (b"a", body(1)), (b"a", body(10)), (b"b", body(2)), late, (b"d", body(4)))
        await kit.read(served.output, 1, quiet_s=0)
        passed.set()
        assert [4.0, 1.0, 10.0] == numbers(await kit.read(served.output, 3))  # the key waits, nobody else
        letters = {letter.key: letter for letter in await kit.read(served.dead, 2)}
        assert 5 == served.report["retries"]

    assert {1.0: 3, 2.0: 4, 4.0: 1, 10.0: 1} == tries
    assert [("unavailable", "4"), ("deadline_exceeded", "1")] == [
        (header(letters[key], "x-dead-error"), header(letters[key], "x-dead-attempts")) for key in (b"b", b"c")
    ]


async def test_07_a_dead_letter_can_be_understood_and_sent_back(kit):
    mended = []

    def broken_at_first(value):
        if not mended:
            raise ValueError("no such column")
        return echo(value)

    kafka = await kit.options()
    async with kit.serve(broken_at_first, kafka) as served:
        before = int(time.time() * 1e3)
        await kit.send(served.input, {"key": b"k", "value": body(7), "headers": [("mine", b"\x01")]})
        (letter,) = await kit.read(served.dead, 1)
        told = {name: value.decode() for name, value in letter.headers if name.startswith("x-dead-")}
        stack, at = told.pop("x-dead-stack"), told.pop("x-dead-at")
        stamp = told.pop("x-dead-timestamp")
        assert (b"k", body(7), b"\x01") == (letter.key, letter.value, dict(letter.headers)["mine"])
        assert {
            "x-dead-topic": served.input, "x-dead-partition": "0", "x-dead-offset": "0", "x-dead-error": "internal",
            "x-dead-message": "ValueError: no such column", "x-dead-node": "step", "x-dead-attempts": "1", "x-dead-graph": "g",
            "x-dead-graph-version": "1",
        } == told  # fmt: skip
        assert "broken_at_first" in stack.split(" < ")[0]
        assert before - 2000 <= int(stamp) <= int(at) <= time.time() * 1e3
        mended.append(True)
        command = [sys.executable, "-m", "servinggraph", "kafka", "replay", served.dead, "--brokers", kit.address]
        replay = await asyncio.create_subprocess_exec(
            *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
        )
        said, _ = await replay.communicate()
        assert 0 == replay.returncode, said.decode()
        (answer,) = await kit.read(served.output, 1)

    assert (b"k", [7.0]) == (answer.key, values(answer))
    assert "1" == header(answer, "x-replayed")


async def test_08_whoever_asked_finds_the_answer(kit):
    kafka = await kit.options()
    replies = await kit.broker.topic("replies", 3)
    kafka["output"]["reply_topics"] = [replies]
    trace = [("traceparent", b"00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"), ("tracestate", b"a=b")]
    asked = [("x-reply-topic", replies.encode()), ("x-reply-partition", b"2"), ("x-correlation-id", b"\x00\x01")]
    event = [("ce_specversion", b"1.0"), ("ce_id", b"e-1"), ("ce_source", b"/shop"), ("ce_type", b"order"), ("ce_shop", b"5")]
    structured = {
        "specversion": "1.0", "id": "e-2", "source": "/shop", "type": "order", "shop": "6",
        "datacontenttype": "application/json", "data": json.loads(body(4)),
    }  # fmt: skip
    async with kit.serve(double, kafka) as served:
        await kit.send(
            served.input,
            {"key": b"1", "value": body(1), "headers": [*trace, *asked, ("x-request-id", b"r-1")]},
            {"key": b"2", "value": body(2, id="b-2"), "headers": [*trace, ("x-request-id", b"r-2")]},
            {"key": b"3", "value": body(3), "headers": [*event, ("content-type", b"application/json")]},
            {
                "key": b"4",
                "value": json.dumps(structured).encode(),
                "headers": [("content-type", b"application/cloudevents+json")],
            },
        )
        (reply,) = await kit.read(replies, 1)
        second, third, fourth = sorted(await kit.read(served.output, 3), key=lambda answer: answer.key)

    assert (2, b"1", "r-1") == (reply.partition, reply.key, json.loads(reply.value)["id"])
    fields = dict(reply.headers)
    assert [*(value for _, value in trace), b"\x00\x01", b"ok"] == [
        fields[name] for name in ("traceparent", "tracestate", "x-correlation-id", "x-status")
    ]
    assert "x-reply-topic" not in fields
    assert ("b-2", "r-2") == (json.loads(second.value)["id"], header(second, "x-request-id"))  # the body's own goes first
    for record, name, shop in ((third, "e-1", "5"), (fourth, "e-2", "6")):
        assert [name, name, shop, "1.0", "servinggraph.answer"] == [
            json.loads(record.value)["id"],
            *(header(record, f"ce_{each}") for each in ("causeid", "shop", "specversion", "type")),
        ]
        assert name != header(record, "ce_id")
    assert [[6.0], [8.0]] == [values(third), values(fourth)]


async def test_09_a_server_begins_when_it_is_ready_and_ends_in_order(kit):
    kafka = await kit.options(commit={"interval_ms": 60_000}, max_in_flight=2)
    await kit.send(kafka["input"]["topics"][0], body(1))
    process = await kit.process(kafka, "SlowToLoad")
    await until(lambda: "asked" in process.output(), process.output)
    assert process.output().index("loaded") < process.output().index("asked")
    await kit.read(kafka["output"]["topic"], 1, quiet_s=0)
    await kit.send(kafka["input"]["topics"][0], *(body(number) for number in range(2, 9)))
    await until(lambda: process.output().count("asked") >= 3)
    assert 0 == process.stop()
    answers = numbers(await kit.read(kafka["output"]["topic"], 3))

    assert [2.0 * number for number in range(1, len(answers) + 1)] == sorted(answers)
    async with kit.serve(double, kafka) as served:  # what was not begun is left for the next member, and nothing else
        assert [2.0 * number for number in range(1, 9)] == sorted(numbers(await kit.read(served.output, 8)))


async def test_10_every_format_of_http_and_grpc_is_understood(kit):
    kafka = await kit.options()
    x = np.array([1, 2], np.float32)
    binary, length = encode_request({"x": x})
    message = triton.ModelInferRequest(model_name="g", id="p")
    message.inputs.add(name="x", datatype="FP32", shape=[2])
    message.raw_input_contents.append(x.tobytes())
    types = {
        "json": (body(1, 2), {"content-type": "application/json"}),
        "nothing said": (body(1, 2), {}),
        "binary": (binary, {"content-type": "application/octet-stream", "inference-header-content-length": str(length)}),
        "protobuf": (message.SerializeToString(), {"content-type": "application/x-protobuf"}),
        "raw": (x.tobytes(), {"content-type": "application/octet-stream"}),
        "document": (b'{"x": [1, 2]}', {"content-type": "application/json"}),
        "csv": (b"x\n1\n2\n", {"content-type": "text/csv", "accept": "application/json"}),
        "too large": (body(*range(20_000)), {}),
    }
    framed = await kit.options(framing="confluent")
    async with kit.serve(double, framed) as served:
        schema = b"\0\0\0\0\x2a"
        await kit.send(served.input, (b"1", schema + body(1, 2)), (b"2", schema + b"\0" + message.SerializeToString()))
        first, second = sorted(await kit.read(served.output, 2), key=lambda answer: answer.key)
        assert [2.0, 4.0] == values(first)
        assert "p" == triton.ModelInferResponse.FromString(second.value).id
    async with kit.serve(double, kafka, max_body_bytes=100_000) as served:
        for key, (value, headers) in types.items():
            fields = [(name, text.encode()) for name, text in headers.items()]
            await kit.send(served.input, {"key": key.encode(), "value": value, "headers": fields})
        answers = {answer.key.decode(): answer for answer in await kit.read(served.output, len(types) - 1)}
        (letter,) = await kit.read(served.dead, 1)

    for key in ("json", "nothing said"):
        assert [2.0, 4.0] == values(answers[key])
    for key in ("binary", "raw"):
        size = int(header(answers[key], "inference-header-content-length"))
        assert [2.0, 4.0] == decode_response(answers[key].value, size).outputs["y"].ravel().tolist()
    reply = triton.ModelInferResponse.FromString(answers["protobuf"].value)
    assert ("p", [2.0, 4.0]) == (reply.id, np.frombuffer(reply.raw_output_contents[0], np.float32).tolist())
    for key in ("document", "csv"):
        assert {"y": [2.0, 4.0]} == json.loads(answers[key].value)
    assert ("too_large", b"too large") == (header(letter, "x-dead-error"), letter.key)


async def test_11_records_that_wait_become_batches_without_a_timer(kit):
    sizes = []

    async def work(value):
        sizes.append(len(value["x"]))
        await asyncio.sleep(0.02)
        return {"y": value["x"]}

    kafka = await kit.options(partitions=2)
    graph = Graph("g", {"x": ("FP32", [-1])}, kafka=kafka).to(work, "step", batch={"max_rows": 32}).respond()
    await kit.send(kafka["input"]["topics"][0], *((b"%d" % number, body(number)) for number in range(320)))
    async with kit.serve(graph, kafka) as served:
        answers = await kit.read(served.output, 320)

    assert set(map(float, range(320))) == set(numbers(answers))
    assert 320 == sum(sizes)
    assert len(sizes) < 40, sizes


async def test_12_the_state_is_told_in_numbers_and_words(kit):
    kafka = await kit.options(partitions=2)
    async with kit.serve(double, kafka) as served:
        await kit.send(served.input, *requests(0, 30), (b"bad", b"bad"))
        await until(lambda: served.report["produced"] == 30 and served.report["dead_letters"] == 1)
        await until(lambda: served.report["lag"] == 0)
        loop, answered = asyncio.get_running_loop(), asyncio.get_running_loop().time()
        await until(lambda: served.report["commit_age_s"] < loop.time() - answered)
        report = served.report

    assert {
        "graph": "g", "ready": True, "state": "reading", "consumed": 31, "in_flight": 0, "waiting": 0, "waiting_bytes": 0,
        "unwritten": 0, "rebalances": 1, "errors": {"invalid_request": 1}, "retries": 0, "paused": False, "abandoned": 0,
    }.items() <= report.items()  # fmt: skip
    assert 2 == len(report["partitions"])
    assert 31 == sum(report["positions"].values())
    assert report["seconds"] > 0


async def test_13_replicas_share_the_work_and_duplicates_are_answered_once(kit):
    kafka = await kit.options(partitions=4, duplicates=1000)
    async with kit.serve(double, kafka) as first, kit.serve(double, kafka) as second:
        await until(lambda: len(first.report["partitions"]) == len(second.report["partitions"]) == 2)
        records = [{"key": b"%d" % n, "value": body(n), "headers": [("x-request-id", b"r-%d" % n)]} for n in range(50)]
        await kit.send(first.input, *records)
        await kit.read(first.output, 50, quiet_s=0)
        await kit.send(first.input, *records)
        await until(lambda: first.report["duplicates"] + second.report["duplicates"] == 50)
        answers = await kit.read(first.output, 50)
        assert first.report["produced"] > 0 < second.report["produced"]
        # Each partition has its records twice, and the second ones are committed a little later.
        once = Counter(answer.partition for answer in answers)
        assert 100 == sum([await first.committed(number, at_least=2 * once[number]) for number in range(4)])

    assert Counter(2.0 * number for number in range(50)) == Counter(numbers(answers))


async def test_14_topics_can_be_tested_without_a_broker(kit):
    with development_broker() as address:
        kit.address = address
        kafka = {
            "brokers": address,
            "input": {"topics": ["tx-in"], "group": "g"},
            "output": {"topic": "tx-out"},
            "errors": {"topic": "tx-dead"},
        }
        async with kit.serve(double, kafka):
            await kit.send("tx-in", (b"k", body(4)), (b"l", b"bad"))
            (answer,) = await kit.read("tx-out", 1)
            (letter,) = await kit.read("tx-dead", 1)

    assert (b"k", [8.0], b"l") == (answer.key, values(answer), letter.key)
