"""A repository on disk, for tests of what becomes of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from servinggraph import Context
from servinggraph.lifecycle import RepositorySettings, Serving, infer
from servinggraph.messages import InferenceRequest

HEAD = "inputs: {x: {datatype: FP32, shape: [-1]}}\nnodes:\n  n: {step: python, call: 'steps:work'}\nanswer: n\n"


class Folder:
    """Writes graphs whose answer is a number that their `steps.py` holds."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, place: str, answer: float | str, head: str = "") -> Path:
        """Write a graph to `name` or `name/1`; a text as answer is the whole of `steps.py`."""
        folder = self.path / place
        folder.mkdir(parents=True, exist_ok=True)
        code = answer if isinstance(answer, str) else f"def work(value):\n    return {{'y': value['x'] * 0 + {answer}}}\n"
        (folder / "steps.py").write_text(code)
        (folder / "graph.yaml").write_text(head + HEAD)
        return folder


class Running:
    """A repository with its catalog."""

    def __init__(self, serving: Serving) -> None:
        self.serving = serving
        self.repository, self.catalog = serving.repository, serving.catalog

    async def ask(self, name: str, version: str = "", context: Context | None = None) -> tuple[str, float]:
        """Return the version that answered and its number."""
        request = InferenceRequest(inputs={"x": np.zeros(1, np.float32)})
        answer = await infer(self.catalog.get(name, version), request, context or Context())
        return answer.version, float(answer.outputs["y"][0])

    async def states(self) -> dict[str, str]:
        """Return the index: name/version to state."""
        return {f"{line.name}/{line.version}": line.state for line in await self.repository.index()}


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path / "repository")


@pytest.fixture
def opened(folder: Folder) -> Callable[..., Any]:
    """Return what opens the folder as a repository, started."""

    @asynccontextmanager
    async def start(mode: str = "explicit", **settings: Any) -> Any:
        folder.path.mkdir(exist_ok=True)
        serving = Serving(None, RepositorySettings(folder=folder.path, mode=mode, **settings))
        try:
            await serving.repository.start()
            yield Running(serving)
        finally:
            await serving.repository.stop()
            left = asyncio.all_tasks() - {asyncio.current_task()}
            assert not left, left

    return start
