"""Write rows with their predictions, a chunk at a time, in the format of a file's suffix."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any, Protocol, TextIO

from sparsegrad_cli.errors import DataError, UsageError
from sparsegrad_cli.io.atomic import replaced_file
from sparsegrad_cli.predict.row_stream import Row, RowStream

# Names of the columns that are added; the last one says why an answer ended.
PREDICTION, PROBABILITY, STOPPED = "prediction", "probability", "stopped"
FORMATS = (".csv", ".tsv", ".jsonl", ".parquet")


class Writer(Protocol):
    """Write rows of a file with the columns that were added to each of them."""

    def write(self, rows: Sequence[Row], added: Sequence[dict[str, Any]]) -> None:
        """Write a chunk.

        Args:
            rows: as read.
            added: new columns of each row.
        """
        ...


@contextmanager
def open_output(path: Path, source: RowStream, added: Sequence[str]) -> Iterator[Writer]:
    """Open a file, which appears under its name when all rows are written.

    Args:
        path: ends in ``.csv``, ``.tsv``, ``.jsonl`` or ``.parquet``.
        source: the rows that will be written.
        added: names of the columns that are added to them.

    Raises:
        UsageError: the suffix is another one.
        DiskError: the file cannot be written.
    """
    check_format(path)
    suffix = path.suffix.lower()
    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced_file(path) as temporary:
        if suffix == ".parquet":
            parquet = _Parquet(temporary, source)
            try:
                yield parquet
            finally:
                parquet.close()
            return
        with temporary.open("w", encoding="utf-8", newline="") as stream:
            yield text_writer(stream, suffix, source, added)


def check_format(path: Path) -> None:
    """Check that a file's suffix is one of :data:`FORMATS`.

    Raises:
        UsageError: it is not.
    """
    if path.suffix.lower() not in FORMATS:
        raise UsageError(
            f"the suffix {path.suffix!r} does not say in which format to write",
            where="--output",
            fix=f"one of {', '.join(FORMATS)}",
        )


def text_writer(stream: TextIO, suffix: str, source: RowStream, added: Sequence[str]) -> Writer:
    """Return a writer of CSV, TSV or JSON lines on a stream."""
    if suffix == ".jsonl":
        return _Json(stream)
    separator = "\t" if suffix == ".tsv" else source.separator if source.separator != "\t" else ","
    return _Delimited(stream, separator, [*source.names, *added])


class _Delimited:
    """A CSV or TSV file; a value that is neither text nor a number is written as JSON."""

    def __init__(self, stream: TextIO, separator: str, names: Sequence[str]) -> None:
        self._names = names
        self._writer = csv.writer(stream, delimiter=separator, lineterminator="\n")
        self._writer.writerow(names)

    def write(self, rows: Sequence[Row], added: Sequence[dict[str, Any]]) -> None:
        """Write a chunk; see :class:`Writer`."""
        known = set(self._names)
        for row, more in zip(rows, added, strict=True):
            unknown = [name for name in row.values if name not in known]
            if unknown:
                raise DataError(
                    f"this row has a column {unknown[0]!r}, which the first row lacks: CSV cannot "
                    "hold it",
                    where=row.place,
                    fix="write to a .jsonl file",
                )
            values = {**row.values, **more}
            self._writer.writerow([_cell(values.get(name)) for name in self._names])


def _cell(value: Any) -> Any:
    if value is None:
        return ""
    if isinstance(value, list | dict):
        return json.dumps(value, ensure_ascii=False, default=str)
    return value


class _Json:
    """JSON lines."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, rows: Sequence[Row], added: Sequence[dict[str, Any]]) -> None:
        """Write a chunk; see :class:`Writer`."""
        for row, more in zip(rows, added, strict=True):
            line = json.dumps({**row.values, **more}, ensure_ascii=False, default=_plain)
            self._stream.write(line + "\n")


def _plain(value: Any) -> Any:
    """Return a value that JSON lacks, as an exact integer or as text (a date, bytes)."""
    if isinstance(value, Decimal) and value == int(value):
        return int(value)
    return str(value)


class _Parquet:
    """A Parquet file; a Parquet source keeps the types of its columns."""

    def __init__(self, path: Path, source: RowStream) -> None:
        self._path, self._source = path, source
        self._writer: Any = None

    def write(self, rows: Sequence[Row], added: Sequence[dict[str, Any]]) -> None:
        """Write a chunk; see :class:`Writer`."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        new = pa.Table.from_pylist(list(added), schema=_added_schema(added[0]))
        old = [row.values for row in rows]
        schema = self._source.schema
        if schema is None and self._writer is not None:
            known = self._writer.schema.names[: -len(new.column_names)]
            schema = pa.schema([self._writer.schema.field(name) for name in known])
        try:
            table = pa.Table.from_pylist(old, schema=schema)
            for name in new.column_names:
                table = table.append_column(name, new.column(name))
            if self._writer is None:
                self._writer = pq.ParquetWriter(self._path, table.schema)
            self._writer.write_table(table)
        except (pa.ArrowInvalid, pa.ArrowTypeError, ValueError) as error:
            raise DataError(
                f"the rows do not fit the columns of a Parquet file: {error}",
                where=rows[0].place,
                fix="write to a .jsonl file",
            ) from None

    def close(self) -> None:
        """Write the end of the file."""
        if self._writer is not None:
            self._writer.close()


def _added_schema(row: dict[str, Any]) -> Any:
    """Return the Arrow schema of added columns. An empty list does not tell the type of its items.

    Args:
        row: one row of added columns; lists are those of labels and of their probabilities.
    """
    import pyarrow as pa

    types = {str: pa.string(), float: pa.float64()}
    lists = {PREDICTION: pa.list_(pa.string()), PROBABILITY: pa.list_(pa.float64())}
    return pa.schema(
        [(name, lists[name] if isinstance(v, list) else types[type(v)]) for name, v in row.items()]
    )
