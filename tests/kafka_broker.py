"""A real Kafka broker for tests, and clusters of them: on free ports, in a folder of their own, to be killed and paused."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from aiokafka.admin import AIOKafkaAdminClient, NewTopic

ROOT: Final = Path(__file__).parents[1]
LIBS: Final = ROOT / ".cache" / "kafka-libs"
PATIENCE_S: Final = 120.0
CLUSTER_ID: Final = "c2VydmluZ2dyYXBoMDAwMQ"
STARTED: Final = "Kafka Server started"
_ENDING: Final = 0x4
"""PF_EXITING, of the flags in proc(5)'s stat."""

SETTINGS: Final = {
    "process.roles": "broker,controller",
    "controller.listener.names": "CONTROLLER",
    "listener.security.protocol.map": "CONTROLLER:PLAINTEXT,PLAINTEXT:PLAINTEXT",
    "group.initial.rebalance.delay.ms": 0,
    "group.min.session.timeout.ms": 1000,
    "offsets.topic.num.partitions": 4,
    "transaction.state.log.num.partitions": 4,
    "transaction.abort.timed.out.transaction.cleanup.interval.ms": 500,
    "auto.create.topics.enable": "false",
    # A node that comes back after kill -9 is let in again only once its old session has ended.
    "broker.session.timeout.ms": 3000,
    "broker.heartbeat.interval.ms": 500,
    "controlled.shutdown.enable": "false",
    "num.network.threads": 2,
    "num.io.threads": 4,
}

_numbers = itertools.count(1)


def fetch_jars() -> None:
    """Bring the broker's jars to the cache, where `make test` has not."""
    if not LIBS.is_dir():
        subprocess.run([ROOT / "scripts" / "kafka-libs.sh"], check=True)


def free_ports(count: int) -> list[int]:
    """Return ports that are free, and none of those that the system gives to connections while a broker is down."""
    chance = random.SystemRandom()
    with contextlib.ExitStack() as stack:
        found: list[int] = []
        while len(found) < count:
            port = chance.randrange(12_000, 32_000)
            with contextlib.suppress(OSError):
                stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
                found.append(port)
        return found


def stop_in_its_tracks(process: subprocess.Popen[bytes]) -> None:
    """Suspend a process, and return when it stands still: that takes its threads some ms, in which they answer yet."""
    process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED)


class Cluster:
    """Brokers that hold each other's replicas.

    Args:
        folder: where their data, settings and logs go.
        size: number of brokers; each is a controller, too, so that more than half have to live.
        settings: further lines of server.properties.
    """

    def __init__(self, folder: Path, size: int = 3, settings: Mapping[str, object] | None = None) -> None:
        fetch_jars()
        ports = free_ports(2 * size)
        voters = ",".join(f"{number}@127.0.0.1:{ports[-number]}" for number in range(1, size + 1))
        replicas = {
            "default.replication.factor": size,
            "offsets.topic.replication.factor": size,
            "transaction.state.log.replication.factor": size,
            "transaction.state.log.min.isr": min(size, 2),
            "min.insync.replicas": min(size, 2),
            "controller.quorum.voters": voters,
        }
        self.brokers = [
            Broker(
                folder / f"broker-{number}",
                number,
                ports[number - 1],
                ports[-number],
                {**SETTINGS, **replicas, **(settings or {})},
            )
            for number in range(1, size + 1)
        ]
        self.size = size

    @property
    def address(self) -> str:
        """Bootstrap servers, separated by commas."""
        return ",".join(broker.address for broker in self.brokers)

    def start(self) -> None:
        for broker in self.brokers:
            broker.launch()
        for broker in self.brokers:
            broker.wait_until_started()

    def stop(self) -> None:
        for broker in self.brokers:
            broker.kill()

    def mend(self) -> None:
        """Have every broker run again that a test has killed or paused."""
        broken = [broker for broker in self.brokers if not broker.running]
        for broker in self.brokers:
            if broker.running:
                broker.resume()
        for broker in broken:
            broker.launch()
        for broker in broken:
            broker.wait_until_started()

    async def create_topics(self, topics: Mapping[str, int], settings: Mapping[str, str] | None = None) -> None:
        """Create topics, each with its number of partitions; every broker that runs has a replica of each and knows it."""
        admin = AIOKafkaAdminClient(bootstrap_servers=self.address)
        await admin.start()
        try:
            made = [NewTopic(name, count, self.size, topic_configs=dict(settings or {})) for name, count in topics.items()]
            answer = await admin.create_topics(made)
            assert all(code == 0 for _, code, *_ in answer.topic_errors), answer.topic_errors
        finally:
            await admin.close()
        for broker in self.brokers:
            if broker.running:
                await broker.wait_until_known(topics)

    async def topic(self, name: str, partitions: int = 1, settings: Mapping[str, str] | None = None) -> str:
        """Create a topic of a name that no other test has: `name-7`."""
        fresh = f"{name}-{next(_numbers)}"
        await self.create_topics({fresh: partitions}, settings)
        return fresh

    # What tests of a single broker say.
    def kill(self, signal_number: int = signal.SIGKILL) -> None:
        self.brokers[0].kill(signal_number)

    def restart(self) -> None:
        self.brokers[0].restart()

    def pause(self) -> None:
        self.brokers[0].pause()

    def resume(self) -> None:
        self.brokers[0].resume()


