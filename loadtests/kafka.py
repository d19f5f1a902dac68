"""Consume, infer, produce: servinggraph over Kafka beside a loop without a model, and beside an HTTP call for each message.

    .venv/bin/python loadtests/kafka.py --output loadtests/results/DATE-kafka.md

One broker (tests/kafka_broker.py), one process of what is measured, one partition count for all. *Throughput*: the messages are
there before it starts, and the answers are read when all are; from their own timestamps, the middle 80 %. *Latency*: messages
come at half of that rate; from a message's time of sending to the moment when a read_committed consumer in another process has
its answer.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.util
import json
import logging
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from conditions import machine, packages, servinggraph
from harness import free_port
from servers import BENCH, HERE, MODELS

KINDS = ("copy", "at_least_once", "exactly_once", "http")
PARTITIONS = 6
PACKAGES = ("aiokafka", "onnxruntime", "numpy", "uvloop")
LOOPS = HERE / "peers" / "kafka_loops.py"

GRAPH = """
graph: {model}
inputs: {{{inputs}}}
nodes: {{model: {{step: onnx, path: {path}, batch: {{max_rows: 64}}}}}}
answer: model
kafka:
  brokers: "{brokers}"
  input: {{topics: [{source}], group: {source}}}
  output: {{topic: {target}}}
  delivery: {delivery}
