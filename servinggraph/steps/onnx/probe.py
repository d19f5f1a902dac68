"""What is learnt of a model by running it before the first request: warm-up, speed, row independence."""

from __future__ import annotations

import asyncio
import logging
import mmap
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Final

import numpy as np

from servinggraph.concurrency import WorkerThreads
from servinggraph.context import Context
from servinggraph.tensors import DATATYPES, Array, TensorSpec, element_count

__all__ = ["has_recurrence", "rows_are_independent", "run_seconds", "sample", "thread_hop_seconds"]

logger = logging.getLogger("servinggraph.steps.onnx")

_LEAST_HOP_S: Final = 100e-6

Run = Callable[[dict[str, Array]], Mapping[str, Array]]


def sample(inputs: Mapping[str, TensorSpec], rows: int, shapes: Mapping[str, list[int]], free: int = 1) -> dict[str, Array]:
    """Return input tensors to try a model with.

    Args:
        inputs: the model's signature.
        rows: size of a free first axis.
        shapes: shapes that the user gave for single inputs; their first axis becomes `rows` if it is free.
        free: size of other free axes.
    """
    random = np.random.default_rng(0)
    result = {}
    for name, spec in inputs.items():
        shape = [free if size == -1 else size for size in spec.shape or ()]
        if name in shapes:
            shape = list(shapes[name])
        if spec.shape and spec.shape[0] == -1:
            shape[0] = rows
        dtype = DATATYPES[spec.datatype or "FP32"]
        if spec.datatype == "BYTES":
            letters = [chr(ord("a") + index % 26) for index in range(element_count(shape))]
            array = np.array(letters, dtype=np.object_).reshape(shape)
        elif dtype.kind == "f":
            array = random.random(shape).astype(dtype)
        else:
            array = random.integers(0, 2, shape).astype(dtype)  # 0 and 1: valid token ids and flags
        result[name] = array
    return result


def has_recurrence(path: Path) -> bool:
    """Tell whether a model file names an LSTM, GRU or RNN, as an operator or otherwise."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as model:
        return any(model.find(name) >= 0 for name in (b"LSTM", b"GRU", b"RNN"))


def run_seconds(run: Run, values: dict[str, Array]) -> float:
    """Return the median time of a run, after one that does not count. Few runs for a slow model."""
    run(values)
    times: list[float] = []
    while len(times) < 5 or (len(times) < 30 and sum(times) < 0.01):
        started = perf_counter()
        run(values)
        times.append(perf_counter() - started)
        if sum(times) > 0.25:
            break
    return median(times)


def rows_are_independent(run: Run, values: dict[str, Array], rows: int) -> str | None:
    """Say why the rows of a model influence each other; None when they do not.

    A free first axis need not be a batch: it may be the length of a sequence, and batching
    would then mix callers. So rows are run together and alone, and compared.
    """
    together = run(values)
    for name, array in together.items():
        if array.ndim == 0 or array.shape[0] != rows:
            return f"output '{name}' has shape {list(array.shape)} for {rows} rows"
    for row in range(rows):
        alone = run({name: array[row : row + 1] for name, array in values.items()})
        for name, array in alone.items():
            ours = together[name][row : row + 1]
            if ours.shape != array.shape or not _close(ours, array):
                return f"output '{name}' of a row depends on the other rows"
    return None


def _close(a: Array, b: Array) -> bool:
    if a.dtype.kind == "f":
        return bool(np.allclose(a, b, rtol=1e-3, atol=1e-5, equal_nan=True))
    return bool(np.array_equal(a, b))


@cache
def thread_hop_seconds() -> float:
    """Return what it costs a request to have its call made in a thread, measured once, in seconds.

    Through an event loop, as in a request. Measured alone both threads stay awake and nobody
    else wants the interpreter; in a server the same hop costs 100 us and more (the difference
    between `floor` and `floor-inline` at one connection, loadtests/), hence the lower bound.
    """

    async def measure() -> float:
        threads = WorkerThreads(1, "probe")
        threads.start()
        context = Context()
        times = []
        for _ in range(100):
            started = perf_counter()
            await threads.call(lambda value, context: value, None, context)
            times.append(perf_counter() - started)
        threads.stop()
        return max(median(times), _LEAST_HOP_S)

    with asyncio.Runner() as runner:
        return runner.run(measure())
