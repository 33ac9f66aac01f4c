"""A table whose columns are converted when they are used, with the place of each row."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from sparsegrad_cli.errors import DataError


class Columns(Mapping[str, list[Any]]):
    """Columns by name, each read when it is first asked for: one that nobody uses cannot fail.

    Args:
        readers: name -> what returns the column's values, or raises a DataError that names it.
    """

    def __init__(self, readers: Mapping[str, Callable[[], list[Any]]]) -> None:
        self._readers = readers
        self._read: dict[str, list[Any]] = {}

    def __getitem__(self, name: str) -> list[Any]:
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
class Row(Mapping[str, Any]):
    """One row of a table by column name; a column is read when its cell is."""

    columns: Mapping[str, list[Any]]
    at: int

    def __getitem__(self, name: str) -> Any:
        return self.columns[name][self.at]

    def __contains__(self, name: object) -> bool:
        return name in self.columns

    def __iter__(self) -> Iterator[str]:
        return iter(self.columns)

    def __len__(self) -> int:
        return len(self.columns)


@dataclass(frozen=True)
class Table:
    """Columns by name, all of one length, and where each row came from.

    Attributes:
        columns: name -> values in file order.
        source: the file.
        lines: the line of each row, where it is known.
        count: number of rows; None counts those of the first column.
        parts: the tables of single files that this one was put together from.
        notes: what the user should know of how it was read.
        class_names: by column, the names that a file written by ``datasets`` gives to the ids of a
            ``ClassLabel`` column.
        ragged: each row names its own columns, as in JSON, so that any may be missing.
        typed: read from Arrow, where every object of a column has every key, and None stands for
            a key that is not there.
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

    def row(self, at: int) -> Row:
        """Return row ``at``, counted from 0."""
        return Row(self.columns, at)

    def place(self, row: int) -> str:
        """Return ``file:line`` where lines are known, else ``file, row n`` (1-based)."""
        for part in self.parts:
            if row < len(part):
                return part.place(row)
            row -= len(part)
        if self.lines is not None:
            return f"{self.source}:{self.lines[row]}"
        return f"{self.source}, row {row + 1}"

    def with_notes(self, *notes: str) -> Table:
        """Return the same table with more notes."""
        return replace(self, notes=(*self.notes, *notes))


def concatenated(tables: list[Table]) -> Table:
    """Return the rows of several files as one table.

    A column that a file lacks is None in its rows where the table is ragged; else it is refused
    once it is used.

    Raises:
        DataError: the files give other names to the ids of a class.
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
