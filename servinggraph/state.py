"""Where routers keep what has to survive a restart: a JSON file, or Redis.

A place is named by the `state` key of a router: a path, relative to the graph file, or a
`redis://` address. Both hold a mapping of key (graph, version and node) to plain values.
"""

from __future__ import annotations

import fcntl
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Final

import numpy as np
import orjson

from servinggraph.interfaces import Learned

__all__ = ["FileStore", "RedisStore", "StateFailed", "StateStore", "open_store", "revision_of"]


class StateFailed(Exception):
    """State could not be read or written; the text says where and why."""


class StateStore(ABC):
    """Keeps documents by key. Its methods block: call them in a thread.

    Attributes:
        adds_up: True where what several workers have learned can be added up: it has `add` and `tell`, which others do not.
    """

    adds_up: ClassVar[bool] = False

    @abstractmethod
    def load(self, key: str) -> dict[str, Any] | None:
        """Return what was saved last under a key; None when nothing was.

        Raises:
            StateFailed: it is there, but cannot be read.
        """

    @abstractmethod
    def save(self, key: str, document: Mapping[str, Any], upto: int | None = None) -> dict[str, Any] | None:
        """Save a document, whole or not at all, unless a later one is there.

        Args:
            key: whose state it is.
            document: the document.
            upto: highest `revision` of the document whose place it may take; None for any.

        Returns:
            None once it is saved; else the later document, which somebody else has saved.

        Raises:
            StateFailed: it could not be written.
        """

    def add(self, key: str, worker: str, number: int, learned: Learned) -> Learned:
        """Add what a worker has learned to what all have, and return that.

        Args:
            key: whose state it is.
            worker: name of the worker, which no other has.
            number: 1, 2, ... for each addition of the worker. One that comes again, because nobody knows whether it
                arrived, is added once.
            learned: numbers by name. Void where everything was forgotten since; of a later era, all others are.

        Raises:
            StateFailed: it may have been added or not.
        """
        raise NotImplementedError

    def tell(self, key: str, messages: Sequence[bytes], seen: str) -> tuple[str, list[bytes]]:
        """Tell all workers something, and return what was told since: to where, and the messages, one's own included.

        Args:
            key: whose state it is.
            messages: what to tell. It is there for a minute.
            seen: to where this worker has seen; empty at first.

        Raises:
            StateFailed: it may have been told or not.
        """
        raise NotImplementedError

    def close(self) -> None:
        """Let go of connections."""
        return


_TELL: Final = """
for i = 2, #ARGV do redis.call('XADD', KEYS[1], 'MAXLEN', '~', 10000, '*', 'm', ARGV[i]) end
if redis.call('EXISTS', KEYS[1]) == 0 then return {} end
local now = redis.call('TIME')
redis.call('XTRIM', KEYS[1], 'MINID', (now[1] - 60) .. '000')
redis.call('EXPIRE', KEYS[1], 120)
return redis.call('XRANGE', KEYS[1], '(' .. ARGV[1], '+')
"""
"""A stream that keeps what was told in the last minute; workers that look each second miss nothing."""

_ADD: Final = """
local function sum(one, other)
  local added = {}
  for at = 1, math.max(#one, #other), 8 do
    local x = at <= #one and struct.unpack('<d', one, at) or 0
    local y = at <= #other and struct.unpack('<d', other, at) or 0
    added[#added + 1] = struct.pack('<d', x + y)
  end
  return table.concat(added)
end

local era = tonumber(redis.call('HGET', KEYS[1], '#era') or '0')
local mine, number = tonumber(ARGV[1]), tonumber(ARGV[2])
if mine > era then
  redis.call('DEL', KEYS[1])
  redis.call('HSET', KEYS[1], '#era', ARGV[1])
  era = mine
end
if #ARGV > 3 and number > tonumber(redis.call('GET', KEYS[2]) or '0') then
  if mine == era then
    for i = 4, #ARGV, 2 do
      redis.call('HSET', KEYS[1], ARGV[i], sum(redis.call('HGET', KEYS[1], ARGV[i]) or '', ARGV[i + 1]))
    end
  end
  redis.call('SET', KEYS[2], ARGV[2], 'EX', ARGV[3])
end
return redis.call('HGETALL', KEYS[1])
"""
"""In one step, whatever other workers do: forget an earlier era, add unless this was added before, read all."""


