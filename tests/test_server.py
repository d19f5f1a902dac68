"""The server on an event loop: ports, front ends, what cannot be served. A whole process is in protocols/http/test_shutdown.py."""

from __future__ import annotations

import asyncio
import socket

import pytest

import servinggraph.server as server_module
from servinggraph import Graph
from servinggraph.errors import GraphInvalid, StepFailed
from servinggraph.importing import ImportProblem
from servinggraph.server import CannotServe, Server, ServerOptions, new_event_loop, read_graphs

GRAPH = "graph: {name}\nversion: {version}\ninputs: {{x: {{datatype: FP32, shape: [-1]}}}}\nnodes:\n  n: {{step: python, call: 'copy:copy'}}\nanswer: n\n"


def a_plan(work=lambda value: {"y": value["x"]}):
    return Graph("g", {"x": ("FP32", [-1])}).to(work, "n").respond().compile()


def serve(*plans, announce=None, **options):
    """Run a server until `announce` has stopped it."""
    options.setdefault("http_port", 0)
    options.setdefault("grpc_port", "off")

    async def main():
        async with asyncio.timeout(60):
            server = Server(list(plans), ServerOptions(**options), announce or Server.stop)
            await server.run()
            return server

    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        return runner.run(main())


async def got(server, path, host="127.0.0.1"):
    """Return all that the server answers to a GET."""
    reader, writer = await asyncio.open_connection(host, server.front_ends["http"].port)
    writer.write(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
    answer = await reader.read()
    writer.close()
    return answer


def test_a_server_announces_itself_once_it_answers_and_stops_when_told():
    seen = []

    def announce(server):
        async def ask():
            seen.append(await got(server, "/v2"))
            server.stop()

        seen.append(asyncio.ensure_future(ask()))

    serve(a_plan(), announce=announce)

    assert seen[1].startswith(b"HTTP/1.1 200")
    assert b'"name":"servinggraph","version":"' in seen[1]
    assert b'"version":""' not in seen[1]


@pytest.mark.parametrize(
    ("options", "status", "text"),
    [
        ({}, b"404", b"unless it has a token: --admin-token or SERVINGGRAPH_ADMIN_TOKEN"),
        ({"admin": "off"}, b"404", b'"Not Found"'),
        ({"admin_token": "secret"}, b"401", b"Authorization: Bearer"),
        ({"admin": "on"}, b"200", b'"n"'),
    ],
)
def test_on_an_address_that_others_reach_admin_says_what_it_takes(options, status, text, monkeypatch):
    monkeypatch.delenv("SERVINGGRAPH_ADMIN_TOKEN", raising=False)
    seen = []

    def announce(server):
        async def ask():
            seen.append(await got(server, "/admin/graphs", "127.0.0.2"))
            server.stop()

        seen.append(asyncio.ensure_future(ask()))

    serve(a_plan(), announce=announce, host="127.0.0.2", **options)
    assert seen[1].startswith(b"HTTP/1.1 " + status)
    assert text in seen[1]


def test_a_port_in_use_is_said_in_one_sentence():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(
            CannotServe,
            match=f"^cannot listen on 127.0.0.1 port {port} .http.: Address already in use; choose another with --http-port$",
        ):
            serve(a_plan(), http_port=port)


def test_a_port_that_another_takes_while_graphs_load_is_said_too(free_port):
    taken = socket.socket()

    class Slow:
        def load(self):
            taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            taken.bind(("127.0.0.1", port))  # as a second server does, which was started a moment later
            taken.listen()

        def __call__(self, value):
            return value

    port = free_port()
    with (
        taken,
        pytest.raises(CannotServe, match=f"port {port} .http.: Address already in use; choose another with --http-port"),
    ):
        serve(a_plan(Slow), http_port=port)


@pytest.mark.parametrize("door", ["http_port", "grpc_port"])
def test_metrics_on_the_port_of_another_front_end_are_refused(door, free_port):
    port = free_port()
    with pytest.raises(CannotServe, match=f"port {port} .metrics.: Address already in use; choose another with --metrics-port"):
        serve(a_plan(), metrics_port=port, **{door: port})


def test_a_server_without_front_ends_is_refused():
    with pytest.raises(CannotServe, match="every front end is off"):
        serve(a_plan(), http_port="off")


def test_a_graph_that_fails_to_load_ends_the_server_and_frees_the_port(free_port):
    class Broken:
        def load(self):
            raise OSError("no model")

        def __call__(self, value):
            return value

    port = free_port()
    with pytest.raises(StepFailed, match="node 'n': failed to load: OSError: no model"):
        serve(a_plan(Broken), http_port=port)
    with socket.socket() as again:
        again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        again.bind(("127.0.0.1", port))


def test_a_folder_is_all_the_graphs_in_it(tmp_path):
    (tmp_path / "a.yaml").write_text(GRAPH.format(name="a", version=1))
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "graph.yaml").write_text(GRAPH.format(name="b", version=2))

    assert [("a", "1"), ("b", "2")] == [(plan.name, plan.version) for plan in read_graphs(tmp_path)]


