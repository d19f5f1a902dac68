"""docs/kafka.md names the tests that hold its promises, and every header that there is."""

from __future__ import annotations

import re
from pathlib import Path

from servinggraph.kafka import headers as names
from servinggraph.protocols.kafka.report import Counts

PAGE = (Path(__file__).parents[3] / "docs" / "kafka.md").read_text()
TESTS = Path(__file__).with_name("test_promises.py").read_text()


def test_each_promise_has_its_test_and_each_test_its_promise():
    promised = re.findall(r"^\| \d+ \|.*\| `(test_\w+)` \|$", PAGE, re.MULTILINE)

    assert 14 == len(promised)
    assert promised == re.findall(r"^async def (test_\w+)", TESTS, re.MULTILINE)


def test_every_header_is_on_the_page():
    text = PAGE.replace("`-", "`x-dead-").replace("x-dead-graph-version", "x-dead-graph, x-dead-graph-version")
    values = {value for name, value in vars(names).items() if name.isupper() and isinstance(value, str) and name != "OK"}

    assert set() == {value for value in values - {names.DEAD_PREFIX} if value not in text}


def test_what_is_counted_has_a_name_and_a_value():
    assert {"consumed": 0, "produced": 0, "dead_letters": 0}.items() <= Counts().plain().items()
