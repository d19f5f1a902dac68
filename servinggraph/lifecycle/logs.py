"""Log settings, as Triton's logging extension has them, changeable while the server runs.

They hold for this package's loggers; what else the process logs stays as it is configured.
Source: Triton, extension_logging.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any, Final

from servinggraph.errors import InvalidRequest, Unsupported

__all__ = ["LogSettings"]

_NAME: Final = "servinggraph"
_LEVELS: Final = {"log_info": logging.INFO, "log_warning": logging.WARNING, "log_error": logging.ERROR}
_FORMATS: Final = ("default", "ISO8601")


class _Chosen(logging.Filter):
    """Lets through what the settings want of this package, and all of others."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        super().__init__()
        self._settings = settings

    def filter(self, record: logging.LogRecord) -> bool:
        if record.name != _NAME and not record.name.startswith(f"{_NAME}."):
            return True
        if record.levelno >= logging.ERROR:
            return bool(self._settings["log_error"])
        if record.levelno >= logging.WARNING:
            return bool(self._settings["log_warning"])
        if record.levelno >= logging.INFO:
            return bool(self._settings["log_info"])
        return bool(self._settings["log_verbose_level"])


class LogSettings:
    """What is logged, and in which form.

    Nothing of the process is touched before the first change.
    """

    def __init__(self) -> None:
        self._logger = logging.getLogger(_NAME)
        self._level = self._logger.level
        self._start: dict[str, Any] = {
            "log_file": "",
            **{key: self._logger.isEnabledFor(level) for key, level in _LEVELS.items()},
            "log_verbose_level": int(self._logger.isEnabledFor(logging.DEBUG)),
            "log_format": "default",
        }
        self._settings = dict(self._start)
        self._filter = _Chosen(self._settings)
        self._handlers: list[logging.Handler] = []

    def settings(self) -> dict[str, Any]:
        """Return the settings that hold."""
        return dict(self._settings)

    def update(self, changes: Mapping[str, Any]) -> dict[str, Any]:
        """Change settings, all or none, and return those that hold then; keys that are none are ignored, as in Triton.

        Args:
            changes: setting to value, or to None for that of the start.

        Raises:
            InvalidRequest: a value that is none for its setting.
            Unsupported: `log_file`, which only the start of the server can set.
        """
        if changes.get("log_file") is not None:
            raise Unsupported("log file location can not be updated through network protocol; the log goes to stderr")
        parsed = {
            key: self._start[key] if value is None else _PARSERS[key](key, value)
            for key, value in changes.items()
            if key in _PARSERS
        }
        if parsed:
            self._settings.update(parsed)
            self._apply()
        return self.settings()

    def close(self) -> None:
        """Take back what was changed in the process."""
        self._logger.setLevel(self._level)
        for handler in self._handlers:
            handler.removeFilter(self._filter)
            _set_format(handler, "default")
        self._handlers = []

    def _apply(self) -> None:
        wanted = [level for key, level in _LEVELS.items() if self._settings[key]]
        lowest = min(wanted, default=logging.CRITICAL + 1)
        self._logger.setLevel(logging.DEBUG if self._settings["log_verbose_level"] else lowest)
        # The filter sits on handlers: one on a logger does not see what its children log.
        for handler in (*logging.getLogger().handlers, *self._logger.handlers):
            if handler not in self._handlers:
                handler.addFilter(self._filter)
                self._handlers.append(handler)
            _set_format(handler, self._settings["log_format"])


def _set_format(handler: logging.Handler, form: str) -> None:
    """Write times as ISO 8601 in UTC, or as they were; other forms than text, JSON say, have ISO 8601 anyway."""
    formatter: Any = handler.formatter
    if type(formatter) is not logging.Formatter:
        return
    for name in ("default_time_format", "default_msec_format", "converter"):
        formatter.__dict__.pop(name, None)
    if form == "ISO8601":
        formatter.default_time_format = "%Y-%m-%dT%H:%M:%S"
        formatter.default_msec_format = "%s.%03dZ"
        formatter.converter = time.gmtime


def _flag(key: str, value: Any) -> bool:
    if value in ("true", "false"):
        return bool(value == "true")
    if type(value) is not bool:
        raise InvalidRequest(f"Unable to parse '{key}': it is true or false, got {str(value)[:40]}")
    return value


def _level(key: str, value: Any) -> int:
    if type(value) is str and value.isascii() and value.isdigit() and len(value) < 10:
        value = int(value)
    if type(value) is not int or not 0 <= value < 2**32:
        raise InvalidRequest(f"Unable to parse '{key}': it is a whole number from 0 on, got {str(value)[:40]}")
    return value


def _format(key: str, value: Any) -> str:
    if value not in _FORMATS:
        raise InvalidRequest(f"'{key}' is {' or '.join(_FORMATS)}, got {str(value)[:40]}")
    return str(value)


_PARSERS: Final[Mapping[str, Callable[[str, Any], Any]]] = {
    **dict.fromkeys(_LEVELS, _flag),
    "log_verbose_level": _level,
    "log_format": _format,
}