def test_a_graph_that_is_there_twice_is_refused_with_both_places(tmp_path):
    for name in ("one.yaml", "two.yaml"):
        (tmp_path / name).write_text(GRAPH.format(name="same", version=1))
    with pytest.raises(GraphInvalid, match=r"two.yaml.*graph 'same' version 1 is in .*one.yaml"):
        read_graphs(tmp_path)


@pytest.mark.parametrize("name", ["missing.yaml", "missing.onnx", "empty"])
def test_a_path_that_holds_no_graph_is_refused(tmp_path, name):
    (tmp_path / "empty").mkdir()
    with pytest.raises(GraphInvalid, match="there is no file|holds no graph"):
        read_graphs(tmp_path / name)


def test_unknown_options_are_refused():
    with pytest.raises(ValueError, match="max_inflight"):
        ServerOptions(max_inflight=3)


def test_grpc_is_served_without_being_asked_for(monkeypatch, free_port):
    port = free_port()
    monkeypatch.setattr("servinggraph.server.GRPC_PORT", port)

    server = serve(a_plan(), grpc_port=None)

    assert ["http", "grpc"] == list(server.front_ends)
    assert port == server.front_ends["grpc"].port


def test_a_front_end_that_is_not_installed_is_missed_only_where_it_was_asked_for(monkeypatch):
    def load_kind(group, name):
        if name == "grpc":
            raise ImportProblem("module 'grpc' cannot be imported: pip install 'servinggraph[grpc]'")
        return load(group, name)

    load = server_module.load_kind
    monkeypatch.setattr(server_module, "load_kind", load_kind)

    assert ["http"] == list(serve(a_plan(), grpc_port=None).front_ends)
    with pytest.raises(CannotServe, match=r"^--grpc-port 8081: module 'grpc' .*pip install 'servinggraph\[grpc\]'$"):
        serve(a_plan(), grpc_port=8081)


def test_a_grpc_port_in_use_is_said_in_one_sentence():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        text = f"^cannot listen on 127.0.0.1 port {port} .grpc.: Address already in use; choose another with --grpc-port$"
        with pytest.raises(CannotServe, match=text):
            serve(a_plan(), grpc_port=port)


def test_two_servers_do_not_share_a_grpc_port():
    def announce(first):
        async def second():
            try:
                await Server(
                    [a_plan()], ServerOptions(http_port="off", grpc_port=first.front_ends["grpc"].port), Server.stop
                ).run()
            except CannotServe as error:
                seen.append(str(error))
            finally:
                first.stop()

        tasks.append(asyncio.ensure_future(second()))

    seen, tasks = [], []
    serve(a_plan(), grpc_port=0, announce=announce)

    assert "Address already in use" in seen[0]


def test_metrics_can_have_a_port_of_their_own_and_are_then_nowhere_else():
    seen = {}

    async def get(port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        answer = await reader.read()
        writer.close()
        return answer

    def announce(server):
        async def ask():
            for name, front_end in server.front_ends.items():
                seen[name] = await get(front_end.port)
            server.stop()

        seen["task"] = asyncio.ensure_future(ask())

    serve(a_plan(), announce=announce, metrics_port=0)

    assert b"404" in seen["http"].splitlines()[0]
    assert b"200" in seen["metrics"].splitlines()[0]
    assert b'servinggraph_graph_ready{graph="g",version="1"} 1.0' in seen["metrics"]
