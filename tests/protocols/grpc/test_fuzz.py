"""A short run of the fuzzer, and some of its inputs over a real channel; FUZZ.md has the long ones."""

import asyncio
import importlib.util
import random
from pathlib import Path

import grpc
import pytest

from servinggraph import Graph

_SPEC = importlib.util.spec_from_file_location("grpc_fuzz", Path(__file__).with_name("fuzz.py"))
fuzz = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(fuzz)


@pytest.mark.slow
def test_no_mutated_message_is_answered_wrongly_or_not_at_all():
    assert "4000 inputs" in asyncio.run(fuzz.run(4000, seed=20))


@pytest.mark.slow
def test_a_server_outlives_mutated_messages(grpc_server, until):
    graphs = [Graph(name, {t: (d, s) for t, (d, s, _) in declared.items()}) for name, declared in fuzz.GRAPHS.items()]
    server = grpc_server(*(graph.to(lambda value: {**value}, "echo").respond() for graph in graphs), max_body_bytes=fuzz.LIMIT)
    mutator = fuzz.Mutator(random.Random(5), fuzz.seeds())
    statuses = set()
    with grpc.insecure_channel(server.url) as channel:
        infer = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        for _ in range(1000):
            try:
                infer(mutator.next(), timeout=fuzz.INPUT_TIMEOUT_S)
            except grpc.RpcError as error:
                statuses.add(error.code())
        stream = channel.stream_stream("/inference.GRPCInferenceService/ModelStreamInfer")
        assert 500 == len(list(stream(iter([mutator.next() for _ in range(500)]), timeout=120)))
    until(lambda: server.in_flight == 0)

    assert grpc.StatusCode.INVALID_ARGUMENT in statuses
    assert statuses <= fuzz.REFUSED
