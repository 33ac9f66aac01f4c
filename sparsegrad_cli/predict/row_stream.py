"""Read the rows of a data file a chunk at a time, with all columns, in bounded memory.

CSV and TSV files are read as for training (:mod:`sparsegrad_cli.data.delimited`), except that the
separator is found from the first rows alone. A file that is one JSON array is read whole.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

from sparsegrad_cli.data.delimited import check_width
from sparsegrad_cli.data.json_files import RepeatedKeys, json_records
from sparsegrad_cli.data.parquet_files import parquet_batches, read_parquet, to_python
from sparsegrad_cli.data.read_table import file_format
from sparsegrad_cli.data.split_files import SUFFIXES_OF
from sparsegrad_cli.data.text_files import open_decompressed, text_lines
from sparsegrad_cli.errors import DataError

_HEAD = 1000  # Rows that the separator is found from.
_SEPARATORS = (",", "\t", ";", "|")
_LONGEST_CELL = 2**24  # Characters. csv's own limit is 128 KiB.


class Row(NamedTuple):
    """One row of a file.

    Attributes:
        place: ``file:line`` or ``file, row n``.
        values: column -> value.
    """

    place: str
    values: dict[str, Any]


@dataclass
class RowStream:
    """The rows of a file, to be read once from start to end.

    Attributes:
        path: the file.
        format: ``.csv``, ``.tsv``, ``.jsonl`` or ``.parquet``.
        names: columns of the file; in JSON those of the first row.
        rows: the rows in order.
        separator: of a CSV or TSV file.
        schema: Arrow schema of a Parquet file.
    """

    path: Path
    format: str
    names: list[str]
    rows: Iterator[Row]
    separator: str = ","
    schema: Any = None

    def chunks(self, size: int) -> Iterator[list[Row]]:
        """Yield the rows in lists of ``size``; the last one may be shorter."""
        while chunk := list(islice(self.rows, size)):
            yield chunk


def open_rows(path: Path) -> RowStream:
    """Open a file for reading.

    Raises:
        DataError: the file cannot be read, its suffix does not say its format, or it has no rows.
            A damaged row raises it when it is read, with its place.
    """
    suffix = file_format(path)
    if suffix == ".parquet":
        stream = _parquet(path)
    elif suffix in SUFFIXES_OF["json"]:
        stream = _json(path)
    else:
        stream = _delimited(path, tabs=suffix == ".tsv")
    first = next(stream.rows, None)
    if first is None:
        raise DataError("the file holds no rows", where=str(path))
    if not stream.names:
        stream.names = list(first.values)
    stream.rows = chain([first], stream.rows)
    return stream


def count_rows(path: Path) -> int:
    """Return the number of rows of a file, which is read once from start to end.

    A damaged row is found here, before any row is labelled.

    Raises:
        DataError: see :func:`open_rows`, and a row is damaged.
    """
    if file_format(path) == ".parquet":
        return len(read_parquet(path))
    return sum(1 for _ in open_rows(path).rows)


def _parquet(path: Path) -> RowStream:
    schema, batches = parquet_batches(path)

    def rows() -> Iterator[Row]:
        number = 0
        for batch in batches:
            columns = {
                name: to_python(batch.column(at), name, str(path))
                for at, name in enumerate(schema.names)
            }
            for values in zip(*columns.values(), strict=True):
                number += 1
                yield Row(f"{path}, row {number}", dict(zip(columns, values, strict=True)))

    return RowStream(path, ".parquet", list(schema.names), rows(), schema=schema)


def _json(path: Path) -> RowStream:
    def rows() -> Iterator[Row]:
        for record in json_records(path):
            if not isinstance(record.value, dict):
                found = type(record.value).__name__
                raise DataError(
                    f"expected an object with named fields, found {found}", where=record.place
                )
            if isinstance(record.value, RepeatedKeys):
                raise DataError(
                    f"the key {record.value.repeated[0]!r} is there twice", where=record.place
                )
            yield Row(record.place, record.value)

    return RowStream(path, ".jsonl", [], rows())


# --- CSV and TSV


def _delimited(path: Path, *, tabs: bool) -> RowStream:
    expected = "\t" if tabs else ","
    declared = _declared_separator(path)
    candidates = [declared] if declared else [expected, *(s for s in _SEPARATORS if s != expected)]
    chosen = None
    for separator in candidates:
        quoted = separator != "\t" or _quotes_hold(path)
        try:
            head = list(islice(_cells(path, separator, quoted=quoted), _HEAD))
        except DataError:
            continue
        if _is_table(head):
            chosen = separator, quoted
            break
    separator, quoted = chosen or (candidates[0], candidates[0] != "\t")
    cells = _cells(path, separator, quoted=quoted)
    if declared:
        next(cells, None)
    _, header = next(cells, (1, []))
    names = [name.strip() for name in header]
    while names and not names[-1]:
        names.pop()
    _check_names(names, path)
    return RowStream(
        path,
        ".tsv" if separator == "\t" else ".csv",
        names,
        _rows(cells, names, path),
        separator=separator,
    )


def _declared_separator(path: Path) -> str | None:
    """Return the separator that Excel declares in the first line, as ``sep=;``."""
    with open_decompressed(path) as file:
        line = file.readline(64).decode("utf-8-sig", "replace").strip().strip('"')
    return line[4] if line.startswith("sep=") and len(line) == 5 else None


def _quotes_hold(path: Path) -> bool:
    """Return whether a tab-separated file is quoted like CSV: the quotes of its head fit."""
    try:
        head = list(islice(_cells(path, "\t", quoted=True), _HEAD))
    except DataError:
        return False
    return _is_table(head) and not any("\t" in cell for _, cells in head for cell in cells)


def _is_table(rows: list[tuple[int, list[str]]]) -> bool:
    """Return whether every row has the width of the header, which has several columns."""
    widths = {len(cells) for _, cells in rows}
    return len(widths) == 1 and widths != {1}


def _check_names(names: list[str], path: Path) -> None:
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        what = f"two columns are named {twice!r}" if twice else "two columns have no name"
        raise DataError(what, where=f"{path}:1", fix="rename one of the two, or remove one")


def _cells(path: Path, separator: str, *, quoted: bool) -> Iterator[tuple[int, list[str]]]:
    """Yield (first line, cells) of every row that is not blank."""
    with open_decompressed(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
        try:
            if quoted:
                yield from _quoted(text, separator, path)
            else:
                for number, line in enumerate(text, start=1):
                    if line := line.rstrip("\r\n"):
                        yield number, line.split(separator)
        except UnicodeDecodeError:
            for _ in text_lines(path):
                pass  # It raises the error with the line.
            raise
        finally:
            text.detach()


def _quoted(text: Iterable[str], separator: str, path: Path) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader(text, delimiter=separator, strict=True)
    start = 1
    try:
        while (cells := _next_row(reader)) is not None:
            if cells:
                yield start, cells
            start = reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"the row that begins here is not CSV: {error}",
            where=f"{path}:{start}",
            fix='quote a text that holds separators or quotes, and double the quotes in it: "a '
            '""b"""',
        ) from None


def _next_row(reader: Iterator[list[str]]) -> list[str] | None:
    """Return the next row, None at the end.

    The limit is the process's, and readers of several files may be open: each row restores it.
    """
    limit = csv.field_size_limit(_LONGEST_CELL)
    try:
        return next(reader, None)
    finally:
        csv.field_size_limit(limit)


def _rows(cells: Iterator[tuple[int, list[str]]], names: list[str], path: Path) -> Iterator[Row]:
    blank: list[Row] = []  # Spreadsheets leave empty rows at the end.
    for line, row in cells:
        read = Row(f"{path}:{line}", dict(zip(names, row, strict=False)))
        if not any(cell.strip() for cell in row):
            blank.append(read)
            continue
        if len(row) < len(names) or any(cell.strip() for cell in row[len(names) :]):
            check_width(row, len(names), path, line)
        yield from blank
        blank = []
        yield read
