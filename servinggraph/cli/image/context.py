"""Writes the build context of a graph's image: its Dockerfile, and what goes in."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from servinggraph.cli.image.collect import Collected

__all__ = ["default_base", "write_context"]

_HEAD = """\
# Image of {names}, made by `servinggraph build`.
ARG BASE={base}
FROM ${{BASE}}
USER 0
"""
_REQUIREMENTS = """\
COPY requirements.txt /opt/graph/requirements.txt
RUN python3 -m venv /tmp/tools \\
 && /tmp/tools/bin/pip --python /opt/servinggraph/bin/python install --no-cache-dir -r /opt/graph/requirements.txt \\
 && /tmp/tools/bin/pip --python /opt/servinggraph/bin/python check \\
 && rm -rf /tmp/tools
"""
_TAIL = """\
COPY files/ {folder}/
{search}USER 10001:10001
WORKDIR {folder}
{check}
CMD ["serve", {path}, "--host", "0.0.0.0"]
LABEL org.opencontainers.image.title={title}
"""


def default_base() -> str:
    """Return the name of the image of this version of servinggraph."""
    from servinggraph.version import __version__

    return f"servinggraph:{__version__}"


def write_context(collected: Collected, folder: Path, base: str, overrides: Sequence[str] = ()) -> None:
    """Write the context to a folder, which is made.

    Args:
        collected: what goes in.
        folder: where; it must be empty or not there.
        base: image of servinggraph that the graph is put on.
        overrides: the `--set` texts for the check in the image.

    Raises:
        FileExistsError: the folder holds something.
        OSError: a file cannot be read or written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty: nothing was written")
    for file in collected.files:
        target = folder / "files" / file
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(collected.root / file, target)
    # Whoever runs the image reads them, whatever this user's umask is.
    for place in (folder / "files").rglob("*"):
        place.chmod(0o755 if place.is_dir() else 0o644)
    if collected.requirements:
        (folder / "requirements.txt").write_text("\n".join(collected.requirements) + "\n", encoding="utf-8")
    (folder / "Dockerfile").write_text(_dockerfile(collected, base, overrides), encoding="utf-8")


def _dockerfile(collected: Collected, base: str, overrides: Sequence[str]) -> str:
    title = "-".join(collected.names) or "graphs"
    place = PurePosixPath("/models") if collected.path == Path() else PurePosixPath("/models") / title[:100]
    served = str(place / PurePosixPath(collected.path.as_posix()))
    search = ":".join(str(place / PurePosixPath(found.as_posix())) for found in collected.search)
    check = "RUN " + json.dumps(["servinggraph", "check", served, *(word for text in overrides for word in ("--set", text))])
    if collected.variables:
        check = f"# Not checked in here: {', '.join(collected.variables)} come from the environment of the server."
    text = _HEAD.format(names=", ".join(collected.names), base=base)
    if collected.requirements:
        text += _REQUIREMENTS
    return text + _TAIL.format(
        folder=place,
        search=f"ENV PYTHONPATH={json.dumps(search)}\n" if search else "",
        check=check,
        path=json.dumps(served),
        title=json.dumps(title),
    )
