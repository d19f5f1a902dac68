"""CSV both ways: rows of text, columns of numbers or text, tables out of answers.

Source: RFC 4180, with its parameter `header` (present or absent).
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

import numpy as np

from servinggraph.errors import InvalidRequest, NotAcceptable, RequestTooLarge
from servinggraph.protocols.freeform.bounds import MAX_CELLS
from servinggraph.protocols.v2.json_data import shown
from servinggraph.tensors import Array

__all__ = ["Table", "cells_of", "columns_of", "decode_table", "encode_table"]

_WHOLE: Final = re.compile(r"-?(0|[1-9][0-9]*)")
_NUMBER: Final = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]{1,4})?|[+-]?(nan|inf|infinity)", re.IGNORECASE)
_BOOLEAN: Final = {"true": True, "false": False, "True": True, "False": False, "TRUE": True, "FALSE": False}
_MOST_COLUMNS: Final = 10_000


class Table(NamedTuple):
    """A table of text."""

    names: tuple[str, ...] | None
    """Names of the columns; None when the table has no header."""
    rows: list[list[str]]
    """The rows, all of equal length."""

    @property
    def width(self) -> int:
        """Number of columns."""
        return len(self.names) if self.names is not None else len(self.rows[0])


def decode_table(text: str, *, header: bool = True) -> Table:
    """Read CSV; empty lines count for nothing.

    Args:
        text: the table.
        header: True when the first line names the columns.

    Raises:
        InvalidRequest: not CSV, no line at all, names that are not distinct, rows of unequal length.
        RequestTooLarge: more cells than `MAX_CELLS`.
    """
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    names: tuple[str, ...] | None = None
    rows: list[list[str]] = []
    width = cells = 0
    try:
        for row in reader:
            if not row:
                continue
            if not width:
                width = len(row)
                if width > _MOST_COLUMNS:
                    raise InvalidRequest(f"the table has {width} columns, at most {_MOST_COLUMNS} are possible")
                if header:
                    names = tuple(name.strip() for name in row)
                    continue
            if len(row) != width:
                raise InvalidRequest(f"line {reader.line_num} of the table has {len(row)} cells, expected {width}")
            cells += width
            if cells > MAX_CELLS:
                raise RequestTooLarge(f"the table has more than {MAX_CELLS} cells")
            rows.append(row)
    except csv.Error as error:
        raise InvalidRequest(f"line {reader.line_num} of the body is no CSV: {error}") from None
    if not width:
        raise InvalidRequest("the table is empty: expected a line with the names of its columns")
    if names is not None and len(set(names)) != width:
        twice = next(name for name in names if names.count(name) > 1)
        raise InvalidRequest(f"two columns of the table are called {shown(twice)}")
    return Table(names, rows)


def columns_of(table: Table) -> dict[str, Array]:
    """Return the columns by name, or by number from "0" on where there is no header.

    A column of whole numbers is INT64; of numbers FP64, its empty cells not-a-number; anything
    else is text. Whole numbers with leading zeros are text: they are codes, not quantities.
    """
    columns: dict[str, Array] = {}
    names = table.names if table.names is not None else tuple(str(index) for index in range(table.width))
    by_column = zip(*table.rows, strict=True) if table.rows else ((),) * table.width
    for name, cells in zip(names, by_column, strict=True):
        columns[name] = _column(cells)
    return columns


def cells_of(name: str, datatype: str, cells: Sequence[str]) -> list[Any]:
    """Return the cells of a tensor as plain values, to be held against the datatype by `decode_data`.

    Raises:
        InvalidRequest: a cell is not what the datatype wants; names the cell.
    """
    if datatype == "BYTES":
        return list(cells)
    if datatype == "BOOL":
        return [_read(name, index, cell, _BOOLEAN.get(cell.strip()), "true or false") for index, cell in enumerate(cells)]
    if datatype.startswith(("FP", "BF")):
        return [_read(name, index, cell, _number(cell), "a number") for index, cell in enumerate(cells)]
    return [_read(name, index, cell, _whole(cell), "an integer") for index, cell in enumerate(cells)]


def encode_table(value: Any) -> bytes | None:
    """Write an answer as CSV; None when it is no table.

    A table is a mapping of column to one-dimensional arrays or lists of equal length (a
    two-dimensional array becomes columns `name.0`, `name.1`, ...), or a list of mappings with
    equal keys. Empty cells stand for None and not-a-number.

    Raises:
        NotAcceptable: a cell holds bytes that are not UTF-8.
    """
    columns = _columns_of_answer(value)
    if columns is None:
        return None
    file = io.StringIO(newline="")
    writer = csv.writer(file)
    writer.writerow(columns)
    writer.writerows(zip(*(map(_cell, cells) for cells in columns.values()), strict=True))
    return file.getvalue().encode()


def _column(cells: Sequence[str]) -> Array:
    stripped = [cell.strip() for cell in cells]
    if stripped and all(map(_WHOLE.fullmatch, stripped)):
        try:
            return np.array([int(cell) for cell in stripped], np.int64)
        except (OverflowError, ValueError):  # beyond 64 bits, or beyond what Python reads
            pass
    elif any(stripped):
        numbers = [_number(cell) for cell in stripped]
        plain = all(number is not None for number in numbers) and not any(map(_is_code, stripped))
        if plain:
            return np.array(numbers, np.float64)
    column = np.empty(len(cells), np.object_)
    column[:] = cells
    return column


def _is_code(cell: str) -> bool:
    return re.fullmatch(r"[+-]?0[0-9]+", cell) is not None


def _number(cell: str) -> float | None:
    cell = cell.strip()
    if not cell:
        return math.nan
    return float(cell) if _NUMBER.fullmatch(cell) else None


def _whole(cell: str) -> int | None:
    cell = cell.strip()
    return int(cell) if len(cell) < 32 and _WHOLE.fullmatch(cell) else None


def _read(name: str, index: int, cell: str, value: Any, wanted: str) -> Any:
    if value is None:
        raise InvalidRequest(f"input '{name}' element {index} is {shown(cell)}, expected {wanted}")
    return value


def _columns_of_answer(value: Any) -> dict[str, Sequence[Any]] | None:
    if isinstance(value, list | tuple) and value and all(isinstance(row, Mapping) for row in value):
        names = list(value[0])
        if any(list(row) != names for row in value):
            return None
        value = {name: [row[name] for row in value] for name in names}
    if not isinstance(value, Mapping) or not value:
        return None
    columns: dict[str, Sequence[Any]] = {}
    for name, column in value.items():
        if isinstance(column, np.ndarray) and column.ndim == 2 and column.shape[1] != 1:
            columns |= {f"{name}.{index}": column[:, index].tolist() for index in range(column.shape[1])}
        elif isinstance(column, np.ndarray) and column.ndim in (1, 2):
            columns[str(name)] = column.reshape(-1).tolist()
        elif isinstance(column, list | tuple):
            columns[str(name)] = column
        else:
            return None
    if len({len(column) for column in columns.values()}) > 1:
        return None
    simple = (str, bytes, int, float, np.generic, type(None))
    return columns if all(isinstance(cell, simple) for column in columns.values() for cell in column) else None


def _cell(cell: Any) -> Any:
    if isinstance(cell, np.generic):
        cell = cell.item()
    if isinstance(cell, bytes):
        try:
            return cell.decode()
        except UnicodeDecodeError:
            raise NotAcceptable("the answer holds bytes that are not UTF-8, which CSV cannot carry") from None
    if isinstance(cell, bool):
        return "true" if cell else "false"
    return "" if cell is None or (isinstance(cell, float) and math.isnan(cell)) else cell
