"""What the tests of gRPC share: a server on the test's own event loop, and a channel to it that speaks Triton's messages."""

import asyncio
from contextlib import asynccontextmanager

import grpc
import numpy as np
import pytest
import tritonclient.grpc.service_pb2 as triton

from servinggraph.interfaces import FrontEndOptions
from servinggraph.lifecycle import Serving
from servinggraph.protocols.grpc.server import GrpcFrontEnd
from servinggraph.protocols.v2.binary_data import encode_bytes
from servinggraph.tensors import datatype_of

SERVICE = "/inference.GRPCInferenceService"
KINDS = {bool: "bool_param", int: "int64_param", float: "double_param", str: "string_param"}


class Live:
    """A server, and a channel to it."""

    def __init__(self, serving, front_end, channel):
        self.serving, self.front_end, self.channel = serving, front_end, channel
        self.infer = channel.unary_unary(
            f"{SERVICE}/ModelInfer", triton.ModelInferRequest.SerializeToString, triton.ModelInferResponse.FromString
        )
        self._stream = channel.stream_stream(
            f"{SERVICE}/ModelStreamInfer",
            triton.ModelInferRequest.SerializeToString,
            triton.ModelStreamInferResponse.FromString,
        )

    def stream(self, **options):
        return self._stream(**options)

    @property
    def in_flight(self):
        return self.serving.admission.in_flight

    @staticmethod
    def request(model, inputs, *, id="", version="", outputs=(), **parameters):
        message = triton.ModelInferRequest(model_name=model, model_version=version, id=id)
        for key, value in parameters.items():
            setattr(message.parameters[key], KINDS[type(value)], value)
        for name, array in inputs.items():
            message.inputs.add(name=name, datatype=datatype_of(array), shape=array.shape)
            message.raw_input_contents.append(bytes(encode_bytes(name, datatype_of(array), array)))
        for name in outputs:
            message.outputs.add(name=name)
        return message

    @staticmethod
    def numbers(answer, dtype="<f4"):
        return np.frombuffer(answer.raw_output_contents[0], dtype).tolist()


@pytest.fixture
def live():
    """Return what starts a server for graphs: `async with live(graph, ..., **limits) as server`."""

    @asynccontextmanager
    async def start(*graphs, **limits):
        serving = Serving(FrontEndOptions(**limits))
        front_end = GrpcFrontEnd(serving, "127.0.0.1", 0)
        front_end.bind()
        await serving.catalog.load([graph.compile() for graph in graphs])
        await front_end.start()
        unlimited = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
        try:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{front_end.port}", unlimited) as channel:
                yield Live(serving, front_end, channel)
        finally:
            await front_end.stop(0.1)
            await serving.catalog.stop()

    return start


@pytest.fixture
def eventually():
    """Return what waits for a condition on the test's event loop."""

    async def wait(condition):
        async with asyncio.timeout(60):
            while not condition():
                await asyncio.sleep(0.001)

    return wait


@pytest.fixture
def anyio_backend():
    return "asyncio"
