"""The model repository: which graphs a folder holds, and loading, replacing and unloading them while others are served.

A load builds the new versions beside the old ones and swaps them in one step. If nothing of
the graph was served before, those that load are served; otherwise one that fails leaves all
as it was. Loads and unloads of one graph go one after the other, of several side by side.
"""

from __future__ import annotations

import asyncio
import logging
import weakref
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal

from servinggraph.errors import GraphInvalid, InvalidRequest, LimitExceeded, LoadFailed, Problem, ServingGraphError, Unavailable
from servinggraph.lifecycle.budget import Budget
from servinggraph.lifecycle.catalog import Catalog, ServedGraph
from servinggraph.lifecycle.layout import Entry, Found, Layout, chosen
from servinggraph.lifecycle.overrides import LoadConfig, parse_config, write_files
from servinggraph.lifecycle.reading import no_graph, read_version
from servinggraph.lifecycle.records import Built, IndexEntry, Record, TemporaryFolder
from servinggraph.lifecycle.residence import Residence

__all__ = ["Repository", "RepositorySettings"]

logger = logging.getLogger("servinggraph.repository")

MAX_PENDING: Final = 64
"""Most loads and unloads that are under way or wait; one more is refused."""


@dataclass(frozen=True, slots=True)
class RepositorySettings:
    """How a repository is kept.

    Attributes:
        folder: its folder; None where what is served came from elsewhere.
        mode: "none" loads all at start, "poll" follows the folder, "explicit" does what it is asked.
        poll_s: seconds between two looks at the folder.
        load: in mode "explicit", what to load at start; "*" for all.
        overrides: `--set` texts, for every graph file.
        max_loaded: most versions in memory; 0 for no limit.
        memory_budget: most bytes in memory; 0 for no limit.
        max_file_bytes: most bytes of files in a load request.
    """

    folder: Path | None = None
    mode: Literal["none", "poll", "explicit"] = "none"
    poll_s: float = 15
    load: Sequence[str] = ()
    overrides: Sequence[str] = ()
    max_loaded: int = 0
    memory_budget: int = 0
    max_file_bytes: int = 64 * 2**20


