"""`callback`: an HTTP request for each value, as often as it takes, to nobody whom the options do not allow."""

import asyncio
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from servinggraph import Graph
from servinggraph.errors import GraphInvalid, InvalidRequest, StepFailed, Unavailable
from servinggraph.steps import Callback

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend():
    return "asyncio"


class Server(ThreadingHTTPServer):
    request_queue_size = 128  # with five, a sixth that comes at the same moment waits a second for its connection


class Listener:
    """A service that is told; answers what `answers` holds, then 200."""

    def __init__(self):
        self.told, self.answers = [], []
        listener = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                listener.told.append((self.path, json.loads(body), dict(self.headers)))
                status = listener.answers.pop(0) if listener.answers else 200
                self.send_response(status)
                self.send_header("Content-Length", "5")
                self.end_headers()
                self.wfile.write(b"words")

            def log_message(self, *args):
                pass

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    def stop(self):
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@pytest.fixture
def listener():
    made = Listener()
    yield made
    made.stop()


def callback(*to, **options):
    """Return the step; the limits of its time are for a machine that may stand still for a while."""
    return Callback(*to, **{"connect_timeout_ms": 60_000, "attempt_timeout_ms": 60_000, **options})


def graph_of(step):
    graph = Graph("g", inputs="body")
    graph.to(step).respond()
    return graph


async def ask(step, body=7, **options):
    async with graph_of(step).mock() as server:
        return await server.invoke(body, **options)


@pytest.mark.parametrize("on_failure", ["fail", "drop"])
async def test_who_is_named_is_told(listener, on_failure):
    step = callback(f"{listener.url}/hook?a=1", headers={"Authorization": "Bearer t"}, on_failure=on_failure)

    assert {"a": 1} == await ask(step, {"a": 1}, headers={"traceparent": "00-1-2-01"})

    ((path, document, headers),) = listener.told
    assert ("/hook?a=1", {"id": "", "graph": "g", "value": {"a": 1}}) == (path, document)
    assert ("Bearer t", "application/json", "00-1-2-01") == tuple(
        headers[name] for name in ("Authorization", "Content-Type", "traceparent")
    )


async def test_a_failure_that_may_pass_is_tried_again(listener):
    listener.answers = [503, 502]

    assert 7 == await ask(callback(listener.url, on_failure="fail", first_ms=1))

    assert 3 == len(listener.told)


async def test_a_refusal_is_not_tried_again(listener):
    listener.answers = [404]

    with pytest.raises(StepFailed, match="callback to 127.0.0.1 answered 404: words"):
        await ask(callback(listener.url, on_failure="fail", first_ms=1))

    assert 1 == len(listener.told)


async def test_attempts_end(listener, caplog):
    listener.answers = [503] * 4

    with pytest.raises(Unavailable, match="answered 503"):
        await ask(callback(listener.url, on_failure="fail", first_ms=1, attempts=2))
    assert 7 == await ask(callback(listener.url, first_ms=1, attempts=2))

    assert 4 == len(listener.told)
    (line,) = [record.getMessage() for record in caplog.records if record.name == "servinggraph.steps"]
    assert "node 'callback': 1 dropped, the last one because: callback to 127.0.0.1 answered 503" in line


async def test_a_service_that_is_away_is_said():
    with pytest.raises(Unavailable, match="cannot connect to callback to 127.0.0.1"):
        await ask(Callback("http://127.0.0.1:1/", on_failure="fail", attempts=1))


async def test_a_request_names_its_callback_where_that_is_allowed(listener):
    step = callback(url_header="x-callback", allow=[f"{listener.url}/hooks"], on_failure="fail")

    await ask(step, headers={"x-callback": f"{listener.url}/hooks/7"})
    await ask(step)

    assert ["/hooks/7"] == [path for path, *_ in listener.told]


@pytest.mark.parametrize(
    "url",
    [
        "{base}/other",
        "{base}/hooks/../admin",
        "{base}/hooks/%2e%2e/admin",
        "{base}/hooksy",
        "http://user@127.0.0.1/hooks",
        "{base}@evil.example/hooks",
        "https://127.0.0.1/hooks",
        "http://127.0.0.1:1/hooks",
        "http://evil.example/hooks",
        "{base}/hooks\\..\\admin",
        "file:///etc/passwd",
        "/hooks",
        "http://[::1",
        "{base}/hooks/\x00",
        "{base}/hooks/\x0b",
    ],
)
async def test_an_address_that_is_not_allowed_is_refused(listener, url):
    step = callback(url_header="x-callback", allow=[f"{listener.url}/hooks"], on_failure="fail")

    with pytest.raises(InvalidRequest, match="names an address that callbacks must not go to"):
        await ask(step, headers={"x-callback": url.format(base=listener.url)})

    assert [] == listener.told


async def test_a_pattern_of_hosts_is_for_those_below():
    from servinggraph.steps.sinks.callback import _begins_with

    allowed = "https://*.example.com/in"

    assert _begins_with("https://a.example.com/in/1", allowed)
    assert _begins_with("https://a.b.example.com/in", allowed)
    assert not _begins_with("https://evil.com\x00.example.com/in", allowed)  # to some resolvers it ends there
    assert not _begins_with("https://example.com/in", allowed)
    assert not _begins_with("https://badexample.com/in", allowed)
    assert not _begins_with("https://a.example.com.evil.net/in", allowed)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, "nowhere to go"),
        ({"url_header": "x"}, "needs 'allow'"),
        ({"url_header": "x", "allow": ["https://a"], "headers": {"Authorization": "t"}}, "'headers' go to 'url' only"),
        ({"url": "ftp://a"}, "'url' is no URL"),
        ({"url": ""}, "'url' is no URL"),
        ({"url": "http://me@a/"}, "'url' has a user name"),
        ({"url_header": "x", "allow": ["https://a", "b"]}, "'allow' is no URL"),
    ],
)
async def test_options_that_make_no_sense_are_refused_at_the_start(options, text):
    with pytest.raises(GraphInvalid, match=text):
        graph_of(Callback(**options)).compile()


def test_what_is_under_way_at_the_end_gets_through(listener, run):
    async def main():
        async with graph_of(callback(listener.url)).mock() as server:
            for number in range(50):
                await server.invoke(number)

    run(main())  # time stands still, and nobody's patience ends

    assert list(range(50)) == sorted(document["value"] for _, document, _ in listener.told)


async def test_a_caller_who_leaves_ends_its_callback(listener):
    listener.answers = [503] * 100
    async with graph_of(callback(listener.url, on_failure="fail", first_ms=1, attempts=1000)).mock() as server:
        asking = asyncio.create_task(server.invoke(1))
        while not listener.told:
            await asyncio.sleep(0.01)
        asking.cancel()
        await asyncio.wait([asking])
        seen = len(listener.told)
        await asyncio.sleep(0.05)

    assert len(listener.told) <= seen + 1
