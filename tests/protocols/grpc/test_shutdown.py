"""A server process with gRPC from its start to its end."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
from grpc_health.v1 import health_pb2, health_pb2_grpc

GRAPH = "graph: slow\ninputs:\n  x: {datatype: FP32, shape: [-1]}\nnodes:\n  wait: {step: python, call: grpc_shutdown_steps:wait}\nanswer: wait\n"
STEPS = """\
import asyncio
import pathlib

async def wait(value):
    here = pathlib.Path(__file__).parent
    (here / "started").touch()
    while not (here / "go").exists():
        await asyncio.sleep(0.005)
    return {"y": value["x"]}
"""


class Process:
    def __init__(self, folder, *options):
        (folder / "graph.yaml").write_text(GRAPH)
        (folder / "grpc_shutdown_steps.py").write_text(STEPS)
        self.folder = folder
        self.popen = subprocess.Popen(
            [sys.executable, "-m", "servinggraph", "serve", "graph.yaml", "--http-port", "off", "--grpc-port", "0", *options],
            cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        self.text = ""
        for line in self.popen.stdout:
            self.text += line
            if found := re.search(r"gRPC on ([^:]+:\d+)", line):
                self.address = found[1]
                break
        else:
            raise AssertionError(self.text)
        self.reader = threading.Thread(target=self.popen.stdout.read, daemon=True)
        self.reader.start()

    def ask(self):
        """Send a request that waits for `go`, and return where its answer will be."""
        answers = []
        self.client = triton.InferenceServerClient(self.address)
        x = triton.InferInput("x", [1], "FP32")
        x.set_data_from_numpy(np.ones(1, np.float32))
        self.client.async_infer("slow", [x], lambda result, error: answers.append(error or result))
        return answers


@pytest.fixture
def process(tmp_path):
    made = []

    def start(*options):
        made.append(Process(tmp_path, *options))
        return made[-1]

    yield start
    for one in made:
        if hasattr(one, "client"):
            one.client.close()
        one.popen.kill()
        one.popen.wait()
        one.reader.join()
        one.popen.stdout.close()


@pytest.mark.slow
def test_sigterm_tells_those_who_watch_at_once_finishes_what_is_in_flight_and_exits_with_0(process, until):
    server = process()
    answers = server.ask()
    until((server.folder / "started").exists)
    with grpc.insecure_channel(server.address) as channel:
        states = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=120)
        assert health_pb2.HealthCheckResponse.SERVING == next(states).status
        server.popen.send_signal(signal.SIGTERM)
        assert health_pb2.HealthCheckResponse.NOT_SERVING == next(states).status
        assert [] == answers
        (server.folder / "go").touch()
        assert 0 == server.popen.wait(60)
    until(lambda: answers)
    assert [1.0] == answers[0].as_numpy("y").tolist()


@pytest.mark.slow
def test_what_does_not_end_within_the_grace_is_told_so(process, until):
    server = process("--grace-s", "0.2")
    answers = server.ask()
    until((server.folder / "started").exists)
    server.popen.send_signal(signal.SIGTERM)

    assert 0 == server.popen.wait(60)
    until(lambda: answers)
    assert "[StatusCode.UNAVAILABLE] the server is shutting down" in str(answers[0])
