"""What a repository notes of each version: its state, why, and what has to be let go of with it."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from servinggraph.errors import ServingGraphError
from servinggraph.lifecycle.catalog import ServedGraph
from servinggraph.plan import Plan
from servinggraph.scopes import ModuleScope

__all__ = ["Built", "IndexEntry", "Record", "TemporaryFolder"]

VersionState = Literal["READY", "LOADING", "UNLOADING", "UNAVAILABLE"]


class IndexEntry(NamedTuple):
    """A line of the repository's index."""

    name: str
    version: str
    """Empty where nothing of the graph was loaded yet."""
    state: VersionState
    reason: str
    """Why it is not ready, or why what it serves is not the newest; empty when all is well."""


class TemporaryFolder:
    """Files of a load request; removed when the last version made of them has gone."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._users = 0

    def take(self) -> None:
        """Count a user."""
        self._users += 1

    def leave(self) -> None:
        """Let go; the last one removes the folder."""
        self._users -= 1
        if self._users <= 0:
            shutil.rmtree(self._folder, ignore_errors=True)


@dataclass(slots=True)
class Built:
    """A graph that has just been loaded.

    Attributes:
        graph: the graph, which nobody is served by yet.
        scope: its modules.
        size_bytes: memory that it takes, as far as that can be known; see `resident_bytes`.
    """

    graph: ServedGraph
    scope: ModuleScope
    size_bytes: int


@dataclass(eq=False)
class Record:
    """One version of one graph.

    Attributes:
        name: the graph's name.
        version: the version.
        compile: makes its plan anew.
        disk_state: what its files were like when it was loaded.
        file_bytes: size of its files.
        state: as in the index.
        reason: as in the index.
        graph: what the catalog has; None before the first load.
        built: what is in memory; None while it is not.
        folder: temporary files that it is made of.
        waiters: requests that wait until it is in memory again.
        waking: the load that they wait for.
        failure: why the last such load failed, and when.
        dropped: True once the policy picks others, or its files are gone: listed only until it is drained.
    """

    name: str
    version: str
    compile: Callable[[], Plan]
    disk_state: object = None
    file_bytes: int = 0
    state: VersionState = "LOADING"
    reason: str = ""
    graph: ServedGraph | None = None
    built: Built | None = None
    folder: TemporaryFolder | None = None
    waiters: list[asyncio.Future[ServedGraph]] = field(default_factory=list)
    waking: asyncio.Task[None] | None = None
    failure: tuple[float, ServingGraphError] | None = None
    dropped: bool = False

    @property
    def key(self) -> tuple[str, str]:
        """Name and version."""
        return self.name, self.version

    @property
    def entry(self) -> IndexEntry:
        """The line of the index."""
        return IndexEntry(self.name, self.version, self.state, self.reason)
