"""Declared outputs with the names of their classes, read from files when the graph is compiled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Final

from servinggraph.errors import Problem
from servinggraph.spec import Source
from servinggraph.spec.model import TensorModel
from servinggraph.spec.source import KeyPath
from servinggraph.tensors import Labels, TensorSpec

__all__ = ["declared_outputs"]

MOST_BYTES: Final = 16 * 2**20
"""A larger file is no file of labels."""


def declared_outputs(
    models: Mapping[str, TensorModel], source: Source, path: KeyPath, problems: list[Problem], node: str | None = None
) -> dict[str, TensorSpec]:
    """Return declared outputs as kernel values.

    Args:
        models: the outputs by name.
        source: where they came from: the folder of relative paths, lines for problems.
        path: key path of the outputs in the source.
        problems: what is wrong with a file of labels is appended here.
        node: the node that declares them; None for the graph.
    """
    specs: dict[str, TensorSpec] = {}
    for name, model in models.items():
        specs[name] = model.spec()
        if model.labels is None:
            continue
        try:
            specs[name] = replace(specs[name], labels=_read(model.labels, source.base))
        except _Unreadable as error:
            problems.append(source.problem(str(error), (*path, name, "labels"), node))
    return specs


class _Unreadable(Exception):
    """Says why there are no labels."""


def _read(file: str, base: Path) -> Labels:
    path = base / file  # an absolute path stays one
    try:
        size = path.stat().st_size
        if size > MOST_BYTES:
            raise _Unreadable(f"labels file '{file}' has {size} bytes, and at most {MOST_BYTES} are read")
        names = path.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        raise _Unreadable(f"labels file '{file}' does not exist (looked at {path})") from None
    except UnicodeDecodeError as error:
        raise _Unreadable(f"labels file '{file}' is not UTF-8: {error}") from error
    except OSError as error:
        raise _Unreadable(f"labels file '{file}' cannot be read: {error.strerror}") from error
    if not names:
        raise _Unreadable(f"labels file '{file}' is empty: expected the name of a class in each line")
    return Labels(file, tuple(names))