class Repository:
    """Keeps what a catalog serves in step with a folder, or with what is asked for."""

    def __init__(self, catalog: Catalog, settings: RepositorySettings | None = None) -> None:
        self.settings = settings = settings or RepositorySettings()
        self._catalog = catalog
        self._residence = Residence(catalog, Budget(settings.max_loaded, settings.memory_budget))
        self._layout = None if settings.folder is None else Layout(settings.folder, settings.overrides)
        self._known: dict[str, Entry] = {}
        self._records: dict[str, dict[str, Record]] = {}
        self._locks: weakref.WeakValueDictionary[str, asyncio.Lock] = weakref.WeakValueDictionary()
        self._pending = 0
        self._done: dict[str, Any] = {}
        self._seen: dict[str, Any] = {}
        self._scanning = asyncio.Lock()
        self._polling: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Load what the mode says.

        Raises:
            GraphInvalid: in mode "none", with the problems of all graphs; in every mode, no such folder.
            ServingGraphError: in mode "none", a graph failed to load.
        """
        if self._layout is None:
            return
        settings = self.settings
        self._catalog.may_be_empty = settings.mode != "none"
        entries = await self._scan()
        if settings.mode == "none":
            if not entries:
                raise no_graph(self._layout.folder)
            await self._load_all(entries)
            return
        names = list(entries)
        if settings.mode == "explicit" and "*" not in settings.load:
            names = list(settings.load)
        self._done = {name: entry.state for name, entry in entries.items()}
        results = await asyncio.gather(*(self._change(name, self._load(name)) for name in names), return_exceptions=True)
        for error in results:
            if isinstance(error, BaseException):
                logger.error("%s", error)
        if settings.mode == "poll":
            self._polling = asyncio.create_task(self._poll_for_ever(), name="repository poll")

    async def stop(self) -> None:
        """End loads, and unload everything."""
        if self._polling is not None:
            self._polling.cancel()
            await asyncio.wait([self._polling])
        everything = [record for versions in self._records.values() for record in versions.values()]
        # What is not in memory has been stopped already.
        away = [record.graph for record in everything if record.built is None and record.graph is not None]
        self._catalog.swap([], [graph for graph in away if graph.ready])
        await self._residence.settled(cancel=True)
        await self._catalog.stop()
        for record in everything:
            if record.built is not None:
                record.built.scope.drop()
                record.built = None
                if record.folder is not None:
                    record.folder.leave()

    # --- what others ask for

    async def index(self, *, ready: bool = False) -> list[IndexEntry]:
        """Return every version with its state, and the graphs of which nothing was loaded yet.

        Args:
            ready: only versions that are ready.
        """
        if self._layout is not None and self.settings.mode != "none":
            await self._scan()
        lines = [
            record.entry
            for versions in self._records.values()
            for record in versions.values()
            if not record.dropped or record.state == "UNLOADING"
        ]
        lines += [
            IndexEntry(graph.plan.name, graph.plan.version, "READY", "")
            for graph in self._catalog.graphs()
            if graph.plan.name not in self._records and graph.ready
        ]
        have = {line.name for line in lines}
        lines += [IndexEntry(name, "", "UNAVAILABLE", "not loaded") for name in self._known if name not in have]
        lines.sort(key=lambda line: (line.name, int(line.version or 0)))
        return [line for line in lines if line.state == "READY"] if ready else lines

    async def load(self, name: str, parameters: Mapping[str, str | bytes] | None = None) -> None:
        """Load a graph, or load it anew, and return when it is served.

        Args:
            name: the graph.
            parameters: `config`, a text that overrides the definition, and `file:<version>/<path>`,
                contents of files that stand in for the graph's folder.

        Raises:
            Unavailable: the mode is not "explicit".
            InvalidRequest: a parameter is not such.
            LoadFailed: with the reasons; what was served before is served on.
        """
        self._only_when_explicit(name)
        config, files = _parameters(name, parameters or {})
        await self._change(name, self._load(name, config, files))

    async def unload(self, name: str) -> None:
        """Take no more requests for a graph, and return; what is in flight is answered.

        A graph that is not there, or not loaded, is none to complain of.

        Raises:
            Unavailable: the mode is not "explicit".
        """
        self._only_when_explicit(name)
        await self._change(name, self._unload(name))

    def _only_when_explicit(self, name: str) -> None:
        if self.settings.mode != "explicit":
            error = Unavailable(
                "explicit model load / unload is not allowed if polling is enabled "
                f"(this server runs with --model-control {self.settings.mode}; explicit allows it)"
            )
            error.retryable = False
            raise error
        if not name or "/" in name or "\\" in name or name.startswith("."):
            raise InvalidRequest(f"model name '{name}' must not contain path traversal characters")

    async def _change(self, name: str, work: Coroutine[Any, Any, None]) -> None:
        """Do what changes a graph, after what else does; a caller that leaves does not end it."""
        if self._pending >= MAX_PENDING:
            work.close()
            raise LimitExceeded(f"{self._pending} loads and unloads are under way (limit MAX_PENDING = {MAX_PENDING})")
        self._pending += 1

        async def alone() -> None:
            # Kept as long as somebody holds it or waits for it.
            lock = self._locks.setdefault(name, asyncio.Lock())
            try:
                async with lock:
                    await work
            finally:
                work.close()
                self._pending -= 1

        await asyncio.shield(self._residence.spawn(alone()))

    # --- loading

    async def _scan(self) -> dict[str, Entry]:
        assert self._layout is not None
        async with self._scanning:
            self._known = await asyncio.to_thread(self._layout.scan)
        self._catalog.known = frozenset(self._known)
        return self._known

    async def _load_all(self, entries: Mapping[str, Entry]) -> None:
        """Load everything, or nothing."""
        problems = [problem for entry in entries.values() for problem in entry.problems]
        records = [self._record(entry, found) for entry in entries.values() for found in chosen(entry)]
        async with self._residence.loading():
            results = await self._residence.build(records)
            failures = [result for result in results if isinstance(result, BaseException)]
            for failure in failures:
                problems += failure.problems if isinstance(failure, GraphInvalid) else ()
            built = [(record, new) for record, new in zip(records, results, strict=True) if isinstance(new, Built)]
            if problems or failures:
                await self._discard(built)
                raise GraphInvalid(list(dict.fromkeys(problems))) if problems else failures[0]
            for record in records:
                self._records.setdefault(record.name, {})[record.version] = record
            self._catalog.policies.update({entry.name: entry.policy for entry in entries.values()})
            self._residence.install(built, [])
            await self._residence.trim()

    async def _load(
        self, name: str, config: LoadConfig | None = None, files: Mapping[str, bytes] | None = None, *, changed: bool = False
    ) -> None:
        """Load a graph; see `load`. With `changed`, leave versions alone whose files are as they were."""
        folder: TemporaryFolder | None = None
        if files:
            path = await asyncio.to_thread(write_files, files, name, self.settings.max_file_bytes)
            folder = TemporaryFolder(path.parent)
            folder.take()
        try:
            entry = await self._entry(name, None if folder is None else path)
            if config is not None and config.policy is not None:
                entry = replace(entry, policy=config.policy)
            self._done[name] = entry.state
            have = {record.version: record for record in self._records.get(name, {}).values()}
            new = [
                self._record(entry, found, config, folder)
                for found in chosen(entry)
                if not changed or found.version not in have or have[found.version].disk_state != found.state
            ]
            await self._replace(entry, have, new)
        finally:
            if folder is not None:
                folder.leave()

    async def _entry(self, name: str, path: Path | None) -> Entry:
        if path is not None:
            assert self._layout is not None
            entry = await asyncio.to_thread(self._layout.folder_entry, path)
        else:
            entry = (await self._scan()).get(name)
        if entry is None:
            if path is not None:
                raise InvalidRequest(f"failed to load '{name}', among its files is neither a graph.yaml nor a model.onnx")
            raise LoadFailed(f"failed to load '{name}', failed to poll from model repository")
        return entry

    def _record(
        self, entry: Entry, found: Found, config: LoadConfig | None = None, folder: TemporaryFolder | None = None
    ) -> Record:
        read = partial(read_version, entry, found, self.settings.overrides, config)
        size = sum(size for _, size, _ in found.state)
        return Record(entry.name, found.version, read, found.state, size, folder=folder)

    async def _replace(self, entry: Entry, have: Mapping[str, Record], new: Sequence[Record]) -> None:
        """Build versions and serve them in place of what there was."""
        name = entry.name
        serving = {version: record for version, record in have.items() if _serves(record)}
        wanted = {found.version for found in chosen(entry)}
        if not wanted and not entry.problems:
            self._failed(have, "", f"no version is available: the policy {entry.policy!r} picks none", name)
        if entry.problems:
            self._failed(have, "", self._clear("\n".join(map(str, entry.problems)), entry), name)
        shown = self._records.setdefault(name, {})
        shown.pop("", None)
        shown.update({record.version: record for record in new if record.version not in serving})
        async with self._residence.loading():
            results = await self._residence.build(new)
            built = [(record, made) for record, made in zip(new, results, strict=True) if isinstance(made, Built)]
            reasons = {
                record.version: self._clear(_reason(failure), entry)
                for record, failure in zip(new, results, strict=True)
                if isinstance(failure, BaseException)
            }
            for record in new:
                if record.version in reasons:
                    record.state, record.reason = "UNAVAILABLE", reasons[record.version]
            if reasons and serving:
                await self._discard(built)
                self._left_as_it_was(name, serving, reasons)
            replaced = [record for version, record in serving.items() if version not in wanted]
            replaced += [serving[record.version] for record in new if record.version in serving]
            for record, _ in built:
                shown[record.version] = record
                if record.folder is not None:
                    record.folder.take()
            self._catalog.policies[name] = entry.policy
            self._residence.install(built, replaced)
            for record in [record for version, record in shown.items() if version not in wanted]:
                record.dropped = True
                if record.graph is None:
                    del shown[record.version]
            logger.info("graph '%s': versions %s loaded", name, ", ".join(record.version for record, _ in built) or "none")
            await self._residence.trim()
        if reasons:
            text = "; ".join(f"version {version}: {reason}" for version, reason in reasons.items())
            raise LoadFailed(f"failed to load '{name}', {'' if built else 'no version is available: '}{text}")

    def _left_as_it_was(self, name: str, serving: Mapping[str, Record], reasons: Mapping[str, str]) -> None:
        """Note a failed load where something serves on, and raise it."""
        text = "; ".join(f"version {version}: {reason}" for version, reason in reasons.items())
        for version, record in serving.items():
            if version in reasons or not any(version in serving for version in reasons):
                record.reason = f"the last load failed, and what was loaded before serves on: {text}"
        logger.error("graph '%s' was not replaced: %s", name, text)
        raise LoadFailed(f"failed to load '{name}', what was loaded before serves on: {text}")

    def _failed(self, have: Mapping[str, Record], version: str, reason: str, name: str) -> None:
        """Note and raise why a graph as a whole cannot be loaded."""
        serving = {number: record for number, record in have.items() if _serves(record)}
        if serving:
            self._left_as_it_was(name, serving, dict.fromkeys(serving, reason))
        record = Record(name, version, _nothing, state="UNAVAILABLE", reason=reason)
        self._records[name] = {version: record}
        raise LoadFailed(f"failed to load '{name}', {reason}")

    async def _discard(self, built: Sequence[tuple[Record, Built]]) -> None:
        await asyncio.gather(*(self._residence.discard(new) for _, new in built))

    async def _unload(self, name: str) -> None:
        records = self._records.get(name, {})
        self._residence.install([], [record for record in records.values() if _serves(record)])
        if name not in self._known:
            self._records.pop(name, None)
        elif records:
            logger.info("graph '%s': unloaded", name)

    def _clear(self, text: str, entry: Entry) -> str:
        """Return a text without the way to the repository, which is nobody's business."""
        folders = [self.settings.folder, *(found.file.parents[2] for found in entry.versions[:1] if found.numbered)]
        for folder in folders:
            if folder is not None:
                text = text.replace(f"{folder.resolve()}/", "").replace(f"{folder}/", "")
        return text

    # --- following the folder

    async def _poll_for_ever(self) -> None:
        while True:
            await asyncio.sleep(self.settings.poll_s)
            try:
                await self.poll()
            except Exception as error:
                logger.error("the repository cannot be read: %s", error)

    async def poll(self) -> None:
        """Look at the folder once, and load and unload what has changed.

        A change counts when two looks in a row have seen the same: until then somebody may
        still be writing.
        """
        entries = await self._scan()
        seen = {name: entry.state for name, entry in entries.items()}
        changed = [name for name in {**self._done, **seen} if seen.get(name) != self._done.get(name)]
        settled = [name for name in changed if name in self._seen and self._seen[name] == seen.get(name)]
        self._seen = {name: seen.get(name) for name in changed}
        works: list[tuple[str, Callable[[], Coroutine[Any, Any, None]]]] = []
        for name in settled:
            if name in entries:
                self._done[name] = seen[name]
                works.append((name, partial(self._load, name, changed=True)))
            else:
                del self._done[name]
                works.append((name, partial(self._unload, name)))
        results = await asyncio.gather(*(self._change(name, work()) for name, work in works), return_exceptions=True)
        for error in results:
            if isinstance(error, BaseException):
                logger.error("%s", error)


