"""The front ends that the conformance suite runs through, all with the same three doors.

A new front end is a class with `open` here and one line in `FRONT_ENDS`.
A wire's status is turned back into the error type, so that a test states the rule.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from typing import Any, Protocol, Self

import grpc
import numpy as np
import tritonclient.grpc.service_pb2 as triton
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition

from servinggraph import Graph, InvalidRequest, ServingGraphError
from servinggraph.errors import (
    Cancelled,
    DeadlineExceeded,
    ErrorCode,
    GraphNotFound,
    LimitExceeded,
    RequestTooLarge,
    StepFailed,
    Unavailable,
    Unsupported,
)
from servinggraph.interfaces import FrontEndOptions
from servinggraph.kafka import KafkaOptions
from servinggraph.lifecycle import Serving
from servinggraph.messages import InferenceResponse
from servinggraph.protocols.grpc.server import GrpcFrontEnd
from servinggraph.protocols.http.server import HttpFrontEnd
from servinggraph.protocols.http.status import HTTP_STATUS
from servinggraph.protocols.kafka.server import KafkaFrontEnd
from servinggraph.protocols.v2.binary_data import decode_bytes, encode_bytes
from servinggraph.protocols.v2.client import decode_response, encode_request
from servinggraph.tensors import datatype_of
from servinggraph.testing import AsyncMock

ERRORS = {
    400: InvalidRequest, 404: GraphNotFound, 413: RequestTooLarge, 499: Cancelled,
    500: StepFailed, 501: Unsupported, 503: Unavailable, 504: DeadlineExceeded,
}  # fmt: skip

UNLIMITED = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]


class Client(Protocol):
    """What a conformance test has."""

    async def infer(
        self,
        inputs: Mapping[str, Any],
        *,
        id: str = "",
        parameters: Mapping[str, Any] | None = None,
        outputs: Sequence[str] = (),
        timeout_s: float | None = None,
        model: str | None = None,
        version: str = "",
        twice: str | None = None,
    ) -> InferenceResponse:
        """Send one request. `twice` names an input that is sent two times."""
        ...

    @property
    def in_flight(self) -> int: ...


class FrontEnd(Protocol):
    """A way to reach a graph."""

    def open(self, graph: Graph, **limits: Any) -> AbstractAsyncContextManager[Client]: ...


Send = Callable[[str, bytes, dict[str, str]], Any]


class V2Client:
    """Speaks V2 over whatever carries a path, a body and headers there, and a status, headers and a body back."""

    def __init__(self, send: Send, model: str, in_flight: Callable[[], int], *, binary: bool) -> None:
        self._send = send
        self._model = model
        self._in_flight = in_flight
        self._binary = binary

    @property
    def in_flight(self) -> int:
        return self._in_flight()

    async def infer(
        self,
        inputs: Mapping[str, Any],
        *,
        id: str = "",
        parameters: Mapping[str, Any] | None = None,
        outputs: Sequence[str] = (),
        timeout_s: float | None = None,
        model: str | None = None,
        version: str = "",
        twice: str | None = None,
    ) -> InferenceResponse:
        headers: dict[str, str] = {}
        if timeout_s is not None:
            headers["x-request-timeout-ms"] = str(timeout_s * 1e3)
        if self._binary:
            body, length = encode_request(inputs, id, parameters, outputs)
            if twice:
                document = json.loads(body[:length])
                again = next(entry for entry in document["inputs"] if entry["name"] == twice)
                document["inputs"].append(again)
                text = json.dumps(document).encode()
                body, length = text + body[length:] + inputs[twice].tobytes(), len(text)
            headers["inference-header-content-length"] = str(length)
        else:
            body = json.dumps(_document(inputs, id, parameters, outputs, twice)).encode()
        path = f"/v2/models/{model or self._model}" + (f"/versions/{version}" if version else "") + "/infer"
        status, answer_headers, answer = await self._send(path, body, headers)
        if status != 200:
            text = json.loads(answer)["error"]
            kind = LimitExceeded if status == 503 and "(limit '" in text else ERRORS[status]
            raise kind(text)
        size = answer_headers.get("inference-header-content-length")
        return decode_response(answer, None if size is None else int(size))


def _document(
    inputs: Mapping[str, Any], id: str, parameters: Mapping[str, Any] | None, outputs: Sequence[str], twice: str | None
) -> dict[str, Any]:
    entries = []
    for name, array in inputs.items():
        datatype = datatype_of(array)
        data = [item.decode() if isinstance(item, bytes) else item for item in array.ravel().tolist()]
        entries.append({"name": name, "datatype": datatype, "shape": array.shape, "data": data})
    if twice:
        entries.append(next(entry for entry in entries if entry["name"] == twice))
    document: dict[str, Any] = {"inputs": entries, "parameters": dict(parameters or {})}
    if id:
        document["id"] = id
    if outputs:
        document["outputs"] = [{"name": name} for name in outputs]
    return document


class Mock:
    """The mock server, by `infer` and where that has no word for it by `request`."""

    def __init__(self, *, by_request: bool = False, binary: bool = True) -> None:
        self._by_request = by_request
        self._binary = binary

    @asynccontextmanager
    async def open(self, graph: Graph, **limits: Any) -> AsyncIterator[Client]:
        async with graph.mock(**limits) as server:

            async def send(path: str, body: bytes, headers: dict[str, str]) -> Any:
                return await server.request("POST", path, body, headers)

            over_request = V2Client(send, graph.name, lambda: server.in_flight, binary=self._binary)
            yield over_request if self._by_request else _MockInfer(server, over_request)


class _MockInfer:
    def __init__(self, server: AsyncMock, over_request: V2Client) -> None:
        self._server = server
        self._over_request = over_request

    @property
    def in_flight(self) -> int:
        return self._server.in_flight

    async def infer(
        self,
        inputs: Mapping[str, Any],
        *,
        model: str | None = None,
        version: str = "",
        twice: str | None = None,
        **options: Any,
    ) -> InferenceResponse:
        if model or version or twice:
            return await self._over_request.infer(inputs, model=model, version=version, twice=twice, **options)
        try:
            return await self._server.infer(inputs, **options)
        except ServingGraphError as error:
            error.message = str(error)  # as it goes over a wire
            raise


class Http:
    """HTTP over a socket, on the test's own event loop."""

    def __init__(self, *, binary: bool) -> None:
        self._binary = binary

    @asynccontextmanager
    async def open(self, graph: Graph, **limits: Any) -> AsyncIterator[Client]:
        serving = Serving(FrontEndOptions(**limits))
        front_end = HttpFrontEnd(serving, "127.0.0.1", 0)
        front_end.bind()
        await serving.catalog.load([graph.compile()])
        await front_end.start()

        async def send(path: str, body: bytes, headers: dict[str, str]) -> Any:
            reader, writer = await asyncio.open_connection("127.0.0.1", front_end.port)
            try:
                lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
                writer.write(f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n{lines}\r\n".encode() + body)
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
                fields = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:])}
                return int(head[0].split()[1]), fields, await reader.readexactly(int(fields["content-length"]))
            finally:
                writer.close()

        try:
            yield V2Client(send, graph.name, lambda: serving.admission.in_flight, binary=self._binary)
        finally:
            await front_end.stop(0.1)
            await serving.catalog.stop()


