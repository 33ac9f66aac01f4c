"""A user's own task from CSV, TSV, JSON or Parquet files: columns, labels, validation part."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparsegrad_cli.data.files import read_table
from sparsegrad_cli.data.spec import (
    CLASS_METRICS,
    SCORE_METRICS,
    Examples,
    RawTask,
    TaskSpec,
    suggest,
    with_metric,
)
from sparsegrad_cli.data.split_files import (
    PREFERRED,
    SUFFIXES,
    TRAIN_STEMS,
    VALIDATION_STEMS,
    find_split,
    lone_shard_note,
    no_training_file,
    split_folder,
    unread_note,
)
from sparsegrad_cli.data.table import Table
from sparsegrad_cli.data.text_files import is_text
from sparsegrad_cli.errors import DataError, UsageError

_ROLES = ("text", "text_pair", "label")
_LARGEST = 3.4e38  # that float32 holds, in which scores are learnt
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


def load_tabular(
    name: str,
    path: Path,
    columns: Mapping[str, str | None] | None,
    *,
    validation_fraction: float,
    metric: str | None,
    seed: int,
    separator: str | None = None,
) -> RawTask:
    """Read a task of the user's own.

    Args:
        name: ``csv``, ``json`` or ``parquet``: what a file without a telling suffix is, and what
            is looked for first in a folder.
        path: one file, or a folder with train.* and validation.* (or dev.*, valid.*, val.*).
        columns: names of the ``text``, ``text_pair`` and ``label`` columns. Left out: those very
            names, ``text_pair`` only where there is such a column.
        validation_fraction: share of rows split off where there is no validation file.
        metric: the selecting metric; accuracy or pearson for None. ``pearson`` and ``spearmanr``
            make whole-number labels scores; ``accuracy``, ``f1``, ``matthews_correlation`` need
            classes.
        seed: of that split.
        separator: what separates the columns of CSV and TSV files; None finds it out.

    Labels: numbers with a fraction anywhere are scores (regression); whole numbers (0.0 counts as
    0) and words are classes, ids given in sorted order of the values found in training.

    Raises:
        UsageError: a column that is not there, or a metric that does not fit the labels.
        DataError: an unreadable or empty file, an empty text or label, an unseen label.
    """
    train_table, validation_table, notes = _find_tables(name, path, separator)
    roles = _resolve_columns(train_table, columns)
    tables = [train_table] if validation_table is None else [train_table, validation_table]
    if validation_table is not None:
        _require_columns(validation_table, roles)
    raw_labels = [_labels(table, roles["label"]) for table in tables]
    regression = _is_regression(raw_labels, metric)
    names: tuple[str, ...] | None = None
    ids: Sequence[list[int] | list[float]]
    if regression:
        ids = [[float(value) for value in labels] for labels in raw_labels]
    else:
        names, ids = _encode_classes(tables, raw_labels)
    splits = [_examples(t, roles, labels) for t, labels in zip(tables, ids, strict=True)]
    if len(splits) == 1:
        train, validation, note = _split(splits[0], validation_fraction, seed, path)
        notes.append(note)
    else:
        train, validation = splits
    text_columns: tuple[str] | tuple[str, str] = (
        (roles["text"], roles["text_pair"]) if "text_pair" in roles else (roles["text"],)
    )
    spec = TaskSpec(
        name=name,
        text_columns=text_columns,
        label_column=roles["label"],
        label_names=names,
        regression=regression,
        metric="pearson" if regression else "accuracy",
        metrics=SCORE_METRICS if regression else ("accuracy",),
    )
    return RawTask(with_metric(spec, metric), train, {"validation": validation}, notes)


def _find_tables(
    name: str, path: Path, separator: str | None
) -> tuple[Table, Table | None, list[str]]:
    if path.is_file():
        table = read_table(path, name, separator)
        return table, None, [*lone_shard_note(path), *table.notes]
    if not path.is_dir():
        raise DataError(f"no such file or folder: {path}", where="task.path")
    suffixes = (*PREFERRED[name], *(s for s in SUFFIXES if s not in PREFERRED[name]))
    folder = split_folder(path, suffixes)
    files = [find_split(folder, stems, suffixes) for stems in (TRAIN_STEMS, VALIDATION_STEMS)]
    if not files[0]:
        raise no_training_file(path, suffixes)
    tables = [read_table(part, name, separator) for part in files if part]
    notes = unread_note(folder, [file for part in files for file in part])
    notes += [note for table in tables for note in table.notes]
    return tables[0], tables[1] if len(tables) > 1 else None, notes


def _resolve_columns(table: Table, columns: Mapping[str, str | None] | None) -> dict[str, str]:
    given = {role: column for role, column in (columns or {}).items() if column is not None}
    for role in given:
        if role not in _ROLES:
            raise UsageError(
                f"{role!r} is not a role of a column",
                where="task.columns",
                fix=suggest(role, _ROLES),
            )
    roles = {"text": given.get("text", "text")}
    if "text_pair" in given or "text_pair" in table.columns:
        roles["text_pair"] = given.get("text_pair", "text_pair")
    roles["label"] = given.get("label", "label")
    _require_columns(table, roles)
    return roles


def _require_columns(table: Table, roles: Mapping[str, str]) -> None:
    for role, column in roles.items():
        if column not in table.columns:
            raise UsageError(
                f"there is no column {column!r} for the {role.replace('_', ' ')} in {table.source}",
                where=f"task.columns.{role}",
                fix=suggest(column, tuple(table.columns)),
            )


def _labels(table: Table, column: str) -> list[int | float | str]:
    """Labels as numbers where every one in the file is a number, else all as words."""
    values = table.columns[column]
    for row, value in enumerate(values):
        empty = value is None or (isinstance(value, str) and not value.strip())
        if empty or (isinstance(value, float) and not math.isfinite(value)):
            shown = "empty" if empty else value
            raise DataError(f"the label in column {column!r} is {shown}", where=table.place(row))
        if not isinstance(value, str | int | float):
            raise DataError(
                f"the label in column {column!r} is a {type(value).__name__}: "
                "expected a word or a number",
                where=table.place(row),
            )
        if isinstance(value, int | float) and abs(value) > _LARGEST:
            raise _too_large(column, table.place(row))
    numbers = [_number(value) for value in values]
    if not all(number is not None for number in numbers):
        return [str(value).strip() for value in values]
    found = [number for number in numbers if number is not None]
    for row, number in enumerate(found):
        if abs(number) > _LARGEST:
            raise _too_large(column, table.place(row))
    return list(found)


def _too_large(column: str, place: str) -> DataError:
    return DataError(f"the label in column {column!r} is too large for a number", where=place)


def _number(value: Any) -> int | float | None:
    if isinstance(value, bool):
        return None
    if isinstance(value, str):
        # float() would also take "nan", "infinity" and "1_000", which are words here.
        if not _NUMBER.fullmatch(value.strip()):
            return None
        value = float(value)
    return int(value) if float(value).is_integer() else float(value)


def _is_regression(labels: list[list[int | float | str]], metric: str | None) -> bool:
    flat = [value for part in labels for value in part]
    numeric = not any(isinstance(value, str) for value in flat)
    fractional = numeric and any(isinstance(value, float) for value in flat)
    if metric in SCORE_METRICS and not numeric:
        raise UsageError(
            f"{metric} needs numbers, and the labels are words",
            where="task.metric",
            fix=f"one of {', '.join(CLASS_METRICS)}",
        )
    if metric in CLASS_METRICS and fractional:
        raise UsageError(
            f"{metric} needs classes, and the labels are numbers with a fraction",
            where="task.metric",
            fix=f"one of {', '.join(SCORE_METRICS)}",
        )
    return fractional or metric in SCORE_METRICS


def _encode_classes(
    tables: list[Table], labels: list[list[int | float | str]]
) -> tuple[tuple[str, ...], list[list[int]]]:
    seen = set(labels[0])
    # Numbers sort as numbers: 2 before 10. A file of words and one of numbers do not mix: the
    # label is then unseen, which is what it is.
    values = sorted(seen, key=lambda value: (isinstance(value, str), value))
    ids = {value: number for number, value in enumerate(values)}
    for table, part in zip(tables[1:], labels[1:], strict=True):
        for row, value in enumerate(part):
            if value not in ids:
                raise DataError(
                    f"label {value!r} occurs in validation but not in training, row {row + 1}",
                    where=table.place(row),
                    fix=f"labels in training: {', '.join(str(v) for v in values[:20])}",
                )
    if len(values) < 2:
        raise DataError(
            f"every training label is {values[0]!r}: there is nothing to learn",
            where=tables[0].source,
        )
    return tuple(str(value) for value in values), [[ids[v] for v in part] for part in labels]


def _examples(table: Table, roles: Mapping[str, str], labels: list[int] | list[float]) -> Examples:
    for role in ("text", "text_pair"):
        if role not in roles:
            continue
        for row, value in enumerate(table.columns[roles[role]]):
            if value is None or (isinstance(value, str) and not value.strip()):
                raise DataError(f"column {roles[role]!r} is empty", where=table.place(row))
            if not isinstance(value, str):
                raise DataError(
                    f"column {roles[role]!r} holds a {type(value).__name__}, expected text",
                    where=table.place(row),
                )
            if not is_text(value):
                what = f"column {roles[role]!r} holds half of a character (a lone surrogate)"
                raise DataError(what, where=table.place(row))
    pairs = table.columns[roles["text_pair"]] if "text_pair" in roles else None
    return Examples(table.columns[roles["text"]], pairs, labels)


def _split(
    examples: Examples, fraction: float, seed: int, path: Path
) -> tuple[Examples, Examples, str]:
    count = len(examples)
    if count < 2:
        raise DataError("one row cannot be split into training and validation", where=str(path))
    held = min(max(1, round(count * fraction)), count - 1)
    chosen = set(random.Random(seed).sample(range(count), held))
    parts = []
    for wanted in (False, True):
        rows = [row for row in range(count) if (row in chosen) is wanted]
        pairs = [examples.text_pair[r] for r in rows] if examples.text_pair is not None else None
        labels: Any = [examples.label[row] for row in rows]
        parts.append(Examples([examples.text[row] for row in rows], pairs, labels))
    note = (
        f"no validation file: {held} of {count} rows were split off at random (seed {seed}); "
        "name a folder with train and validation files to choose them yourself"
    )
    return parts[0], parts[1], note
