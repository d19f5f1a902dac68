"""What each delivery promises, on a real broker."""

from __future__ import annotations

import asyncio
import sys
from collections import Counter
from pathlib import Path

import pytest

from servinggraph.protocols.kafka import stream as streams

pytestmark = pytest.mark.anyio

path = str(Path(__file__).with_name("conftest.py"))
here = next(module for module in sys.modules.values() if getattr(module, "__file__", None) == path)
body, values, header, until, double = here.body, here.values, here.header, here.until, here.double
numbers = here.numbers


async def test_exactly_once_writes_answers_and_offsets_together(kit):
    kafka = await kit.options(partitions=2, delivery="exactly_once", transaction={"records": 10, "interval_ms": 20})
    async with kit.serve(double, kafka) as served:
        await kit.send(served.input, *((b"%d" % (i % 7), body(i)) for i in range(100)))
        answers = await kit.read(served.output, 100)
        await until(lambda: served.report["produced"] == 100, lambda: served.report)
        assert 10 <= served.report["commits"] <= 100

    assert Counter(2.0 * i for i in range(100)) == Counter(numbers(answers))
    each = Counter(answer.partition for answer in answers)
    # What a transaction commits is seen a little after its records.
    assert 100 == sum([await served.committed(number, at_least=each[number]) for number in (0, 1)])


async def test_exactly_once_writes_a_partition_s_answers_in_the_order_of_its_records(kit):
    gates = [asyncio.Event() for _ in range(4)]
    ended = []

    async def wait(value):
        number = int(value["x"][0])
        await gates[number].wait()
        ended.append(number)
        return {"y": value["x"]}

    kafka = await kit.options(delivery="exactly_once", transaction={"interval_ms": 10})
    async with kit.serve(wait, kafka) as served:
        await kit.send(served.input, *((bytes([i]), body(i)) for i in range(4)))
        for number in (3, 1, 0, 2):
            gates[number].set()
            await until(lambda number=number: number in ended)
        answers = await kit.read(served.output, 4)

    assert [0.0, 1.0, 2.0, 3.0] == numbers(answers)


async def test_exactly_once_has_dead_letters_in_the_same_transaction(kit):
    kafka = await kit.options(delivery="exactly_once")
    async with kit.serve(double, kafka) as served:
        await kit.send(served.input, body(1), b"nonsense", body(2))
        assert [2.0, 4.0] == numbers(await kit.read(served.output, 2))
        (letter,) = await kit.read(served.dead, 1)

    assert b"nonsense" == letter.value
    assert 3 == await served.committed(at_least=3)


async def test_at_most_once_commits_before_it_runs(kit):
    begun = []

    async def never(value):
        begun.append(value)
        await asyncio.Event().wait()

    kafka = await kit.options(delivery="at_most_once")
    async with kit.serve(never, kafka) as served:
        await kit.send(served.input, body(1), body(2))
        await until(lambda: len(begun) == 2)
        assert 2 == await served.committed()


async def test_a_broker_that_goes_away_is_waited_for_with_a_line_in_the_log_and_nothing_is_lost_or_doubled(
    kit, caplog, monkeypatch
):
    monkeypatch.setattr(streams, "_SILENT_S", 600.0)  # however long the broker takes to start
    caplog.set_level("INFO")
    kafka = await kit.options(delivery="exactly_once", transaction={"interval_ms": 20})
    async with kit.serve(double, kafka) as served:
        await kit.send(served.input, *(body(i) for i in range(50)))
        await kit.read(served.output, 50)
        kit.broker.kill()
        await until(lambda: not served.serving.catalog.ready)
        assert f"no answer from {kit.address}" == served.report["state"]
        await asyncio.to_thread(kit.broker.restart)
        await kit.send(served.input, *(body(i) for i in range(50, 100)))
        answers = await kit.read(served.output, 100)
        await served.ready()

    assert Counter(2.0 * i for i in range(100)) == Counter(numbers(answers))
    lines = [record.getMessage() for record in caplog.records if record.name == "servinggraph.kafka"]
    told = [f"graph 'g', Kafka: no answer from {kit.address}; waiting", "graph 'g', Kafka: reading again"]
    # Once for each time that it does not answer, of which a slow machine may add some.
    assert told * max(1, len(lines) // 2) == lines


@pytest.mark.parametrize("delivery", ["at_least_once", "exactly_once"])
@pytest.mark.timeout(300)
async def test_leaders_that_change_under_load_lose_and_double_nothing(kafka_cluster, tmp_path, delivery):
    kit = here.Kit(kafka_cluster, tmp_path)
    kafka = await kit.options(partitions=3, delivery=delivery, transaction={"interval_ms": 20}, commit={"interval_ms": 50})
    async with kit.serve(double, kafka) as served:
        for number, broker in enumerate((*kafka_cluster.brokers, None)):
            first = 60 * number
            await kit.send(served.input, *((b"%d" % (i % 7), body(i)) for i in range(first, first + 60)))
            if broker is not None:
                broker.kill()
                await asyncio.sleep(0.5)
                await asyncio.to_thread(broker.restart)
        answers = Counter(numbers(await kit.read(served.output, 240)))

    assert {2.0 * i for i in range(240)} == set(answers)
    if delivery == "exactly_once":
        assert {1} == set(answers.values())
