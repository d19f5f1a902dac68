"""What a load request may say: another definition, some of Triton's keys, files in place of those on disk."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from servinggraph.errors import GraphInvalid, InvalidRequest, Problem, RequestTooLarge, Unavailable
from servinggraph.lifecycle.layout import VersionPolicy, version_policy
from servinggraph.spec import Source
from servinggraph.spec.source import read_text

__all__ = ["LoadConfig", "parse_config", "write_files"]

_OWN_PLATFORMS: Final = ("onnxruntime", "onnxruntime_onnx", "servinggraph", "servinggraph_graph")
_HONOURED: Final = ("name", "backend", "platform", "max_batch_size", "dynamic_batching", "version_policy", "versions")
_FILE: Final = re.compile(r"file:(?P<version>[1-9][0-9]*)/(?P<path>.+)")
_PART: Final = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_. -]*")
_BATCHING: Final = {
    "preferred_batch_size": "preferred_rows",
    "priority_levels": "priorities",
    "default_priority_level": "default_priority",
}
_QUEUE: Final = {"max_queue_size": "max_queue"}


@dataclass(frozen=True, slots=True)
class LoadConfig:
    """The `config` of a load request, understood.

    Attributes:
        definition: text of a whole graph definition; None when only keys are overridden.
        policy: which versions to serve; None as the folder says.
        batch: keys of `batch` for the nodes that batch; None when nothing is said, False for no batching.
    """

    definition: str | None = None
    policy: VersionPolicy | None = None
    batch: Mapping[str, Any] | bool | None = field(default=None)

    def apply(self, source: Source) -> list[Problem]:
        """Write the batching keys into a definition; return what stands in the way."""
        if self.batch is None:
            return []
        document = source.document
        places = [place for place in (document, *_nodes(document)) if _batches(place)]
        if not places:
            if self.batch is False:
                return []
            return [source.problem("'max_batch_size' or 'dynamic_batching' was asked for: no node of this graph batches")]
        for place in places:
            if self.batch is False:
                # A node that says nothing may batch of itself, a graph does not.
                place.pop("batch", None) if place is document else place.update(batch=False)
            else:
                have = place.get("batch")
                place["batch"] = {**(have if isinstance(have, dict) else {}), **self.batch}  # type: ignore[dict-item]
        return []


def _nodes(place: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for key in ("nodes", "branches"):
        nodes = place.get(key)
        for node in nodes.values() if isinstance(nodes, dict) else ():
            if isinstance(node, dict):
                yield node
                yield from _nodes(node)


def _batches(place: Mapping[str, Any]) -> bool:
    batch = place.get("batch")
    return isinstance(batch, dict) or batch is True or (batch is None and place.get("step") == "onnx")


def parse_config(text: str, name: str) -> LoadConfig:
    """Return what the `config` of a load request means.

    Args:
        text: JSON or YAML: a graph definition (it has `nodes`), or keys as in Triton's model configuration.
        name: name of the graph.

    Raises:
        InvalidRequest: not such a text, or a key that has no meaning here.
    """
    try:
        document = read_text(text, "'config'", Path(), environment={}).expanded()
    except GraphInvalid as error:
        raise InvalidRequest(f"failed to load '{name}', the 'config' parameter cannot be read: {error}") from error
    try:
        if "nodes" in document:
            return LoadConfig(definition=text)
        return _from_keys(document, name)
    except ValueError as error:
        raise InvalidRequest(f"failed to load '{name}', the 'config' parameter: {error}") from error


def _from_keys(document: Mapping[str, Any], name: str) -> LoadConfig:
    for key in document:
        if key not in _HONOURED:
            raise ValueError(f"key '{key}' has no meaning here; expected a graph definition, or {', '.join(_HONOURED)}")
    if document.get("name", name) not in (name, ""):
        raise ValueError(f"'name' is '{document['name']}', and the request is for '{name}'")
    for key in ("backend", "platform"):
        value = document.get(key, "")
        if value not in ("", *_OWN_PLATFORMS):
            raise ValueError(f"{key} '{value}' is not here; expected one of: {', '.join(_OWN_PLATFORMS)}")
    return LoadConfig(policy=_policy(document), batch=_batch(document))


def _policy(document: Mapping[str, Any]) -> VersionPolicy | None:
    if "versions" in document:
        return version_policy(document["versions"])
    policy = document.get("version_policy")
    if policy is None:
        return None
    match policy:
        case {"latest": latest} if len(policy) == 1:
            count = latest.get("num_versions", 1) if isinstance(latest, dict) else latest
            return version_policy({"latest": _integer("version_policy.latest.num_versions", count)})
        case {"all": _} if len(policy) == 1:
            return "all"
        case {"specific": {"versions": [*versions]}} if len(policy) == 1:
            return version_policy([_integer("version_policy.specific.versions", version) for version in versions])
    raise ValueError(f"'version_policy' is one of latest.num_versions, all, specific.versions, got {policy!r}")


def _batch(document: Mapping[str, Any]) -> dict[str, Any] | bool | None:
    if "max_batch_size" not in document and "dynamic_batching" not in document:
        return None
    keys: dict[str, Any] = {}
    if "max_batch_size" in document:
        size = _integer("max_batch_size", document["max_batch_size"])
        if size == 0:
            return False
        keys["max_rows"] = size
    given = document.get("dynamic_batching") or {}
    if not isinstance(given, dict):
        raise ValueError(f"'dynamic_batching' is an object, got {given!r}")  # noqa: TRY004  (one error for all of it)
    for key, value in given.items():
        if key == "max_queue_delay_microseconds":
            keys["max_delay_ms"] = _integer(key, value) / 1e3
        elif key == "preferred_batch_size" and isinstance(value, list):
            keys[_BATCHING[key]] = [_integer(key, item) for item in value]
        elif key in _BATCHING:
            keys[_BATCHING[key]] = _integer(key, value)
        elif key == "default_queue_policy" and isinstance(value, dict):
            keys.update(_queue(value))
        else:
            raise ValueError(f"'dynamic_batching.{key}' has no meaning here")
    return keys


def _queue(policy: Mapping[str, Any]) -> dict[str, Any]:
    keys: dict[str, Any] = {}
    for key, value in policy.items():
        if key in _QUEUE:
            keys[_QUEUE[key]] = _integer(key, value)
        elif key == "default_timeout_microseconds":
            keys["queue_timeout_ms"] = _integer(key, value) / 1e3
        elif key == "timeout_action" and value in ("REJECT", "DELAY", 0, 1):
            keys["on_timeout"] = "reject" if value in ("REJECT", 0) else "continue"
        else:
            raise ValueError(f"'dynamic_batching.default_queue_policy.{key}' has no meaning here")
    return keys


def _integer(key: str, value: Any) -> int:
    """Return a number that clients also send as text."""
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 19:
        return int(value)
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    raise ValueError(f"'{key}' is a number of 0 or more, got {value!r}")


def write_files(files: Mapping[str, bytes], name: str, limit: int) -> Path:
    """Write the files of a load request into a folder `.../name` of their own, made for them.

    Args:
        files: parameter name, `file:<version>/<path>`, to content.
        name: name of the graph.
        limit: most bytes together.

    Returns:
        The graph's folder. The one above it is temporary, and the caller removes it.

    Raises:
        InvalidRequest: a parameter is no such name, or leads out of the folder.
        RequestTooLarge: they are larger than the limit.
        Unavailable: this machine has no folder for them.
    """
    paths: dict[Path, bytes] = {}
    for parameter, content in files.items():
        match = _FILE.fullmatch(parameter)
        if match is None:
            raise InvalidRequest(f"failed to load '{name}', '{parameter}' is no file: expected 'file:<version>/<name>'")
        parts = match["path"].split("/")
        if not all(_PART.fullmatch(part) for part in parts):
            raise InvalidRequest(f"failed to load '{name}', '{parameter}' must not contain path traversal characters")
        paths[Path(match["version"], *parts)] = content
    if sum(map(len, paths.values())) > limit:
        raise RequestTooLarge(f"failed to load '{name}', its files exceed {limit} bytes (limit 'max_body_bytes')")
    try:
        folder = Path(tempfile.mkdtemp(prefix="servinggraph-load-"))
    except OSError as error:
        raise Unavailable(
            f"failed to load '{name}', the server has no folder for its files ({error.strerror}): on a read-only root it needs "
            "one at /tmp, or where TMPDIR says"
        ) from error
    try:
        for path, content in paths.items():
            target = folder / name / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise InvalidRequest(f"failed to load '{name}', its files cannot be written: {error.strerror}") from error
    return folder / name
