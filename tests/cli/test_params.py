"""Addresses, times and headers as commands take them: what is wrong is one sentence, and no secret is in it."""

import json
import threading
import time
from concurrent import futures
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import click
import grpc
import pytest
from click.testing import CliRunner

from servinggraph.cli import main
from servinggraph.cli.params import headers_from, server_address

LONG = "a" * 70


def run(*arguments):
    return CliRunner().invoke(main, arguments)


@pytest.mark.parametrize("command", [("infer", "m"), ("bench", "m"), ("health",), ("top",), ("compare", "g", "n")])
@pytest.mark.parametrize(
    "url", ["http://[::1", "http://h:99999", "http://h:x", "http://", "ftp://h", "http://a b", f"http://{LONG}.x"]
)
def test_what_is_no_address_is_one_sentence(command, url):
    done = run(command[0], url, *command[1:])
    assert (2, True) == (done.exit_code, f"'{url}' is no address of a server: expected http://host:port" in done.output)


@pytest.mark.parametrize(
    "url", ["http://h", "https://h.example:1/path", "http://[::1]:80", "http://127.0.0.1:80", "http://ä.example"]
)
def test_what_is_an_address_is_taken(url):
    assert url == server_address(url).geturl()


@pytest.mark.parametrize("command", [("infer", "m"), ("bench", "m"), ("health",)])
@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf"])
def test_no_time_at_all_and_no_number_are_no_time_to_wait(command, seconds):
    done = run(command[0], "http://127.0.0.1:1", *command[1:], "--timeout-s", seconds)
    assert (2, True) == (done.exit_code, "Invalid value for '--timeout-s'" in done.output)
    assert 2 == run("bench", "http://127.0.0.1:1", "m", "--seconds", seconds).exit_code


def test_headers_are_taken_literally():
    given = {"A": "1e3", "B": "true", "C": '"quoted"', "D": "x=y", "E": ""}
    assert given == headers_from([f"{name}={value}" for name, value in given.items()])


@pytest.mark.parametrize("header", ["X=hunter22\nY: 1", "X=hunter22ä", "hunter22", "X Y=hunter22", "=hunter22"])
def test_what_is_no_header_is_not_quoted(header):
    with pytest.raises(click.UsageError) as refused:
        headers_from([header])
    assert "hunter22" not in refused.value.message


def test_a_token_that_no_header_can_hold_is_not_printed():
    done = run("compare", "http://127.0.0.1:1", "g", "n", "--token", "hunter2222\r")
    assert (2, True) == (done.exit_code, "the token has line breaks" in done.output)
    assert "hunter" not in done.output


def go_elsewhere(handler):
    """Answer with a redirect."""
    handler.send_response(302)
    handler.send_header("Location", handler.path.replace("redirect", "stolen") + "?login")
    handler.send_header("Content-Length", "0")
    handler.end_headers()


class Foreign(BaseHTTPRequestHandler):
    """Another V2 server: without binary tensors, with a datatype of its own, and answers only to those with a token."""

    protocol_version = "HTTP/1.1"
    asked: ClassVar[list[str]]

    def do_GET(self):
        self.asked.append(self.path)
        if "secret" not in self.headers.get("authorization", ""):
            self.answer(401, {"error": "who are you"})
        elif "redirect" in self.path:
            go_elsewhere(self)
        elif "list" in self.path:
            self.answer(200, [])
        else:
            datatype = "FANCY" if "fancy" in self.path else "BYTES"
            self.answer(200, {"name": "m", "inputs": [{"name": "x", "datatype": datatype, "shape": [-1]}], "outputs": []})

    def do_POST(self):
        self.rfile.read(int(self.headers["content-length"]))
        if "redirect" in self.path:
            self.do_GET()
            return
        self.answer(200, {"model_name": "m", "outputs": [{"name": "y", "datatype": "BYTES", "shape": [1], "data": ["ü"]}]})

    def answer(self, status, document):
        body = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format, *arguments):
        """Say nothing."""


@pytest.fixture
def foreign():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Foreign)
    Foreign.asked = []
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_headers_go_along_when_a_server_is_asked_what_its_model_takes(foreign):
    sent = ("-i", '["a"]', "--header", "Authorization=Bearer secret")
    assert "who are you" in run("infer", foreign, "m", *sent[:2]).output
    done = run("infer", foreign, "m", *sent)
    assert (0, True) == (done.exit_code, "y BYTES [1]\n['ü']" in done.output), done.output


def test_what_another_server_says_of_its_model_may_be_beyond_us(foreign):
    sent = ("-i", '["a"]', "--header", "Authorization=Bearer secret")
    done = run("infer", foreign, "fancy", *sent)
    assert (2, True) == (done.exit_code, "takes 'x' as FANCY, which is no datatype of V2" in done.output)
    done = run("infer", foreign, "list", *sent)
    assert (1, True) == (done.exit_code, "the model's metadata cannot be read" in done.output)


def test_a_grpc_server_that_says_nothing_is_not_waited_for_longer_than_asked():
    class Silent(grpc.GenericRpcHandler):
        def service(self, details):
            return grpc.unary_unary_rpc_method_handler(lambda request, context: silence.wait(600))

    silence = threading.Event()
    server = grpc.server(futures.ThreadPoolExecutor(1))
    server.add_generic_rpc_handlers((Silent(),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        began = time.monotonic()
        done = run("infer", f"grpc://127.0.0.1:{port}", "m", "-i", "[1]", "--timeout-s", "0.5", "--header", "X-User=ann")
        assert (1, True) == (done.exit_code, "DEADLINE_EXCEEDED" in done.output), done.output
        assert time.monotonic() - began < 120  # and not the ten minutes that the server would take
    finally:
        silence.set()
        server.stop(None).wait()


@pytest.mark.parametrize(
    "arguments",
    [
        ["compare", "{url}", "g", "n", "--token", "secret"],
        ["infer", "{url}", "m", "--body", "{}", "--header", "Authorization=secret"],
        ["infer", "{url}", "m", "-i", "[1]", "--header", "Authorization=secret"],
    ],
)
def test_a_redirect_is_not_followed_and_takes_no_token_along(foreign, arguments):
    done = run(*(argument.replace("{url}", f"{foreign}/redirect") for argument in arguments))
    assert (1, True) == (done.exit_code, "302" in done.output), done.output
    assert Foreign.asked
    assert not [path for path in Foreign.asked if "stolen" in path]


@pytest.mark.parametrize("arguments", [["health"], ["top", "--once"]])
def test_a_page_that_a_redirect_leads_to_is_not_the_server(monkeypatch, foreign, arguments):
    monkeypatch.setattr(Foreign, "do_GET", go_elsewhere)
    done = run(*arguments, foreign)
    assert (1, True) == (done.exit_code, "redirects are not followed" in done.output), done.output