def _serves(record: Record) -> bool:
    graph: ServedGraph | None = record.graph
    return graph is not None and graph.ready


def _reason(error: BaseException) -> str:
    return str(error) if isinstance(error, ServingGraphError) else f"{type(error).__name__}: {error}"


def _nothing() -> Any:
    raise GraphInvalid([Problem("there is nothing to load")])


def _parameters(name: str, parameters: Mapping[str, str | bytes]) -> tuple[LoadConfig | None, dict[str, bytes]]:
    """Return what a load request's parameters mean.

    Raises:
        InvalidRequest: one is not known, or not of its type.
    """
    config: LoadConfig | None = None
    files: dict[str, bytes] = {}
    for key, value in parameters.items():
        if key == "config" and isinstance(value, str):
            config = parse_config(value, name)
        elif key.startswith("file:") and isinstance(value, bytes):
            files[key] = value
        elif key == "config" or key.startswith("file:"):
            raise InvalidRequest(f"load parameter '{key}' is {'text' if key == 'config' else 'bytes'}, got another type")
        else:
            raise InvalidRequest(f"unrecognized load parameter '{key}'; expected config or file:<version>/<name>")
    if files and config is None:
        raise InvalidRequest(f"failed to load '{name}', override files need the 'config' parameter with them")
    return config, files
