"""A small run of many streams with slow, stalling and vanishing readers; many_streams.md has the large one."""

from __future__ import annotations

import asyncio
import importlib.util
from pathlib import Path

import pytest

_SPEC = importlib.util.spec_from_file_location("many_streams", Path(__file__).with_name("many_streams.py"))
many_streams = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(many_streams)


@pytest.mark.slow
def test_readers_that_are_slow_stall_or_vanish_leave_nothing_behind():
    first, second = asyncio.run(many_streams.run(60, 2, seed=1))

    for seen in (first, second):
        assert [0, 0, 0, 0] == [seen[name] for name in ("pending", "slots", "requests", "tasks")]
        assert 60 >= seen["begun"] > 40
        assert seen["most of one stream"] < 10_000  # of 2**30: a reader that stalls stops its generator
    assert second["after MiB"] - first["after MiB"] < 4
    assert second["peak MiB"] - first["peak MiB"] < 60 * 0.25
