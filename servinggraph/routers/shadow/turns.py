"""Finds out who holds the event loop: each turn that a call takes of it is measured."""

from __future__ import annotations

import resource
from collections.abc import Awaitable, Callable, Generator
from functools import partial
from time import perf_counter_ns
from typing import Any, Final

from servinggraph.context import Context
from servinggraph.interfaces import Handler

__all__ = ["turns_of"]

_HOLD_NS: Final = 2_000_000
"""Shorter turns are not held against anybody."""

_WHOSE: Final = getattr(resource, "RUSAGE_THREAD", None)
"""Linux has figures of a thread; elsewhere the time on the wall has to do."""


class _Turns:
    """Awaits a call, and tells of every turn in which it held the event loop for long."""

    __slots__ = ("_call", "_held")

    def __init__(self, call: Callable[[], Awaitable[Any]], held: Callable[[int], None]) -> None:
        self._call = call
        self._held = held

    def __await__(self) -> Generator[Any, Any, Any]:
        inner: Any = None
        error: BaseException | None = None
        while True:
            used = None if _WHOSE is None else resource.getrusage(_WHOSE)
            began = perf_counter_ns()
            try:
                if inner is None:
                    inner = self._call().__await__()
                waits_for = inner.send(None) if error is None else inner.throw(error)
            except StopIteration as end:
                return end.value
            except BaseException:
                inner = error = None  # the error is in them, and holds this frame by its traceback
                raise
            finally:
                took = perf_counter_ns() - began
                if took > _HOLD_NS and (took := _own_ns(took, used)) > _HOLD_NS:
                    self._held(took)
            error = None
            try:
                yield waits_for
            except BaseException as raised:  # for the call to see, as if it were awaited here
                error = raised


def turns_of(handler: Handler, held: Callable[[int], None], value: Any, context: Context) -> Awaitable[Any]:
    """Return an awaitable of `handler(value, context)`, begun when it is awaited.

    Args:
        handler: the call.
        held: told, in nanoseconds, of each turn in which the call held the event loop for over 2 ms.
        value: what it is called with.
        context: the same.
    """
    return _Turns(partial(handler, value, context), held)


def _own_ns(took: int, before: resource.struct_rusage | None) -> int:
    """Return how much of a turn the call is to blame for: none of it where the machine gave the core to others."""
    if before is None or _WHOSE is None:
        return took
    after = resource.getrusage(_WHOSE)
    computed = int((after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) * 1e9)
    # It gave the core away by itself: it waited for something, a file, a lock or a socket.
    waited = after.ru_nvcsw > before.ru_nvcsw
    return took if waited else min(took, computed)