class FileStore(StateStore):
    """One JSON file; several routers, and several processes of one machine, may share it."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def load(self, key: str) -> dict[str, Any] | None:
        try:
            with self._locked():
                found = self._read().get(key)
        except OSError as error:
            raise StateFailed(f"cannot read state '{self._path}': {error.strerror or error}") from error
        return found

    def save(self, key: str, document: Mapping[str, Any], upto: int | None = None) -> dict[str, Any] | None:
        beside = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        try:
            with self._locked():
                everything = self._read()
                if _is_later(found := everything.get(key), upto):
                    return found
                everything[key] = dict(document)
                # Written beside and moved into place: a crash leaves the old file or the new one.
                with beside.open("wb") as file:
                    file.write(orjson.dumps(everything, option=orjson.OPT_INDENT_2))
                    file.flush()
                    os.fsync(file.fileno())
                beside.replace(self._path)
        except OSError as error:
            raise StateFailed(f"cannot write state '{self._path}': {error.strerror or error}") from error
        return None

    @contextmanager
    def _locked(self) -> Iterator[None]:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.with_name(f".{self._path.name}.lock").open("ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _read(self) -> dict[str, Any]:
        try:
            text = self._path.read_bytes()
        except FileNotFoundError:
            return {}
        try:
            found = orjson.loads(text)
        except orjson.JSONDecodeError as error:
            raise StateFailed(f"state '{self._path}' is not JSON: {error}; move it away to begin anew") from error
        if not isinstance(found, dict):
            raise StateFailed(f"state '{self._path}' holds no JSON object; move it away to begin anew")
        return found


class RedisStore(StateStore):
    """A Redis, for replicas on several machines; each key is a string of JSON."""

    adds_up = True
    _PREFIX = "servinggraph:state:"
    _SUMS = "servinggraph:sums:"
    _TOLD = "servinggraph:told:"
    _REMEMBER_S = 24 * 3600  # how long a worker may try to have its last addition added

    def __init__(self, url: str) -> None:
        try:
            import redis
        except ImportError as error:
            raise StateFailed("state in Redis needs the package: pip install 'servinggraph[redis]'") from error
        self._failures = redis.RedisError
        try:
            self._client = redis.Redis.from_url(url, socket_timeout=5, socket_connect_timeout=5)
        except ValueError:  # whose text may have a part of the password
            text = "redis://user:password@host:port/number is expected, with special characters of a password as %xx"
            raise StateFailed(f"'state' is not an address of a Redis: {text}") from None

    def load(self, key: str) -> dict[str, Any] | None:
        try:
            text = self._client.get(self._PREFIX + key)
        except self._failures as error:
            raise StateFailed(f"cannot read state '{key}' in Redis: {error}") from error
        return self._document(key, text)

    def save(self, key: str, document: Mapping[str, Any], upto: int | None = None) -> dict[str, Any] | None:
        place, text = self._PREFIX + key, orjson.dumps(dict(document))

        later: dict[str, Any] | None = None

        def swap(pipe: Any) -> None:
            nonlocal later
            found = self._document(key, pipe.get(place))
            later = found if _is_later(found, upto) else None
            if later is None:
                pipe.multi()
                pipe.set(place, text)

        try:
            # Again from the start where somebody else saves between the look and the save.
            self._client.transaction(swap, place)
        except self._failures as error:
            raise StateFailed(f"cannot write state '{key}' to Redis: {error}") from error
        return later

    @staticmethod
    def _document(key: str, text: Any) -> dict[str, Any] | None:
        try:
            found: dict[str, Any] | None = None if text is None else orjson.loads(text)
        except orjson.JSONDecodeError as error:
            raise StateFailed(f"state '{key}' in Redis is not JSON: {error}; delete it to begin anew") from error
        return found

    def add(self, key: str, worker: str, number: int, learned: Learned) -> Learned:
        # In a Redis cluster both keys are on one machine, by what stands in braces.
        keys = [f"{self._SUMS}{{{key}}}", f"{self._SUMS}{{{key}}}:{worker}"]
        arguments: list[Any] = [learned.era, number, self._REMEMBER_S]
        for name, numbers in learned.sums.items():
            arguments += (name, numbers.astype("<f8").tobytes())
        try:
            flat: Any = self._client.eval(_ADD, 2, *keys, *arguments)
        except self._failures as error:
            raise StateFailed(f"cannot add to state '{key}' in Redis: {error}") from error
        try:
            found = {name.decode(): data for name, data in zip(flat[::2], flat[1::2], strict=True)}
            era = int(found.pop("#era", learned.era))
            return Learned(era, {name: np.frombuffer(data, "<f8") for name, data in found.items()})
        except ValueError as error:
            raise StateFailed(f"the sums of state '{key}' in Redis are none: {error}; delete them to begin anew") from error

    def tell(self, key: str, messages: Sequence[bytes], seen: str) -> tuple[str, list[bytes]]:
        try:
            told: Any = self._client.eval(_TELL, 1, self._TOLD + key, seen or "0-0", *messages)
        except self._failures as error:
            raise StateFailed(f"cannot tell other workers of '{key}' through Redis: {error}") from error
        last = told[-1][0].decode() if told else seen
        return last, [fields[1] for _, fields in told]

    def close(self) -> None:
        self._client.close()


def revision_of(document: Any) -> int:
    """Return the revision of a document; -1 for what has none."""
    revision = document.get("revision") if isinstance(document, Mapping) else None
    return revision if isinstance(revision, int) else -1


def _is_later(found: Any, upto: int | None) -> bool:
    """Tell whether a document that is there may not be replaced."""
    return upto is not None and revision_of(found) > upto


def open_store(place: str, base: Path) -> StateStore:
    """Return the store that a `state` key names.

    Args:
        place: a path, or a `redis://`, `rediss://` or `unix://` address.
        base: folder that a relative path starts from.

    Raises:
        StateFailed: the address is none, or the client is not installed.
    """
    if place.startswith(("redis://", "rediss://", "unix://")):
        return RedisStore(place)
    return FileStore((base / place).resolve())