"""
SHARE = {"iris": 1, "mlp": 6}
"""What part of the messages a model gets: a request of mlp is forty times as large."""
INPUTS = {"iris": "X: {datatype: FP32, shape: [-1, 4]}", "mlp": "x: {datatype: FP32, shape: [-1, 784]}"}


@dataclass
class Row:
    """One line of the table."""

    model: str
    kind: str
    rate: float
    spread: tuple[float, float]
    p50_ms: float = 0.0
    p99_ms: float = 0.0
    half_rate: float = 0.0


def body_of(model: str) -> bytes:
    return (BENCH / f"{model}.json").read_bytes()


class Bench:
    """The broker and what is measured on it."""

    def __init__(self, cluster: Any, folder: Path) -> None:
        self.cluster, self.folder = cluster, folder

    @contextlib.asynccontextmanager
    async def running(self, kind: str, model: str, source: str, target: str) -> AsyncIterator[None]:
        """Run one of the kinds until the block ends."""
        with contextlib.ExitStack() as stack:
            if kind in ("copy", "http"):
                arguments = [kind, self.cluster.address, source, target]
                if kind == "http":
                    port = free_port()
                    serve = ["serve", str(MODELS / f"{model}.onnx"), "--http-port", str(port), "--grpc-port", "off"]
                    self._start(stack, [sys.executable, "-m", "servinggraph", *serve])
                    await listening(port)
                    arguments.append(f"http://127.0.0.1:{port}/v2/models/{model}/infer")
                self._start(stack, [sys.executable, str(LOOPS), *arguments])
            else:
                path = self.folder / f"{source}.yaml"
                path.write_text(
                    GRAPH.format(
                        model=model, inputs=INPUTS[model], path=MODELS / f"{model}.onnx", brokers=self.cluster.address,
                        source=source, target=target, delivery=kind,
                    )
                )  # fmt: skip
                serve = ["serve", str(path), "--http-port", "off", "--grpc-port", "off", "--log-level", "warning"]
                self._start(stack, [sys.executable, "-m", "servinggraph", *serve])
            yield

    def _start(self, stack: contextlib.ExitStack, command: list[str]) -> None:
        log = stack.enter_context((self.folder / "log").open("ab"))
        process = subprocess.Popen(command, stdout=log, stderr=log)

        def end() -> None:
            assert process.poll() is None, (self.folder / "log").read_text()[-3000:]
            process.send_signal(signal.SIGKILL)
            process.wait()

        stack.callback(end)

    async def throughput(self, kind: str, model: str, count: int) -> float:
        """Return messages a second."""
        source, target = await self.cluster.topic("in", PARTITIONS), await self.cluster.topic("out", PARTITIONS)
        body = body_of(model)
        async with AIOKafkaProducer(bootstrap_servers=self.cluster.address, linger_ms=20, max_batch_size=2**18) as producer:
            for number in range(count):
                await producer.send(source, body, key=str(number % 1000).encode())
        async with consuming(self.cluster.address, target) as consumer:
            async with self.running(kind, model, source, target), asyncio.timeout(300):
                await self._written(consumer, count)
            times: list[int] = []
            async with asyncio.timeout(60):
                while len(times) < count:
                    for records in (await consumer.getmany(timeout_ms=1000)).values():
                        times += [record.timestamp for record in records]
                        assert b'"error"' not in records[0].value, records[0].value
        times.sort()
        low, high = int(count * 0.1), int(count * 0.9)
        return (high - low) / max(1e-3, (times[high] - times[low]) / 1e3)

    @staticmethod
    async def _written(consumer: Any, count: int) -> None:
        """Wait until so many answers are there, without reading them, which would take a part of the machine."""
        places, total, since = list(consumer.assignment()), 0, time.monotonic()
        consumer.pause(*places)
        while total < count or time.monotonic() - since < 1.5:  # ends of transactions count as well
            await asyncio.sleep(0.25)
            now = sum((await consumer.end_offsets(places)).values())
            if now != total:
                total, since = now, time.monotonic()
        consumer.resume(*places)

    async def latency(self, kind: str, model: str, rate: float, seconds: float) -> tuple[float, float]:
        """Return median and 99th percentile, milliseconds, at a rate."""
        source, target = await self.cluster.topic("in", PARTITIONS), await self.cluster.topic("out", PARTITIONS)
        body = body_of(model)
        found: list[float] = []

        async def read(consumer: Any) -> None:
            while True:
                for records in (await consumer.getmany(timeout_ms=200)).values():
                    now = time.time()
                    found.extend(now - float(dict(record.headers)["sent"]) for record in records)

        async with consuming(self.cluster.address, target) as consumer, self.running(kind, model, source, target):
            reading = asyncio.create_task(read(consumer))
            async with AIOKafkaProducer(bootstrap_servers=self.cluster.address, acks=1) as producer:
                await producer.send_and_wait(source, body, headers=[("sent", str(time.time()).encode())])
                async with asyncio.timeout(60):
                    while not found:
                        await asyncio.sleep(0.05)
                await asyncio.sleep(2)
                began, sent = time.perf_counter(), 0
                while (passed := time.perf_counter() - began) < seconds:
                    while sent < passed * rate:
                        headers = [("sent", str(time.time()).encode())]
                        await producer.send(source, body, key=str(sent % 1000).encode(), headers=headers)
                        sent += 1
                    await asyncio.sleep(0.002)
            async with asyncio.timeout(120):
                while len(found) < sent + 1:
                    await asyncio.sleep(0.05)
            reading.cancel()
            await asyncio.wait([reading])
        later = sorted(found[1 + sent // 5 :])  # without the first moments
        return statistics.median(later) * 1e3, later[int(len(later) * 0.99)] * 1e3


@contextlib.asynccontextmanager
async def consuming(address: str, topic: str) -> AsyncIterator[Any]:
    async with AIOKafkaConsumer(
        topic, bootstrap_servers=address, auto_offset_reset="earliest", isolation_level="read_committed", fetch_max_wait_ms=20
    ) as consumer:
        yield consumer


async def listening(port: int) -> None:
    async with asyncio.timeout(60):
        while True:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
            except OSError:
                await asyncio.sleep(0.05)
                continue
            writer.close()
            return


def page(rows: list[Row], options: argparse.Namespace) -> str:
    """Return the results as Markdown."""
    about = {
        "copy": "a loop of aiokafka that writes what it reads, no model",
        "at_least_once": "servinggraph, at least once",
        "exactly_once": "servinggraph, exactly once",
        "http": "a loop of aiokafka with an HTTP call of servinggraph for each message, two processes",
    }
    lines = [
        "# Kafka: consume, infer, produce", "",
        "V2 JSON, one row a message, one process of what is measured; broker, producer and reader run on the same machine.",
        "How it is measured is written at the top of [kafka.py](../kafka.py).", "",
        "| model | what | messages/s | lowest to highest | half rate | p50 ms | p99 ms |", "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for row in rows:
        spread = f"{row.spread[0]:,.0f} to {row.spread[1]:,.0f}"
        late = f"{row.half_rate:,.0f} | {row.p50_ms:.1f} | {row.p99_ms:.1f}"
        lines.append(f"| {row.model} | {about[row.kind]} | {row.rate:,.0f} | {spread} | {late} |")
    counted = f"Median of {options.rounds} rounds of {options.count:,} messages (mlp: a sixth of that)"
    lines += ["", f"{counted}; latency over {options.seconds:g} s.", ""]
    conditions = {k: v for k, v in machine().items() if k != "wrk"} | {
        "load before": options.load,
        "versions": f"{servinggraph()}, {packages(Path(sys.executable), *PACKAGES)}, Kafka 4.1.0",
    }
    return "\n".join([*lines, *(f"- {name}: {text}" for name, text in conditions.items()), ""])


async def main(options: argparse.Namespace) -> None:
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)
    options.load = f"{os.getloadavg()[0]:.1f} (load average of one minute)"
    if not (MODELS / "iris.onnx").is_file():
        subprocess.run([sys.executable, str(HERE / "make_models.py"), str(BENCH)], check=True)
    path = HERE.parent / "tests" / "kafka_broker.py"
    spec = importlib.util.spec_from_file_location("kafka_broker", path)
    assert spec is not None
    assert spec.loader is not None
    broker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(broker)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        cluster = broker.Cluster(Path(folder) / "broker", 1)
        cluster.start()
        try:
            bench = Bench(cluster, Path(folder))
            for model in options.models:
                rates: dict[str, list[float]] = {kind: [] for kind in options.kinds}
                for _ in range(options.rounds):
                    for kind in options.kinds:
                        rates[kind].append(await bench.throughput(kind, model, options.count // SHARE[model]))
                        print(model, kind, f"{rates[kind][-1]:,.0f}/s", flush=True)
                for kind, found in rates.items():
                    row = Row(model, kind, statistics.median(found), (min(found), max(found)))
                    row.half_rate = row.rate / 2
                    row.p50_ms, row.p99_ms = await bench.latency(kind, model, row.half_rate, options.seconds)
                    print(json.dumps(vars(row)), flush=True)
                    rows.append(row)
        finally:
            cluster.stop()
    if options.output:
        options.output.write_text(page(rows, options))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=["iris", "mlp"])
    parser.add_argument("--kinds", nargs="*", default=list(KINDS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--count", type=int, default=60_000)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--output", type=Path)
    asyncio.run(main(parser.parse_args()))
