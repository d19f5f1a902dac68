"""Fixtures of the image tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from images import Running


@pytest.fixture
def start() -> Iterator[Callable[..., Running]]:
    """Return what starts an image: its name, a command in place of its own, folders mounted read-only, another user."""
    running: list[Running] = []

    def begin(image: str, command: list[str] | None = None, mounts: dict[Path, str] | None = None, user: str = "") -> Running:
        running.append(Running(image, command, mounts or {}, user))
        return running[-1]

    yield begin
    for one in running:
        one.close()