STATUS = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequest, grpc.StatusCode.NOT_FOUND: GraphNotFound,
    grpc.StatusCode.RESOURCE_EXHAUSTED: RequestTooLarge, grpc.StatusCode.CANCELLED: Cancelled,
    grpc.StatusCode.INTERNAL: StepFailed, grpc.StatusCode.UNIMPLEMENTED: Unsupported,
    grpc.StatusCode.UNAVAILABLE: Unavailable, grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
}  # fmt: skip
CONTENTS = {
    "BOOL": "bool_contents", "INT8": "int_contents", "INT16": "int_contents", "INT32": "int_contents",
    "INT64": "int64_contents", "UINT8": "uint_contents", "UINT16": "uint_contents", "UINT32": "uint_contents",
    "UINT64": "uint64_contents", "FP32": "fp32_contents", "FP64": "fp64_contents", "BYTES": "bytes_contents",
}  # fmt: skip


class Grpc:
    """gRPC over a socket, on the test's own event loop; inputs as raw contents, or typed where there is a field for them."""

    def __init__(self, *, typed: bool) -> None:
        self._typed = typed

    @asynccontextmanager
    async def open(self, graph: Graph, **limits: Any) -> AsyncIterator[Client]:
        serving = Serving(FrontEndOptions(**limits))
        front_end = GrpcFrontEnd(serving, "127.0.0.1", 0)
        front_end.bind()
        await serving.catalog.load([graph.compile()])
        await front_end.start()
        try:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{front_end.port}", UNLIMITED) as channel:
                yield GrpcClient(channel, graph.name, lambda: serving.admission.in_flight, typed=self._typed)
        finally:
            await front_end.stop(0.1)
            await serving.catalog.stop()


