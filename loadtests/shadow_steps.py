"""Challengers for shadow.py: each gives what the champion gives, or goes wrong in its own way."""

from __future__ import annotations

import asyncio
import time

import numpy as np

SLOW_S = 0.005
"""About a hundred times what the champion takes."""


def _answer(value):
    rows = len(value["pixels"])
    return {"label": np.zeros(rows, np.int64), "probabilities": np.full((rows, 10), 0.1, np.float32)}


async def hangs(value):
    await asyncio.Event().wait()


def crashes(value):
    raise MemoryError("out of memory")


async def leaks(value):
    """Raise what nobody expects: a cancellation of its own, an exit, an exception that is no Exception."""
    await asyncio.sleep(0)
    raise (asyncio.CancelledError(), SystemExit(1), GeneratorExit())[time.perf_counter_ns() % 3]


async def slow(value):
    await asyncio.sleep(SLOW_S)
    return _answer(value)


def slow_native(value):
    """Compute without the interpreter's lock, as models do."""
    big = np.ones((400, 400), np.float32)
    end = time.perf_counter() + SLOW_S
    while time.perf_counter() < end:
        big @ big
    return _answer(value)


def slow_python(value):
    """Compute with the interpreter's lock."""
    end = time.perf_counter() + SLOW_S
    while time.perf_counter() < end:
        pass
    return _answer(value)
