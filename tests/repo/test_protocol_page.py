"""docs/protocol.md names every endpoint and call that there is, and tests that there are."""

from __future__ import annotations

import asyncio
import re
from itertools import product
from pathlib import Path

import pytest

from servinggraph.lifecycle import Serving
from servinggraph.protocols.http.app import make_app

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "protocol.md").read_text()
SECTIONS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL))


def rows(section):
    lines = [line for line in SECTIONS[section].splitlines() if line.startswith("| ")][2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def documented_routes():
    found = set()
    for methods, paths, *_ in rows("HTTP"):
        for method, path in product(methods.split(", "), re.findall(r"`(.*?)`", paths)):
            pieces = re.split(r"(\[.*?\])", path)
            ways = product(*(("", piece[1:-1]) if piece.startswith("[") else (piece,) for piece in pieces))
            found |= {(method, "".join(way)) for way in ways}
    return found


def served_routes():
    async def collect():
        app = make_app(Serving())
        short = {"name": "m", "version": "v", "region": "r", "repo": "repo", "node": "node"}
        return {
            (method, re.sub(r"\{(\w+)(?::\w+)?\}", lambda m: "{" + short[m[1]] + "}", route.path))
            for route in app.routes
            for method in route.methods
        }

    return asyncio.run(collect())


def test_every_route_is_on_the_page_and_every_row_is_a_route():
    assert served_routes() == documented_routes()


def test_every_call_is_on_the_page_and_every_row_is_a_call():
    text = (ROOT / "servinggraph/protocols/protobuf/proto/grpc_service.proto").read_text()
    calls = set(re.findall(r"^\s*rpc (\w+)", text, re.MULTILINE))
    documented = {call for cell, *_ in rows("gRPC") if not cell.startswith("`grpc.") for call in re.findall(r"\w+", cell)}

    assert calls == documented


@pytest.mark.parametrize("test", sorted({row[-1].strip("`") for section in SECTIONS for row in rows(section)}))
def test_every_test_that_the_page_names_is_there(test):
    file, _, name = test.partition("::")
    path = ROOT / "tests" / "protocols" / file
    assert path.is_file()
    assert not name or re.search(rf"^(async )?def {name}\(", path.read_text(), re.MULTILINE)
