"""Read tables (CSV, TSV, JSON, JSON lines, Parquet) whole, as text and numbers, with places.

Nothing is guessed: a cell that says ``NA`` or ``None`` is that word. Every fault says its file and
line or row.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparsegrad_cli.data.json_text import json_records
from sparsegrad_cli.data.text_files import read_text
from sparsegrad_cli.errors import DataError

SUFFIXES = (".csv", ".tsv", ".jsonl", ".json", ".parquet")
TRAIN_STEMS = ("train",)
VALIDATION_STEMS = ("validation", "dev", "valid", "val")
PREFERRED = {
    "csv": (".csv", ".tsv"),
    "json": (".jsonl", ".json"),
    "parquet": (".parquet",),
}


@dataclass(frozen=True)
class Table:
    """Columns by name, all of one length, and where each row came from.

    ``class_names`` holds, by column, the names that a Parquet file written by ``datasets`` gives to
    the class ids of a ``ClassLabel`` column.
    """

    columns: dict[str, list[Any]]
    source: str
    lines: list[int] | None = None
    class_names: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()))) if self.columns else 0

    def place(self, row: int) -> str:
        """``file:line`` where lines are known, else ``file, row n`` (1-based)."""
        if self.lines is not None:
            return f"{self.source}:{self.lines[row]}"
        return f"{self.source}, row {row + 1}"


def read_table(files: Path | Sequence[Path], kind: str | None = None) -> Table:
    """Read one file, or the shards of one split in order.

    Args:
        files: the file, or several with the same columns.
        kind: ``csv``, ``json`` or ``parquet`` for a file whose suffix says nothing.

    Raises:
        DataError: it cannot be read, is damaged, holds no rows, or a row has another number of
            columns than the header.
    """
    paths = [files] if isinstance(files, Path) else list(files)
    tables = [_read_one(path, kind) for path in paths]
    if len(tables) == 1:
        return tables[0]
    names = list(tables[0].columns)
    for table in tables[1:]:
        if set(table.columns) != set(names):
            raise DataError(
                f"columns {', '.join(table.columns)} differ from {', '.join(names)} of the first "
                "file of this split",
                where=table.source,
            )
        if table.class_names != tables[0].class_names:
            raise DataError(
                "Expected the class names of the first file of this split, got others",
                where=table.source,
                fix="write all files of the split with the same ClassLabel features",
            )
    merged = {name: [value for table in tables for value in table.columns[name]] for name in names}
    source = f"{paths[0]} and {len(paths) - 1} more"
    return Table(merged, source, class_names=tables[0].class_names)


def _read_one(path: Path, kind: str | None) -> Table:
    name = path.name.lower().removesuffix(".gz")
    suffix = Path(name).suffix
    if suffix not in SUFFIXES:
        suffix = PREFERRED[kind][0] if kind else suffix
    if suffix == ".parquet":
        table = _read_parquet(path)
    elif suffix in (".jsonl", ".json"):
        table = _read_json(path)
    elif suffix in (".csv", ".tsv"):
        table = _read_delimited(path, tab=suffix == ".tsv")
    else:
        raise DataError(
            f"cannot tell what kind of file this is from its suffix {suffix!r}",
            where=str(path),
            fix=f"one of {', '.join(SUFFIXES)}",
        )
    if not len(table):
        raise DataError("the file holds no rows", where=str(path))
    return table


def tab_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """(line number, fields) of a file split at tabs only: quotes are text, as in GLUE's files."""
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        line = line.removesuffix("\r")
        if line:
            yield number, line.split("\t")


def _read_delimited(path: Path, *, tab: bool) -> Table:
    if not tab:
        rows = _quoted_rows(path, ",")
    else:
        rows = _consistently_quoted(path) or list(tab_rows(path))
    if not rows:
        return Table({}, str(path))
    header = [name.strip() for name in rows[0][1]]
    if len(set(header)) != len(header):
        raise DataError(
            f"the header names a column twice: {', '.join(header)}", where=f"{path}:{rows[0][0]}"
        )
    for number, fields in rows[1:]:
        if len(fields) != len(header):
            raise column_count_error(path, number, len(fields), len(header))
    columns = {name: [fields[i] for _, fields in rows[1:]] for i, name in enumerate(header)}
    return Table(columns, str(path), [number for number, _ in rows[1:]])