class GrpcClient:
    """Speaks V2 over a channel, with the messages of Triton's own client."""

    def __init__(self, channel: Any, model: str, in_flight: Callable[[], int], *, typed: bool) -> None:
        self._call = channel.unary_unary(
            "/inference.GRPCInferenceService/ModelInfer",
            request_serializer=triton.ModelInferRequest.SerializeToString,
            response_deserializer=triton.ModelInferResponse.FromString,
        )
        self._model = model
        self._in_flight = in_flight
        self._typed = typed

    @property
    def in_flight(self) -> int:
        return self._in_flight()

    async def infer(
        self,
        inputs: Mapping[str, Any],
        *,
        id: str = "",
        parameters: Mapping[str, Any] | None = None,
        outputs: Sequence[str] = (),
        timeout_s: float | None = None,
        model: str | None = None,
        version: str = "",
        twice: str | None = None,
    ) -> InferenceResponse:
        message = _message(inputs, id, parameters, outputs, model or self._model, version, twice, typed=self._typed)
        try:
            answer = await self._call(message, timeout=timeout_s)
        except grpc.aio.AioRpcError as error:
            text = error.details() or ""
            kind = LimitExceeded if error.code() is grpc.StatusCode.UNAVAILABLE and "(limit '" in text else STATUS[error.code()]
            raise kind(text) from None
        return _response(answer)


def _message(
    inputs: Mapping[str, Any],
    id: str,
    parameters: Mapping[str, Any] | None,
    outputs: Sequence[str],
    model: str,
    version: str,
    twice: str | None,
    *,
    typed: bool,
) -> Any:
    message = triton.ModelInferRequest(model_name=model, model_version=version, id=id)
    for key, value in (parameters or {}).items():
        _set_parameter(message.parameters[key], value)
    names = [*inputs, *([twice] if twice else [])]
    # Raw and typed contents do not mix in one request.
    typed = typed and all(datatype_of(array) in CONTENTS for array in inputs.values())
    for name in names:
        array = inputs[name]
        datatype = datatype_of(array) or str(array.dtype)
        entry = message.inputs.add(name=name, datatype=datatype, shape=array.shape)
        if typed:
            entry.contents.SetInParent()
            elements = [item.encode() if isinstance(item, str) else item for item in array.ravel().tolist()]
            getattr(entry.contents, CONTENTS[datatype]).extend(elements)
        else:
            message.raw_input_contents.append(bytes(encode_bytes(name, datatype, array)))
    for name in outputs:
        message.outputs.add(name=name)
    return message


def _response(answer: Any) -> InferenceResponse:
    arrays = {
        output.name: decode_bytes(output.name, answer.model_name, output.datatype, output.shape, memoryview(raw))
        for output, raw in zip(answer.outputs, answer.raw_output_contents, strict=True)
    }
    given = {key: getattr(value, value.WhichOneof("parameter_choice")) for key, value in answer.parameters.items()}
    return InferenceResponse(answer.model_name, answer.model_version, arrays, answer.id, given)


def _set_parameter(parameter: Any, value: Any) -> None:
    kinds = {bool: "bool_param", int: "int64_param", float: "double_param", str: "string_param"}
    if type(value) in kinds:  # for anything else gRPC has no field: it stays unset
        setattr(parameter, kinds[type(value)], value)


class Kafka:
    """Topics of a real broker: a request in the input topic names the reply topic, and its answer is awaited there."""

    needs_kafka = True
    callers_leave = False
    way_s = 1.0  # how long a record may take to where it runs

    def __init__(self, *, binary: bool = False, protobuf: bool = False) -> None:
        self._binary = binary
        self._protobuf = protobuf

    @asynccontextmanager
    async def open(self, graph: Graph, **limits: Any) -> AsyncIterator[Client]:
        topic, replies, dead = [await self.broker.topic(name) for name in ("in", "replies", "dead")]
        block = {
            "brokers": self.broker.address,
            "input": {"topics": [topic], "group": topic},
            "output": {"reply_topics": [replies], "linger_ms": 0},
            "errors": {"topic": dead},
            "retry": {"attempts": 1},
        }
        serving = Serving(FrontEndOptions(**limits))
        await serving.catalog.load([replace(graph.compile(), kafka=KafkaOptions.model_validate(block))])
        front_end = KafkaFrontEnd(serving)
        await front_end.start()
        try:
            async with KafkaWire(self.broker.address, topic, replies) as wire:
                async with asyncio.timeout(60):
                    while not serving.catalog.ready:
                        await asyncio.sleep(0.005)
                in_flight = lambda: serving.admission.in_flight  # noqa: E731
                if self._protobuf:
                    yield KafkaProtobufClient(wire, graph.name, in_flight)
                else:
                    yield V2Client(wire.send, graph.name, in_flight, binary=self._binary)
        finally:
            await front_end.stop(0.1)
            await serving.catalog.stop()

    broker: Any = None


