"""Read texts with labels from the user's own CSV, TSV, JSON or Parquet files."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sparsegrad_cli.data.conversation import refuse_fraction
from sparsegrad_cli.data.examples import Examples, RawTexts, joined
from sparsegrad_cli.data.labels import Labels, read_labels
from sparsegrad_cli.data.mixing import mix
from sparsegrad_cli.data.multilabel import read_label_columns, read_label_lists
from sparsegrad_cli.data.read_table import read_table
from sparsegrad_cli.data.split_files import SUFFIXES, SUFFIXES_OF, split_files
from sparsegrad_cli.data.tables import Table, concatenated, read_text_cell
from sparsegrad_cli.errors import DataError, UsageError
from sparsegrad_cli.io.paths import expanded
from sparsegrad_cli.io.suggest import listed, suggest
from sparsegrad_cli.recipe.task_section import ColumnsSection, TaskSection
from sparsegrad_cli.recipe.tasks import MULTILABEL_METRICS, SCORE_METRICS, TaskSpec

# A fixed seed, not the run's: the seeds of a comparison must share their validation rows.
_SPLIT_SEED = 0


def load_labelled_files(task: TaskSection) -> RawTexts:
    """Read the file or folder that ``task.path`` names, or the sources of ``task.mix``.

    :mod:`sparsegrad_cli.data.labels` decides what the labels are, once for all files. A file
    without a validation part is split at random.

    Raises:
        UsageError: a column is missing, or the labels do not fit the settings.
        DataError: a file is unreadable or empty, a text or label is empty, or validation has a
            label that training lacks.
    """
    files = _read_tables(task)
    tables, notes = files.tables, list(files.notes)
    roles = _roles(tables, task.columns or ColumnsSection())
    notes += _column_notes(tables, roles, task.columns or ColumnsSection())
    labels = _read_labels(files, roles, task)
    parts = [_examples(table, roles, labels.values[at]) for at, table in enumerate(tables)]
    evaluation = dict(
        zip(files.evaluation, parts[len(parts) - len(files.evaluation) :], strict=True)
    )
    if all(table is not None for table in files.validation):
        refuse_fraction(task)
    every, held_out = parts[0], iter(parts[1:])
    trained: list[Examples] = []
    validated: list[Examples] = []
    start = 0
    for source, table in zip(files.train, files.validation, strict=True):
        own = every.select(range(start, start + len(source)))
        start += len(source)
        if table is not None:
            trained.append(own)
            validated.append(next(held_out))
            continue
        train, validation, note = _split(own, task.validation_fraction, source.source)
        trained.append(train)
        validated.append(validation)
        notes.append(note if task.mix is None else f"{source.source}: {note}")
    mixture = None
    if task.mix is not None:
        sizes = [len(part) for part in trained]
        names, weights = [s.label for s in task.mix], [s.weight for s in task.mix]
        mixture = mix(names, weights, sizes, task.mix_until)
        notes += mixture.notes("rows")
    train = trained[0] if mixture is None else joined(trained).select(mixture.positions)
    regression, multilabel = labels.names is None, task.type == "multilabel"
    metrics = MULTILABEL_METRICS if multilabel else SCORE_METRICS if regression else ("accuracy",)
    spec = TaskSpec(
        name=task.name,
        text_columns=(roles["text"], roles["text_pair"])
        if "text_pair" in roles
        else (roles["text"],),
        label_column=roles.get("label", "label"),
        label_names=labels.names,
        regression=regression,
        metric=metrics[0],
        metrics=metrics,
        multilabel=multilabel,
    )
    sets = {"validation": joined(validated), **evaluation}
    notes += _unlabelled_notes(sets) if multilabel else []
    return RawTexts(spec, train, sets, [*notes, *labels.notes], mixture)


def _read_labels(files: _Files, roles: Mapping[str, str], task: TaskSection) -> Labels:
    tables, sets = files.tables, files.sets
    if task.type != "multilabel":
        return read_labels(tables, sets, roles["label"], task)
    if task.columns is not None and task.columns.labels is not None:
        return read_label_columns(tables, task.columns.labels)
    return read_label_lists(tables, sets, roles["label"], task.label_separator)


def _unlabelled_notes(sets: Mapping[str, Examples]) -> list[str]:
    """Return a note for each set in which no row has any of several labels."""
    return [
        f"no row of {name} has a label: its F1 is 0 whatever the model predicts"
        for name, rows in sets.items()
        if not any(map(any, rows.label))
    ]


def check_columns(task: TaskSection) -> None:
    """Check that all files have the columns of the task; errors as :func:`load_labelled_files`."""
    _roles(_read_tables(task).tables, task.columns or ColumnsSection())


@dataclass(frozen=True)
class _Files:
    """The tables of a task.

    Attributes:
        train: one per source.
        validation: one per source; None if it has none.
        evaluation: name of a further evaluation set -> its table.
        notes: on the files.
    """

    train: list[Table]
    validation: list[Table | None]
    evaluation: dict[str, Table]
    notes: list[str]

    @property
    def tables(self) -> list[Table]:
        """The training rows of all sources as one table, then all others."""
        held_out = [table for table in self.validation if table is not None]
        return [concatenated(self.train), *held_out, *self.evaluation.values()]

    @property
    def sets(self) -> list[str]:
        """The name of the set of each of the tables."""
        held_out = ["validation" for table in self.validation if table is not None]
        return ["training", *held_out, *self.evaluation]


def _read_tables(task: TaskSection) -> _Files:
    own = SUFFIXES_OF[task.name]
    suffixes = (*own, *(suffix for suffix in SUFFIXES if suffix not in own))
    separator = "\t" if task.separator == "tab" else task.separator
    found = [split_files(expanded(path), suffixes) for path in task.train_paths]
    train = [read_table(files.train, task.name, separator) for files in found]
    validation = [
        read_table(files.validation, task.name, separator) if files.validation else None
        for files in found
    ]
    evaluation = {
        name: read_table([expanded(path)], task.name, separator)
        for name, path in (task.evaluation or {}).items()
    }
    tables = [table for table in (*train, *validation, *evaluation.values()) if table is not None]
    notes = [note for files in found for note in files.notes]
    return _Files(train, validation, evaluation, notes + [n for t in tables for n in t.notes])


def _roles(tables: Sequence[Table], columns: ColumnsSection) -> dict[str, str]:
    """Return role -> column name; ``text_pair`` only if the task has a second text.

    Of several label columns, each is a role of its own.
    """
    roles = {"text": columns.text or "text"}
    if columns.text_pair or "text_pair" in tables[0].columns:
        roles["text_pair"] = columns.text_pair or "text_pair"
    if columns.labels is None:
        roles["label"] = columns.label or "label"
    else:
        roles |= {f"labels.{number}": name for number, name in enumerate(columns.labels)}
    # Rows that name their columns themselves have None in a column that their whole file lacks.
    ragged = (part for whole in tables for part in whole.parts if part.ragged)
    for table in (*tables, *ragged):
        for role, column in roles.items():
            if column not in table.columns:
                shown = role.partition(".")[0]
                raise UsageError(
                    f"there is no column {column!r} for the {shown.replace('_', ' ')} in "
                    f"{table.source}",
                    where=f"task.columns.{shown}",
                    fix=_other_separator(table) or suggest(column, tuple(table.columns)),
                )
    for column in roles.values():
        same = [other for other in roles if roles[other] == column]
        if len(same) > 1:
            keys = [other.partition(".")[0] for other in same]
            raise UsageError(
                f"Expected a column for each of {' and '.join(keys)}, got {column!r} for both",
                where=f"task.columns.{keys[0]}",
                fix=f"columns found: {', '.join(tables[0].columns)}",
            )
    return roles


def _other_separator(table: Table) -> str | None:
    """Return which separator to set if a table's only column seems to hold several."""
    name, *more = table.columns
    found = next((mark for mark in ",;\t|" if mark in name), None)
    if more or found is None:
        return None
    written = "tab" if found == "\t" else found
    return (
        f"its only column is {name!r:.60}, which holds several names: "
        f"set task.separator to {written!r}, or leave it out"
    )


