"""Read tables (CSV, TSV, JSON, JSON lines, Parquet), as text and numbers, with places.

Every fault says its file and its line, row or column.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from sparsegrad_cli.data.delimited import read_delimited
from sparsegrad_cli.data.json_files import Record, RepeatedKeys, json_records
from sparsegrad_cli.data.parquet_files import read_parquet
from sparsegrad_cli.data.split_files import PREFERRED, SUFFIXES, is_unreadable, unreadable
from sparsegrad_cli.data.table import Columns, Table, concatenated
from sparsegrad_cli.data.text_files import COMPRESSIONS, unpacked_name
from sparsegrad_cli.errors import DataError, UsageError


def read_table(
    files: Path | Sequence[Path], kind: str | None = None, separator: str | None = None
) -> Table:
    """Read one file, or the shards of one split in order.

    Args:
        files: the file, or several with the same columns.
        kind: ``csv``, ``json`` or ``parquet`` for a file whose suffix says nothing.
        separator: what separates the columns of CSV and TSV files; None finds it out.

    Raises:
        UsageError: a separator for files of another kind.
        DataError: a file cannot be read, is damaged, holds no rows, or a row has another number of
            columns than the header. A column at fault raises it once it is used.
    """
    paths = [files] if isinstance(files, Path) else list(files)
    return concatenated([_read_one(path, kind, separator) for path in paths])


def _read_one(path: Path, kind: str | None, separator: str | None) -> Table:
    if is_unreadable(path):
        raise unreadable(path)
    suffix = Path(unpacked_name(path)).suffix
    if suffix not in SUFFIXES:
        suffix = PREFERRED[kind][0] if kind else suffix
    if separator is not None and suffix not in PREFERRED["csv"]:
        raise UsageError(
            f"a separator goes with CSV and TSV files, and {path.name} is none",
            where="task.separator",
            fix="leave it out",
        )
    if suffix == ".parquet":
        if path.name.lower().endswith(COMPRESSIONS):
            raise DataError("a Parquet file is read unpacked", where=str(path), fix="unpack it")
        table = read_parquet(path)
    elif suffix in PREFERRED["json"]:
        table = _read_json(path)
    elif suffix in PREFERRED["csv"]:
        table = read_delimited(path, tab=suffix == ".tsv", separator=separator)
    else:
        raise DataError(
            f"cannot tell what kind of file this is from its suffix {suffix!r}",
            where=str(path),
            fix=f"one of {', '.join(SUFFIXES)}",
        )
    if not len(table):
        raise DataError("the file holds no rows", where=str(path))
    return table


def _read_json(path: Path) -> Table:
    records = list(json_records(path, as_written=True))  # a label is kept as its text
    names: dict[str, None] = {}
    twice: dict[str, str] = {}  # key -> the first row that writes it twice
    for record in records:
        if not isinstance(record.value, dict):
            raise DataError(
                f"expected an object with named fields, found {type(record.value).__name__}",
                where=record.place,
            )
        names.update(dict.fromkeys(record.value))
        if isinstance(record.value, RepeatedKeys):
            twice = {**dict.fromkeys(record.value.repeated, record.place), **twice}
    readers: dict[str, Callable[[], list[Any]]] = {}
    for name in names:
        readers[name] = partial(_values, records, name)
        if name in twice:
            readers[name] = partial(_refuse_twice, name, twice[name])
    lines = [record.line for record in records if record.line is not None]
    return Table(Columns(readers), str(path), lines or None, count=len(records), ragged=True)


def _values(records: Sequence[Record], name: str) -> list[Any]:
    return [record.value.get(name) for record in records]


def _refuse_twice(name: str, where: str) -> list[Any]:
    raise DataError(
        f"the object has two values for the key {name!r}",
        where=where,
        fix="rename one of the two, or take one out",
    )
