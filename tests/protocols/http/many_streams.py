"""Many streams at once with readers that are slow, stall or vanish: memory, and what is left behind.

`python many_streams.py --streams 1000 --waves 3`; many_streams.md says what is looked at and has a
recorded run. The server is a process of its own, so that its memory is its alone.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import random
import resource
import socket
import sys
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

HEAD = b"POST /v2/models/g/generate_stream HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s"
NUMBERS = 500
ITEMS = 200
ENDLESS = 2**30
READERS = ("slow", "stalls", "leaves", "leaves at once", "resets")
PATIENCE_S = 60.0


# The server's side.


def memory_mib() -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise AssertionError


async def serve() -> None:
    import numpy as np

    from servinggraph import Graph
    from servinggraph.interfaces import FrontEndOptions
    from servinggraph.lifecycle import Serving
    from servinggraph.protocols.http.server import HttpFrontEnd

    counts: Counter[str] = Counter()

    async def source(value: Any) -> Any:
        counts["begun"] += 1
        try:
            for number in range(int(value["x"][0])):
                await asyncio.sleep(0)
                counts["items"] += 1
                counts["most"] = max(counts["most"], number + 1)
                yield {"y": np.full(NUMBERS, number + 0.25)}
        finally:
            counts["ended"] += 1

    def behind(value: Any) -> Any:
        return {"y": value["y"] + 1}

    graph = Graph("g", {"x": ("INT32", [-1])}, outputs={"y": ("FP64", [-1])})
    graph.to(source).to(behind).respond()
    serving = Serving(FrontEndOptions(max_in_flight=100_000, max_connections=100_000))
    front_end = HttpFrontEnd(serving, "127.0.0.1", 0)
    front_end.bind()
    await serving.catalog.load([graph.compile()])
    await front_end.start()
    tasks = len(asyncio.all_tasks())
    print(front_end.port, flush=True)
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        if line.strip() == "settled":
            gc.collect()
        said = {
            **counts,
            "pending": counts["begun"] - counts["ended"],
            "in_flight": serving.admission.in_flight,
            "requests": serving.catalog.get("g").requests,
            "tasks": len(asyncio.all_tasks()) - tasks,
            "memory": memory_mib(),
        }
        print(json.dumps(said), flush=True)
    await front_end.stop(1)
    await serving.catalog.stop()


# The clients' side.


class Served:
    """The server process."""

    async def __aenter__(self) -> Self:
        pipe = asyncio.subprocess.PIPE
        self._process = await asyncio.create_subprocess_exec(sys.executable, __file__, "--serve", stdin=pipe, stdout=pipe)
        self.port = int(await self._line())
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        assert 0 == await asyncio.wait_for(self._process.wait(), PATIENCE_S)

    async def _line(self) -> bytes:
        assert self._process.stdout is not None
        return await asyncio.wait_for(self._process.stdout.readline(), PATIENCE_S)

    async def look(self, word: str = "now") -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(word.encode() + b"\n")
        return dict(json.loads(await self._line()))

    async def settled(self) -> dict[str, Any]:
        """Return the counts once nothing is under way, or after a while those that say what is."""
        for _ in range(int(PATIENCE_S / 0.05)):
            seen = await self.look("settled")
            if not seen["pending"] and not seen["in_flight"] and not seen["tasks"]:
                break
            await asyncio.sleep(0.05)
        return seen


async def one(port: int, kind: str, rng: random.Random, go: asyncio.Event) -> int:
    """Read one stream as its kind does.

    Returns:
        Events read.
    """
    raw = socket.socket()
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16384)  # the kernel's buffers are not what is looked at
    raw.setblocking(False)
    await asyncio.get_running_loop().sock_connect(raw, ("127.0.0.1", port))
    reader, writer = await asyncio.open_connection(sock=raw, limit=16384)
    body = json.dumps({"x": ITEMS if kind == "slow" else ENDLESS}).encode()
    writer.write(HEAD % (len(body), body))
    events = 0
    try:
        if kind == "leaves at once":
            return 0
        if kind == "stalls":
            await go.wait()
            return 0
        last = {"slow": ITEMS}.get(kind, rng.randrange(1, 30))
        while events < last:
            line = await asyncio.wait_for(reader.readline(), PATIENCE_S)
            if line.startswith(b"data: "):
                number = json.loads(line[6:])["y"]
                assert number == [events + 1.25] * NUMBERS, "an event is wrong"
                events += 1
                await asyncio.sleep(rng.random() * 0.02)
        if kind == "slow":
            rest = await asyncio.wait_for(reader.readuntil(b"0\r\n\r\n"), PATIENCE_S)
            assert rest.endswith(b"0\r\n\r\n"), "the end is wrong"
        elif kind == "resets":
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        return events
    finally:
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()


async def wave(served: Served, streams: int, rng: random.Random) -> dict[str, Any]:
    """Run one wave of streams, and return what was seen during it and after it."""
    go = asyncio.Event()
    kinds = [READERS[number % len(READERS)] for number in range(streams)]
    before = await served.look()
    readers = [asyncio.ensure_future(one(served.port, kind, rng, go)) for kind in kinds]
    others = [reader for reader, kind in zip(readers, kinds, strict=True) if kind != "stalls"]
    peak, most = 0.0, 0
    try:
        while not all(reader.done() for reader in others):
            await asyncio.wait(others, timeout=0.2)
            seen = await served.look()
            peak, most = max(peak, seen["memory"]), max(most, seen["in_flight"])
    finally:
        go.set()
    read = sum(await asyncio.gather(*readers))
    after = await served.settled()
    return {
        "streams": streams,
        "at once": most,
        "begun": after["begun"] - before.get("begun", 0),
        "items made": after["items"] - before.get("items", 0),
        "events read": read,
        "most of one stream": after["most"],
        "peak MiB": round(peak, 1),
        "after MiB": round(after["memory"], 1),
        "pending": after["pending"],
        "slots": after["in_flight"],
        "requests": after["requests"],
        "tasks": after["tasks"],
    }


async def run(streams: int, waves: int, seed: int) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    async with Served() as served:
        return [await wave(served, streams, rng) for _ in range(waves)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--serve", action="store_true")
    parser.add_argument("--streams", type=int, default=1000)
    parser.add_argument("--waves", type=int, default=4)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 16384), hard))
    if options.serve:
        from servinggraph.server import new_event_loop

        with asyncio.Runner(loop_factory=new_event_loop) as runner:
            runner.run(serve())
        return
    for seen in asyncio.run(run(options.streams, options.waves, options.seed)):
        print(", ".join(f"{name} {value}" for name, value in seen.items()))


if __name__ == "__main__":
    main()
