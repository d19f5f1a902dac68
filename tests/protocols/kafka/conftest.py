"""What tests of the Kafka front end share: a graph served from topics of its own, and a way to write and read them."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition

from servinggraph import Graph
from servinggraph.interfaces import FrontEndOptions
from servinggraph.lifecycle import Serving
from servinggraph.protocols.kafka.server import KafkaFrontEnd

PATIENCE_S = 60.0


def body(*values: float, id: str = "") -> bytes:
    """Return a V2 request with one tensor `x`."""
    document: dict[str, Any] = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [len(values)], "data": list(values)}]}
    return json.dumps(document | ({"id": id} if id else {})).encode()


def values(record: Any) -> list[float]:
    """Return what the only tensor of a V2 answer holds."""
    return list(json.loads(record.value)["outputs"][0]["data"])


def numbers(records: list[Any]) -> list[float]:
    """Return the first number of each V2 answer."""
    return [values(record)[0] for record in records]


def header(record: Any, name: str) -> str | None:
    """Return a header as text; None without it."""
    found = dict(record.headers).get(name)
    return None if found is None else found.decode()


def broker_module() -> Any:
    """Return `tests/kafka_broker.py`: tests are imported with importlib, which gives files of a folder no common package."""
    if "kafka_broker" not in sys.modules:
        spec = importlib.util.spec_from_file_location("kafka_broker", Path(__file__).parents[2] / "kafka_broker.py")
        assert spec is not None
        assert spec.loader is not None
        sys.modules["kafka_broker"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["kafka_broker"])
    return sys.modules["kafka_broker"]


async def until(condition: Any, what: str = "it never came true", patience_s: float = PATIENCE_S) -> Any:
    """Wait for a condition."""
    end = asyncio.get_running_loop().time() + patience_s
    while not (result := condition()):
        assert asyncio.get_running_loop().time() < end, what() if callable(what) else what
        await asyncio.sleep(0.01)
    return result


class Served:
    """A graph served from topics, in this process.

    Attributes:
        input, output, dead: its topics.
    """

    def __init__(self, broker: Any, serving: Serving, front_end: KafkaFrontEnd, kafka: dict[str, Any]) -> None:
        self.broker, self.serving, self.front_end, self.kafka = broker, serving, front_end, kafka
        self.input = kafka["input"]["topics"][0]
        self.output = kafka.get("output", {}).get("topic")
        self.dead = kafka.get("errors", {}).get("topic")

    @property
    def report(self) -> dict[str, Any]:
        return self.front_end.report()[0]

    async def ready(self) -> None:
        await until(lambda: self.front_end.report() and self.report["ready"], lambda: f"not ready: {self.front_end.report()}")

    async def committed(self, partition: int = 0, at_least: int = 0) -> int | None:
        """Return the offset that the group has committed, once it is `at_least` so much."""
        consumer = AIOKafkaConsumer(
            bootstrap_servers=self.broker.address, group_id=self.kafka["input"]["group"], enable_auto_commit=False
        )
        await consumer.start()
        end = asyncio.get_running_loop().time() + PATIENCE_S
        try:
            while True:
                offset = await consumer.committed(TopicPartition(self.input, partition))
                if at_least <= (offset or 0):
                    return offset
                assert asyncio.get_running_loop().time() < end, f"{offset} is committed"
                await asyncio.sleep(0.02)
        finally:
            await consumer.stop()


class Process:
    """A server in a process of its own, to be killed and stopped in its tracks."""

    def __init__(self, folder: Path, graph: str) -> None:
        folder.mkdir()
        shutil.copy(Path(__file__).with_name("steps_of_processes.py"), folder)
        (folder / "graph.yaml").write_text(graph)
        self._folder = folder
        self._log = folder / "log"
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "servinggraph", "serve", "graph.yaml", "--http-port", "off", "--grpc-port", "off"]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(command, cwd=self._folder, stdout=log, stderr=log)

    def output(self) -> str:
        return self._log.read_text()

    def signal(self, number: int) -> None:
        self._process.send_signal(number)

    def pause(self) -> None:
        broker_module().stop_in_its_tracks(self._process)

    def resume(self) -> None:
        self.signal(signal.SIGCONT)

    def wake(self) -> None:
        """Let the step `freeze` go on."""
        (self._folder / "awake").touch()

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        self._process.wait(PATIENCE_S)

    def stop(self) -> int:
        """End in order, and return the exit status."""
        self.signal(signal.SIGCONT)
        self.signal(signal.SIGTERM)
        return self._process.wait(PATIENCE_S)

    def end(self) -> None:
        if self._process.poll() is None:
            self.kill()


class Kit:
    """Writes and reads topics of a broker.

    Args:
        broker: the broker.
        folder: for processes.
    """

    def __init__(self, broker: Any, folder: Path) -> None:
        self.broker = broker
        self.address = broker.address
        self._folder = folder
        self.processes: list[Process] = []

    async def process(self, kafka: dict[str, Any], step: str) -> Process:
        """Serve a graph with a step of `steps_of_processes` in a process of its own."""
        document = {
            "graph": "g",
            "inputs": {"x": {"datatype": "FP32", "shape": [-1]}},
            "nodes": {"step": {"step": "python", "call": f"steps_of_processes:{step}"}},
            "answer": "step",
            "kafka": kafka,
        }
        process = Process(self._folder / f"process-{len(self.processes)}", yaml.safe_dump(document))
        self.processes.append(process)
        return process

    async def options(self, partitions: int = 1, settings: dict[str, str] | None = None, **kafka: Any) -> dict[str, Any]:
        """Return a `kafka:` block with fresh topics."""
        fresh = [await self.broker.topic(name, count) for name, count in (("in", partitions), ("out", partitions), ("dead", 1))]
        least = {
            "brokers": self.address,
            "input": {"topics": [fresh[0]], "group": f"group-{fresh[0]}", **kafka.pop("input", {})},
            "output": {"topic": fresh[1], **kafka.pop("output", {})},
            "errors": {"topic": fresh[2]},
            "retry": {"first_ms": 10.0, **kafka.pop("retry", {})},
        }
        return {**least, **kafka}

    @asynccontextmanager
    async def serve(
        self, work: Any, kafka: dict[str, Any], *, inputs: Any = None, ready: bool = True, **limits: Any
    ) -> AsyncIterator[Served]:
        """Serve a graph of one step; `work` may be a whole graph."""
        graph = (
            work
            if isinstance(work, Graph)
            else Graph("g", inputs or {"x": ("FP32", [-1])}, kafka=kafka).to(work, "step").respond()
        )
        serving = Serving(FrontEndOptions(**limits))
        await serving.catalog.load([graph.compile()])
        front_end = KafkaFrontEnd(serving)
        await front_end.start()
        served = Served(self.broker, serving, front_end, kafka)
        try:
            if ready:
                await served.ready()
            yield served
        finally:
            await front_end.stop(5)
            await serving.catalog.stop()
            await serving.close()

    async def send(self, topic: str, *records: Any) -> None:
        """Write records: values, or (key, value) pairs, or mappings of what `AIOKafkaProducer.send` takes."""
        # Idempotent: what brokers acknowledge too late is not written twice.
        async with AIOKafkaProducer(bootstrap_servers=self.address, enable_idempotence=True, linger_ms=2) as producer:
            sent = []
            for record in records:
                if isinstance(record, bytes):
                    record = {"value": record}
                elif isinstance(record, tuple):
                    record = {"key": record[0], "value": record[1]}
                sent.append(await producer.send(topic, **record))
            await asyncio.gather(*sent)

    async def read(
        self, topic: str, count: int | None = None, *, quiet_s: float = 0.6, patience_s: float = PATIENCE_S
    ) -> list[Any]:
        """Return a topic's committed records from its beginning: `count` of them, then what comes within `quiet_s`."""
        consumer = AIOKafkaConsumer(
            topic, bootstrap_servers=self.address, auto_offset_reset="earliest", isolation_level="read_committed",
            enable_auto_commit=False,
        )  # fmt: skip
        await consumer.start()
        found: list[Any] = []
        loop = asyncio.get_running_loop()
        end = loop.time() + patience_s
        try:
            while count is not None and len(found) < count:
                assert loop.time() < end, f"{len(found)} of {count} records came in topic {topic}"
                for records in (await consumer.getmany(timeout_ms=200)).values():
                    found += records
            quiet = loop.time() + quiet_s
            while loop.time() < quiet:
                for records in (await consumer.getmany(timeout_ms=100)).values():
                    found += records
                    quiet = loop.time() + quiet_s
        finally:
            await consumer.stop()
        return found


@pytest.fixture
def kit(kafka: Any, tmp_path: Path) -> Iterator[Kit]:
    """Return what writes, reads and serves topics of a real broker."""
    made = Kit(kafka, tmp_path)
    yield made
    for process in made.processes:
        process.end()


class RunningTime:
    """The time in which aiokafka measures how long nobody polls: it passes while a test waits for it and the machine runs."""

    def __init__(self) -> None:
        self._now = 0.0

    def monotonic(self) -> float:
        return self._now

    async def sleep(self, seconds: float) -> None:
        loop, end = asyncio.get_running_loop(), self._now + seconds
        while self._now < end:
            before = loop.time()
            await asyncio.sleep(0.01)
            self._now += min(0.05, loop.time() - before)  # what is more, the machine stood still


@pytest.fixture
def running_time(monkeypatch: pytest.MonkeyPatch) -> RunningTime:
    """Have a group's `max_poll_interval_ms` measured in a time that does not pass while the machine stands still."""
    clock = RunningTime()
    monkeypatch.setattr("aiokafka.consumer.subscription_state.time", clock)
    return clock


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def double(value: Any) -> Any:
    """A step."""
    return {"y": value["x"] * 2}
