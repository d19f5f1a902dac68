"""The `queue` step: the rest of the work is done later, by the graph that reads the topic."""

from __future__ import annotations

import asyncio
import uuid
from typing import Any, Final

import numpy as np
from pydantic import Field

from servinggraph.context import Context
from servinggraph.interfaces import Operation
from servinggraph.kafka import headers as names
from servinggraph.steps.remote.calls import close_on
from servinggraph.steps.topics.encoding import Format, encode
from servinggraph.steps.topics.writer import Record, TopicOptions, TopicStep, TopicWriter, record_headers
from servinggraph.tensors import Signature, TensorSpec

__all__ = ["Queue", "QueueOptions"]

_OUTPUTS: Final = {
    "id": TensorSpec("BYTES", (1,)),
    "topic": TensorSpec("BYTES", (1,)),
    "partition": TensorSpec("INT32", (1,)),
    "offset": TensorSpec("INT64", (1,)),
}


class QueueOptions(TopicOptions):
    """A topic between two stages of the work."""

    format: Format = Field(
        "auto",
        description="How requests for the next stage are written: `v2-binary` or `v2-json` for tensors, `json` or `msgpack` "
        "for any value; `auto` is v2-binary for tensors and else json.",
    )
    graph: str | None = Field(None, description="Graph that the requests are for, where several read the topic.")


class Queue(TopicStep[QueueOptions]):
    """Writes each request's value as a request for the next stage, and answers with an acknowledgement.

    It says where the request lies (`id`, `topic`, `partition`, `offset`), and is given once all replicas have it. The next
    stage is a graph, in this process or another, whose `kafka: {input: {topics: ...}}` names the topic; it sees the same id.
    A request without an id gets one.
    """

    options_type = QueueOptions
    _writer: TopicWriter | None = None

    def prepare(self) -> Signature:
        return Signature(None, _OUTPUTS)

    def operation(self) -> Operation:
        self._loop = asyncio.get_running_loop()
        self._writer = writer = self.writer()
        options = self.options
        topic = _bytes(options.topic)
        fixed = {names.GRAPH: options.graph.encode()} if options.graph else {}

        async def queue(value: Any, context: Context) -> Any:
            named = context.id or uuid.uuid4().hex
            body, own = encode(value, options.format, named)
            key = named.encode() if options.key == "id" else writer.key(value, context)
            headers = record_headers(context, named, options.headers, {**own, **fixed}, self.name)
            place = await writer.write(Record(body, key, headers))
            return {
                "id": _bytes(named),
                "topic": topic,
                "partition": np.array([place.partition], np.int32),
                "offset": np.array([place.offset], np.int64),
            }

        return Operation(queue, suspends=True)

    def unload(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            close_on(self._loop, writer.close())


def _bytes(text: str) -> Any:
    array = np.empty(1, dtype=object)
    array[0] = text.encode()
    return array
