"""Answers of pure nodes, kept and given again: bounded by bytes, least recently used goes first.

A key is a digest of everything that reaches the node, so it is looked up before any queue.
Equal requests that come while the first is being computed wait for its answer.
"""

from __future__ import annotations

import asyncio
import mmap
from collections import OrderedDict
from collections.abc import Callable, Mapping
from hashlib import sha256
from struct import pack
from time import perf_counter_ns
from typing import Any, Final, NamedTuple

import numpy as np

from servinggraph.context import Context, ParameterValue
from servinggraph.executor.wiring import read_only
from servinggraph.interfaces import CachePolicy, Operation
from servinggraph.statistics import NodeStatistics, code_of
from servinggraph.tensors import DATATYPES, Array

__all__ = ["ResponseCache", "cached"]

_ENTRY_BYTES: Final = 512
"""What an entry costs besides its data: key, dictionaries and array headers, rounded up."""
_TENSOR_BYTES: Final = 256
_ELEMENT_BYTES: Final = 64
"""What an element of a BYTES tensor costs besides its text."""
_HASHED_AT_ONCE: Final = 1 << 20
"""Values above this are hashed in a thread: it takes a millisecond for about 1.5 MB."""

_MARKS: Final[Mapping[np.dtype[Any], bytes]] = {
    dtype: name.encode() for name, dtype in DATATYPES.items() if not dtype.hasobject
}


class _Entry(NamedTuple):
    value: Any
    parameters: dict[str, ParameterValue]
    size: int
    expires: float


class ResponseCache:
    """Answers of one node.

    Args:
        policy: its bounds.
        clock: the time, seconds.

    Attributes:
        size: bytes that the entries take.
    """

    def __init__(self, policy: CachePolicy, clock: Callable[[], float]) -> None:
        self._max_bytes = policy.max_bytes
        self._ttl = policy.ttl_s
        self._clock = clock
        self._entries: OrderedDict[bytes, _Entry] = OrderedDict()
        self.size = 0

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, key: bytes, context: Context) -> Any:
        """Return the answer kept under a key, its response parameters set; None when there is none."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        if self._clock() >= entry.expires:
            self._drop(key)
            return None
        self._entries.move_to_end(key)
        return _given(entry, context)

    def keep(self, key: bytes, result: Any, parameters: dict[str, ParameterValue]) -> _Entry | None:
        """Keep a copy of an answer; None for one that cannot be kept, or is larger than the whole cache."""
        tensors = result if isinstance(result, Mapping) else {"": result}
        size = _size(tensors)
        if size is None or size > self._max_bytes:
            return None
        # A copy: the step may reuse its buffer, and a view of one row would keep its whole batch alive.
        copies = {name: _frozen(array) for name, array in tensors.items()}
        expires = float("inf") if self._ttl is None else self._clock() + self._ttl
        entry = _Entry(copies if tensors is result else copies[""], dict(parameters), size, expires)
        if key in self._entries:
            self._drop(key)
        while self.size + size > self._max_bytes:
            self._drop(next(iter(self._entries)))
        self._entries[key] = entry
        self.size += size
        return entry

    def _drop(self, key: bytes) -> None:
        self.size -= self._entries.pop(key).size


def cached(operation: Operation, cache: ResponseCache, statistics: NodeStatistics) -> Operation:
    """Return an operation that asks the cache first, and counts hits and misses.

    Its answers are read-only, whether they were kept or not: what takes them behaves the same
    on the first request and on the second. Errors are never kept nor shared.
    """
    if operation.suspends:
        return Operation(_Shared(operation, cache, statistics).run, suspends=True)
    call = operation.call

    def run(value: Any, context: Context) -> Any:
        began = perf_counter_ns()
        value = read_only(_settled(value))
        key = _digest(value)
        if key is None:
            return read_only(call(value, context))
        found = cache.find(key, context)
        if found is not None:
            statistics.cache_hit(perf_counter_ns() - began)
            return found
        statistics.cache_miss(perf_counter_ns() - began)
        piece = context.for_piece()
        result = call(value, piece)
        began = perf_counter_ns()
        entry = cache.keep(key, result, piece.response_parameters)
        statistics.miss_ns += perf_counter_ns() - began
        return _answer(entry, result, piece, context)

    return Operation(run, suspends=False)


class _Shared:
    """Runs an operation that suspends, once for equal requests that come while it runs."""

    def __init__(self, operation: Operation, cache: ResponseCache, statistics: NodeStatistics) -> None:
        self._call = operation.call
        self._cache = cache
        self._statistics = statistics
        self._loop = asyncio.get_running_loop()
        self._waiting: dict[bytes, list[asyncio.Future[_Entry | bool]]] = {}

    async def run(self, value: Any, context: Context) -> Any:
        began = perf_counter_ns()
        try:
            value = read_only(_settled(value))
            key = await asyncio.to_thread(_digest, value) if _is_large(value) else _digest(value)
            found = None if key is None else await self._known(key, context, began)
        except BaseException as error:
            if self._statistics.batched:  # the batcher, which counts, has not seen this request
                self._statistics.failed(perf_counter_ns() - began, code_of(error))
            raise
        if found is not None:
            return found
        if key is None or key in self._waiting:
            return read_only(await self._call(value, context))
        return await self._lead(key, value, context)

    async def _known(self, key: bytes, context: Context, began: int) -> Any:
        """Return the answer to an equal request, waiting for one that runs; None when this one is to be computed."""
        statistics = self._statistics
        while True:
            found = self._cache.find(key, context)
            waiting = None if found is not None else self._waiting.get(key)
            if waiting is not None:
                follower: asyncio.Future[_Entry | bool] = self._loop.create_future()
                waiting.append(follower)
                outcome = await follower
                if outcome is True:
                    continue  # the first one was cancelled: one of those who waited is the next first
                found = _given(outcome, context) if isinstance(outcome, _Entry) else None
            spent = perf_counter_ns() - began
            if found is not None:
                statistics.cache_hit(spent)
            else:
                # Nobody runs, or the first one failed, perhaps for a reason of its own, its deadline say.
                statistics.cache_miss(spent)
            return found

    async def _lead(self, key: bytes, value: Any, context: Context) -> Any:
        self._waiting[key] = []
        outcome: _Entry | bool = False
        try:
            piece = context.for_piece()
            result = await self._call(value, piece)
            began = perf_counter_ns()
            entry = self._cache.keep(key, result, piece.response_parameters)
            self._statistics.miss_ns += perf_counter_ns() - began
            if entry is not None:
                outcome = entry
            return _answer(entry, result, piece, context)
        except asyncio.CancelledError:
            outcome = True
            raise
        finally:
            for follower in self._waiting.pop(key):
                if not follower.done():  # its client may have gone
                    follower.set_result(outcome)


def _given(entry: _Entry, context: Context) -> Any:
    """Return a kept answer: a mapping is the taker's own, its arrays are shared."""
    if entry.parameters:
        context.response_parameters.update(entry.parameters)
    return entry.value.copy() if type(entry.value) is dict else entry.value


