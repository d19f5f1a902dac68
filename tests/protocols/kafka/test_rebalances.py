"""Members that come, go, stand still and come back, on a real broker."""

from __future__ import annotations

import asyncio
import sys
from collections import Counter
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from aiokafka.errors import KafkaError

pytestmark = pytest.mark.anyio

path = str(Path(__file__).with_name("conftest.py"))
here = next(module for module in sys.modules.values() if getattr(module, "__file__", None) == path)
body, values, until, double = here.body, here.values, here.until, here.double
numbers = here.numbers

# A session that is longer than any machine stands still or takes to begin again, and heartbeats as frequent as of a short one.
PATIENT = {"session_timeout_ms": 120_000, "settings": {"heartbeat_interval_ms": 500}}


def requests(first, last):
    return [(b"%d" % (number % 13), body(number)) for number in range(first, last)]


async def echo_slowly(value):
    await asyncio.sleep(0.05)
    return {"y": value["x"]}


async def test_what_runs_when_partitions_go_to_another_member_is_finished_committed_and_not_done_again(kit):
    kafka = await kit.options(partitions=4, commit={"interval_ms": 60_000, "records": 100_000}, max_in_flight=8)
    async with kit.serve(echo_slowly, kafka) as first:
        await kit.send(first.input, *requests(0, 60))
        await until(lambda: first.report["produced"] > 10)
        async with kit.serve(echo_slowly, kafka) as second:
            await until(lambda: 2 == len(first.report["partitions"]) == len(second.report["partitions"]))
            await kit.send(first.input, *requests(60, 120))
            answers = await kit.read(first.output, 120)
            assert second.report["produced"] > 0
        assert 0 == first.report["abandoned"]

    assert Counter(map(float, range(120))) == Counter(numbers(answers))


async def test_what_takes_longer_than_a_rebalance_may_wait_is_abandoned_and_done_by_the_next_member(kit):
    began = []

    async def stuck_the_first_time(value):
        began.append(value["x"][0])
        if len(began) == 1:
            await asyncio.Event().wait()
        return {"y": value["x"]}

    kafka = await kit.options(input={"revoke_ms": 300})
    async with kit.serve(stuck_the_first_time, kafka) as first:
        await kit.send(first.input, body(1))
        await until(lambda: began)
        async with kit.serve(stuck_the_first_time, kafka, ready=False):
            answers = await kit.read(first.output, 1)
            assert 1 == first.report["abandoned"]

    assert [1.0] == numbers(answers)


@pytest.mark.parametrize("delivery", ["at_least_once", "exactly_once"])
async def test_members_that_join_and_leave_all_the_time_lose_nothing(kit, delivery):
    count = 400
    kafka = await kit.options(partitions=4, delivery=delivery, transaction={"interval_ms": 20})
    async with AsyncExitStack() as stack:
        served = await stack.enter_async_context(kit.serve(echo_slowly, kafka))

        async def feed():
            for first in range(0, count, 20):
                await kit.send(served.input, *requests(first, first + 20))

        feeding = asyncio.ensure_future(feed())
        for _ in range(4):
            async with kit.serve(echo_slowly, kafka, ready=False):
                await asyncio.sleep(0.5)
        await feeding
        answers = Counter(numbers(await kit.read(served.output, count)))

    assert set(map(float, range(count))) == set(answers)
    # Every rebalance was an orderly one, so that not even at least once has anything twice.
    assert {1} == set(answers.values())


async def test_a_member_with_a_name_comes_back_without_a_rebalance_for_the_others(kit):
    kafka = await kit.options(partitions=4, input={"member": "a", **PATIENT})
    other = {**kafka, "input": {**kafka["input"], "member": "b"}}
    async with kit.serve(double, kafka) as first:
        async with kit.serve(double, other) as second:
            await until(lambda: 2 == len(first.report["partitions"]) == len(second.report["partitions"]))
        before = first.report["rebalances"]
        async with kit.serve(double, other) as second:
            await until(lambda: len(second.report["partitions"]) == 2)
            assert before == first.report["rebalances"]


