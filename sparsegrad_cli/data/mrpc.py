"""MRPC as Microsoft published it: msr_paraphrase_train.txt, with GLUE's development ids or without.

GLUE's train and dev parts are both cut from this one file, so they must be told apart by ids.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sparsegrad_cli.data.delimited import bare_rows, column_count_error
from sparsegrad_cli.data.table import Table
from sparsegrad_cli.data.text_files import read_text
from sparsegrad_cli.errors import DataError

_TRAIN = "msr_paraphrase_train.txt"
_TEST = "msr_paraphrase_test.txt"
_ID_FILES = ("mrpc_dev_ids.tsv", "dev_ids.tsv")
_IDS = ("#1 ID", "#2 ID")


@dataclass(frozen=True)
class Corpus:
    """Both parts, and in words how they were told apart."""

    train: Table
    validation: Table
    note: str


def original_corpus(folder: Path) -> Corpus | None:
    """The two parts from the published files; None where they are not what the folder offers.

    Validation is, in this order: dev.tsv (its rows are taken out of training); the rows of
    training that mrpc_dev_ids.tsv or dev_ids.tsv names; the corpus's own test part.

    Raises:
        DataError: a damaged row, or nothing to validate on.
    """
    source = folder / _TRAIN
    if (folder / "train.tsv").is_file() or not source.is_file():
        return None
    table = _read(source)
    keys = list(zip(*(table.columns[name] for name in _IDS), strict=True))
    if (folder / "dev.tsv").is_file():
        validation = _read(folder / "dev.tsv")
        held = set(zip(*(validation.columns[name] for name in _IDS), strict=True))
        train = _select(table, [row for row, key in enumerate(keys) if key not in held])
        return Corpus(train, validation, f"training is {_TRAIN} without the rows of dev.tsv")
    for name in _ID_FILES:
        if (folder / name).is_file():
            held = {(fields[0], fields[-1]) for _, fields in bare_rows(read_text(folder / name))}
            validation = _select(table, [row for row, key in enumerate(keys) if key in held])
            train = _select(table, [row for row, key in enumerate(keys) if key not in held])
            return Corpus(train, validation, f"validation is the rows of {_TRAIN} in {name}")
    if (folder / _TEST).is_file():
        note = f"validation is {_TEST}, the test part of the corpus: no GLUE dev part was found"
        return Corpus(table, _read(folder / _TEST), note)
    raise DataError(
        f"glue/mrpc has no validation file in {folder}",
        where="task.path",
        fix=f"looked for: dev.tsv, {', '.join(_ID_FILES)}, {_TEST}",
    )


def _read(path: Path) -> Table:
    rows = list(bare_rows(read_text(path)))
    header = [name.strip() for name in rows[0][1]] if rows else []
    for name in _IDS:
        if name not in header:
            raise DataError(
                f"there is no column {name!r}",
                where=str(path),
                fix=f"columns found: {', '.join(header) or 'none'}",
            )
    for number, fields in rows[1:]:
        if len(fields) != len(header):
            raise column_count_error(path, number, len(fields), len(header))
    if len(rows) < 2:
        raise DataError("the file holds no rows", where=str(path))
    columns = {name: [fields[i] for _, fields in rows[1:]] for i, name in enumerate(header)}
    return Table(columns, str(path), [number for number, _ in rows[1:]])


def _select(table: Table, rows: list[int]) -> Table:
    columns = {name: [values[row] for row in rows] for name, values in table.columns.items()}
    lines = table.lines or []
    return Table(columns, table.source, [lines[row] for row in rows])
