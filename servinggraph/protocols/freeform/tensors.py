"""Makes the declared tensors of a graph out of a free-form body.

A JSON object or msgpack map names the tensors; what MLflow and TensorFlow Serving send, a
table, and the bare tensor of a graph with only one, are understood as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from servinggraph.errors import InvalidRequest, UnsupportedType
from servinggraph.protocols.freeform.body import decode_body, decode_text, has_header
from servinggraph.protocols.freeform.media import CSV, JSON, MSGPACK, Media, kind_of
from servinggraph.protocols.freeform.table import Table, cells_of, decode_table
from servinggraph.protocols.v2.checks import check_array, check_input, check_names
from servinggraph.protocols.v2.json_data import decode_data, shown
from servinggraph.tensors import Array, TensorSpec

__all__ = ["decode_tensors"]

Declared = Mapping[str, TensorSpec]

_WRAPPERS: Final = ("inputs", "instances", "dataframe_split", "dataframe_records")


def decode_tensors(data: bytes, media: Media, declared: Declared, model: str) -> dict[str, Array]:
    """Return the tensors in a body.

    Args:
        data: the body, without content coding.
        media: its type.
        declared: the graph's inputs.
        model: the graph's name, for error texts.

    Raises:
        InvalidRequest: not what its type says, or not the declared tensors.
        UnsupportedType: a type that holds no tensors.
        RequestTooLarge: it holds more than its bounds.
    """
    kind = kind_of(media.name)
    if kind == "csv":
        table = decode_table(decode_text(data, media), header=has_header(media))
        return _from_table(table, declared, model)
    if kind not in ("json", "msgpack"):
        raise UnsupportedType(
            f"graph '{model}' takes tensors, and {media.name} holds none: "
            f"send {JSON}, {MSGPACK[0]} or {CSV}, and say so in Content-Type"
        )
    return _from_value(decode_body(data, media), declared, model)


def _from_value(value: Any, declared: Declared, model: str) -> dict[str, Array]:
    if type(value) is dict and len(value) == 1 and not value.keys() & declared.keys():
        ((wrapper, inner),) = value.items()
        if wrapper == "inputs":
            return _from_value(inner, declared, model) if type(inner) is dict else _only(inner, declared, model)
        if wrapper in ("instances", "dataframe_records"):
            return _from_rows(wrapper, inner, declared, model)
        if wrapper == "dataframe_split":
            return _from_split(inner, declared, model)
    if type(value) is not dict:
        return _only(value, declared, model)
    check_names(value, declared, model)
    return {name: _tensor(name, item, declared[name], model) for name, item in value.items()}


def _only(value: Any, declared: Declared, model: str) -> dict[str, Array]:
    """Return the only tensor of a graph, from a body that does not name it."""
    if len(declared) != 1 or not isinstance(value, list | np.ndarray):
        names = ", ".join(map(repr, declared)) or "nothing"
        raise InvalidRequest(
            f"graph '{model}' takes an object of tensor name to nested list, with {names}; "
            f"got {'an array' if isinstance(value, np.ndarray) else shown(value)}"
        )
    ((name, spec),) = declared.items()
    return {name: _tensor(name, value, spec, model)}


def _tensor(name: str, value: Any, spec: TensorSpec, model: str) -> Array:
    if isinstance(value, np.ndarray):
        check_array(name, value, spec, model)
        return value
    datatype = spec.datatype or "FP64"
    shape = _shape(value, spec)
    check_input(name, datatype, shape, spec, model)
    return decode_data(name, datatype, shape, value if type(value) is list else [value])


def _shape(value: Any, spec: TensorSpec) -> tuple[int, ...]:
    """Return the shape that nested lists have, read off their first elements; `decode_data` finds the ragged ones."""
    sizes: list[int] = []
    while type(value) is list:
        sizes.append(len(value))
        if not value:
            # Nothing tells the sizes below an empty list but the declaration.
            rest = spec.shape[len(sizes) :] if spec.shape is not None else ()
            return (*sizes, *(max(size, 0) for size in rest))
        value = value[0]
    return tuple(sizes)


def _from_rows(wrapper: str, rows: Any, declared: Declared, model: str) -> dict[str, Array]:
    """Return the tensors of a list with one entry for each row: objects, or the rows of the only tensor."""
    if type(rows) is not list:
        raise InvalidRequest(f"'{wrapper}' is a list with an entry for each row, got {shown(rows)}")
    if not rows or type(rows[0]) is not dict:
        return _only(rows, declared, model)
    names = rows[0].keys()
    check_names(rows[0], declared, model)
    for index, row in enumerate(rows):
        if type(row) is not dict or row.keys() != names:
            raise InvalidRequest(f"entry {index} of '{wrapper}' has other keys than entry 0: {', '.join(names)}")
    return {name: _column(name, [row[name] for row in rows], declared[name], model) for name in names}


def _from_split(frame: Any, declared: Declared, model: str) -> dict[str, Array]:
    """Return the tensors of a pandas DataFrame as `to_dict(orient="split")` writes it."""
    columns, rows = (frame.get("columns"), frame.get("data")) if type(frame) is dict else (None, None)
    if type(columns) is not list or type(rows) is not list or not all(type(name) is str for name in columns):
        raise InvalidRequest("'dataframe_split' is an object with 'columns', a list of names, and 'data', a list of rows")
    for index, row in enumerate(rows):
        if type(row) is not list or len(row) != len(columns):
            raise InvalidRequest(f"row {index} of 'dataframe_split' is no list of {len(columns)} values")
    if len(set(columns)) != len(columns):
        raise InvalidRequest("two columns of 'dataframe_split' have the same name")
    matrix = _matrix(declared)
    if matrix is not None and matrix not in columns:
        spec = declared[matrix]
        check_input(matrix, spec.datatype or "FP64", (len(rows), len(columns)), spec, model)
        return {matrix: decode_data(matrix, spec.datatype or "FP64", (len(rows), len(columns)), rows)}
    check_names(dict.fromkeys(columns), declared, model)
    return {name: _column(name, [row[index] for row in rows], declared[name], model) for index, name in enumerate(columns)}


def _column(name: str, values: list[Any], spec: TensorSpec, model: str) -> Array:
    """Return the tensor of a column: values as rows; single values fill tensors of one column as well."""
    if _is_column(spec) and not any(isinstance(value, list | dict | np.ndarray) for value in values):
        shape = (len(values), 1)
        check_input(name, spec.datatype or "FP64", shape, spec, model)
        return decode_data(name, spec.datatype or "FP64", shape, values)
    if any(isinstance(value, np.ndarray) for value in values):
        raise InvalidRequest(f"input '{name}' has an array in each row: send the whole tensor as one array")
    return _tensor(name, values, spec, model)


def _from_table(table: Table, declared: Declared, model: str) -> dict[str, Array]:
    """Return the tensors of a table: one of each column, or a two-dimensional one of them all."""
    count = len(table.rows)
    matrix = _matrix(declared)
    if matrix is not None and (table.names is None or matrix not in table.names):
        spec = declared[matrix]
        shape = (count, table.width)
        check_input(matrix, spec.datatype or "FP64", shape, spec, model)
        cells = [cell for row in table.rows for cell in row]
        return {matrix: decode_data(matrix, spec.datatype or "FP64", shape, cells_of(matrix, spec.datatype or "FP64", cells))}
    names = table.names if table.names is not None else tuple(declared)
    if len(names) != table.width:
        raise InvalidRequest(f"the table has {table.width} columns, but graph '{model}' takes {len(names)} tensors")
    check_names(dict.fromkeys(names), declared, model)
    tensors: dict[str, Array] = {}
    for index, name in enumerate(names):
        spec = declared[name]
        values = cells_of(name, spec.datatype or "FP64", [row[index] for row in table.rows])
        tensors[name] = _column(name, values, spec, model)
    return tensors


def _matrix(declared: Declared) -> str | None:
    """Return the name of a graph's only input, if that is two-dimensional."""
    if len(declared) != 1:
        return None
    ((name, spec),) = declared.items()
    return name if spec.shape is not None and len(spec.shape) == 2 else None


def _is_column(spec: TensorSpec) -> bool:
    return spec.shape is not None and len(spec.shape) == 2 and spec.shape[1] in (1, -1)