@pytest.mark.slow
@pytest.mark.parametrize("delivery", ["at_least_once", "exactly_once"])
async def test_two_members_of_one_name_are_told_so_and_do_not_take_turns_at_each_heartbeat(kit, delivery):
    """As replicas are whose file says the name itself: else each answers again and again what the other has not committed."""
    kafka = await kit.options(partitions=2, delivery=delivery, input={"member": "a", **PATIENT, "session_timeout_ms": 8000})

    def dropped(served):
        return served.report["state"].startswith("the group dropped member 'a': another one has joined as 'input.member: a'")

    async with kit.serve(double, kafka) as first:
        async with kit.serve(double, kafka) as second:
            await until(lambda: dropped(first) or dropped(second), lambda: f"{first.report} {second.report}")
            await until(lambda: first.report["ready"] or second.report["ready"])
            await kit.send(first.input, body(1))
            await kit.read(first.output, 1)
        await first.ready()
        await kit.send(first.input, body(2))
        answers = await kit.read(first.output, 2)

    assert {2.0, 4.0} == set(numbers(answers))


async def test_a_member_that_stood_still_for_longer_than_its_group_waits_writes_nothing_more(kit):
    """The group has given its partition away meanwhile, and the record was answered by another."""
    patient = await kit.options()
    kafka = {**patient, "input": {**patient["input"], "session_timeout_ms": 1500, "revoke_ms": 1000}}
    frozen = await kit.process(kafka, "freeze")
    await kit.send(kafka["input"]["topics"][0], body(1))
    await until(lambda: "asleep" in frozen.output())
    frozen.pause()
    frozen.wake()
    async with kit.serve(double, patient) as second:
        answers = await kit.read(second.output, 1)
        await asyncio.sleep(1.5)  # by itself longer than the session of the one that is paused
        frozen.resume()
        await until(lambda: "Kafka" in frozen.output() and "stood still" in frozen.output(), frozen.output)
        again = await kit.read(second.output, 1, quiet_s=2)
    frozen.stop()

    assert [[2.0], [2.0]] == [numbers(answers), numbers(again)]


async def test_a_rebalance_that_fails_is_begun_anew(kit):
    kafka = await kit.options()
    async with kit.serve(double, kafka) as served:
        (stream,) = served.front_end._streams.values()
        coordinator = stream._session.consumer._coordinator

        async def refused(subscription):
            await asyncio.sleep(1)  # longer than a poll lasts
            raise KafkaError("the group has no room")

        coordinator._do_rejoin_group = refused
        coordinator.request_rejoin()
        await until(lambda: served.report["state"] == "KafkaError: the group has no room", lambda: served.report)
        await served.ready()
        await kit.send(served.input, body(1))
        assert [2.0] == numbers(await kit.read(served.output, 1))


@pytest.mark.parametrize("delivery", ["at_least_once", "exactly_once", "at_most_once"])
async def test_what_comes_between_two_members_is_answered_although_they_begin_with_what_comes(kit, delivery):
    kafka = await kit.options(partitions=2, delivery=delivery, input={"start": "latest"})
    await kit.send(kafka["input"]["topics"][0], body(1), body(2))  # before the first one
    async with kit.serve(double, kafka):
        pass
    await kit.send(kafka["input"]["topics"][0], body(3), body(4))
    async with kit.serve(double, kafka) as served:
        assert {6.0, 8.0} == set(numbers(await kit.read(served.output, 2)))


@pytest.mark.parametrize("by", ["stop", "rebalance"])
async def test_at_most_once_runs_what_it_has_just_committed_before_it_lets_go(kit, by):
    kafka = await kit.options(delivery="at_most_once")
    async with AsyncExitStack() as stack:
        served = await stack.enter_async_context(kit.serve(double, kafka))
        (stream,) = served.front_end._streams.values()
        consumer = stream._session.consumer
        commit, committed, go_on = consumer.commit, asyncio.Event(), asyncio.Event()

        async def slowly(offsets):
            await commit(offsets)
            committed.set()
            await go_on.wait()

        consumer.commit = slowly
        await kit.send(served.input, body(1))
        await committed.wait()
        if by == "rebalance":
            await stack.enter_async_context(kit.serve(double, kafka, ready=False))
            await until(lambda: not stream._session.joined)
        stopping = [asyncio.ensure_future(served.front_end.stop(60))] if by == "stop" else []
        await until(lambda: stream._session._giving)
        go_on.set()
        await asyncio.gather(*stopping)
        if by == "rebalance":
            await until(lambda: stream.counts.rebalances >= 2)
    assert [2.0] == numbers(await kit.read(kafka["output"]["topic"], 1))
