"""Sizes, compression, limits and TLS of the wire."""

import asyncio
import gc
import subprocess
import weakref
from contextlib import suppress

import grpc
import numpy as np
import pytest

from servinggraph import Graph
from servinggraph.errors import InvalidRequest, ServingGraphError
from servinggraph.interfaces import FrontEndOptions
from servinggraph.protocols.grpc.transport import channel_options, credentials

X = np.array([1.0, 2.0], np.float32)


def echo():
    return Graph("g", {"x": ("FP32", [-1])}).to(lambda value: {"y": value["x"]}, "step").respond()


@pytest.mark.anyio
async def test_a_request_over_the_limit_is_refused_by_name_or_by_grpc(live):
    async with live(echo(), max_body_bytes=10_000) as server:
        for count, text in ((3_000, r"10000 bytes .limit 'max_body_bytes'"), (30_000, "Received message larger than max")):
            with pytest.raises(grpc.aio.AioRpcError, match=text) as error:
                await server.infer(server.request("g", {"x": np.zeros(count, np.float32)}))
            assert grpc.StatusCode.RESOURCE_EXHAUSTED is error.value.code()
        assert X.tolist() == server.numbers(await server.infer(server.request("g", {"x": X})))
        assert 0 == server.in_flight


@pytest.mark.anyio
async def test_what_a_request_unpacks_to_is_bounded(live):
    async with live(echo(), max_body_bytes=100_000) as server:
        bomb = server.request("g", {"x": np.zeros(5_000_000, np.float32)})
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await server.infer(bomb, compression=grpc.Compression.Gzip)
        assert grpc.StatusCode.RESOURCE_EXHAUSTED is error.value.code()


@pytest.mark.anyio
@pytest.mark.parametrize("level", ["none", "low", "high"])
async def test_answers_are_compressed_as_set(live, level):
    sizes = []
    async with live(echo(), grpc_compression=level) as server:
        zeros = server.request("g", {"x": np.zeros(100_000, np.float32)})
        # A proxy that counts what comes back.
        proxy = await asyncio.start_server(
            lambda reader, writer: forward(reader, writer, server.front_end.port, sizes), "127.0.0.1", 0
        )
        port = proxy.sockets[0].getsockname()[1]
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            call = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
            assert len(await call(zeros.SerializeToString())) > 400_000
        proxy.close()
        await proxy.wait_closed()

    assert (sum(sizes) > 400_000) == (level == "none")


async def forward(reader, writer, port, sizes):
    up, down = await asyncio.open_connection("127.0.0.1", port)

    async def pump(source, sink, note):
        while data := await source.read(65536):
            note(len(data))
            sink.write(data)
        sink.close()

    await asyncio.gather(pump(reader, down, lambda size: None), pump(up, writer, sizes.append))


@pytest.mark.anyio
async def test_more_calls_than_allowed_are_refused(live):
    entered, free = asyncio.Event(), asyncio.Event()

    async def wait(value):
        entered.set()
        await free.wait()
        return {"y": value["x"]}

    graph = Graph("g", {"x": ("FP32", [-1])}).to(wait, "step").respond()
    async with live(graph, grpc_max_calls=1) as server:
        request = server.request("g", {"x": X})
        first = asyncio.ensure_future(server.infer(request))
        await entered.wait()
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await server.infer(request)
        assert grpc.StatusCode.RESOURCE_EXHAUSTED is error.value.code()
        free.set()
        assert X.tolist() == server.numbers(await first)


def test_settings_have_grpc_s_names():
    got = dict(channel_options(FrontEndOptions(grpc_keepalive_without_calls=True, grpc_max_connection_age_ms=5000)))

    assert {
        "grpc.keepalive_time_ms": 7_200_000, "grpc.keepalive_timeout_ms": 20_000, "grpc.keepalive_permit_without_calls": 1,
        "grpc.http2.max_pings_without_data": 2, "grpc.http2.max_ping_strikes": 2, "grpc.max_connection_age_ms": 5000,
        "grpc.max_send_message_length": 2**31 - 1, "grpc.so_reuseport": 0,
    }.items() <= got.items()  # fmt: skip
    assert "grpc.max_connection_age_grace_ms" not in got


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    """A root, and a certificate from it for the server and one for a client."""
    folder = tmp_path_factory.mktemp("tls")

    def openssl(*arguments):
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)

    openssl(
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-keyout",
        "ca.key",
        "-out",
        "ca.pem",
        "-subj",
        "/CN=root",
        "-days",
        "2",
    )
    (folder / "names").write_text("subjectAltName=IP:127.0.0.1,DNS:localhost")
    for name in ("server", "client"):
        openssl("req", "-newkey", "rsa:2048", "-nodes", "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}")
        openssl(
            "x509", "-req", "-in", f"{name}.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2",
            "-extfile", "names", "-out", f"{name}.pem",
        )  # fmt: skip
    return folder