def _column_notes(
    tables: Sequence[Table], roles: Mapping[str, str], columns: ColumnsSection
) -> list[str]:
    notes = []
    if "text_pair" in roles and not columns.text_pair:
        notes.append("column text_pair is the second text of each row; rename it to leave it out")
    names = dict.fromkeys(name for table in tables for name in table.columns)
    unused = [name for name in names if name not in roles.values()]
    if unused:
        notes.append(f"columns that are not used: {listed(unused, 10)}")
    return notes


def _examples(table: Table, roles: Mapping[str, str], labels: Any) -> Examples:
    rows = range(len(table))
    texts = [read_text_cell(table, roles["text"], row, blank=False) for row in rows]
    pairs = None
    if "text_pair" in roles:
        pairs = [read_text_cell(table, roles["text_pair"], row, blank=False) for row in rows]
    return Examples(texts, pairs, labels)


def _split(examples: Examples, fraction: float, source: str) -> tuple[Examples, Examples, str]:
    """Split off validation rows at random; both parts keep the order of the file."""
    count = len(examples)
    if count < 2:
        raise DataError("one row cannot be split into training and validation", where=source)
    held_out = min(max(1, round(count * fraction)), count - 1)
    chosen = set(random.Random(_SPLIT_SEED).sample(range(count), held_out))
    parts = []
    for wanted in (False, True):
        parts.append(examples.select([row for row in range(count) if (row in chosen) is wanted]))
    note = (
        f"no validation file: {held_out} of {count} rows were split off at random (seed "
        f"{_SPLIT_SEED}); use a folder with train and validation files to choose them yourself"
    )
    return parts[0], parts[1], note
