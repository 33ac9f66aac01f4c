"""Read a CSV, TSV, JSON or Parquet file as a table.

Every error names the file and the line, row or column.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sparsegrad_cli.data.delimited import read_delimited
from sparsegrad_cli.data.json_files import read_json_table
from sparsegrad_cli.data.parquet_files import read_parquet
from sparsegrad_cli.data.split_files import SUFFIXES, SUFFIXES_OF, refuse_unreadable
from sparsegrad_cli.data.tables import Table, concatenated
from sparsegrad_cli.data.text_files import COMPRESSIONS, uncompressed_name
from sparsegrad_cli.errors import DataError, UsageError


def read_table(
    files: Sequence[Path], kind: str | None = None, separator: str | None = None
) -> Table:
    """Read a file, or the shards of one split in order.

    Args:
        files: files with the same columns.
        kind: ``csv``, ``json`` or ``parquet``: format of a file whose suffix does not say it.
        separator: separator of CSV and TSV files; None finds it out.

    Raises:
        UsageError: a separator for files of another format.
        DataError: a file cannot be read, is damaged, has no rows, or a row has another number of
            columns than the header. A damaged column raises it on first use.
    """
    return concatenated([_read_file(path, kind, separator) for path in files])


def file_format(path: Path, kind: str | None = None) -> str:
    """Return the suffix of the format in which a file is read: ``.csv``, ``.jsonl``, ...

    Args:
        path: the file, plain or compressed.
        kind: as in :func:`read_table`.

    Raises:
        DataError: the format is not read, or the suffix does not say it.
    """
    refuse_unreadable(path)
    suffix = Path(uncompressed_name(path)).suffix
    if suffix not in SUFFIXES and kind is not None:
        suffix = SUFFIXES_OF[kind][0]
    if suffix not in SUFFIXES:
        raise DataError(
            f"the suffix {suffix!r} does not say which format this file has",
            where=str(path),
            fix=f"rename it to one of {', '.join(SUFFIXES)}",
        )
    if suffix == ".parquet" and path.name.lower().endswith(COMPRESSIONS):
        raise DataError(
            "Expected a Parquet file that is not compressed", where=str(path), fix="unpack it"
        )
    return suffix


def _read_file(path: Path, kind: str | None, separator: str | None) -> Table:
    suffix = file_format(path, kind)
    if separator is not None and suffix not in SUFFIXES_OF["csv"]:
        raise UsageError(
            f"task.separator is for CSV and TSV files, and {path.name} is neither",
            where="task.separator",
            fix="leave it out",
        )
    if suffix == ".parquet":
        table = read_parquet(path)
    elif suffix in SUFFIXES_OF["json"]:
        table = read_json_table(path)
    else:
        table = read_delimited(path, tabs=suffix == ".tsv", separator=separator)
    if not len(table):
        raise DataError("the file holds no rows", where=str(path))
    return table
