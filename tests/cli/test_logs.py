"""Log lines: the request in each, text and JSON, repeats said once."""

from __future__ import annotations

import asyncio
import json
import logging

import numpy as np
import pytest

from servinggraph import Context, Graph
from servinggraph.cli.logs import JsonFormatter, OfRequest, Repeats, TextFormatter

logger = logging.getLogger("my.steps")
X = {"x": np.ones(1, np.float32)}


class Lines(logging.Handler):
    """Keeps formatted lines."""

    def __init__(self, formatter=None):
        super().__init__()
        self.lines = []
        self.addFilter(OfRequest())
        self.setFormatter(formatter or logging.Formatter("%(message)s%(of_request)s"))

    def emit(self, record):
        self.lines.append(self.format(record))


@pytest.fixture
def lines():
    handler = Lines()
    logger.addHandler(handler)
    yield handler.lines
    logger.removeHandler(handler)


def speaking(value):
    logger.warning("here")
    return {"y": value["x"]}


async def speaking_later(value):
    await asyncio.sleep(0)
    return speaking(value)


@pytest.mark.parametrize("options", [{}, {"batch": True}, {"run": "thread"}, {"run": "thread", "batch": True}], ids=str)
def test_what_a_step_logs_has_the_request_wherever_it_runs(lines, options):
    graph = Graph("g", {"x": ("FP32", [-1])})
    graph.to(speaking, name="n", **options).respond()

    async def check():
        async with graph.mock() as server:
            await server.infer(X, id="r-1")
            await server.infer(X, id="r-2")

    asyncio.run(check())
    assert ["here [g r-1]", "here [g r-2]"] == lines


def test_requests_side_by_side_are_not_mixed_up_and_one_without_an_id_has_a_number(lines):
    graph = Graph("g", {"x": ("FP32", [-1])})
    graph.to(speaking_later, name="n").to(lambda value: speaking({"x": value["y"]}), name="m").respond()

    async def check():
        async with graph.mock() as server:
            await asyncio.gather(*(server.infer(X, id=f"r-{number}") for number in range(4)))
            assert sorted([f"here [g r-{number}]" for number in range(4)] * 2) == sorted(lines)
            lines.clear()
            await server.infer(X)

    asyncio.run(check())
    first, second = lines
    assert first == second
    assert first.startswith("here [g #")


def test_a_line_of_a_batch_names_its_requests(lines):
    graph = Graph("g", {"x": ("FP32", [-1])})
    graph.to(speaking, name="n", batch={"max_rows": 16, "max_delay_ms": 60_000, "wait_when_idle": True}).respond()

    async def check():
        async with graph.mock() as server:
            await asyncio.gather(*(server.infer(X, id=f"r-{number}") for number in range(16)))

    asyncio.run(check())
    assert ["here [g r-0,r-1,r-2,r-3,r-4,r-5,r-6,r-7 and 8 more]"] == lines


def test_outside_of_requests_there_is_nothing_to_name(lines):
    logger.warning("alone")
    assert ["alone"] == lines


def test_json_has_the_request_and_survives_what_clients_send():
    handler = Lines(JsonFormatter())
    logger.addHandler(handler)
    graph = Graph("g", {"x": ("FP32", [-1])})

    def quoting(value, context: Context):
        logger.warning("got %s", "\ud800")
        return {"y": value["x"]}

    graph.to(quoting, name="n").respond()
    try:
        with graph.mock() as server:
            server.infer(X, id="r-1")
    finally:
        logger.removeHandler(handler)
    (line,) = handler.lines
    entry = json.loads(line)
    assert ("r-1", "g", "got ?", "warning") == tuple(entry[key] for key in ("request", "graph", "message", "level"))


def record(message="failed %s", level=logging.ERROR, name="a", args=("x",)):
    return logging.LogRecord(name, level, __file__, 1, message, args, None)


def test_what_a_caller_sends_is_no_line_of_its_own_in_text():
    handler = Lines(TextFormatter())
    handler.addFilter(Repeats())
    logger.addHandler(handler)
    graph = Graph("g", {"x": ("FP32", [-1])})
    graph.to(speaking, name="n").respond()
    try:
        with graph.mock() as server:
            server.infer(X, id="r\n2026-01-01 00:00:00,000 ERROR faked\r\x1b[2J\x85\u2028ä")
    finally:
        logger.removeHandler(handler)
    (text,) = handler.lines
    first, second = text.split("\n")
    assert first.endswith(" WARNING my.steps: here [g r")
    assert "    2026-01-01 00:00:00,000 ERROR faked\\r\\x1b[2J\\x85\\u2028ä]" == second


def test_many_lines_of_one_kind_are_said_a_few_times_and_then_counted():
    now = 0.0
    repeats = Repeats(most=3, seconds=10, clock=lambda: now)
    assert [True] * 3 + [False] * 97 == [repeats.filter(record(args=(number,))) for number in range(100)]
    assert repeats.filter(record("another"))
    assert repeats.filter(record(name="b"))
    assert repeats.filter(record(level=logging.INFO))
    now = 10.0
    late = record()
    assert repeats.filter(late)
    assert " (and 97 more like it)" == late.repeats
    assert repeats.filter(again := record())
    assert "" == again.repeats


def test_kinds_that_are_kept_apart_are_bounded():
    repeats = Repeats(kinds=10)
    for number in range(1000):
        assert repeats.filter(record(f"text {number}"))
    assert 10 == len(repeats._seen)
