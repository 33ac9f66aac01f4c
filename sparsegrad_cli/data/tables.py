"""Tables: columns that are read on first use, and the place of each row in its file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from sparsegrad_cli.data.text_files import is_unicode
from sparsegrad_cli.errors import DataError


class Columns(Mapping[str, list[Any]]):
    """Columns by name, each read on first use, so that an unused column cannot fail.

    Args:
        readers: name -> function that returns the column's values, or raises a DataError that
            names the column.
        repeated: name that the file has twice -> its place. Such a column is refused on first use.
    """

    def __init__(
        self,
        readers: Mapping[str, Callable[[], list[Any]]],
        repeated: Mapping[str, str] | None = None,
    ) -> None:
        self._readers, self._repeated = readers, repeated or {}
        self._read: dict[str, list[Any]] = {}

    def __getitem__(self, name: str) -> list[Any]:
        if name in self._repeated:
            raise DataError(
                f"Expected one column or key named {name!r}, got two",
                where=self._repeated[name],
                fix="rename one of the two, or remove one",
            )
        if name not in self._read:
            self._read[name] = self._readers[name]()
        return self._read[name]

    def __contains__(self, name: object) -> bool:
        return name in self._readers

    def __iter__(self) -> Iterator[str]:
        return iter(self._readers)

    def __len__(self) -> int:
        return len(self._readers)


@dataclass(frozen=True)
class Table:
    """Columns of one length, and the place of each row.

    Attributes:
        columns: name -> values in file order.
        source: the file.
        lines: the line of each row; None if unknown.
        count: number of rows; None counts those of the first column.
        parts: the tables of single files that this table was concatenated from.
        notes: what the user should know of how the file was read.
        class_names: column -> class names of a ``ClassLabel`` column that ``datasets`` wrote.
        ragged: each row names its own columns, as in JSON, so any column may be missing.
        typed: read from Arrow, where None stands for a key that a row does not have.
    """

    columns: Mapping[str, list[Any]]
    source: str
    lines: list[int] | None = None
    count: int | None = None
    parts: tuple[Table, ...] = ()
    notes: tuple[str, ...] = ()
    class_names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    ragged: bool = False
    typed: bool = False

    def __len__(self) -> int:
        if self.count is not None:
            return self.count
        return len(next(iter(self.columns.values()))) if self.columns else 0

    def place(self, row: int) -> str:
        """Return ``file:line`` if lines are known, else ``file, row n`` (counted from 1)."""
        for part in self.parts:
            if row < len(part):
                return part.place(row)
            row -= len(part)
        if self.lines is not None:
            return f"{self.source}:{self.lines[row]}"
        return f"{self.source}, row {row + 1}"


def concatenated(tables: Sequence[Table]) -> Table:
    """Return the rows of several files as one table.

    A column that a file lacks is None in its rows if the table is ragged. Otherwise it is refused
    on first use.

    Raises:
        DataError: the files name the classes of a column differently.
    """
    if len(tables) == 1:
        return tables[0]
    for table in tables[1:]:
        if table.class_names != tables[0].class_names:
            raise DataError(
                "Expected the class names of the first file of this split, got others",
                where=table.source,
                fix="write all files of the split with the same ClassLabel features",
            )
    names = dict.fromkeys(name for table in tables for name in table.columns)

    def values(name: str) -> list[Any]:
        found: list[Any] = []
        for table in tables:
            if name in table.columns:
                found += table.columns[name]
            elif table.ragged:
                found += [None] * len(table)
            else:
                raise DataError(
                    f"there is no column {name!r}, which other files of this split have",
                    where=table.source,
                    fix=f"columns found: {', '.join(table.columns)}",
                )
        return found

    return Table(
        Columns({name: partial(values, name) for name in names}),
        f"{tables[0].source} and {len(tables) - 1} more",
        count=sum(map(len, tables)),
        parts=tuple(tables),
        notes=tuple(dict.fromkeys(note for table in tables for note in table.notes)),
        class_names=tables[0].class_names,
        ragged=all(table.ragged for table in tables),
        typed=all(table.typed for table in tables),
    )


def type_words(value: Any) -> str:
    """Return what a cell holds in place of a text: ``an object with fields``, ``a list``."""
    names = {dict: "an object with fields", int: "an integer", bytes: "bytes"}
    return names.get(type(value), f"a {type(value).__name__}")


def read_text_cell(table: Table, column: str, row: int, *, blank: bool) -> str:
    """Return the text of a cell.

    Args:
        blank: whether an empty text, or one of white space, is allowed.

    Raises:
        DataError: the cell is empty, is not text, or is not valid Unicode.
    """

    def is_missing(value: Any) -> bool:
        return value is None or (not blank and isinstance(value, str) and not value.strip())

    value, fix = table.columns[column][row], "correct or remove the row"
    if is_missing(value):
        more = sum(map(is_missing, table.columns[column])) - 1
        what = f"is empty, as in {more:,} more row{'s' if more > 1 else ''}" if more else "is empty"
        fix = "remove rows without a text, or fill in the text"
    elif not isinstance(value, str):
        what = f"holds {type_words(value)}, expected text"
        fix = "name a column of texts, or write the text of a row as a column of its own"
    elif not is_unicode(value):
        what = "holds half of a character (a lone surrogate)"
    else:
        return value
    raise DataError(f"column {column!r} {what}", where=table.place(row), fix=fix)