def secure(server, folder, *, client=False):
    mine = [(folder / name).read_bytes() for name in ("client.key", "client.pem")] if client else []
    keys = grpc.ssl_channel_credentials((folder / "ca.pem").read_bytes(), *mine)
    return grpc.aio.secure_channel(f"127.0.0.1:{server.front_end.port}", keys)


async def ask(channel):
    async with channel:
        return await channel.unary_unary("/inference.GRPCInferenceService/ServerLive")(b"", timeout=60)


@pytest.mark.anyio
async def test_tls_serves_those_who_use_it(live, certificates):
    options = {"grpc_tls_cert": str(certificates / "server.pem"), "grpc_tls_key": str(certificates / "server.key")}
    async with live(echo(), **options) as server:
        assert b"\x08\x01" == await ask(secure(server, certificates))
        with pytest.raises(grpc.aio.AioRpcError):
            await ask(grpc.aio.insecure_channel(f"127.0.0.1:{server.front_end.port}"))


@pytest.mark.anyio
async def test_with_a_client_root_only_clients_with_a_certificate_are_served(live, certificates):
    options = {
        f"grpc_tls_{key}": str(certificates / name)
        for key, name in (("cert", "server.pem"), ("key", "server.key"), ("client_ca", "ca.pem"))
    }
    async with live(echo(), **options) as server:
        assert b"\x08\x01" == await ask(secure(server, certificates, client=True))
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await ask(secure(server, certificates))
        assert grpc.StatusCode.UNAVAILABLE is error.value.code()


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"cert": "server.pem"}, "TLS for gRPC needs --grpc-tls-key, too"),
        ({"client_ca": "ca.pem"}, "TLS for gRPC needs --grpc-tls-cert, too"),
        ({"cert": "none.pem", "key": "server.key"}, "--grpc-tls-cert: there is no file '.*none.pem'"),
        ({"cert": "server.pem", "key": "client.key"}, "are no certificate and its private key"),
        ({"cert": "names", "key": "server.key"}, "are no certificate and its private key"),
        ({"cert": "server.pem", "key": "server.key", "client_ca": "names"}, "--grpc-tls-client-ca .* holds no certificate"),
    ],
)  # fmt: skip
def test_files_that_cannot_be_used_for_tls_are_said_in_one_sentence(certificates, given, text):
    options = FrontEndOptions(**{f"grpc_tls_{key}": str(certificates / name) for key, name in given.items()})

    with pytest.raises(ServingGraphError, match=text):
        credentials(options)


@pytest.mark.anyio
@pytest.mark.parametrize("how", ["is cancelled", "is cancelled, and has a time limit", "fails", "comes too late"])
async def test_what_a_request_without_an_answer_had_goes_with_it_and_waits_for_no_collection(live, eventually, how):
    had = []

    async def work(value):
        had.append(weakref.ref(value["x"]))
        if how == "fails":
            raise InvalidRequest("the log of a test would keep a failure of ours")
        await asyncio.Event().wait()

    limit_s = {"is cancelled, and has a time limit": [60], "comes too late": [0.2, 2, 20]}.get(how, [0])  # 0 is none
    gc.collect()
    gc.disable()
    try:
        async with live(Graph("g", {"x": ("FP32", [-1])}).to(work, "step").respond()) as server:
            for seconds in limit_s:  # one whose time is up before it is at the step has nothing yet
                call = server.infer(server.request("g", {"x": X}, timeout=int(seconds * 1e6)))
                await eventually(lambda: had or call.done())
                if "cancelled" in how:
                    call.cancel()
                with suppress(asyncio.CancelledError, grpc.aio.AioRpcError):
                    await call
                await eventually(lambda: server.in_flight == 0)
                if had:
                    break
            await eventually(lambda: had[0]() is None)
    finally:
        gc.enable()
