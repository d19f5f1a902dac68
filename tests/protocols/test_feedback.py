"""Feedback through every door: what is taken, what is refused, and in the same words."""

from __future__ import annotations

import json
from contextlib import asynccontextmanager

import grpc
import numpy as np
import pytest
import tritonclient.grpc.service_pb2 as triton

from servinggraph import Graph, routers
from servinggraph.errors import GraphNotFound, InvalidRequest, RequestNotFound, ServingGraphError
from servinggraph.protocols.grpc.server import GrpcFrontEnd

pytestmark = pytest.mark.anyio

X = np.array([1.0, 2.0], np.float32)
KINDS = {bool: "bool_param", int: "int64_param", float: "double_param", str: "string_param"}
DOORS = ["python", "http", "grpc", "stream"]


@pytest.fixture
def anyio_backend():
    return "asyncio"


def a(value):
    return {"y": value["x"]}


def a_graph(**options):
    router = routers.Bandit({"a": a, "b": a}, "thompson", scorer="accuracy", seed=1, **options)
    return Graph("g", {"x": ("FP32", [-1])}).to(router, "score").respond()


class Caller:
    """Feeds back through one door; raises what was refused as the error that it stands for."""

    def __init__(self, door, mock, channel):
        self._door, self._mock, self._channel = door, mock, channel

    async def feedback(self, graph="g", truth=None, **said):
        if self._door == "python":
            if graph != "g":
                return self._mock.serving.feedback(graph, said)
            return await self._mock.feedback(truth=truth, **said)
        if self._door == "http":
            body = json.dumps({**said, **({} if truth is None else {"truth": {n: v.tolist() for n, v in truth.items()}})})
            reply = await self._mock.request("POST", f"/v2/models/{graph}/feedback", body.encode())
            if reply.status != 200:
                raise {400: InvalidRequest, 404: RequestNotFound}[reply.status](reply.json()["error"])
            return reply.json()["routers"]
        message = triton.ModelInferRequest(model_name=graph, id="f")
        for name, value in said.items():
            setattr(message.parameters[f"feedback_{name}"], KINDS[type(value)], value)
        for name, array in (truth or {}).items():
            message.inputs.add(name=name, datatype="FP32", shape=array.shape)
            message.raw_input_contents.append(array.tobytes())
        answer = await (self.unary if self._door == "grpc" else self._streamed)(message)
        assert ("f", "g", []) == (answer.id, answer.model_name, list(answer.outputs))
        return {
            name.removesuffix(".feedback"): parameter.string_param
            for name, parameter in answer.parameters.items()
            if name.endswith(".feedback")
        }

    async def unary(self, message):
        path = "/inference.GRPCInferenceService/ModelInfer"
        call = self._channel.unary_unary(path, lambda m: m.SerializeToString(), triton.ModelInferResponse.FromString)
        try:
            return await call(message)
        except grpc.aio.AioRpcError as error:
            kinds = {grpc.StatusCode.INVALID_ARGUMENT: InvalidRequest, grpc.StatusCode.NOT_FOUND: RequestNotFound}
            raise kinds[error.code()](error.details()) from None

    async def _streamed(self, message):
        path = "/inference.GRPCInferenceService/ModelStreamInfer"
        call = self._channel.stream_stream(path, lambda m: m.SerializeToString(), triton.ModelStreamInferResponse.FromString)()
        await call.write(message)
        await call.done_writing()
        item = await call.read()
        assert item.infer_response.parameters["triton_final_response"].bool_param
        if item.error_message:
            raise ServingGraphError(item.error_message)  # a stream has no status for one request
        return item.infer_response


@pytest.fixture
def through():
    """Return what opens a door to a graph: `async with through(door, graph) as (caller, mock)`."""

    @asynccontextmanager
    async def start(door, graph):
        async with graph.mock() as mock:
            front_end = GrpcFrontEnd(mock.serving, "127.0.0.1", 0)
            front_end.bind()
            await front_end.start()
            try:
                async with grpc.aio.insecure_channel(f"127.0.0.1:{front_end.port}") as channel:
                    yield Caller(door, mock, channel), mock
            finally:
                await front_end.stop(0.1)

    return start


