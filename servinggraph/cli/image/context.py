"""Writes the build context of a graph's image: its Dockerfile, and what goes in."""

from __future__ import annotations

import json
import shutil
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
 && rm -rf /tmp/tools
"""
_TAIL = """\
COPY files/ {folder}/
USER 10001:10001
WORKDIR {folder}
RUN ["servinggraph", "check", {path}]
CMD ["serve", {path}, "--host", "0.0.0.0"]
LABEL org.opencontainers.image.title={title}
"""


def default_base() -> str:
    """Return the name of the image of this version of servinggraph."""
    from servinggraph.version import __version__

    return f"servinggraph:{__version__}"


def write_context(collected: Collected, folder: Path, base: str) -> None:
    """Write the context to a folder, which is made.

    Args:
        collected: what goes in.
        folder: where; it must be empty or not there.
        base: image of servinggraph that the graph is put on.

    Raises:
        FileExistsError: the folder holds something.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty: nothing was written")
    for file in collected.files:
        target = folder / "files" / file
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(collected.root / file, target)
        target.chmod(0o644)
    if collected.requirements:
        (folder / "requirements.txt").write_text("\n".join(collected.requirements) + "\n", encoding="utf-8")
    (folder / "Dockerfile").write_text(_dockerfile(collected, base), encoding="utf-8")


def _dockerfile(collected: Collected, base: str) -> str:
    title = "-".join(collected.names) or "graphs"
    place = PurePosixPath("/models") if collected.path == Path() else PurePosixPath("/models") / title[:100]
    served = json.dumps(str(place / PurePosixPath(collected.path.as_posix())))
    text = _HEAD.format(names=", ".join(collected.names), base=base)
    if collected.requirements:
        text += _REQUIREMENTS
    return text + _TAIL.format(folder=place, path=served, title=json.dumps(title))
