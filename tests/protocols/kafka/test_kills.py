"""A few rounds of each scenario of kills.py; kills.md has the long run."""

import importlib.util
import logging
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.anyio, pytest.mark.slow, pytest.mark.timeout(400)]

_SPEC = importlib.util.spec_from_file_location("kafka_kills", Path(__file__).with_name("kills.py"))
kills = importlib.util.module_from_spec(_SPEC)
sys.modules["kafka_kills"] = kills
_SPEC.loader.exec_module(kills)


@pytest.mark.parametrize("delivery", ["at_least_once", "exactly_once"])
@pytest.mark.parametrize("scenario", kills.SCENARIOS)
async def test_nothing_is_lost(kafka, tmp_path, scenario, delivery, caplog):
    caplog.set_level(logging.CRITICAL, "aiokafka")

    verdict = await kills.Harness(kafka, tmp_path, delivery, count=1500, rounds=1).run(scenario, stand_still_s=2)

    assert (0, 0, 0, 0) == (verdict.lost, verdict.wrong, verdict.dead, verdict.out_of_order)
    if delivery == "exactly_once" or scenario == "terminate_server":
        assert 0 == verdict.doubled
