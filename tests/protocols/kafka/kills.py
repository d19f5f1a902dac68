"""Kills what a Kafka front end depends on, again and again under load, and counts what was lost and what came twice.

    .venv/bin/python tests/protocols/kafka/kills.py --rounds 20 --count 50000 --output kills.json

Two servers share a group. In each round a part of the records is written while something dies; at the end a consumer of its
own, read_committed, holds the topic of answers against the topic of requests. test_kills.py runs a few rounds of each.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.util
import itertools
import json
import logging
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.errors import KafkaError

from servinggraph.protocols.kafka.clients import lasting

ROOT = Path(__file__).parents[3]
PATIENCE_S = 120.0
PARTITIONS = 6
KEYS = 300

STEPS = """
import asyncio, random

async def double(value):
    await asyncio.sleep(random.random() * 0.004)
    return {"y": value["x"] * 2}
"""

GRAPH = """
graph: doubled
inputs: {{x: {{datatype: INT64, shape: [1]}}}}
nodes: {{double: {{step: python, call: "kill_steps:double"}}}}
answer: double
kafka:
  brokers: "{brokers}"
  input: {{topics: [{input}], group: {input}, session_timeout_ms: {session_ms}, settings: {{heartbeat_interval_ms: 750}}}}
  output: {{topic: {output}}}
  errors: {{topic: {dead}}}
  delivery: {delivery}
  retry: {{first_ms: 50}}
"""


@dataclass
class Verdict:
    """What came of a run."""

    scenario: str
    delivery: str
    rounds: int
    records: int
    lost: int
    doubled: int
    wrong: int
    dead: int
    out_of_order: int
    seconds: float
    longest_silence_s: float


class Server:
    """A server process."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        command = [
            "-m",
            "servinggraph",
            "serve",
            "graph.yaml",
            "--http-port",
            "off",
            "--grpc-port",
            "off",
            "--log-level",
            "warning",
        ]
        with (self._folder / "log").open("ab") as log:
            self.process = await asyncio.create_subprocess_exec(
                sys.executable, *command, cwd=self._folder, stdout=log, stderr=log
            )

    async def end(self, signal_number: int) -> int:
        assert self.process is not None
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal_number)
        return await asyncio.wait_for(self.process.wait(), 60)


