"""Log settings change what this package logs, and nothing else."""

import io
import logging
import re

import pytest

from servinggraph.errors import InvalidRequest, Unsupported
from servinggraph.lifecycle.logs import LogSettings

OURS, OTHER = logging.getLogger("servinggraph.lifecycle"), logging.getLogger("somebody.else")


@pytest.fixture
def written():
    """The text of a handler as `serve` sets it up."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.INFO)
    root.addHandler(handler)
    yield stream
    root.removeHandler(handler)
    root.setLevel(level)


@pytest.fixture
def logs(written):
    settings = LogSettings()
    yield settings
    settings.close()


def log_all(stream):
    stream.truncate(0)
    stream.seek(0)
    for logger in (OURS, OTHER):
        for level in ("debug", "info", "warning", "error"):
            getattr(logger, level)("%s %s", "ours" if logger is OURS else "other", level)
    return re.findall(r"(?:ours|other) \w+", stream.getvalue())


def test_it_starts_as_the_process_was_configured(logs, written):
    expected = {
        "log_file": "",
        "log_info": True,
        "log_warning": True,
        "log_error": True,
        "log_verbose_level": 0,
        "log_format": "default",
    }
    assert expected == logs.settings()
    assert expected == logs.update({})
    assert ["ours info", "ours warning", "ours error", "other info", "other warning", "other error"] == log_all(written)


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"log_info": False}, ["ours warning", "ours error"]),
        ({"log_warning": False}, ["ours info", "ours error"]),
        ({"log_error": False}, ["ours info", "ours warning"]),
        ({"log_info": False, "log_warning": False, "log_error": False}, []),
        ({"log_verbose_level": 1}, ["ours debug", "ours info", "ours warning", "ours error"]),
        ({"log_info": "false"}, ["ours warning", "ours error"]),
        ({"log_verbose_level": "2", "log_info": False}, ["ours debug", "ours warning", "ours error"]),
        ({"nobody_knows": 1}, ["ours info", "ours warning", "ours error"]),
    ],
)
def test_each_level_can_be_switched_and_others_are_left_alone(logs, written, changes, expected):
    logs.update(changes)
    assert [*expected, "other info", "other warning", "other error"] == log_all(written)
    logs.update(dict.fromkeys(changes))  # None: as it started
    assert ["ours info", "ours warning", "ours error"] == log_all(written)[:3]


def test_times_can_be_iso_8601(logs, written):
    logs.update({"log_format": "ISO8601"})
    log_all(written)
    assert re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z INFO ours info", written.getvalue())
    logs.update({"log_format": "default"})
    log_all(written)
    assert re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} INFO ours info", written.getvalue())


def test_closing_leaves_the_process_as_it_was(written):
    level, filters = (
        logging.getLogger("servinggraph").level,
        [list(handler.filters) for handler in logging.getLogger().handlers],
    )
    logs = LogSettings()
    logs.update({"log_info": False, "log_verbose_level": 3, "log_format": "ISO8601"})
    logs.close()
    assert level == logging.getLogger("servinggraph").level
    assert filters == [list(handler.filters) for handler in logging.getLogger().handlers]


@pytest.mark.parametrize(
    "changes, kind",
    [
        ({"log_file": "x"}, Unsupported),
        ({"log_info": 1}, InvalidRequest),
        ({"log_verbose_level": True}, InvalidRequest),
        ({"log_verbose_level": -1}, InvalidRequest),
        ({"log_format": "iso"}, InvalidRequest),
    ],
)
def test_what_is_no_value_is_refused_and_nothing_changes(logs, changes, kind):
    before = logs.settings()
    with pytest.raises(kind):
        logs.update({"log_warning": False, **changes})
    assert before == logs.settings()
