"""Memory of a server while a gigabyte waits in its topic and the graph is slow: flat, or not.

    .venv/bin/python loadtests/kafka_memory.py --output loadtests/results/2026-11-28-2-cores-kafka-memory.md

Records of 100 kB, written before the server starts; a step that takes 50 ms, 16 at a time; resident memory every second.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import aiokafka
import yaml

ROOT = Path(__file__).parents[1]
STEP = "import asyncio\n\n\nasync def slow(value):\n    await asyncio.sleep(0.05)\n    return len(value)\n"


def broker_module():
    spec = importlib.util.spec_from_file_location("kafka_broker", ROOT / "tests" / "kafka_broker.py")
    module = sys.modules["kafka_broker"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


async def write(address: str, topic: str, count: int, size: int) -> None:
    value = os.urandom(size)
    async with aiokafka.AIOKafkaProducer(bootstrap_servers=address, max_batch_size=1_000_000) as producer:
        for number in range(count):
            await producer.send(topic, value, key=b"%d" % number)


def resident_mb(process: int) -> float:
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) / 1024


async def measure(folder: Path, count: int, size: int, seconds: int) -> list[float]:
    cluster = broker_module().Cluster(folder / "broker", 1)
    cluster.start()
    try:
        source, answers, dead = [await cluster.topic(name, 4) for name in ("in", "out", "dead")]
        await write(cluster.address, source, count, size)
        graph = {
            "graph": "g", "inputs": "body", "nodes": {"s": {"step": "python", "call": "memory_steps:slow"}}, "answer": "s",
            "kafka": {
                "brokers": cluster.address, "input": {"topics": [source], "group": "g"}, "output": {"topic": answers},
                "errors": {"topic": dead}, "max_in_flight": 16,
            },
        }  # fmt: skip
        (folder / "memory_steps.py").write_text(STEP)
        (folder / "graph.yaml").write_text(yaml.safe_dump(graph))
        command = [sys.executable, "-m", "servinggraph", "serve", "graph.yaml", "--http-port", "off", "--grpc-port", "off"]
        server = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL)
        sizes = []
        try:
            for _ in range(seconds):
                await asyncio.sleep(1)
                sizes.append(resident_mb(server.pid))
        finally:
            server.terminate()
            assert server.wait(60) == 0
        return sizes
    finally:
        cluster.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--size", type=int, default=100_000)
    parser.add_argument("--seconds", type=int, default=30)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        sizes = asyncio.run(measure(Path(folder), options.count, options.size, options.seconds))
    settled = sizes[3:]
    versions = f"Python {platform.python_version()}, aiokafka {aiokafka.__version__}, Kafka 4.1.0"
    seen = f"least {min(settled):.0f}, most {max(settled):.0f}, at the end {sizes[-1]:.0f}"
    lines = [
        f"# Memory while {options.count * options.size / 1e9:.1f} GB wait in the topic",
        "",
        f"`loadtests/kafka_memory.py`, {time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores, the broker included; {versions}.",
        f"{options.count} records of {options.size} bytes, a step of 50 ms, 16 at a time; `max_waiting_bytes` 64 MiB.",
        "",
        f"Resident memory of the server, MB, from the fourth second on: {seen}.",
        "",
        "| second | " + " | ".join(str(at + 1) for at in range(0, len(sizes), 3)) + " |",
        "|---|" + "---|" * len(sizes[::3]),
        "| MB | " + " | ".join(f"{size:.0f}" for size in sizes[::3]) + " |",
        "",
    ]
    text = "\n".join(lines)
    print(text)
    if options.output:
        options.output.write_text(text)


if __name__ == "__main__":
    main()