@pytest.mark.parametrize("door", DOORS)
async def test_a_reward_is_taken_once_by_request_or_variant(door, through):
    async with through(door, a_graph()) as (caller, mock):
        await mock.infer(x=X, id="r")
        assert {"score": "taken"} == await caller.feedback(id="r", reward=1.0)
        assert {"score": "duplicate"} == await caller.feedback(id="r", reward=0)
        assert {"score": "taken"} == await caller.feedback(variant="a", reward=0, node="score", metric="reward")
        assert 2 == sum(rewards["count"] for rewards in mock.router("score").report()["rewards"].values())
        assert 1 == sum(mock.router("score").report()["decisions"].values())  # feedback runs no graph
        assert 0 == mock.in_flight


@pytest.mark.parametrize("door", DOORS)
async def test_a_truth_is_compared_with_the_answer(door, through):
    async with through(door, a_graph()) as (caller, mock):
        variant = (await mock.infer(x=X, id="r")).parameters["score.variant"]
        assert {"score": "taken"} == await caller.feedback(id="r", truth={"y": np.array([1.0, 0.0], np.float32)})
        assert 0.5 == mock.router("score").report()["rewards"][variant]["mean"]


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize(
    ("said", "kind", "text"),
    [
        ({"id": "s", "reward": 1.0}, RequestNotFound, "request 's' is not known to score of graph 'g'"),
        ({"id": "r", "reward": 1.5}, InvalidRequest, "router 'score' takes rewards from 0 to 1"),
        ({"id": "r"}, InvalidRequest, "one of the two"),
        ({"reward": 1.0}, InvalidRequest, "needs the 'id' of the request, or the 'variant'"),
        ({"id": "r", "reward": "1"}, InvalidRequest, "'reward' is a finite number"),
        ({"id": 7, "reward": 1.0}, InvalidRequest, "'id' of feedback is text"),
        (
            {"variant": "c", "reward": 1.0},
            InvalidRequest,
            "that could use this feedback: one that learns from 'reward' with a branch 'c'",
        ),
        ({"id": "r", "reward": 1.0, "node": "scor"}, GraphNotFound, "no router 'scor'; did you mean 'score'"),
        ({"id": "r", "reward": 1.0, "graph": "h"}, GraphNotFound, "'h' is not found"),
        ({"id": "r", "truth": {"z": X}}, InvalidRequest, "a tensor 'z', which the answer had not"),
    ],
)
async def test_what_cannot_be_used_is_refused_in_the_same_words(door, said, kind, text, through):
    async with through(door, a_graph()) as (caller, mock):
        await mock.infer(x=X, id="r")
        with pytest.raises(ServingGraphError, match=text) as refused:
            await caller.feedback(**said)
        if door != "stream":
            assert kind.code == refused.value.code
        assert {"score": "taken"} == await caller.feedback(id="r", reward=1.0)  # nothing was used up


async def test_a_graph_that_takes_a_body_has_feedback_over_grpc_too(through):
    graph = Graph("g", "body").to(routers.Bandit({"a": lambda body: body}, "ucb1"), "score").respond()
    async with through("grpc", graph) as (caller, _):
        assert {"score": "taken"} == await caller.feedback(variant="a", reward=1.0)


async def test_other_parameters_make_no_feedback(through):
    async with through("grpc", a_graph()) as (caller, _):
        message = triton.ModelInferRequest(model_name="g")
        message.parameters["feedback_form"].string_param = "long"
        message.inputs.add(name="x", datatype="FP32", shape=X.shape)
        message.raw_input_contents.append(X.tobytes())
        assert X.tobytes() == (await caller.unary(message)).raw_output_contents[0]
