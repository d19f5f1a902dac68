"""Load on a server: requests one after the other on many connections, or so many a second."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field

import click

from servinggraph.cli.asking.body import model_url
from servinggraph.cli.asking.target import Target, failure
from servinggraph.tensors import Array

__all__ = ["Body", "Outcome", "run_load"]

Ask = Callable[[], Awaitable[str | None]]
"""Sends one request; returns what was wrong with the answer, None for nothing."""


@dataclass(frozen=True)
class Body:
    """A request that is no tensors: bytes and their content type."""

    data: bytes
    kind: str


@dataclass
class Outcome:
    """What became of the requests of a load.

    Attributes:
        latencies_s: of the requests that were answered, in order of their ends.
        moments_s: when each of those began, after the start of the measurement.
        errors: the others, by what went wrong.
        seconds: how long it was measured.
        client_cpu: share of a core that this process used meanwhile.
    """

    latencies_s: list[float] = field(default_factory=list)
    moments_s: list[float] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)
    seconds: float = 0
    client_cpu: float = 0


async def run_load(
    target: Target,
    model: str,
    version: str,
    what: Mapping[str, Array] | Body,
    headers: Mapping[str, str],
    connections: int,
    warmup_s: float,
    seconds: float,
    rate: float | None,
    tick: Callable[[float, str], None],
) -> Outcome:
    """Send requests for a time and return what became of those that began in it.

    Args:
        target: the server.
        model: what is asked.
        version: its version; empty for the server's choice.
        what: what each request holds, tensors or a body (over HTTP only).
        headers: headers of each request (gRPC: metadata).
        connections: requests at the same time.
        warmup_s: seconds before the measurement.
        seconds: seconds of the measurement.
        rate: requests a second, whatever the answers take; None for the next as soon as one is answered.
        tick: told, now and then, how many seconds have passed, and something to read.
    """
    outcome = Outcome()
    async with AsyncExitStack() as stack:
        make = _over_grpc if target.is_grpc else _over_http
        ask = await make(stack, target, model, version, what, target.headers(headers), connections)
        clock = time.perf_counter
        begin = clock() + warmup_s
        end = begin + seconds
        due = _due(begin - warmup_s, rate)

        async def worker() -> None:
            while True:
                now = clock()
                asked = now if rate is None else next(due)
                if asked >= end:
                    return
                if asked > now:
                    await asyncio.sleep(asked - now)
                wrong = await ask()
                if asked < begin:
                    continue
                if wrong is None:
                    outcome.latencies_s.append(clock() - asked)
                    outcome.moments_s.append(asked - begin)
                else:
                    outcome.errors[wrong] += 1

        async def watch() -> None:
            while True:
                tick(clock() - begin + warmup_s, f"{len(outcome.latencies_s):,} answered, {outcome.errors.total():,} failed")
                await asyncio.sleep(0.1)

        watching = asyncio.ensure_future(watch())
        cpu, started = time.process_time(), clock()
        try:
            await asyncio.gather(*(worker() for _ in range(connections)))
        finally:
            watching.cancel()
        outcome.client_cpu = (time.process_time() - cpu) / (clock() - started)
        outcome.seconds = max(seconds, clock() - begin)
    return outcome


class _due:  # noqa: N801  (an iterator that reads as a call)
    """Moments at a fixed rate, handed out in order."""

    def __init__(self, start: float, rate: float | None) -> None:
        self._next, self._step = start, 0.0 if rate is None else 1 / rate

    def __next__(self) -> float:
        moment = self._next
        self._next += self._step
        return moment


async def _over_http(
    stack: AsyncExitStack,
    target: Target,
    model: str,
    version: str,
    what: Mapping[str, Array] | Body,
    more: Mapping[str, str],
    connections: int,
) -> Ask:
    """Return what sends one request over HTTP: the same bytes each time, made once."""
    try:
        import aiohttp
        from multidict import CIMultiDict  # aiohttp's own
    except ImportError as error:
        raise click.UsageError(f"{error}: bench needs pip install 'servinggraph[tools]'") from error
    if isinstance(what, Body):
        place, body, headers = f"{model_url(target.url, model, version)}/invocations", what.data, {"Content-Type": what.kind}
    else:
        place, headers = f"{model_url(target.url, model, version)}/infer", {"Content-Type": "application/octet-stream"}
        body, length = target.library.InferenceServerClient.generate_request_body(target.tensors(what))
        if length is not None:
            headers["Inference-Header-Content-Length"] = str(length)
    sent = CIMultiDict(headers)
    sent.update(more)  # whatever the case of their names
    session = await stack.enter_async_context(
        aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=connections),
            timeout=aiohttp.ClientTimeout(total=target.timeout_s),
            headers=sent,
        )
    )

    async def ask() -> str | None:
        try:
            async with session.post(place, data=body, allow_redirects=False) as answer:
                content = await answer.read()
        except (OSError, aiohttp.ClientError, TimeoutError) as error:
            return failure(error)
        return None if answer.status == 200 else f"{answer.status} {content[:200].decode('utf-8', 'replace')}"

    return ask


async def _over_grpc(
    stack: AsyncExitStack,
    target: Target,
    model: str,
    version: str,
    what: Mapping[str, Array] | Body,
    more: Mapping[str, str],
    connections: int,
) -> Ask:
    """Return what sends one request over gRPC."""
    import tritonclient.grpc.aio as library

    client = library.InferenceServerClient(target.address, ssl=target.is_secure)
    stack.push_async_callback(client.close)
    assert not isinstance(what, Body)  # as the command has looked
    inputs = target.tensors(what, library)

    async def ask() -> str | None:
        try:
            await client.infer(model, inputs, model_version=version, client_timeout=target.timeout_s, headers=dict(more))
        except Exception as error:
            return failure(error)
        return None

    return ask
