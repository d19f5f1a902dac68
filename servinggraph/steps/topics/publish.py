"""The `publish` step: a copy of what passes goes to a topic."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any, Final, Literal

from pydantic import Field

from servinggraph.context import Context
from servinggraph.interfaces import Operation
from servinggraph.steps.outbox import Outbox
from servinggraph.steps.remote.calls import close_on
from servinggraph.steps.topics.encoding import Format, encode
from servinggraph.steps.topics.writer import Record, TopicOptions, TopicStep, TopicWriter, record_headers
from servinggraph.tensors import Signature

__all__ = ["Publish", "PublishOptions"]

_PATIENCE_S: Final = 5.0


class PublishOptions(TopicOptions):
    """A topic that gets a copy of what passes."""

    format: Format = Field(
        "json",
        description="How records are written: `json` and `msgpack` take any value, `v2-json` and `v2-binary` are requests for "
        "another graph, `auto` is v2-binary for tensors and else json.",
    )
    on_failure: Literal["fail", "drop"] = Field(
        "fail",
        description="`fail`: a request waits until its record is written, and fails if it is not. `drop`: it does not wait, "
        "and what cannot be written is counted and logged.",
    )
    max_waiting: int = Field(1000, ge=1, description="With `drop`, most records that wait to be written; one more is dropped.")


class Publish(TopicStep[PublishOptions]):
    """Writes a record of each request's value, and passes the value on as it is."""

    options_type = PublishOptions
    passes_on = True
    _writer: TopicWriter | None = None
    _outbox: Outbox[Record] | None = None

    def prepare(self) -> Signature:
        return Signature()

    def operation(self) -> Operation:
        self._loop = asyncio.get_running_loop()
        self._writer = writer = self.writer()
        options = self.options

        def record(value: Any, context: Context) -> Record:
            body, own = encode(value, options.format, context.id)
            headers = record_headers(context, context.id, options.headers, own, self.name)
            return Record(body, writer.key(value, context), headers)

        async def publish(value: Any, context: Context) -> Any:
            await writer.write(record(value, context))
            return value

        if options.on_failure == "fail":
            return Operation(publish, suspends=True)

        async def begin(one: Record) -> Awaitable[object]:
            return writer.outcome(await writer.begin(one))

        self._outbox = outbox = Outbox(self.name, begin, options.max_waiting)

        def note(value: Any, context: Context) -> Any:
            outbox.put(lambda: record(value, context), context)
            return value

        return Operation(note, suspends=False)

    def unload(self) -> None:
        writer, outbox = self._writer, self._outbox
        self._writer = self._outbox = None

        async def close() -> None:
            if outbox is not None:
                await outbox.close(_PATIENCE_S)
            if writer is not None:
                await writer.close()

        if writer is not None:
            close_on(self._loop, close())
