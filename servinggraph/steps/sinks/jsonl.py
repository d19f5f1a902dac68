"""The `jsonl` step: a line of a file for each request."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any, Final, Literal

from pydantic import Field

from servinggraph.context import Context
from servinggraph.errors import LimitExceeded, StepFailed
from servinggraph.interfaces import BatchPolicy, Operation, Options, Step
from servinggraph.messages import Body
from servinggraph.steps.outbox import Outbox
from servinggraph.steps.remote.calls import close_on
from servinggraph.steps.sinks.documents import encoded
from servinggraph.steps.sinks.files import LineFile
from servinggraph.tensors import Signature

__all__ = ["Jsonl", "JsonlOptions"]

_PATIENCE_S: Final = 5.0
_TOGETHER: Final = 1000
"""Most lines of one write."""


class JsonlOptions(Options):
    """A file that gets a line of JSON for each request: `time`, `id`, `graph`, `value`."""

    path: str = Field(description="The file; a relative path starts from the graph file. Lines are appended.")
    on_failure: Literal["fail", "drop"] = Field(
        "fail",
        description="`fail`: a request waits until its line is written, and fails if it is not. `drop`: it does not wait, and "
        "what cannot be written is counted and logged.",
    )
    max_waiting: int = Field(
        10_000, ge=1, description="Most lines that wait to be written; one more fails its request, or is dropped."
    )
    max_bytes: int = Field(
        0, ge=0, description="Size from which on the file is set aside as `.1`, the one before as `.2`, ...; 0 for never."
    )
    kept: int = Field(5, ge=0, description="How many files are kept aside; the oldest is removed.")
    sync: bool = Field(False, description="Write through to the disk, so that a line outlives a loss of power.")


class Jsonl(Step[JsonlOptions]):
    """Appends a line for each request's value, and passes the value on as it is.

    Lines that wait at the same time are written together, by a thread. One process writes a file: with `max_bytes`,
    two would set aside each other's.
    """

    options_type = JsonlOptions
    passes_on = True
    sees_requests = True
    _file: LineFile | None = None
    _lines: _Lines | None = None
    _outbox: Outbox[bytes] | None = None

    def prepare(self) -> Signature:
        return Signature()

    def load(self, batch: BatchPolicy | bool | None) -> BatchPolicy | None:
        options = self.options
        self._file = file = LineFile(self.base / options.path, options.max_bytes, options.kept, sync=options.sync)
        try:
            file.open()
        except OSError as error:
            raise StepFailed(f"file '{self.conceal(options.path)}' cannot be written: {error.strerror}") from error
        return None

    def operation(self) -> Operation:
        self._loop = asyncio.get_running_loop()
        assert self._file is not None  # load has seen to it
        self._lines = lines = _Lines(self._file, self.conceal(self.options.path), self.options.max_waiting)

        async def append(value: Any, context: Context) -> Any:
            await lines.put(_line(value, context))
            return value

        if self.options.on_failure == "fail":
            return Operation(append, suspends=True)

        async def begin(line: bytes) -> Awaitable[object]:
            return lines.put(line)

        self._outbox = outbox = Outbox(self.name, begin, self.options.max_waiting)

        def note(value: Any, context: Context) -> Any:
            outbox.put(lambda: _line(value, context), context)
            return value

        return Operation(note, suspends=False)

    def unload(self) -> None:
        lines, outbox = self._lines, self._outbox
        self._lines = self._outbox = None

        async def close() -> None:
            if outbox is not None:
                await outbox.close(_PATIENCE_S)
            if lines is not None:
                await lines.close()

        if lines is not None:
            close_on(self._loop, close())
        if self._file is not None:
            self._file.close()

    def impurity(self) -> str | None:
        return "writes to a file"

    def describe(self) -> str:
        return f"jsonl {self.conceal(self.options.path)}"


class _Lines:
    """Lines that wait for the thread that writes. To be made on the event loop."""

    def __init__(self, file: LineFile, shown: str, most: int) -> None:
        self._file, self._shown, self._most = file, shown, most
        self._loop = asyncio.get_running_loop()
        self._thread = ThreadPoolExecutor(1, "jsonl")
        self._waiting: list[tuple[bytes, asyncio.Future[None]]] = []
        self._writing: asyncio.Task[None] | None = None

    def put(self, line: bytes) -> asyncio.Future[None]:
        """Have a line written; the result tells when it is.

        Raises:
            LimitExceeded: too many wait.
        """
        if len(self._waiting) >= self._most:
            raise LimitExceeded(f"{self._most} lines wait for '{self._shown}' already (limit 'max_waiting')")
        done: asyncio.Future[None] = self._loop.create_future()
        self._waiting.append((line, done))
        if self._writing is None:
            self._writing = self._loop.create_task(self._write())
        return done

    async def _write(self) -> None:
        while self._waiting:
            now, self._waiting = self._waiting[:_TOGETHER], self._waiting[_TOGETHER:]
            try:
                await self._loop.run_in_executor(self._thread, self._file.write, b"".join(line for line, _ in now))
                failure = None
            except OSError as error:
                failure = StepFailed(f"file '{self._shown}' cannot be written: {error.strerror or error}")
            for _, done in now:
                if done.done():  # its caller has gone; the line is there all the same
                    continue
                if failure is None:
                    done.set_result(None)
                else:
                    done.set_exception(failure.copy())
        self._writing = None

    async def close(self) -> None:
        """Write what waits."""
        if self._writing is not None:
            await self._writing
        self._thread.shutdown()


def _line(value: Any, context: Context) -> bytes:
    document = {
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "id": context.id,
        "graph": context.graph,
        "value": value.value if isinstance(value, Body) else value,
    }
    return encoded(document) + b"\n"