def _answer(entry: _Entry | None, result: Any, piece: Context, context: Context) -> Any:
    """Return what the request gets that was computed."""
    if entry is not None:
        return _given(entry, context)
    if piece.response_parameters:
        context.response_parameters.update(piece.response_parameters)
    return read_only(result)


def _digest(value: Any) -> bytes | None:
    """Return a digest of names, datatypes, shapes and contents; None for a value that is not made of V2 tensors.

    SHA-256, because an answer goes to other callers than the one who asked first: nobody must
    be able to make two requests that collide.
    """
    if isinstance(value, Mapping):
        whole = sha256(b"m%d" % len(value))
        tensors = value
    else:
        whole, tensors = sha256(b"a"), {"": value}
    for name, array in tensors.items():
        if type(array) is not np.ndarray or type(name) is not str:
            return None
        mark = _MARKS.get(array.dtype)
        if mark is None:
            if array.dtype.kind not in "OUS":
                return None
            mark = array.dtype.str.encode()
        data = _content(array)
        if data is None:
            return None
        title = name.encode("utf-8", "surrogatepass")
        # Every part has its length before it, so that no two values give the same bytes.
        whole.update(pack(f"<IB{array.ndim}qIq", len(mark), array.ndim, *array.shape, len(title), len(data)))
        whole.update(mark)
        whole.update(title)
        whole.update(data)
    return whole.digest()


def _content(array: Array) -> memoryview | bytes | None:
    if not array.nbytes:
        return b""
    if array.dtype.kind != "O":
        return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
    parts: list[bytes] = []
    for item in array.ravel().tolist():
        if type(item) is bytes:
            parts.append(b"b" + len(item).to_bytes(8, "little") + item)
        elif type(item) is str:
            text = item.encode("utf-8", "surrogatepass")
            parts.append(b"s" + len(text).to_bytes(8, "little") + text)
        else:
            return None
    return b"".join(parts)


def _is_large(value: Any) -> bool:
    tensors = value.values() if isinstance(value, Mapping) else (value,)
    return sum(array.nbytes for array in tensors if isinstance(array, np.ndarray)) > _HASHED_AT_ONCE


def _settled(value: Any) -> Any:
    """Return the value with copies of what somebody else may write into meanwhile: clients' shared memory.

    Otherwise the digest of one content could get the answer to another.
    """
    if not isinstance(value, Mapping):
        return value.copy() if _is_shared(value) else value
    if not any(map(_is_shared, value.values())):
        return value
    return {name: array.copy() if _is_shared(array) else array for name, array in value.items()}


def _is_shared(array: Any) -> bool:
    while isinstance(array, np.ndarray):
        array = array.base
    return isinstance(array, memoryview) and isinstance(array.obj, mmap.mmap)


def _size(tensors: Mapping[Any, Any]) -> int | None:
    """Return the bytes that an answer takes; None when it is not made of arrays whose elements cannot change."""
    size = _ENTRY_BYTES
    for name, array in tensors.items():
        if type(array) is not np.ndarray or type(name) is not str:
            return None
        size += _TENSOR_BYTES + array.nbytes
        if array.dtype not in _MARKS and array.dtype.kind not in "OUS":
            return None
        if array.dtype.kind == "O":
            for item in array.ravel().tolist():
                if type(item) not in (bytes, str):
                    return None
                size += _ELEMENT_BYTES + len(item) * (1 if type(item) is bytes else 4)
    return size


def _frozen(array: Array) -> Array:
    copy = array.copy()
    copy.flags.writeable = False
    return copy
