"""The ways to a graph that can give any number of answers, all with one door: `stream`."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing, asynccontextmanager
from typing import Any, NamedTuple

import grpc
import numpy as np
import tritonclient.grpc.service_pb2 as triton

from servinggraph import Graph, ServingGraphError
from servinggraph.interfaces import FrontEndOptions
from servinggraph.lifecycle import Serving
from servinggraph.protocols.grpc.server import GrpcFrontEnd
from servinggraph.protocols.http.server import HttpFrontEnd
from servinggraph.protocols.v2.binary_data import decode_bytes, encode_bytes
from servinggraph.tensors import datatype_of


class Failed(Exception):
    """A request failed; over most wires its text is all that is told."""


class Got(NamedTuple):
    """One answer."""

    id: str
    outputs: dict[str, list[Any]]
    """Elements, flat, by name: all that every wire carries."""
    parameters: dict[str, Any]


class Mock:
    """The mock server."""

    @asynccontextmanager
    async def open(self, graph: Graph, **limits: Any) -> AsyncIterator[Any]:
        async with graph.mock(**limits) as server:
            yield _MockClient(server)


class _MockClient:
    def __init__(self, server: Any) -> None:
        self._server = server

    @property
    def in_flight(self) -> int:
        return int(self._server.in_flight)

    async def stream(self, inputs: Mapping[str, Any], id: str = "", **parameters: Any) -> AsyncGenerator[Got, None]:
        try:
            async with aclosing(self._server.stream(inputs, id=id, parameters=parameters)) as answers:
                async for answer in answers:
                    outputs = {name: _plain(array) for name, array in answer.outputs.items()}
                    yield Got(answer.id, outputs, dict(answer.parameters))
        except ServingGraphError as error:
            raise Failed(str(error)) from error


class Http:
    """Server-sent events over a socket."""

    def __init__(self, endpoint: str) -> None:
        self._endpoint = endpoint

    @asynccontextmanager
    async def open(self, graph: Graph, **limits: Any) -> AsyncIterator[Any]:
        serving = Serving(FrontEndOptions(**limits))
        front_end = HttpFrontEnd(serving, "127.0.0.1", 0)
        front_end.bind()
        await serving.catalog.load([graph.compile()])
        await front_end.start()
        try:
            yield _HttpClient(serving, front_end.port, f"/v2/models/{graph.name}/{self._endpoint}")
        finally:
            await front_end.stop(0.1)
            await serving.catalog.stop()


class _HttpClient:
    def __init__(self, serving: Serving, port: int, path: str) -> None:
        self._serving = serving
        self._port = port
        self._path = path

    @property
    def in_flight(self) -> int:
        return self._serving.admission.in_flight

    async def stream(self, inputs: Mapping[str, Any], id: str = "", **parameters: Any) -> AsyncGenerator[Got, None]:
        document: dict[str, Any] = {"parameters": parameters}
        if id:
            document["id"] = id
        if self._path.endswith("infer_stream"):
            document["inputs"] = [
                {"name": name, "datatype": datatype_of(array), "shape": array.shape, "data": _plain(array)}
                for name, array in inputs.items()
            ]
        else:
            document |= {name: _plain(array) for name, array in inputs.items()}
        body = json.dumps(document).encode()
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        try:
            writer.write(f"POST {self._path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
            head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
            if not head.startswith("http/1.1 200 "):
                length = int(head.partition("content-length: ")[2].split("\r\n")[0])
                raise Failed(json.loads(await reader.readexactly(length))["error"])
            while size := int(await reader.readline(), 16):
                event = (await reader.readexactly(size + 2))[6:-4]
                yield self._got(json.loads(event))
        finally:
            writer.close()

    @staticmethod
    def _got(answer: dict[str, Any]) -> Got:
        if "error" in answer:
            raise Failed(answer["error"])
        answer_id = answer.pop("id", "")
        assert ("g", "1") == (answer.pop("model_name"), answer.pop("model_version"))
        if "outputs" in answer:
            outputs = {output["name"]: output["data"] for output in answer["outputs"]}
            return Got(answer_id, outputs, answer.get("parameters", {}))
        # Flat: by the convention of these tests outputs have short names, and parameters long ones.
        outputs = {name: value if isinstance(value, list) else [value] for name, value in answer.items() if len(name) == 1}
        return Got(answer_id, outputs, {name: value for name, value in answer.items() if len(name) > 1})


class Grpc:
    """`ModelStreamInfer` over a socket, a call for each request."""

    @asynccontextmanager
    async def open(self, graph: Graph, **limits: Any) -> AsyncIterator[Any]:
        serving = Serving(FrontEndOptions(**limits))
        front_end = GrpcFrontEnd(serving, "127.0.0.1", 0)
        front_end.bind()
        await serving.catalog.load([graph.compile()])
        await front_end.start()
        try:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{front_end.port}") as channel:
                yield _GrpcClient(serving, channel)
        finally:
            await front_end.stop(0.1)
            await serving.catalog.stop()


class _GrpcClient:
    def __init__(self, serving: Serving, channel: Any) -> None:
        self._serving = serving
        self._call = channel.stream_stream(
            "/inference.GRPCInferenceService/ModelStreamInfer",
            triton.ModelInferRequest.SerializeToString,
            triton.ModelStreamInferResponse.FromString,
        )

    @property
    def in_flight(self) -> int:
        return self._serving.admission.in_flight

    async def stream(self, inputs: Mapping[str, Any], id: str = "", **parameters: Any) -> AsyncGenerator[Got, None]:
        message = triton.ModelInferRequest(model_name="g", id=id)
        for name, array in inputs.items():
            message.inputs.add(name=name, datatype=datatype_of(array), shape=array.shape)
            message.raw_input_contents.append(bytes(encode_bytes(name, str(datatype_of(array)), array)))
        for name, value in parameters.items():
            message.parameters[name].int64_param = value
        call = self._call()
        try:
            await call.write(message)
            await call.done_writing()
            while (item := await call.read()) is not grpc.aio.EOF:
                if item.error_message:
                    raise Failed(item.error_message)
                answer = item.infer_response
                outputs = {
                    output.name: _plain(decode_bytes(output.name, "g", output.datatype, output.shape, memoryview(raw)))
                    for output, raw in zip(answer.outputs, answer.raw_output_contents, strict=True)
                }
                given = {
                    key: getattr(value, value.WhichOneof("parameter_choice"))
                    for key, value in answer.parameters.items()
                    if not key.startswith("triton_")
                }
                yield Got(answer.id, outputs, given)
        finally:
            call.cancel()


def _plain(array: Any) -> list[Any]:
    return [item.decode() if isinstance(item, bytes) else item for item in np.asarray(array).ravel().tolist()]


STREAMING: dict[str, Any] = {
    "mock": Mock(),
    "http generate_stream": Http("generate_stream"),
    "http infer_stream": Http("infer_stream"),
    "grpc": Grpc(),
}
