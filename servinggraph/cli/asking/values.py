"""Tensors from the command line: JSON, .npy and .npz files, pictures, and random ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final
from zipfile import BadZipFile

import click
import numpy as np
import orjson

from servinggraph.cli.asking.target import TensorMeta
from servinggraph.cli.params import texts_from
from servinggraph.errors import nearest
from servinggraph.tensors import DATATYPES, Array

__all__ = ["key_values", "random_tensors", "shown", "tensors_from"]

_PICTURES: Final = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")


def tensors_from(given: Sequence[str], wanted: Sequence[TensorMeta]) -> dict[str, Array]:
    """Return the tensors that `--input` options name.

    Args:
        given: NAME=VALUE, or VALUE alone for a model of one input; a value is JSON, or @FILE: .npy, .npz (the array
            of that name), .json, a picture, .txt for one text, or any other file for its bytes.
        wanted: the model's inputs.

    Raises:
        click.UsageError: no such input, a file or value that cannot be read, or one that does not fit.
    """
    by_name = {tensor.name: tensor for tensor in wanted}
    found: dict[str, Array] = {}
    for option in given:
        name, equals, value = option.partition("=")
        if (not equals or name not in by_name) and len(wanted) == 1 and option[:1] in '@[{"-0123456789tf':
            name, value = wanted[0].name, option
        elif not equals:
            raise click.UsageError(f"--input {option!r} names no tensor: expected NAME=VALUE with {', '.join(by_name)}")
        if name not in by_name:
            raise click.UsageError(f"the model has no input '{name}'{nearest(name, list(by_name))}")
        found[name] = _fitted(_read(value, by_name[name]), by_name[name], f"--input {name}")
    return found


def random_tensors(wanted: Sequence[TensorMeta], rows: int) -> dict[str, Array]:
    """Return tensors of a model's datatypes and shapes with random values; free axes have `rows` first, 1 elsewhere."""
    generator = np.random.default_rng(0)
    found: dict[str, Array] = {}
    for tensor in wanted:
        shape = tuple((rows if axis == 0 else 1) if size < 0 else size for axis, size in enumerate(tensor.shape))
        dtype = _dtype(tensor)
        if tensor.datatype == "BYTES":
            found[tensor.name] = np.full(shape, b"text", dtype=object)
        elif dtype.kind == "b":
            found[tensor.name] = generator.integers(0, 2, shape).astype(bool)
        elif dtype.kind in "iu":
            found[tensor.name] = generator.integers(0, 10, shape).astype(dtype)
        else:
            found[tensor.name] = generator.random(shape).astype(dtype)
    return found


def key_values(given: Sequence[str], option: str) -> dict[str, Any]:
    """Return KEY=VALUE options; a value that is JSON of a number or truth value is one.

    Raises:
        click.UsageError: there is no equals sign.
    """
    found: dict[str, Any] = {}
    for name, value in texts_from(given, option).items():
        try:
            parsed = orjson.loads(value)
        except orjson.JSONDecodeError:
            parsed = value
        found[name] = parsed if isinstance(parsed, bool | int | float | str) else value
    return found


def _read(value: str, tensor: TensorMeta) -> Any:
    if not value.startswith("@"):
        return _json(value.encode(), f"the value of '{tensor.name}'")
    file = Path(value[1:])
    suffix = file.suffix.lower()
    try:
        if suffix == ".npy":
            return np.load(file, allow_pickle=False)
        if suffix == ".npz":
            return _from_archive(file, tensor.name)
        if suffix == ".json":
            return _json(file.read_bytes(), str(file))
        if suffix in _PICTURES and tensor.datatype != "BYTES":
            return _picture(file, tensor)
        return np.array([file.read_bytes().rstrip(b"\n") if suffix == ".txt" else file.read_bytes()], dtype=object)
    except (OSError, ValueError, EOFError, BadZipFile) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise click.UsageError(f"cannot read {file}: {reason}") from error


