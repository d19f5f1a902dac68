"""Replay of dead letters on a real broker: to where they came from, each once, also across runs, filters and crashes."""

import asyncio
import gc

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition

from servinggraph.clients.dead_letters import Selection, replay
from servinggraph.clients.marks import Marks
from servinggraph.errors import LimitExceeded, Unavailable
from servinggraph.kafka import ConnectionOptions, headers as names

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend():
    return "asyncio"


class Place:
    """Two topics: one that requests came from, one of dead letters."""

    def __init__(self, kafka, source, dead):
        self.connection = ConnectionOptions(brokers=kafka.address)
        self.address, self.source, self.dead = kafka.address, source, dead

    async def bury(self, *letters, **options):
        """Write dead letters: (value, error code, node), in one transaction, as the front end does."""
        async with (
            AIOKafkaProducer(bootstrap_servers=self.address, transactional_id=self.dead) as producer,
            producer.transaction(),
        ):
            for number, (value, error, node) in enumerate(letters):
                headers = {
                    names.DEAD_TOPIC: self.source,
                    names.DEAD_PARTITION: "1",
                    names.DEAD_OFFSET: "7",
                    names.DEAD_ERROR: error,
                    names.DEAD_NODE: node,
                    names.DEAD_AT: str(1000 * number),
                    names.DEADLINE: "1",
                    "tenant": "a",
                } | options
                sent = [(name, value.encode()) for name, value in headers.items() if value is not None]
                await producer.send(self.dead, value.encode(), key=b"k", headers=sent, partition=number % 2)
        await self._committed()

    async def _committed(self):
        """Wait until readers of committed records see all that is there: brokers say earlier that a transaction is over."""
        places = [TopicPartition(self.dead, number) for number in range(2)]
        async with (
            AIOKafkaConsumer(bootstrap_servers=self.address, isolation_level="read_committed") as one,
            AIOKafkaConsumer(bootstrap_servers=self.address) as other,
            asyncio.timeout(60),
        ):
            while await one.end_offsets(places) != await other.end_offsets(places):
                await asyncio.sleep(0.02)

    async def replay(self, *, to=None, group=None, again=False, dry_run=False, **selected):
        selection = Selection(**selected)
        return await replay(self.connection, self.dead, selection, to=to, group=group, again=again, dry_run=dry_run)

    async def arrived(self, count):
        """Return what has come to the topic: so many records, and no further one."""
        async with AIOKafkaConsumer(
            self.source, bootstrap_servers=self.address, auto_offset_reset="earliest", isolation_level="read_committed"
        ) as consumer:
            records = [await asyncio.wait_for(consumer.getone(), 60) for _ in range(count)]
            more = await consumer.getmany(timeout_ms=300)
            assert {} == {place: [record.value for record in found] for place, found in more.items()}
            return records


@pytest.fixture
async def place(kafka, anyio_backend):
    return Place(kafka, await kafka.topic("source", partitions=3), await kafka.topic("dead", partitions=2))


THREE = [("a", "internal", "score.gbm"), ("b", "invalid_request", ""), ("c", "internal", "clean")]


def values(records):
    return sorted(record.value.decode() for record in records)


async def test_a_letter_goes_back_as_it_came(place):
    await place.bury(THREE[0])

    summary = await place.replay()

    assert {("internal", "score.gbm", place.source): 1} == summary.sent
    (record,) = await place.arrived(1)
    assert (b"a", b"k", 1) == (record.value, record.key, record.partition)
    assert (("tenant", b"a"), (names.REPLAYED, b"1")) == record.headers


async def test_no_letter_goes_back_twice(place):
    await place.bury(*THREE)

    await place.replay()
    second = await place.replay()
    await place.bury(("d", "internal", ""))
    third = await place.replay()

    assert (0, 1) == (second.sent.total(), third.sent.total())
    assert ["a", "b", "c", "d"] == values(await place.arrived(4))


async def test_what_one_selection_left_another_one_sends_and_no_more(place):
    await place.bury(*THREE, *THREE)

    first = await place.replay(errors=frozenset(["invalid_request"]))
    second = await place.replay(nodes=("score.*",))
    third = await place.replay()

    assert [2, 2, 2] == [each.sent.total() for each in (first, second, third)]
    assert [4, 2] == [first.left, second.left]
    assert 2 + 2 <= second.before + third.before + 2
    assert ["a", "a", "b", "b", "c", "c"] == values(await place.arrived(6))


