"""Runs servers as processes, loads one of them with wrk, reads from /proc what that cost and what disturbed it.

Linux only. Everything listens on, and goes to, 127.0.0.1.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any, NoReturn, TypeVar

POST = Path(__file__).with_name("post.lua")
TICKS_PER_S = os.sysconf("SC_CLK_TCK")
UNIT_MS = {"us": 1e-3, "ms": 1.0, "s": 1e3, "m": 6e4}
START_S, STOP_S = 90, 5

T = TypeVar("T")

_given: set[int] = set()


class ServerFailed(Exception):
    """A server ended, or did not answer in time; the text says where its log is."""


@dataclass(frozen=True)
class Launch:
    """What starts a server.

    Attributes:
        command: the program and its arguments.
        environment: variables beside those of this process.
    """

    command: list[str]
    environment: dict[str, str]


@dataclass(frozen=True)
class Sample:
    """One wrk run.

    Attributes:
        requests: how many were answered.
        rate: requests a second.
        p50_ms: median latency.
        p99_ms: latency that one request in a hundred exceeds.
        failed: answers other than 2xx, and socket errors.
        others: cores that everything but the loaded server and wrk used meanwhile.
    """

    requests: int
    rate: float
    p50_ms: float
    p99_ms: float
    failed: int
    others: float


class Server:
    """A server with one model, in a process session of its own.

    Args:
        name: what the results call it.
        model: the V2 model name.
        body: file with the request that it is asked.
        folder: an empty scratch folder; its output goes to `log` there.
    """

    def __init__(self, name: str, model: str, body: Path, folder: Path) -> None:
        self.name, self.model, self.body, self.folder = name, model, body, folder
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.infer_url = f"{self.url}/v2/models/{model}/infer"
        self.log = folder / "log"
        self._process: subprocess.Popen[bytes] | None = None

    def __str__(self) -> str:
        return f"{self.name} with {self.model}"

    def start(self, launch: Launch) -> None:
        """Start the process; `first` waits for it."""
        environment = os.environ | launch.environment
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                launch.command, env=environment, stdout=log, stderr=log, cwd=self.folder, start_new_session=True
            )

    def first(self, request: Callable[[], T], pause_s: float = 0.2) -> T:
        """Send a request until it is answered, and return the answer.

        Raises:
            ServerFailed: the process ended, or START_S seconds passed.
        """
        end = time.monotonic() + START_S
        while True:
            try:
                return request()
            except (OSError, HTTPException) as error:
                if self._process is None or self._process.poll() is not None:
                    raise ServerFailed(f"{self} ended by itself; see {self.log}") from error
                if time.monotonic() > end:
                    raise ServerFailed(f"{self} did not answer within {START_S} s: {error}; see {self.log}") from error
            time.sleep(pause_s)

    def infer(self) -> dict[str, Any]:
        """Ask what wrk asks, once."""
        request = urllib.request.Request(self.infer_url, self.body.read_bytes(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=5) as answer:
            return dict(json.load(answer))

    def get(self, path: str) -> bytes:
        """Get a path of the server."""
        with urllib.request.urlopen(self.url + path, timeout=5) as answer:
            return bytes(answer.read())

    def pids(self) -> list[int]:
        """Return its processes: all of its session that have not ended."""
        if self._process is None:
            return []
        self._process.poll()
        session = str(self._process.pid)
        every = [int(name) for name in os.listdir("/proc") if name.isdigit()]
        return [pid for pid in every if (stat := _stat(pid)) and stat[3] == session and stat[0] != "Z"]

    def cpu_seconds(self) -> float:
        """Return what its processes have computed so far."""
        return sum(int(ticks) for pid in self.pids() for ticks in _stat(pid)[11:13]) / TICKS_PER_S

    def resident_mb(self) -> float:
        """Return the resident memory of its processes; a page that several share counts for each."""
        return sum(_resident_kb(pid) for pid in self.pids()) / 1024


@contextmanager
def stopping(servers: Sequence[Server]) -> Iterator[None]:
    """End the servers when the block is left, whichever way; from then on Ctrl-C cannot cut it short."""
    try:
        yield
    finally:
        usual = signal.signal(signal.SIGINT, signal.SIG_IGN)
        for number in (signal.SIGTERM, signal.SIGKILL):
            for pid in _pids_of(servers):
                try:
                    os.kill(pid, number)
                except ProcessLookupError:
                    pass
            end = time.monotonic() + STOP_S
            while _pids_of(servers) and time.monotonic() < end:
                time.sleep(0.05)
        signal.signal(signal.SIGINT, usual)


def run_program(main: Callable[[], int]) -> NoReturn:
    """Run a program and exit with its status; Ctrl-C and SIGTERM leave it through `stopping`, and without a traceback."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except ServerFailed as error:
        sys.exit(str(error))


def free_port() -> int:
    """Return a port that nobody listens on at the moment, and that was not returned before."""
    while True:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = int(listener.getsockname()[1])
        if port not in _given:
            _given.add(port)
            return port


def load(server: Server, connections: int, seconds: int) -> Sample:
    """Load a server with wrk: each connection sends its next request when it has the answer to the last.

    Raises:
        ServerFailed: wrk reached nobody.
    """
    command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--latency", "-s", str(POST), server.infer_url]
    environment = os.environ | {"BODY": str(server.body)}
    started, before = time.monotonic(), foreign_cpu_seconds(server)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=seconds + 30, check=False)
    others = (foreign_cpu_seconds(server) - before) / (time.monotonic() - started)
    text = done.stdout
    requests = re.search(r"(\d+) requests in", text)
    if done.returncode or not requests or requests[1] == "0":
        raise ServerFailed(f"{server} gave wrk no answer: {done.stderr.strip() or text.strip()}; see {server.log}")
    errors = re.findall(r"(?:Non-2xx or 3xx responses:|connect|read|write|timeout) (\d+)", text)
    return Sample(
        requests=int(requests[1]),
        rate=float(re.findall(r"Requests/sec:\s+([\d.]+)", text)[0]),
        p50_ms=_percentile_ms(text, 50),
        p99_ms=_percentile_ms(text, 99),
        failed=sum(map(int, errors)),
        others=max(0.0, others),
    )


def _percentile_ms(text: str, percent: int) -> float:
    number, unit = re.findall(rf"\n\s+{percent}%\s+([\d.]+)(us|ms|s|m)\b", text)[0]
    return float(number) * UNIT_MS[unit]


def _pids_of(servers: Sequence[Server]) -> list[int]:
    return [pid for server in servers for pid in server.pids()]


def foreign_cpu_seconds(server: Server) -> float:
    """Return what the whole machine has computed so far, but for this server, this process and its wrk."""
    user, nice, system, _, _, *interrupts = map(int, Path("/proc/stat").read_text().split()[1:9])
    machine = (user + nice + system + sum(interrupts)) / TICKS_PER_S
    return machine - server.cpu_seconds() - sum(os.times()[:4])


def _stat(pid: int) -> list[str]:
    """Return /proc/PID/stat from the state on; nothing when the process is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _resident_kb(pid: int) -> int:
    try:
        found = re.search(r"^VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(found[1]) if found else 0
