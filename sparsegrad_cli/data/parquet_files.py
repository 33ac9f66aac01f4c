"""Read Parquet files column by column, so that an unused column cannot fail."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any

from sparsegrad_cli.data.tables import Columns, Table
from sparsegrad_cli.data.text_files import LFS_POINTER
from sparsegrad_cli.error_mapping import first_line
from sparsegrad_cli.errors import DataError


def read_parquet(path: Path) -> Table:
    """Return the columns of a file; each is read and converted on first use.

    Raises:
        DataError: the file is not Parquet or is damaged. On first use of a column: names it.
    """
    try:
        with _open(path) as file:
            names = list(file.schema_arrow.names)
            count = file.metadata.num_rows
            class_names = _class_names(file.schema_arrow.metadata)
    except MemoryError:
        raise
    except Exception as error:  # pyarrow raises errors of many classes on damaged files
        raise _unreadable(path, error) from None
    columns = Columns(
        {name: partial(_column, path, name) for name in names},
        repeated={name: str(path) for name, times in Counter(names).items() if times > 1},
    )
    return Table(columns, str(path), count=count, class_names=class_names, typed=True)


def parquet_batches(path: Path) -> tuple[Any, Iterator[Any]]:
    """Return the Arrow schema of a file, and its record batches, which are read one at a time.

    Raises:
        DataError: the file is not Parquet, is damaged, or has two columns of one name.
    """
    try:
        file = _open(path)
        schema = file.schema_arrow
    except MemoryError:
        raise
    except Exception as error:
        raise _unreadable(path, error) from None
    twice = [name for name, times in Counter(schema.names).items() if times > 1]
    if twice:
        raise DataError(
            f"two columns are named {twice[0]!r}", where=str(path), fix="rename one of the two"
        )

    def batches() -> Iterator[Any]:
        try:
            with file:
                yield from file.iter_batches()
        except OSError as error:
            raise _unreadable(path, error) from None

    return schema, batches()


def _unreadable(path: Path, error: Exception) -> DataError:
    reason, fix = first_line(error), "fetch it again"
    if _is_lfs_pointer(path):
        reason, fix = "it is a Git LFS pointer", "fetch the file itself: git lfs pull"
    return DataError(f"the Parquet file cannot be read: {reason}", where=str(path), fix=fix)


def to_python(values: Any, name: str, source: str) -> list[Any]:
    """Convert an Arrow column to Python values.

    Args:
        values: an Arrow array.
        name: the column's name, for the error.
        source: the file.

    Raises:
        DataError: a value cannot be converted; names the column and its first such row.
    """
    try:
        found = values.to_pylist()
    except MemoryError:
        raise
    except Exception as error:
        row = _first_unconvertible_row(values)
        raise DataError(
            f"column {name!r} cannot be read: {first_line(error)}",
            where=f"{source}, row {row}" if row else source,
            fix="correct the value there, and write the file again",
        ) from None
    return [_without_point(value) if isinstance(value, Decimal) else value for value in found]


def _without_point(value: Decimal) -> int | Decimal:
    """Return a decimal type without decimal places as an integer; others keep all their digits."""
    return int(value) if value.as_tuple().exponent == 0 else value


def _class_names(metadata: Mapping[bytes, bytes] | None) -> dict[str, tuple[str, ...]]:
    """Return the names of ClassLabel columns, and of lists of them, that ``datasets`` writes."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        # The feature of a list's items is one level deeper.
        items = {
            column: feature.get("feature", feature)
            for column, feature in features.items()
            if isinstance(feature, dict)
        }
        return {
            column: tuple(str(name) for name in feature["names"])
            for column, feature in items.items()
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
        }
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        return {}  # written by another program, or by another version of it


def _open(path: Path) -> Any:
    import pyarrow.parquet as pq

    # The library's default limits on sizes in the header do not depend on the file. No name and no
    # list in a file is longer than the file itself.
    size = min(max(path.stat().st_size, 1), 2**31 - 1)
    # ParquetFile, not read_table, which turns a folder named a=b into a column.
    return pq.ParquetFile(path, thrift_string_size_limit=size, thrift_container_size_limit=size)


def _is_lfs_pointer(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(LFS_POINTER)) == LFS_POINTER
    except OSError:
        return False


def _column(path: Path, name: str) -> list[Any]:
    try:
        with _open(path) as file:
            table = file.read(columns=[name])  # also reads columns whose names begin with "name."
        column = table.column(table.column_names.index(name))
    except MemoryError:
        raise
    except Exception as error:
        raise DataError(
            f"column {name!r} cannot be read: {first_line(error)}", where=str(path)
        ) from None
    return to_python(column, name, str(path))


def _first_unconvertible_row(values: Sequence[Any]) -> int | None:
    """Return the first row, counted from 1, that cannot be converted by itself."""
    for row in range(len(values)):
        try:
            values[row].as_py()
        except Exception:
            return row + 1
    return None