def column_count_error(path: Path, line: int, found: int, expected: int) -> DataError:
    """The error for a row that does not fit its header."""
    return DataError(
        f"the row has {found} column{'' if found == 1 else 's'}, expected {expected}",
        where=f"{path}:{line}",
        fix="a text that holds the separator must be quoted (CSV) or cleaned of it (TSV)",
    )


def _quoted_rows(path: Path, delimiter: str) -> list[tuple[int, list[str]]]:
    """(first line, fields) with CSV quoting; blank lines are skipped."""
    # newline="" keeps line ends inside quoted texts, and line_num counts what an editor counts.
    reader = csv.reader(io.StringIO(read_text(path), newline=""), delimiter=delimiter, strict=True)
    rows: list[tuple[int, list[str]]] = []
    start = 1
    try:
        for fields in reader:
            if fields:
                rows.append((start, fields))
            start = reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"the row that begins here is not CSV: {error}",
            where=f"{path}:{start}",
            fix='quote a text that holds commas or quotes, and double the quotes in it: "a ""b"""',
        ) from None
    return rows


def _consistently_quoted(path: Path) -> list[tuple[int, list[str]]] | None:
    """A tab-separated file's rows if it is quoted like CSV throughout, else None.

    Files written by spreadsheet software and pandas quote some fields; GLUE-like files hold bare
    quotes that mean nothing. The first kind reads without a fault, keeps one number of columns,
    and no bare quote has swallowed a separator.
    """
    if '"' not in read_text(path):
        return None
    try:
        rows = _quoted_rows(path, "\t")
    except DataError:
        return None
    uniform = len({len(fields) for _, fields in rows}) == 1
    swallowed = any("\t" in value for _, fields in rows for value in fields)
    return rows if uniform and not swallowed else None


def _read_json(path: Path) -> Table:
    records = list(json_records(path, as_written=True))  # a label is kept as its text
    names: dict[str, None] = {}
    for record in records:
        if not isinstance(record.value, dict):
            raise DataError(
                f"expected an object with named fields, found {type(record.value).__name__}",
                where=record.place,
            )
        names.update(dict.fromkeys(record.value))
    columns = {name: [record.value.get(name) for record in records] for name in names}
    lines = [record.line for record in records if record.line is not None]
    return Table(columns, str(path), lines or None)


def _read_parquet(path: Path) -> Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # ParquetFile, not read_table: a folder named a=b must not turn into a column.
        with pq.ParquetFile(path) as file:
            table = file.read()
    except (pa.ArrowException, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise DataError(f"the Parquet file cannot be read: {reason}", where=str(path)) from None
    columns = {name: table.column(name).to_pylist() for name in table.column_names}
    return Table(columns, str(path), class_names=_class_names(table.schema.metadata))


def _class_names(metadata: Mapping[bytes, bytes] | None) -> dict[str, tuple[str, ...]]:
    """The names of ClassLabel columns from what ``datasets`` writes into a Parquet file."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        return {
            column: tuple(str(name) for name in feature["names"])
            for column, feature in features.items()
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
        }
    except (KeyError, TypeError, ValueError, AttributeError):
        return {}  # the block is another program's, or of another version


def find_split(
    folder: Path, stems: Sequence[str], suffixes: Sequence[str] = SUFFIXES
) -> list[Path]:
    """Files of one split: ``stem.suffix``, or Parquet shards ``stem-00000-of-00002.parquet``.

    Stems and suffixes are tried in order; the first that is there wins. Empty when none is.
    """
    for stem in stems:
        for suffix in suffixes:
            plain = folder / f"{stem}{suffix}"
            if plain.is_file():
                return [plain]
            if suffix == ".parquet":
                shards = sorted(folder.glob(f"{stem}-[0-9]*-of-[0-9]*.parquet"))
                if shards:
                    return shards
    return []


def looked_for(stems: Sequence[str], suffixes: Sequence[str] = SUFFIXES) -> str:
    """The names that find_split tries, for an error message."""
    names = [f"{stem}{suffix}" for stem in stems for suffix in suffixes]
    if ".parquet" in suffixes:
        names.append(f"{stems[0]}-00000-of-NNNNN.parquet")
    return ", ".join(names)
