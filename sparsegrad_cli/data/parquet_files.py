"""Read Parquet files column by column, so that a column that nobody uses cannot fail."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any

from sparsegrad_cli.data.table import Columns, Table
from sparsegrad_cli.data.text_files import LFS_POINTER
from sparsegrad_cli.errors import DataError


def read_parquet(path: Path) -> Table:
    """Return the file's columns; each is read and converted when it is first used.

    Raises:
        DataError: the file is not Parquet or is damaged; names the column once one is used.
    """
    try:
        with _opened(path) as file:
            names = list(file.schema_arrow.names)
            count = file.metadata.num_rows
            class_names = _class_names(file.schema_arrow.metadata)
    except MemoryError:
        raise
    except Exception as error:  # pyarrow raises errors of many classes on damaged files
        reason, fix = _first_line(error), "fetch it again"
        if _is_pointer(path):
            reason, fix = "it is a Git LFS pointer", "fetch the file itself: git lfs pull"
        raise DataError(
            f"the Parquet file cannot be read: {reason}", where=str(path), fix=fix
        ) from None
    times = Counter(names)
    readers: dict[str, Callable[[], list[Any]]] = {}
    for name in times:
        twice = times[name] > 1
        readers[name] = (
            partial(_refuse_twice, path, name) if twice else partial(_column, path, name)
        )
    return Table(Columns(readers), str(path), count=count, class_names=class_names, typed=True)


def converted(values: Sequence[Any], name: str, source: str) -> list[Any]:
    """Return an Arrow column, or what behaves like one, as Python values.

    Args:
        values: has ``to_pylist()``, or can be iterated.
        name: the column's name, for the error.
        source: the file.

    Raises:
        DataError: a value cannot be converted; names the column and its first such row.
    """
    try:
        found = values.to_pylist() if hasattr(values, "to_pylist") else list(values)
    except MemoryError:
        raise
    except Exception as error:
        row = _first_fault(values)
        raise DataError(
            f"column {name!r} cannot be read: {_first_line(error)}",
            where=f"{source}, row {row}" if row else source,
            fix="write the file again without what is at fault there",
        ) from None
    return [_whole(value) if isinstance(value, Decimal) else value for value in found]


def _whole(value: Decimal) -> int | Decimal:
    """Return a decimal without a fraction as an integer; others keep all their digits."""
    return int(value) if value.as_tuple().exponent == 0 else value


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


def _opened(path: Path) -> Any:
    import pyarrow.parquet as pq

    # The library's limits on the sizes in a header say nothing about the file: no name and no list
    # in it is longer than the file itself.
    size = min(max(path.stat().st_size, 1), 2**31 - 1)
    # ParquetFile, not read_table: a folder named a=b must not turn into a column.
    return pq.ParquetFile(path, thrift_string_size_limit=size, thrift_container_size_limit=size)


def _is_pointer(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(LFS_POINTER)) == LFS_POINTER
    except OSError:
        return False


def _column(path: Path, name: str) -> list[Any]:
    try:
        with _opened(path) as file:
            table = file.read(columns=[name])  # also another column whose name begins with "name."
        column = table.column(table.column_names.index(name))
    except MemoryError:
        raise
    except Exception as error:
        raise DataError(
            f"column {name!r} cannot be read: {_first_line(error)}", where=str(path)
        ) from None
    return converted(column, name, str(path))


def _first_fault(values: Sequence[Any]) -> int | None:
    """Return the first row (from 1) that cannot be converted by itself."""
    for row in range(len(values)):
        try:
            value = values[row]
            if hasattr(value, "as_py"):
                value.as_py()
        except Exception:
            return row + 1
    return None


def _refuse_twice(path: Path, name: str) -> list[Any]:
    raise DataError(
        f"the file has two columns named {name!r}",
        where=str(path),
        fix="rename one of the two, or take one out",
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
