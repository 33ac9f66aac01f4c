"""A user's own task from CSV, TSV, JSON or Parquet files: columns, labels, validation part."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparsegrad_cli.data.files import read_table
from sparsegrad_cli.data.labels import read_labels
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
from sparsegrad_cli.data.validation_split import check_fraction_unused
from sparsegrad_cli.errors import DataError, UsageError
from sparsegrad_cli.io.suggest import suggest
from sparsegrad_cli.recipe.tasks import SCORE_METRICS, Examples, RawTask, TaskSpec, TaskType

_ROLES = ("text", "text_pair", "label")


def load_tabular(
    name: str,
    path: Path,
    columns: Mapping[str, str | None] | None,
    *,
    validation_fraction: float,
    task_type: TaskType | None,
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
        task_type: what the labels are; None goes by ``metric``, then by the labels themselves.
        metric: the selecting metric.
        seed: of that split.
        separator: what separates the columns of CSV and TSV files; None finds it out.

    What the labels are, and how a class is named, is decided in
    :mod:`sparsegrad_cli.data.labels`.

    Raises:
        UsageError: a column that is not there, or labels that do not fit the settings.
        DataError: an unreadable or empty file, an empty text or label, an unseen label.
    """
    train_table, validation_table, notes = _find_tables(name, path, separator)
    roles = _resolve_columns(train_table, columns)
    tables = [train_table] if validation_table is None else [train_table, validation_table]
    if validation_table is not None:
        _require_columns(validation_table, roles)
    notes += _columns_notes(tables, roles, columns)
    labels = read_labels(tables, roles["label"], task_type=task_type, metric=metric)
    splits = [_examples(t, roles, labels.values[i]) for i, t in enumerate(tables)]
    if len(splits) == 1:
        train, validation, note = _split(splits[0], validation_fraction, seed, path)
        notes.append(note)
    else:
        check_fraction_unused(validation_fraction)
        train, validation = splits
    text_columns: tuple[str] | tuple[str, str] = (
        (roles["text"], roles["text_pair"]) if "text_pair" in roles else (roles["text"],)
    )
    regression = labels.names is None
    spec = TaskSpec(
        name=name,
        text_columns=text_columns,
        label_column=roles["label"],
        label_names=labels.names,
        regression=regression,
        metric="pearson" if regression else "accuracy",
        metrics=SCORE_METRICS if regression else ("accuracy",),
    )
    return RawTask(spec, train, {"validation": validation}, [*notes, *labels.notes])


def check_columns(
    name: str, path: Path, columns: Mapping[str, str | None] | None, *, separator: str | None
) -> None:
    """Refuse files that lack a column; arguments and errors as :func:`load_tabular`."""
    train_table, validation_table, _ = _find_tables(name, path, separator)
    roles = _resolve_columns(train_table, columns)
    if validation_table is not None:
        _require_columns(validation_table, roles)


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
    notes = unread_note(path, [file for part in files for file in part])
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
    for role, column in roles.items():
        twice = [other for other in roles if roles[other] == column]
        if len(twice) > 1:
            raise UsageError(
                f"Expected a column for each of {' and '.join(twice)}, got {column!r} for both",
                where=f"task.columns.{role}",
                fix=f"columns found: {', '.join(table.columns)}",
            )
    return roles


def _columns_notes(
    tables: Sequence[Table], roles: Mapping[str, str], columns: Mapping[str, str | None] | None
) -> list[str]:
    """Return notes on a second text that no setting names, and on columns that are not used."""
    notes = []
    if "text_pair" in roles and not (columns or {}).get("text_pair"):
        notes.append("column text_pair is the second text of each row; rename it to leave it out")
    names = dict.fromkeys(name for table in tables for name in table.columns)
    unused = [name for name in names if name not in roles.values()]
    if unused:
        more = f" and {len(unused) - 10} more" if len(unused) > 10 else ""
        notes.append(f"columns that are not used: {', '.join(unused[:10])}{more}")
    return notes


def _require_columns(table: Table, roles: Mapping[str, str]) -> None:
    for role, column in roles.items():
        if column not in table.columns:
            raise UsageError(
                f"there is no column {column!r} for the {role.replace('_', ' ')} in {table.source}",
                where=f"task.columns.{role}",
                fix=suggest(column, tuple(table.columns)),
            )


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
