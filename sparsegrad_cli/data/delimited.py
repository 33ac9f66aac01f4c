"""Read CSV and TSV files as text: separator, quoting, header, and columns without a name.

Nothing is guessed about a cell: one that says ``NA``, ``None`` or ``01`` is that word.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from sparsegrad_cli.data.table import Columns, Table
from sparsegrad_cli.data.text_files import read_text
from sparsegrad_cli.errors import DataError

Rows = list[tuple[int, list[str]]]  # (number of its first line, its cells)

_SEPARATORS = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "vertical bars"}
_JSON = re.compile(r'\s*(\[\s*)?\{\s*"')  # how no header begins
_DECLARED = re.compile(r'"?sep=([^"\r\n])"?\r?(\n|$)')  # what Excel puts and reads in a first line


def read_delimited(path: Path, *, tab: bool, separator: str | None = None) -> Table:
    """Read a file of comma- or tab-separated values.

    Where ``separator`` is None, the file's own one by its name is tried first; another is taken,
    and said in a note, where only that makes the rows fit a header of several columns.

    Args:
        path: the file, plain or compressed.
        tab: its name says that tabs separate its columns.
        separator: what separates columns; one character.

    Raises:
        DataError: the file cannot be read, is damaged, or a row does not fit the header.
    """
    text = read_text(path)
    if _JSON.match(text):
        raise DataError(
            f"Expected {'tab' if tab else 'comma'}-separated values, got JSON",
            where=str(path),
            fix="rename it to .json or .jsonl; where its name has no such suffix, set "
            "task.name: json",
        )
    own = "\t" if tab else ","
    declared = _DECLARED.match(text)
    if declared and separator is None:
        separator = declared[1]
    candidates = [separator] if separator else [own, *(m for m in _SEPARATORS if m != own)]
    failed: tuple[int, DataError] | None = None
    narrow: Table | None = None
    for mark in candidates:
        wide = 0
        try:
            rows = _tab_separated(text, path) if mark == "\t" else quoted_rows(text, mark, path)
            rows = rows[1:] if declared else rows
            wide = len(rows[0][1]) if rows else 0
            table = _table(rows, path)
        except DataError as error:
            wide = wide or _header_width(text, mark)
            if failed is None or wide > failed[0]:
                failed = (wide, error)
            continue
        if len(table.columns) > 1 or len(candidates) == 1:
            return table if mark == own else _with_note(table, path, mark)
        narrow = narrow or table
    if narrow is not None and (failed is None or failed[0] < 2):
        return narrow
    assert failed is not None
    raise failed[1]


def bare_rows(text: str) -> Iterator[tuple[int, list[str]]]:
    """Yield (line number, cells) of text that is split at tabs only: quotes are text, as in GLUE's
    files."""
    for number, line in enumerate(text.split("\n" if "\n" in text else "\r"), start=1):
        line = line.removesuffix("\r")
        if line:
            yield number, line.split("\t")


def quoted_rows(text: str, separator: str, path: Path) -> Rows:
    """Return the rows of text with CSV quoting; blank lines are skipped.

    Raises:
        DataError: the quoting is damaged; names the line where the row begins.
    """
    # newline="" keeps line ends inside quoted texts, and line_num counts what an editor counts.
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    rows: Rows = []
    start = 1
    # The library's limit on a cell's length says nothing about the file: no cell is longer than it.
    limit = csv.field_size_limit(max(len(text), 1))
    try:
        for fields in reader:
            if fields:
                rows.append((start, fields))
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


def column_count_error(path: Path, line: int, found: int, expected: int) -> DataError:
    """Return the error for a row that does not fit its header."""
    return DataError(
        f"the row has {found} column{'' if found == 1 else 's'}, expected {expected}",
        where=f"{path}:{line}",
        fix="a text that holds the separator must be quoted (CSV) or cleaned of it (TSV)",
    )


def _tab_separated(text: str, path: Path) -> Rows:
    """Return the rows of a tab-separated file, quoted like CSV or not at all.

    Spreadsheets and pandas quote some cells; GLUE-like files hold bare quotes that mean nothing.
    The first kind reads without a fault and no bare quote has swallowed a separator.

    Raises:
        DataError: some cells are quoted like CSV and others cannot be.
    """
    bare = list(bare_rows(text))
    if '"' not in text:
        return bare
    try:
        quoted = quoted_rows(text, "\t", path)
    except DataError:
        if any(_is_quoted(cell) for _, fields in bare for cell in fields):
            raise
        return bare
    swallowed = any("\t" in cell for _, fields in quoted for cell in fields)
    if (swallowed or not _fit(quoted)) and _fit(bare):
        return bare
    return quoted


def _is_quoted(cell: str) -> bool:
    """True where only CSV quoting explains the cell: its inner quotes are all doubled."""
    inner = cell[1:-1]
    ends = len(cell) > 1 and cell[0] == cell[-1] == '"'
    return ends and '""' in inner and '"' not in inner.replace('""', "")


def _fit(rows: Rows) -> bool:
    return len({len(fields) for _, fields in rows}) == 1


def _header_width(text: str, mark: str) -> int:
    return text.lstrip().split("\n", 1)[0].count(mark) + 1


def _is_blank(cells: list[str]) -> bool:
    return not any(cell.strip() for cell in cells)


def _table(rows: Rows, path: Path) -> Table:
    while rows and _is_blank(rows[-1][1]):  # spreadsheets leave rows of nothing at the end
        rows = rows[:-1]
    if not rows:
        return Table({}, str(path))
    (line, header), rows = rows[0], rows[1:]
    names = [name.strip() for name in header]
    while names and not names[-1]:
        names.pop()
    for number, fields in rows:
        if len(fields) < len(names):
            raise column_count_error(path, number, len(fields), len(names))
        if not _is_blank(fields[len(names) :]):
            raise column_count_error(path, number, len(fields), len(names))
        if len(names) > 1 and fields == header:
            raise DataError(
                "the header stands here again, as where files are joined",
                where=f"{path}:{number}",
                fix="take this line out",
            )
    readers: dict[str, Any] = {}
    for at, name in enumerate(names):
        if name in readers:
            readers[name] = partial(_refuse_twice, name, f"{path}:{line}")
        elif name:
            readers[name] = partial(_cells, rows, at)
    unnamed = [at for at, name in enumerate(names) if not name]
    unnamed = [at for at in unnamed if any(fields[at].strip() for _, fields in rows)]
    notes = [f"{path.name}: column {at + 1} has no name in the header: not read" for at in unnamed]
    lines = [number for number, _ in rows]
    return Table(Columns(readers), str(path), lines, count=len(rows), notes=tuple(notes))


def _cells(rows: Rows, at: int) -> list[Any]:
    return [fields[at] for _, fields in rows]


def _refuse_twice(name: str, where: str) -> list[Any]:
    raise DataError(
        f"the header names a column twice: {name}",
        where=where,
        fix="rename one of the two, or take one out",
    )


def _with_note(table: Table, path: Path, mark: str) -> Table:
    what = _SEPARATORS.get(mark, repr(mark))
    return table.with_notes(f"{path.name}: columns are separated by {what}")