class Broker:
    """One node: broker and controller in one process."""

    def __init__(self, folder: Path, number: int, port: int, controller_port: int, settings: Mapping[str, object]) -> None:
        self.address = f"127.0.0.1:{port}"
        self.number = number
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        folder.mkdir(parents=True)
        own = {
            "node.id": number,
            "listeners": f"PLAINTEXT://{self.address},CONTROLLER://127.0.0.1:{controller_port}",
            "advertised.listeners": f"PLAINTEXT://{self.address}",
            "log.dirs": folder / "data",
        }
        lines = [f"{key}={value}" for key, value in {**settings, **own}.items()]
        (folder / "server.properties").write_text("\n".join(lines) + "\n")

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def log(self) -> str:
        """What the broker has said since its latest start."""
        return (self._folder / "log").read_text(errors="replace")

    def launch(self) -> None:
        """Begin to start, on the data that is there."""
        properties = str(self._folder / "server.properties")
        if not (self._folder / "data").exists():
            self._java(
                ["kafka.tools.StorageTool", "format", "-t", CLUSTER_ID, "-c", properties], self._folder / "format"
            ).wait()
        self._process = self._java(["-Xmx512m", "kafka.Kafka", properties], self._folder / "log")

    def _java(self, arguments: Sequence[str], output: Path) -> subprocess.Popen[bytes]:
        log = "-Dorg.slf4j.simpleLogger."
        options = [
            "-XX:+UseSerialGC",
            "-XX:TieredStopAtLevel=1",
            f"{log}defaultLogLevel=warn",
            f"{log}log.kafka.server.KafkaRaftServer=info",
        ]
        with output.open("wb") as file:
            command = ["java", *options, "-cp", f"{LIBS}/*", *arguments]
            return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env={**os.environ, "LC_ALL": "C"})

    def wait_until_started(self) -> None:
        end = time.monotonic() + PATIENCE_S
        while STARTED not in self.log:
            assert self.running, self.log[-5000:]
            assert time.monotonic() < end, f"the broker did not start\n{self.log[-5000:]}"
            time.sleep(0.02)

    async def wait_until_known(self, topics: Mapping[str, int]) -> None:
        """Wait until the broker says of all topics who leads their partitions: what the controller has decided comes later."""
        async with asyncio.timeout(PATIENCE_S):
            admin = AIOKafkaAdminClient(bootstrap_servers=self.address)
            await admin.start()
            try:
                while True:
                    found = {each["topic"]: each["partitions"] for each in await admin.describe_topics(list(topics))}
                    if all(
                        len(found[name]) == count and all(part["leader"] >= 0 for part in found[name])
                        for name, count in topics.items()
                    ):
                        return
                    await asyncio.sleep(0.01)
            finally:
                await admin.close()

    def start(self) -> None:
        self.launch()
        self.wait_until_started()

    def kill(self, signal_number: int = signal.SIGKILL) -> None:
        """End at once, with no chance to write anything; or by another signal. Return when it has ended."""
        if self._process is not None:
            self._process.send_signal(signal_number)
            self._process.wait(PATIENCE_S)

    def restart(self) -> None:
        """Start again on the same data and port."""
        self.kill()
        self.start()

    def pause(self) -> None:
        """Stop answering, connections open, as a machine that hangs."""
        assert self._process is not None
        stop_in_its_tracks(self._process)

    def thread_states(self) -> set[str]:
        """What the threads are doing, as proc(5) names it: T is stopped. Those that are ending do nothing any more."""
        assert self._process is not None
        states = set()
        for stat in Path(f"/proc/{self._process.pid}/task").glob("*/stat"):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                state, _, _, _, _, _, flags, *_ = stat.read_text().rpartition(")")[2].split()
                if not int(flags) & _ENDING:
                    states.add(state)
        return states

    def resume(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)