class KafkaWire:
    """Sends records and awaits those with the same correlation id; says an error code as HTTP would."""

    def __init__(self, address: str, topic: str, replies: str) -> None:
        self._topic, self._replies = topic, replies
        self._producer = AIOKafkaProducer(bootstrap_servers=address, max_request_size=2**27)
        self._consumer = AIOKafkaConsumer(bootstrap_servers=address, auto_offset_reset="earliest")
        self._waiting: dict[bytes, asyncio.Future[Any]] = {}
        self._numbers = itertools.count()

    async def __aenter__(self) -> Self:
        await self._producer.start()
        await self._consumer.start()
        self._consumer.assign([TopicPartition(self._replies, 0)])
        self._task = asyncio.ensure_future(self._read())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        await asyncio.wait([self._task])
        await self._producer.stop()
        await self._consumer.stop()

    async def _read(self) -> None:
        while True:
            record = await self._consumer.getone()
            headers = dict(record.headers)
            answer = self._waiting.pop(headers["x-correlation-id"])
            if not answer.done():
                answer.set_result((headers, record.value))

    async def exchange(self, value: bytes, headers: dict[str, str]) -> Any:
        number = str(next(self._numbers)).encode()
        self._waiting[number] = asyncio.get_running_loop().create_future()
        own = [("x-reply-topic", self._replies.encode()), ("x-correlation-id", number)]
        fields = own + [(name, text.encode()) for name, text in headers.items()]
        await self._producer.send(self._topic, value, headers=fields)
        return await self._waiting[number]

    async def send(self, path: str, value: bytes, headers: dict[str, str]) -> Any:
        name, _, version = path.removeprefix("/v2/models/").removesuffix("/infer").partition("/versions/")
        headers = {**headers, "x-graph": name}
        if version:
            headers["x-graph-version"] = version
        if "x-request-timeout-ms" in headers:
            headers["x-deadline"] = str(time.time() * 1e3 + float(headers.pop("x-request-timeout-ms")))
        fields, answer = await self.exchange(value, headers)
        status = fields.pop("x-status").decode()
        code = 200 if status == "ok" else HTTP_STATUS[ErrorCode(status)]
        return code, {name: text.decode("latin-1") for name, text in fields.items()}, answer


class KafkaProtobufClient:
    """Sends `inference.ModelInferRequest` in records."""

    def __init__(self, wire: KafkaWire, model: str, in_flight: Callable[[], int]) -> None:
        self._wire = wire
        self._model = model
        self._in_flight = in_flight

    @property
    def in_flight(self) -> int:
        return self._in_flight()

    async def infer(
        self,
        inputs: Mapping[str, Any],
        *,
        id: str = "",
        parameters: Mapping[str, Any] | None = None,
        outputs: Sequence[str] = (),
        timeout_s: float | None = None,
        model: str | None = None,
        version: str = "",
        twice: str | None = None,
    ) -> InferenceResponse:
        name = model or self._model
        message = _message(inputs, id, parameters, outputs, name, version, twice, typed=False)
        headers = {"content-type": "application/x-protobuf"}
        if timeout_s is not None:
            headers["x-request-timeout-ms"] = str(timeout_s * 1e3)
        path = f"/v2/models/{name}" + (f"/versions/{version}" if version else "") + "/infer"
        status, _, answer = await self._wire.send(path, message.SerializeToString(), headers)
        if status != 200:
            text = json.loads(answer)["error"]
            kind = LimitExceeded if status == 503 and "(limit '" in text else ERRORS[status]
            raise kind(text)
        return _response(triton.ModelInferResponse.FromString(answer))


FRONT_ENDS: dict[str, FrontEnd] = {
    "mock infer": Mock(),
    "mock json": Mock(by_request=True, binary=False),
    "mock binary": Mock(by_request=True, binary=True),
    "http json": Http(binary=False),
    "http binary": Http(binary=True),
    "grpc raw": Grpc(typed=False),
    "grpc typed": Grpc(typed=True),
    "kafka json": Kafka(),
    "kafka binary": Kafka(binary=True),
    "kafka protobuf": Kafka(protobuf=True),
}


def same(expected: Any, got: Any) -> bool:
    """Tell whether two arrays have the same datatype, shape and bits (not-a-number included)."""
    if datatype_of(expected) != datatype_of(got) or expected.shape != got.shape:
        return False
    if datatype_of(expected) == "BYTES":
        return _as_bytes(expected) == _as_bytes(got)
    return bool(
        np.array_equal(np.isnan(expected), np.isnan(got)) and np.array_equal(expected[expected == expected], got[got == got])
    )  # noqa: PLR0124  (not-a-number differs from itself)


def _as_bytes(array: Any) -> list[bytes]:
    return [item.encode() if isinstance(item, str) else item for item in array.ravel().tolist()]
