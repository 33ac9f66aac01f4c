"""Read CSV and TSV files as text: separator, quotes, header, and columns without a name.

Cells are not interpreted: ``NA``, ``None`` and ``01`` are texts.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from sparsegrad_cli.data.tables import Columns, Table
from sparsegrad_cli.data.text_files import read_text
from sparsegrad_cli.errors import DataError

Rows = list[tuple[int, list[str]]]  # (number of its first line, its cells)

_SEPARATORS = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "vertical bars"}
_JSON = re.compile(r'\s*(\[\s*)?\{\s*"')  # how JSON begins and no header does
_DECLARED = re.compile(r'"?sep=([^"\r\n])"?\r?(\n|$)')  # Excel's declaration in the first line


def read_delimited(path: Path, *, tabs: bool, separator: str | None = None) -> Table:
    """Read a file of comma- or tab-separated values.

    Without ``separator``, the separator that the file's name suggests is tried first. Another one
    is taken, with a note, if only that one makes the rows fit a header of several columns.

    Args:
        path: the file, plain or compressed.
        tabs: whether its name says that tabs separate its columns.
        separator: one character.

    Raises:
        DataError: the file cannot be read, is damaged, or a row does not fit the header.
    """
    text = read_text(path)
    if _JSON.match(text):
        raise DataError(
            f"Expected {'tab' if tabs else 'comma'}-separated values, got JSON",
            where=str(path),
            fix="rename it to .json or .jsonl, or set task.name: json",
        )
    expected = "\t" if tabs else ","
    declared = _DECLARED.match(text)
    if declared and separator is None:
        separator = declared[1]
    candidates = (
        [separator] if separator else [expected, *(s for s in _SEPARATORS if s != expected)]
    )
    failed: tuple[int, DataError] | None = None  # of the candidate with the widest header
    narrow: Table | None = None
    for candidate in candidates:
        width = 0
        try:
            rows = (
                _tab_rows(text, path) if candidate == "\t" else _quoted_rows(text, candidate, path)
            )
            rows = rows[1:] if declared else rows
            width = len(rows[0][1]) if rows else 0
            table = _table(rows, path)
        except DataError as error:
            width = width or text.lstrip().split("\n", 1)[0].count(candidate) + 1
            if failed is None or width > failed[0]:
                failed = (width, error)
            continue
        if len(table.columns) > 1 or len(candidates) == 1:
            if candidate == expected:
                return table
            what = _SEPARATORS.get(candidate, repr(candidate))
            note = f"{path.name}: columns are separated by {what}"
            return replace(table, notes=(*table.notes, note))
        narrow = narrow or table
    if narrow is not None and (failed is None or failed[0] < 2):
        return narrow
    assert failed is not None
    raise failed[1]


def unquoted_rows(text: str) -> Iterator[tuple[int, list[str]]]:
    """Yield (line number, cells) of text that is split at tabs; quotes are text, as in GLUE."""
    for number, line in enumerate(text.split("\n" if "\n" in text else "\r"), start=1):
        line = line.removesuffix("\r")
        if line:
            yield number, line.split("\t")


def _quoted_rows(text: str, separator: str, path: Path) -> Rows:
    """Return the rows of text with CSV quoting; blank lines are skipped.

    Raises:
        DataError: the quoting is damaged; names the line where the row begins.
    """
    # newline="" keeps line ends inside quoted texts, and line_num counts as an editor does.
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    rows: Rows = []
    start = 1
    # The csv module refuses cells above 128 KiB by default; no cell is longer than its file.
    limit = csv.field_size_limit(max(len(text), 1))
    try:
        for cells in reader:
            if cells:
                rows.append((start, cells))
            start = reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"the row that begins here is not CSV: {error}",
            where=f"{path}:{start}",
            fix='quote a text that holds separators or quotes, and double the quotes in it: "a '
            '""b"""',
        ) from None
    finally:
        csv.field_size_limit(limit)
    return rows


def check_width(cells: Sequence[str], expected: int, path: Path, line: int) -> None:
    """Refuse a row whose number of cells differs from that of the header.

    Raises:
        DataError: names the line and both numbers.
    """
    found = len(cells)
    if found != expected:
        raise DataError(
            f"the row has {found} column{'' if found == 1 else 's'}, expected {expected}",
            where=f"{path}:{line}",
            fix="quote a text that holds the separator (CSV), or remove it from the text (TSV)",
        )


def _tab_rows(text: str, path: Path) -> Rows:
    """Return the rows of a tab-separated file, which is quoted like CSV or not at all.

    Spreadsheets and pandas quote some cells. Files like GLUE's hold bare quotes without a meaning.
    A file counts as quoted if it reads without an error and no quote has swallowed a tab.
    """
    unquoted = list(unquoted_rows(text))
    if '"' not in text:
        return unquoted
    try:
        quoted = _quoted_rows(text, "\t", path)
    except DataError:
        if any(_is_quoted(cell) for _, cells in unquoted for cell in cells):
            raise
        return unquoted
    swallowed = any("\t" in cell for _, cells in quoted for cell in cells)
    if (swallowed or not _equal_widths(quoted)) and _equal_widths(unquoted):
        return unquoted
    return quoted


def _is_quoted(cell: str) -> bool:
    """Return whether only CSV quoting explains a cell: it has inner quotes, and all are doubled."""
    inner = cell[1:-1]
    in_quotes = len(cell) > 1 and cell[0] == cell[-1] == '"'
    return in_quotes and '""' in inner and '"' not in inner.replace('""', "")


def _equal_widths(rows: Rows) -> bool:
    return len({len(cells) for _, cells in rows}) == 1


def _is_blank(cells: Sequence[str]) -> bool:
    return not any(cell.strip() for cell in cells)


def _table(rows: Rows, path: Path) -> Table:
    """Return the rows below the header as a table.

    Spreadsheets leave empty rows and empty columns at the end, and write separators at the end of
    rows: these are left out.
    """
    while rows and _is_blank(rows[-1][1]):
        rows = rows[:-1]
    if not rows:
        return Table({}, str(path))
    (header_line, header), rows = rows[0], rows[1:]
    names = [name.strip() for name in header]
    while names and not names[-1]:
        names.pop()
    for line, cells in rows:
        if len(cells) < len(names) or not _is_blank(cells[len(names) :]):
            check_width(cells, len(names), path, line)
        if len(names) > 1 and cells == header:
            raise DataError(
                "the header is repeated here, as in files that were joined",
                where=f"{path}:{line}",
                fix="remove this line",
            )
    columns = Columns(
        {name: partial(_cells, rows, at) for at, name in enumerate(names) if name},
        repeated={
            name: f"{path}:{header_line}" for name in names if name and names.count(name) > 1
        },
    )
    unnamed = [at for at, name in enumerate(names) if not name]
    unnamed = [at for at in unnamed if any(cells[at].strip() for _, cells in rows)]
    notes = [f"{path.name}: column {at + 1} has no name in the header: not read" for at in unnamed]
    lines = [line for line, _ in rows]
    return Table(columns, str(path), lines, count=len(rows), notes=tuple(notes))


def _cells(rows: Rows, at: int) -> list[Any]:
    return [cells[at] for _, cells in rows]
