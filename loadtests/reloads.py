"""Requests at full load while their graph is loaded again and again, once with a broken file.

    .venv/bin/python loadtests/reloads.py [--requests 10000] [--connections 32] [--reloads 20]

Every load brings a new version with a number of its own in each of its three steps (inline,
async, batched), and unloads the one before. An answer must name one version and hold its
number three times. Prints the figures that tests/protocols/load_under_fire.md records.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import tempfile
import time
from collections import Counter
from pathlib import Path

from servinggraph.interfaces import FrontEndOptions
from servinggraph.lifecycle import RepositorySettings, Serving
from servinggraph.protocols.http.server import HttpFrontEnd
from servinggraph.server import new_event_loop

GRAPH = """\
inputs: {x: {datatype: FP64, shape: [-1]}}
nodes:
  first: {step: python, call: "steps:first"}
  second: {step: python, call: "more.steps:second"}
  third: {step: python, call: "more.steps:third", batch: {max_rows: 16, max_delay_ms: 1}}
answer: third
"""
STEPS = "N = {n}\ndef first(value):\n    return {{'one': value['x'] * 0 + N}}\n"
MORE = """\
import asyncio
from . import number
async def second(value):
    await asyncio.sleep(0.002)
    return {**value, 'two': value['one'] * 0 + number.N}
def third(value):
    return {**value, 'three': value['one'] * 0 + number.N}
"""
BODY = json.dumps({"inputs": [{"name": "x", "datatype": "FP64", "shape": [1], "data": [0]}]}).encode()
INFER = b"POST /v2/models/fire/infer HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s" % (len(BODY), BODY)


def write(folder: Path, number: int) -> None:
    version = folder / "fire" / str(number)
    (version / "more").mkdir(parents=True, exist_ok=True)
    (version / "steps.py").write_text(STEPS.format(n=number))
    (version / "more" / "__init__.py").write_text("")
    (version / "more" / "number.py").write_text(f"N = {number}\n")
    (version / "more" / "steps.py").write_text(MORE)
    (version / "graph.yaml").write_text(GRAPH)


class Counts:
    def __init__(self, requests: int) -> None:
        self.left = requests
        self.failed: list[str] = []
        self.mixed = 0
        self.versions: Counter[str] = Counter()
        self.seconds: list[float] = []

    def take(self, status: int, body: bytes, seconds: float) -> None:
        self.seconds.append(seconds)
        if status != 200:
            self.failed.append(body.decode())
            return
        document = json.loads(body)
        numbers = {output["data"][0] for output in document["outputs"]}
        if len(document["outputs"]) != 3 or numbers != {float(document["model_version"])}:
            self.mixed += 1
        self.versions[document["model_version"]] += 1


async def connection(port: int, counts: Counts) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    while counts.left > 0:
        counts.left -= 1
        began = time.perf_counter()
        writer.write(INFER)
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        length = int(head.split(b"content-length:")[1].split(b"\r\n")[0])
        counts.take(int(head.split()[1]), await reader.readexactly(length), time.perf_counter() - began)
    writer.close()


async def reload(serving: Serving, folder: Path, reloads: int, counts: Counts, total: int) -> int:
    refused = 0
    for number in range(1, reloads + 1):
        due = total - total * number // (reloads + 1)
        while counts.left > due:
            await asyncio.sleep(0.001)
        if number == reloads // 2:
            write(folder, number + 1)
            (folder / "fire" / str(number + 1) / "graph.yaml").write_text(GRAPH[:90])
            try:
                await serving.repository.load("fire")
            except Exception as error:
                refused += 1
                print("refused, as it must be:", str(error).splitlines()[0])
        write(folder, number + 1)
        await serving.repository.load("fire")
    return refused


async def main(requests: int, connections: int, reloads: int) -> None:
    folder = Path(tempfile.mkdtemp())
    write(folder, 1)
    serving = Serving(FrontEndOptions(), RepositorySettings(folder=folder, mode="explicit", load=("fire",)))
    front_end = HttpFrontEnd(serving, "127.0.0.1", 0)
    front_end.bind()
    await serving.repository.start()
    await front_end.start()
    counts = Counts(requests)
    began = time.perf_counter()
    reloading = asyncio.ensure_future(reload(serving, folder, reloads, counts, requests))
    await asyncio.gather(*(connection(front_end.port, counts) for _ in range(connections)))
    seconds = time.perf_counter() - began
    refused = await reloading
    await front_end.stop(1)
    await serving.repository.stop()
    shutil.rmtree(folder)
    answered = sum(counts.versions.values())
    ordered = sorted(counts.seconds)
    print(f"{requests} requests, {connections} connections, {reloads} reloads, {refused} refused load")
    print(f"answered {answered}, failed {len(counts.failed)} {counts.failed[:3]}, mixed {counts.mixed}")
    print(f"versions that answered: {len(counts.versions)}; fewest answers of one {min(counts.versions.values())}")
    median, longest = ordered[len(ordered) // 2] * 1e3, ordered[-1] * 1e3
    print(f"{requests / seconds:.0f} a second; p50 {median:.1f} ms, longest {longest:.0f} ms")
    if counts.failed or counts.mixed or answered != requests or refused != 1:
        raise SystemExit(1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--connections", type=int, default=32)
    parser.add_argument("--reloads", type=int, default=20)
    given = parser.parse_args()
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(main(given.requests, given.connections, given.reloads))
