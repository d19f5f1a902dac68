"""Log lines as text or JSON, each with the request that it is about; many alike are said once."""

from __future__ import annotations

import logging
import re
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Final

import orjson

from servinggraph.context import current_context

__all__ = ["JsonFormatter", "OfRequest", "Repeats", "TextFormatter", "configure_logging"]

_CONTROL: Final = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029]")
_TEXT: Final = "%(asctime)s %(levelname)-7s %(name)s: %(message)s%(of_request)s%(repeats)s"


class OfRequest(logging.Filter):
    """Notes on each record which request it is about: `request`, `graph`, and `of_request` for text."""

    def filter(self, record: logging.LogRecord) -> bool:
        context = current_context.get()
        label = "" if context is None else context.label
        graph = "" if context is None else context.graph
        record.__dict__.update(request=label, graph=graph, of_request=f" [{graph} {label}]" if label else "")
        return True


class Repeats(logging.Filter):
    """Lets through a few warnings and errors of one kind in a while, and says how many more there were.

    Of one kind are those of one logger, level and text before its values are put in.

    Args:
        most: lines of one kind in `seconds`.
        seconds: that while.
        clock: the time, seconds.
        kinds: kinds that are kept apart; the one not seen for longest is forgotten.
    """

    def __init__(
        self, most: int = 10, seconds: float = 10.0, clock: Callable[[], float] = time.monotonic, kinds: int = 1000
    ) -> None:
        super().__init__()
        self._most, self._seconds, self._clock, self._kinds = most, seconds, clock, kinds
        self._seen: OrderedDict[tuple[str, int, str], tuple[float, int]] = OrderedDict()
        self._lock = threading.Lock()

    def filter(self, record: logging.LogRecord) -> bool:
        record.repeats = ""
        if record.levelno < logging.WARNING:
            return True
        key = record.name, record.levelno, str(record.msg)
        now = self._clock()
        with self._lock:
            began, seen = self._seen.pop(key, (now, 0))
            if now - began >= self._seconds:
                if seen > self._most:
                    record.repeats = f" (and {seen - self._most} more like it)"
                began, seen = now, 0
            self._seen[key] = began, seen + 1
            if len(self._seen) > self._kinds:
                self._seen.popitem(last=False)
        return seen < self._most


class TextFormatter(logging.Formatter):
    """One line, and what goes on in further ones indented, so that nothing a caller sent looks like a line of this log."""

    def __init__(self) -> None:
        super().__init__(_TEXT)

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record).replace("\n", "\n    ")
        # Others move the cursor of the terminal.
        return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, logger, message, request, graph, and the traceback where there is one."""

    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage() + getattr(record, "repeats", ""),
        }
        if request := getattr(record, "request", ""):
            entry["request"], entry["graph"] = request, getattr(record, "graph", "")
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        # A text may quote what a client sent, lone surrogates included, which JSON cannot hold.
        return orjson.dumps({name: text.encode("utf-8", "replace").decode() for name, text in entry.items()}).decode()


def configure_logging(level: str, form: str) -> None:
    """Send the log to stderr, so that stdout stays for what a command prints."""
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(OfRequest())
    handler.addFilter(Repeats())
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
