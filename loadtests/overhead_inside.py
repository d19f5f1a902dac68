"""The same without sockets: what a request costs the event loop's process in each way to serve, by processor time.

Trials of a few hundred requests, 32 at once, go over the ways in turn; the lowest tenth of them is what a quiet moment of the
machine gives, so other programs disturb this less than a load test. Run by overhead.py in a process of its own.

usage: python overhead_inside.py TRIALS MODEL BODY  ->  JSON on standard output: way to microseconds a request
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from servinggraph.interfaces import FrontEndOptions
from servinggraph.lifecycle import Serving, read_graphs
from servinggraph.protocols.http.server import make_asgi
from servinggraph.protocols.http.wire import REPLY
from servinggraph.server import new_event_loop

WAYS: dict[str, dict[str, Any]] = {
    "nothing": {"metrics": "off"},
    "nothing again": {"metrics": "off"},
    "metrics": {},
    "metrics, access log": {"access_log": os.devnull},
    "metrics, 1 % traces": {"otel": "on", "otel_sample": 0.01},
}
AT_ONCE, TURNS = 32, 12


async def measure(trials: int, model: Path, body: bytes) -> dict[str, float]:
    """Return microseconds a request of each way, the lowest tenth of its trials."""
    applications = {}
    for way, options in WAYS.items():
        serving = Serving(FrontEndOptions(**options))
        if serving.spans is not None:
            serving.spans.add = lambda spans: None  # the exporter's thread is another matter
        await serving.catalog.load(read_graphs(model, ()))
        applications[way] = make_asgi(serving)
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    scope = {
        "type": "http", "method": "POST", "path": f"/v2/models/{model.stem}/infer", "headers": headers, "http_version": "1.1",
        "extensions": {REPLY: lambda head, content: True},
    }  # fmt: skip
    message = {"type": "http.request", "body": body, "more_body": False}

    async def receive() -> Any:
        return message

    async def send(message: Any) -> None:
        raise AssertionError(message)

    async def trial(application: Any) -> float:
        began = time.process_time_ns()
        for _ in range(TURNS):
            await asyncio.gather(*(application(scope, receive, send) for _ in range(AT_ONCE)))
        return (time.process_time_ns() - began) / (TURNS * AT_ONCE) / 1e3

    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 50)
    spent: dict[str, list[float]] = {way: [] for way in WAYS}
    names = list(WAYS)
    for number in range(trials):
        first = number % len(names)
        for way in names[first:] + names[:first]:
            spent[way].append(await trial(applications[way]))
    return {way: sorted(times)[len(times) // 10] for way, times in spent.items()}


if __name__ == "__main__":
    loop = new_event_loop()
    found = loop.run_until_complete(measure(int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]).read_bytes()))
    print(json.dumps(found), flush=True)
    os._exit(0)  # the exporter would wait for its collector
