"""Builds an image with the engine that is there: docker, podman or buildah."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

__all__ = ["ENGINES", "NoEngine", "build_command", "find_engine"]

ENGINES = ("docker", "podman", "buildah")
ANSWER_S = 60.0
"""How long an engine may take to say that it is there."""


class NoEngine(Exception):
    """There is nothing here that builds images; the text says what there could be."""


def find_engine(wanted: str | None = None) -> str:
    """Return the first engine that is installed and answers.

    Args:
        wanted: one of `ENGINES`; None for whichever there is.

    Raises:
        NoEngine: none is, or not the one that is wanted.
    """
    silent: list[str] = []
    for name in (wanted,) if wanted else ENGINES:
        if shutil.which(name) is None:
            continue
        # A docker without its daemon, or something else of that name, is found out here and not by a failed build.
        with contextlib.suppress(subprocess.TimeoutExpired):
            if subprocess.run([name, "info"], capture_output=True, check=False, timeout=ANSWER_S).returncode == 0:  # noqa: S603  (one of ENGINES)
                return name
        silent.append(name)
    there = f"{', '.join(silent)} is installed but does not answer '{silent[0]} info'" if silent else "none is installed"
    raise NoEngine(
        f"an image is built by {wanted or ', '.join(ENGINES)}, and {there}. "
        "With --context-only FOLDER the build context is written for a builder of your own"
    )


def build_command(engine: str, context: Path, tag: str, more: Sequence[str] = ()) -> list[str]:
    """Return the command that builds a context.

    Args:
        engine: one of `ENGINES`.
        context: folder with a Dockerfile.
        tag: name of the image.
        more: further arguments of the engine, such as `--build-arg`.
    """
    command = [engine, "bud" if engine == "buildah" else "build"]
    if engine != "docker":
        command += ["--format", "docker"]  # the OCI format has no health checks
    return [*command, "-t", tag, *more, "-f", str(context / "Dockerfile"), str(context)]
