"""The health service that probes ask, and reflection as grpcurl uses it."""

import asyncio

import grpc
import pytest
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from servinggraph import Graph

SERVING, NOT_SERVING, UNKNOWN = (
    health_pb2.HealthCheckResponse.SERVING,
    health_pb2.HealthCheckResponse.NOT_SERVING,
    health_pb2.HealthCheckResponse.SERVICE_UNKNOWN,
)


def a_graph(name="g", version=1):
    return Graph(name, {"x": ("FP32", [-1])}, version=version).to(lambda value: value, "step").respond()


async def check(server, service=""):
    answer = await health_pb2_grpc.HealthStub(server.channel).Check(health_pb2.HealthCheckRequest(service=service))
    return answer.status


def watch(server, service=""):
    return health_pb2_grpc.HealthStub(server.channel).Watch(health_pb2.HealthCheckRequest(service=service))


@pytest.mark.anyio
async def test_check_tells_of_the_server_and_of_each_graph(live):
    async with live(a_graph()) as server:
        assert [SERVING] * 3 == [await check(server, name) for name in ("", "inference.GRPCInferenceService", "g")]
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await check(server, "nope")
        assert grpc.StatusCode.NOT_FOUND is error.value.code()
        server.serving.catalog.draining = True
        assert [NOT_SERVING] * 2 == [await check(server, name) for name in ("", "g")]


@pytest.mark.anyio
async def test_watch_tells_of_every_change_once(live):
    async with live(a_graph()) as server:
        all_of_it, mine, later = watch(server), watch(server, "g"), watch(server, "later")
        assert [SERVING, SERVING, UNKNOWN] == [(await call.read()).status for call in (all_of_it, mine, later)]
        await server.serving.catalog.load([a_graph("later").compile()])
        assert SERVING == (await later.read()).status
        server.serving.catalog.draining = True
        assert [NOT_SERVING] * 3 == [(await call.read()).status for call in (all_of_it, mine, later)]
        stopping = asyncio.ensure_future(server.front_end.stop(60))
        async with asyncio.timeout(60):
            for call in (all_of_it, mine, later):
                assert grpc.aio.EOF is await call.read()
            await stopping


@pytest.mark.anyio
async def test_somebody_who_watches_may_leave(live):
    async with live(a_graph()) as server:
        call = watch(server)
        await call.read()
        call.cancel()
        server.serving.catalog.draining = True
        assert NOT_SERVING == await check(server)


@pytest.mark.anyio
async def test_bytes_that_are_no_message_are_the_caller_s_mistake(live):
    async with live(a_graph()) as server:
        for path in ("grpc.health.v1.Health/Check", "inference.GRPCInferenceService/ModelMetadata"):
            with pytest.raises(grpc.aio.AioRpcError, match="failed to parse the request") as error:
                await server.channel.unary_unary(f"/{path}")(b"\xff\xff")
            assert grpc.StatusCode.INVALID_ARGUMENT is error.value.code()
        with pytest.raises(grpc.aio.AioRpcError, match="failed to parse the request"):
            await server.channel.unary_stream("/grpc.health.v1.Health/Watch")(b"\xff\xff").read()


def test_a_reflection_client_finds_every_service_and_can_call_what_it_finds(grpc_server):
    server = grpc_server(a_graph(version=7))
    with grpc.insecure_channel(server.url) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        assert {
            "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection", "inference.GRPCInferenceService",
        } == set(database.get_services())  # fmt: skip
        pool = DescriptorPool(database)
        service = pool.FindServiceByName("inference.GRPCInferenceService")
        assert 20 == len(service.methods)
        assert "TYPE_BF16" in pool.FindEnumTypeByName("inference.DataType").values_by_name
        assert pool.FindServiceByName("grpc.health.v1.Health").methods_by_name["Watch"].server_streaming
        method = service.methods_by_name["ModelMetadata"]
        from google.protobuf.message_factory import GetMessageClass

        ask = channel.unary_unary(
            f"/{service.full_name}/{method.name}",
            GetMessageClass(method.input_type).SerializeToString,
            GetMessageClass(method.output_type).FromString,
        )
        assert ["7"] == list(ask(GetMessageClass(method.input_type)(name="g")).versions)