async def test_a_selection_by_time_topic_and_count(place):
    await place.bury(*THREE)

    assert 0 == (await place.replay(topics=frozenset(["another"]))).sent.total()
    assert 0 == (await place.replay(since_ms=2001)).sent.total()
    assert 1 == (await place.replay(since_ms=1000, until_ms=2000)).sent.total()
    assert 1 == (await place.replay(limit=1)).sent.total()

    assert 2 == len(await place.arrived(2))


async def test_a_dry_run_sends_and_notes_nothing(place):
    await place.bury(*THREE)

    dry = await place.replay(dry_run=True)
    wet = await place.replay()

    assert dry.sent == wet.sent
    assert 3 == len(await place.arrived(3))


async def test_again_sends_what_was_sent(place):
    await place.bury(*THREE)
    await place.replay()

    await place.replay(again=True)

    assert ["a", "a", "b", "b", "c", "c"] == values(await place.arrived(6))


async def test_a_letter_that_died_again_says_how_often(place):
    await place.bury(*THREE, **{names.REPLAYED: "2"})

    assert 0 == (await place.replay(most_replays=2)).sent.total()
    await place.replay()

    assert {b"3"} == {dict(record.headers)[names.REPLAYED] for record in await place.arrived(3)}


async def test_a_letter_without_its_value_or_origin_stays(place):
    await place.bury(THREE[0], **{names.DEAD_LEFT_OUT: "100000"})
    await place.bury(THREE[1], **{names.DEAD_TOPIC: None})

    summary = await place.replay()

    assert 2 == summary.impossible.total()
    assert [] == await place.arrived(0)


async def test_letters_go_to_another_topic_when_told(place, kafka):
    await place.bury(*THREE)
    other = await kafka.topic("mended")

    await place.replay(to=other)

    assert [] == await place.arrived(0)
    place.source = other
    assert ["a", "b", "c"] == values(await place.arrived(3))


async def test_a_topic_that_is_gone_stops_before_anything_is_noted(place):
    await place.bury(THREE[0], **{names.DEAD_TOPIC: "no-such-topic"})

    with pytest.raises(Unavailable, match="'no-such-topic' does not exist"):
        await place.replay()

    assert 1 == (await place.replay(to=place.source)).sent.total()


async def test_a_letter_that_its_topic_does_not_take_stops_before_anything_is_noted(place, kafka):
    place.source = await kafka.topic("small", partitions=2, settings={"max.message.bytes": "2000"})
    await place.bury(("x" * 5000, "internal", ""))

    with pytest.raises(Unavailable, match=f"topic '{place.source}' does not take the letter at 0/0: MessageSizeTooLarge"):
        await place.replay()

    assert [] == await place.arrived(0)
    assert 1 == (await place.replay(to=await kafka.topic("mended"))).sent.total()


# A connection that is being made is left behind by aiokafka when that is cancelled.
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("after_s", [0.02, 0.1, 0.3])
async def test_a_run_that_is_cut_off_leaves_what_the_next_one_sends(place, after_s):
    await place.bury(*THREE)
    running = asyncio.create_task(place.replay())
    await asyncio.wait([running], timeout=after_s)
    running.cancel()
    await asyncio.wait([running])
    gc.collect()

    await place.replay()

    assert ["a", "b", "c"] == values(await place.arrived(3))


async def test_notes_of_somebody_else_are_not_overwritten(place, kafka):
    await place.bury(*THREE)
    # Without automatic commits: closing would commit the position that is being fetched, and with it an empty note.
    async with AIOKafkaConsumer(bootstrap_servers=kafka.address, group_id="others", enable_auto_commit=False) as consumer:
        consumer.assign([TopicPartition(place.dead, 0)])
        await consumer.commit({TopicPartition(place.dead, 0): (0, "mine")})

    with pytest.raises(Unavailable, match="not a replay's: 'mine'"):
        await place.replay(group="others")


@pytest.mark.parametrize("done", ["1111", "0000", "1010", "0110110", "10" * 5000 + "1"])
async def test_marks_survive_being_noted(done):
    marks = Marks(5)
    for offset, one in enumerate(done, 5):
        marks.pass_by(offset, done=one == "1")

    offset, metadata = marks.note()
    again = Marks.of(offset, metadata)

    assert len(metadata) <= 4000
    assert [one == "1" for one in done] == [again.has(offset) for offset in range(5, 5 + len(done))]


async def test_marks_that_brokers_would_not_keep_are_refused():
    import random

    marks, chance = Marks(), random.Random(1)
    for offset in range(60_000):
        marks.pass_by(offset, done=chance.random() < 0.5)

    with pytest.raises(LimitExceeded, match="alternate more often than can be noted"):
        marks.note()
