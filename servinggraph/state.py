"""Where routers keep what has to survive a restart: a JSON file, or Redis.

A place is named by the `state` key of a router: a path, relative to the graph file, or a
`redis://` address. Both hold a mapping of key (graph, version and node) to plain values.
"""

from __future__ import annotations

import fcntl
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import orjson

__all__ = ["FileStore", "RedisStore", "StateFailed", "StateStore", "open_store"]


class StateFailed(Exception):
    """State could not be read or written; the text says where and why."""


class StateStore(ABC):
    """Keeps documents by key. Its methods block: call them in a thread."""

    @abstractmethod
    def load(self, key: str) -> dict[str, Any] | None:
        """Return what was saved last under a key; None when nothing was.

        Raises:
            StateFailed: it is there, but cannot be read.
        """

    @abstractmethod
    def save(self, key: str, document: Mapping[str, Any]) -> None:
        """Save a document, whole or not at all.

        Raises:
            StateFailed: it could not be written.
        """

    def close(self) -> None:
        """Let go of connections."""
        return


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

    def save(self, key: str, document: Mapping[str, Any]) -> None:
        beside = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        try:
            with self._locked():
                everything = self._read() | {key: dict(document)}
                # Written beside and moved into place: a crash leaves the old file or the new one.
                with beside.open("wb") as file:
                    file.write(orjson.dumps(everything, option=orjson.OPT_INDENT_2))
                    file.flush()
                    os.fsync(file.fileno())
                beside.replace(self._path)
        except OSError as error:
            raise StateFailed(f"cannot write state '{self._path}': {error.strerror or error}") from error

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

    _PREFIX = "servinggraph:state:"

    def __init__(self, url: str) -> None:
        try:
            import redis
        except ImportError as error:
            raise StateFailed("state in Redis needs the package: pip install 'servinggraph[redis]'") from error
        self._failures = redis.RedisError
        try:
            self._client = redis.Redis.from_url(url, socket_timeout=5, socket_connect_timeout=5)
        except ValueError as error:
            raise StateFailed(f"not an address of a Redis: {error}") from error

    def load(self, key: str) -> dict[str, Any] | None:
        try:
            text = self._client.get(self._PREFIX + key)
        except self._failures as error:
            raise StateFailed(f"cannot read state '{key}' in Redis: {error}") from error
        found: dict[str, Any] | None = None if text is None else orjson.loads(text)
        return found

    def save(self, key: str, document: Mapping[str, Any]) -> None:
        try:
            self._client.set(self._PREFIX + key, orjson.dumps(dict(document)))
        except self._failures as error:
            raise StateFailed(f"cannot write state '{key}' to Redis: {error}") from error

    def close(self) -> None:
        self._client.close()


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
