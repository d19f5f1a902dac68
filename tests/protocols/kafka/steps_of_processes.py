"""Steps of graphs that tests serve in processes of their own."""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path
from typing import Any


def double(value: Any) -> Any:
    return {"y": value["x"] * 2}


async def freeze(value: Any) -> Any:
    """Say that it runs, and go on once the test has stopped the process, and says so."""
    print("asleep", file=sys.stderr, flush=True)
    while not Path("awake").exists():
        await asyncio.sleep(0.01)
    return double(value)


async def linger(value: Any) -> Any:
    await asyncio.sleep(0.02)
    return double(value)


class SlowToLoad:
    def load(self) -> None:
        time.sleep(1)
        print("loaded", file=sys.stderr, flush=True)

    async def __call__(self, value: Any) -> Any:
        print("asked", file=sys.stderr, flush=True)
        await asyncio.sleep(0.3)
        return double(value)