def _from_archive(file: Path, name: str) -> Any:
    # NumPy leaves a file open that it cannot read.
    with file.open("rb") as opened, np.load(opened, allow_pickle=False) as archive:
        if name in archive:
            return archive[name]
        if len(archive.files) == 1:
            return archive[archive.files[0]]
        raise click.UsageError(f"{file} has no array '{name}': it has {', '.join(archive.files)}")


def _picture(file: Path, tensor: TensorMeta) -> Array:
    """Return a picture's pixels, grey where the tensor has no axis of colours, colours first where it has them there."""
    try:
        from PIL import Image
    except ImportError as error:
        raise click.UsageError(f"{error}: pictures need pip install 'servinggraph[tools]'") from error
    axes = tensor.shape[1:] if len(tensor.shape) in (3, 4) and tensor.shape[0] in (-1, 1) else tensor.shape
    with Image.open(file) as image:
        if len(axes) == 2:
            pixels = np.asarray(image.convert("L"))
        else:
            pixels = np.asarray(image.convert("RGB"))
            if axes and axes[0] == 3 and axes[-1] != 3:
                pixels = pixels.transpose(2, 0, 1)
    if len(axes) > 1 and all(size > 0 for size in axes) and pixels.shape != axes:
        raise click.UsageError(f"{file} has pixels {list(pixels.shape)}, input '{tensor.name}' takes {list(axes)}: resize it")
    return np.ascontiguousarray(pixels)


def _json(text: bytes, what: str) -> Any:
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError as error:
        hint = "; a text is written '[\"like this\"]', a file @like-this.npy"
        raise click.UsageError(f"{what} is no JSON: {error}{hint}") from error


def _dtype(tensor: TensorMeta) -> np.dtype[Any]:
    if tensor.datatype not in DATATYPES:
        raise click.UsageError(f"the model takes '{tensor.name}' as {tensor.datatype}, which is no datatype of V2")
    return DATATYPES[tensor.datatype]


def _fitted(value: Any, tensor: TensorMeta, where: str) -> Array:
    """Return a value as an array of the tensor's datatype, with the axis of rows where only that is missing."""
    array = _as_array(value, tensor, where)
    if array.ndim == len(tensor.shape) - 1 and tensor.shape[0] in (-1, 1):
        array = array[None]
    fits = array.ndim == len(tensor.shape) and all(
        size in (-1, axis) for size, axis in zip(tensor.shape, array.shape, strict=True)
    )
    if not fits:
        raise click.UsageError(f"{where}: has shape {list(array.shape)}, the model takes {list(tensor.shape)}")
    return array


def _as_array(value: Any, tensor: TensorMeta, where: str) -> Array:
    dtype = _dtype(tensor)
    try:
        if tensor.datatype == "BYTES":
            array = np.array(value, dtype=object)
            flat = [item.encode() if isinstance(item, str) else item for item in array.reshape(-1)]
            if not all(isinstance(item, bytes) for item in flat):
                raise click.UsageError(f"{where}: has values that are no texts, and the model takes BYTES")
            encoded = np.empty(len(flat), dtype=object)
            encoded[:] = flat
            return encoded.reshape(array.shape)
        array = np.asarray(value)
        if array.dtype.kind not in "biuf" and array.dtype != dtype:
            raise click.UsageError(f"{where}: is no array of numbers, and the model takes {tensor.datatype}")
        with np.errstate(all="ignore"):  # what does not fit is found out below
            converted = array.astype(dtype)
    except (ValueError, OverflowError) as error:
        raise click.UsageError(f"{where}: {error}") from error
    fits = (converted == array) if dtype.kind in "iub" else np.isinf(converted.astype("f8")) == np.isinf(array.astype("f8"))
    if not fits.all():
        raise click.UsageError(f"{where}: has values that {tensor.datatype} cannot hold")
    return converted


def shown(outputs: Mapping[str, Array]) -> dict[str, Any]:
    """Return tensors as plain values for JSON; bytes as text where they are."""
    found = {}
    for name, array in outputs.items():
        flat = [item.decode("utf-8", "replace") if isinstance(item, bytes) else item for item in array.reshape(-1).tolist()]
        values = np.empty(len(flat), dtype=object)
        values[:] = flat
        found[name] = values.reshape(array.shape).tolist()
    return found