class Harness:
    """Servers, load and the reader of one run."""

    def __init__(self, cluster: Any, folder: Path, delivery: str, count: int, rounds: int, seed: int = 0) -> None:
        self.cluster, self.folder, self.delivery = cluster, folder, delivery
        self.count, self.rounds = count, rounds
        self.chance = random.Random(seed)
        self.servers = [Server(folder), Server(folder)]
        self.seen: set[bytes] = set()
        self.silence_s, self._heard = 0.0, time.monotonic()
        self._numbers = itertools.count()

    async def run(self, scenario: str, stand_still_s: float) -> Verdict:
        began = time.monotonic()
        self.topics = {name: await self.cluster.topic(name, PARTITIONS) for name in ("in", "out", "dead")}
        (self.folder / "kill_steps.py").write_text(STEPS)
        names = {"input": self.topics["in"], "output": self.topics["out"], "dead": self.topics["dead"]}
        # A member that stands still must not count as dead sooner than the broker that does, or than a slow machine.
        longer_s = {"pause_broker": stand_still_s, "terminate_server": 30.0}
        session_ms = 3000 + int(1e3 * longer_s.get(scenario, 0.0))
        text = GRAPH.format(brokers=self.cluster.address, delivery=self.delivery, session_ms=session_ms, **names)
        (self.folder / "graph.yaml").write_text(text)
        disturb = getattr(self, f"_{scenario}")
        reading = asyncio.create_task(self._read())
        for server in self.servers:
            await server.start()
        try:
            async with lasting(
                AIOKafkaProducer(
                    bootstrap_servers=self.cluster.address,
                    acks="all",
                    enable_idempotence=True,
                    request_timeout_ms=60_000,
                    linger_ms=2,
                )
            ) as producer:
                await self._write(producer, self.count // (self.rounds + 1))
                await self._until(lambda: len(self.seen) > 0, "no answer at all")
                for _ in range(self.rounds):
                    writing = asyncio.create_task(self._write(producer, self.count // (self.rounds + 1)))
                    await asyncio.sleep(0.2 + self.chance.random())
                    behind = len(self.seen)
                    await disturb(stand_still_s)
                    await writing
                    await self._until(lambda behind=behind: len(self.seen) > behind, "no answers since the round began")
            written = await self._all(self.topics["in"])
            ids = {id_of(record) for record in written}
            await self._until(lambda: ids <= self.seen, lambda: f"{len(ids - self.seen)} of {len(ids)} were not answered")
            for server in self.servers:
                await server.end(signal.SIGTERM)
        finally:
            reading.cancel()
            await asyncio.wait([reading])
            for server in self.servers:
                await server.end(signal.SIGKILL)
        return await self._verdict(scenario, written, time.monotonic() - began)

    async def _write(self, producer: Any, count: int) -> None:
        sent = []
        for _ in range(count):
            number = next(self._numbers)
            body = json.dumps({"inputs": [{"name": "x", "datatype": "INT64", "shape": [1], "data": [number]}]}).encode()
            key, name = str(number % KEYS).encode(), str(number).encode()
            sent.append(await producer.send(self.topics["in"], body, key=key, headers=[("x-request-id", name)]))
            if number % 20 == 0:  # over two seconds, so that something is under way whenever it happens
                await asyncio.sleep(40 / count)
        await asyncio.gather(*sent)

    # What is disturbed in a round.

    async def _kill_server(self, _: float) -> None:
        server = self.chance.choice(self.servers)
        await server.end(signal.SIGKILL)
        await server.start()

    async def _terminate_server(self, _: float) -> None:
        server = self.chance.choice(self.servers)
        code = await server.end(signal.SIGTERM)
        assert code in (0, -signal.SIGTERM), code
        await server.start()

    async def _rebalance(self, _: float) -> None:
        guest = Server(self.folder)
        await guest.start()
        await asyncio.sleep(1 + self.chance.random())
        await guest.end(self.chance.choice([signal.SIGTERM, signal.SIGKILL]))

    async def _kill_broker(self, _: float) -> None:
        await asyncio.to_thread(self.cluster.kill)
        await asyncio.to_thread(self.cluster.restart)

    async def _pause_broker(self, stand_still_s: float) -> None:
        self.cluster.pause()
        await asyncio.sleep(stand_still_s)
        self.cluster.resume()

    # What is looked at.

    async def _read(self) -> None:
        """Follow the answers while the run is under way."""
        while True:
            try:
                async with lasting(
                    AIOKafkaConsumer(
                        self.topics["out"],
                        bootstrap_servers=self.cluster.address,
                        auto_offset_reset="earliest",
                        isolation_level="read_committed",
                    )
                ) as consumer:
                    while True:
                        for records in (await consumer.getmany(timeout_ms=100)).values():
                            now = time.monotonic()
                            self.silence_s = max(self.silence_s, now - self._heard) if self.seen else 0.0
                            self._heard = now
                            self.seen.update(id_of(record) for record in records)
            except KafkaError:
                await asyncio.sleep(0.2)

    async def _until(self, condition: Any, what: Any) -> None:
        end = time.monotonic() + PATIENCE_S
        while not condition():
            if time.monotonic() > end:
                log = (self.folder / "log").read_text()[-3000:]
                text = what() if callable(what) else what
                raise AssertionError(f"{text}\n{log}\n{await self._where_it_stands()}")
            await asyncio.sleep(0.05)

    async def _where_it_stands(self) -> str:
        """Say of each partition what is committed, and where the topics end for readers of committed and of all records."""
        lines = []
        group = self.topics["in"]
        for isolation in ("read_committed", "read_uncommitted"):
            async with AIOKafkaConsumer(
                bootstrap_servers=self.cluster.address, group_id=group, enable_auto_commit=False, isolation_level=isolation
            ) as consumer:
                for name in ("in", "out"):
                    places = [TopicPartition(self.topics[name], number) for number in range(PARTITIONS)]
                    ends = await consumer.end_offsets(places)
                    lines.append(f"{name}, {isolation}: ends {[ends[place] for place in places]}")
                    if name == "in":
                        lines.append(f"group: {[await consumer.committed(place) for place in places]}")
        return "\n".join(lines)

    async def _all(self, topic: str) -> list[Any]:
        """Return all committed records of a topic, read by a consumer of its own."""
        async with AIOKafkaConsumer(
            topic, bootstrap_servers=self.cluster.address, auto_offset_reset="earliest", isolation_level="read_committed"
        ) as consumer:
            found: list[Any] = []
            ends = await consumer.end_offsets(consumer.assignment())
            while any([await consumer.position(place) < end for place, end in ends.items()]):
                for records in (await consumer.getmany(timeout_ms=200)).values():
                    found += records
            return found

    async def _verdict(self, scenario: str, written: list[Any], seconds: float) -> Verdict:
        answers, dead = await self._all(self.topics["out"]), await self._all(self.topics["dead"])
        asked, answered = Counter(map(id_of, written)), Counter(map(id_of, answers))
        values = [(int(id_of(record)), json.loads(record.value)) for record in answers]
        wrong = sum("outputs" not in value or value["outputs"][0]["data"] != [2 * number] for number, value in values)
        # What came twice came in order the first time.
        last: dict[bytes, int] = {}
        disorder = 0
        firsts: set[int] = set()
        for record, (number, _) in zip(answers, values, strict=True):
            if number not in firsts:
                firsts.add(number)
                disorder += number < last.get(record.key, -1)
                last[record.key] = number
        return Verdict(
            scenario,
            self.delivery,
            self.rounds,
            len(asked),
            sum((asked - answered).values()),
            sum((answered - asked).values()),
            wrong,
            len(dead),
            disorder,
            round(seconds, 1),
            round(self.silence_s, 1),
        )


def id_of(record: Any) -> bytes:
    return next(value for name, value in record.headers if name == "x-request-id")


SCENARIOS = ("kill_server", "terminate_server", "rebalance", "kill_broker", "pause_broker")


def _module(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


async def main(options: argparse.Namespace) -> None:
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)  # that brokers are away is the point
    broker = _module(ROOT / "tests" / "kafka_broker.py")
    verdicts = []
    for delivery in options.delivery:
        for scenario in options.scenario:
            with tempfile.TemporaryDirectory() as folder:
                cluster = broker.Cluster(Path(folder) / "broker", 1)
                cluster.start()
                try:
                    (Path(folder) / "server").mkdir()
                    harness = Harness(cluster, Path(folder) / "server", delivery, options.count, options.rounds)
                    verdict = await harness.run(scenario, options.stand_still_s)
                finally:
                    cluster.stop()
            print(json.dumps(asdict(verdict)), flush=True)
            verdicts.append(asdict(verdict))
            if options.output:
                options.output.write_text(json.dumps(verdicts, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenario", nargs="*", choices=SCENARIOS, default=list(SCENARIOS))
    parser.add_argument("--delivery", nargs="*", default=["at_least_once", "exactly_once"])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--count", type=int, default=50_000)
    parser.add_argument("--stand-still-s", type=float, default=20.0)
    parser.add_argument("--output", type=Path)
    asyncio.run(main(parser.parse_args()))
