"""What is bounded: records and bytes in memory, sizes, time; and what a slow graph does to the membership."""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.anyio

path = str(Path(__file__).with_name("conftest.py"))
here = next(module for module in sys.modules.values() if getattr(module, "__file__", None) == path)
body, values, header, until, double = here.body, here.values, here.header, here.until, here.double
numbers = here.numbers


class Gate:
    """A step that runs once it may."""

    def __init__(self):
        self.open = asyncio.Event()
        self.most = self.running = 0

    async def __call__(self, value):
        self.running += 1
        self.most = max(self.most, self.running)
        await self.open.wait()
        self.running -= 1
        return {"y": value["x"]}


async def test_no_more_records_are_read_than_may_wait_and_no_more_run_than_may(kit):
    gate = Gate()
    kafka = await kit.options(partitions=2, max_in_flight=4, max_waiting=20)
    async with kit.serve(gate.__call__, kafka) as served:
        await kit.send(served.input, *((b"%d" % number, body(number)) for number in range(200)))
        await until(lambda: served.report["paused"])
        await asyncio.sleep(1.2)
        assert (4, 20, True) == (served.report["in_flight"], served.report["waiting"], served.report["paused"])
        gate.open.set()
        answers = await kit.read(served.output, 200)
        assert served.report["pauses"] >= 1

    assert 4 == gate.most
    assert set(map(float, range(200))) == set(numbers(answers))


async def test_no_more_bytes_are_read_than_may_wait_but_for_a_record(kit):
    gate = Gate()
    kafka = await kit.options(max_waiting_bytes=500_000)
    async with kit.serve(gate.__call__, kafka) as served:
        large = body(*range(10_000))  # 69 kB
        await kit.send(served.input, *(large for _ in range(40)))
        await until(lambda: served.report["paused"])
        await asyncio.sleep(0.5)
        assert 500_000 <= served.report["waiting_bytes"] < 500_000 + 2 * len(large)
        gate.open.set()
        await kit.read(served.output, 40)
        await until(lambda: served.report["waiting_bytes"] == 0, lambda: served.report)


async def test_headers_count_as_bytes_that_wait(kit):
    gate = Gate()
    kafka = await kit.options(max_waiting_bytes=500_000)
    async with kit.serve(gate.__call__, kafka) as served:
        await kit.send(served.input, *({"value": body(1), "headers": [("mine", b"x" * 70_000)]} for _ in range(40)))
        await until(lambda: served.report["paused"])
        assert 500_000 <= served.report["waiting_bytes"] < 500_000 + 2 * 80_000
        gate.open.set()
        await kit.read(served.output, 40)
        await until(lambda: served.report["waiting_bytes"] == 0, lambda: served.report)


async def test_a_graph_that_is_slower_than_the_group_waits_for_polls_keeps_its_partitions(kit, running_time):
    gate = Gate()
    kafka = await kit.options(input={"settings": {"max_poll_interval_ms": 1000}}, max_in_flight=1, max_waiting=2)
    async with kit.serve(gate.__call__, kafka) as served:
        await kit.send(served.input, *(body(number) for number in range(5)))
        await until(lambda: served.report["paused"])
        await running_time.sleep(4)
        assert (1, True) == (served.report["rebalances"], served.report["ready"])
        gate.open.set()
        assert list(map(float, range(5))) == numbers(await kit.read(served.output, 5))


async def test_a_record_whose_deadline_has_passed_is_given_up_without_running(kit):
    ran = []

    def note(value):
        ran.append(value["x"][0])
        return {"y": value["x"]}

    kafka = await kit.options()
    now = time.time() * 1e3
    async with kit.serve(note, kafka) as served:
        late = {"value": body(1), "headers": [("x-deadline", b"%d" % (now - 1))]}
        early = {"value": body(2), "headers": [("x-deadline", b"%d" % (now + 60_000))]}
        odd = {"value": body(3), "headers": [("x-deadline", b"tomorrow")]}
        await kit.send(served.input, late, early, odd)
        letters = await kit.read(served.dead, 2)
        assert [2.0] == numbers(await kit.read(served.output, 1))

    assert {"deadline_exceeded", "invalid_request"} == {header(letter, "x-dead-error") for letter in letters}
    assert [2.0] == ran


async def test_an_answer_that_is_too_large_is_an_error_that_names_the_limit(kit):
    def grow(value):
        return {"y": value["x"].repeat(10_000)}

    kafka = await kit.options(max_message_bytes=20_000)
    async with kit.serve(grow, kafka) as served:
        await kit.send(served.input, body(1))
        (letter,) = await kit.read(served.dead, 1)

    assert ("too_large", body(1)) == (header(letter, "x-dead-error"), letter.value)
    assert "limit 'max_message_bytes'" in header(letter, "x-dead-message")


async def test_an_answer_that_only_the_topic_finds_too_large_is_given_up_and_the_others_go_on(kit):
    def grow(value):
        return {"y": value["x"].repeat(20_000 if value["x"][0] == 1 else 1)}

    kafka = await kit.options()
    small = await kit.broker.topic("small", settings={"max.message.bytes": "20000"})
    kafka["output"] = {"topic": small}
    async with kit.serve(grow, kafka) as served:
        await kit.send(served.input, *(body(number) for number in range(300)))  # together beyond the limit, too
        (letter,) = await kit.read(served.dead, 1)
        assert set(map(float, range(300))) - {1.0} == set(numbers(await kit.read(small, 299)))

    assert ("too_large", body(1)) == (header(letter, "x-dead-error"), letter.value)


async def test_the_server_is_not_ready_while_it_lags_beyond_its_limit(kit):
    gate = Gate()
    kafka = await kit.options(input={"max_lag": 10}, max_in_flight=1, max_waiting=1)
    async with kit.serve(gate.__call__, kafka) as served:
        await kit.send(served.input, *(body(number) for number in range(50)))
        await until(lambda: (served.report["lag"] or 0) > 10, lambda: served.report)
        await until(lambda: not served.serving.catalog.ready)
        gate.open.set()
        await until(lambda: served.serving.catalog.ready)


@pytest.mark.parametrize("compression", ["gzip", "snappy", "lz4", "zstd"])
async def test_what_is_written_and_read_may_be_compressed(kit, compression):
    kafka = await kit.options(output={"compression": compression})
    again = await kit.options()
    again["input"]["topics"] = [kafka["output"]["topic"]]
    async with kit.serve(double, kafka) as served:
        await kit.send(served.input, body(*range(1000)))
        (answer,) = await kit.read(served.output, 1)

    assert [2.0 * number for number in range(1000)] == values(answer)
