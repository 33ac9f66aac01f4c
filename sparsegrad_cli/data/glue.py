"""GLUE from a local folder: the original TSV layout with its quirks, or Parquet, CSV, JSON files.

Quirks read right: CoLA has no header; quotes are text; a byte-order mark before MRPC's header;
labels that are words; QQP's rows broken in two; MNLI's many columns and its ``-`` labels; STS-B's
extra columns. Class ids are those of the hub's nyu-mll/glue.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from sparsegrad_cli.data import mrpc
from sparsegrad_cli.data.delimited import bare_rows, column_count_error
from sparsegrad_cli.data.files import read_table
from sparsegrad_cli.data.labels import as_number
from sparsegrad_cli.data.split_files import find_split, looked_for, unread_note
from sparsegrad_cli.data.table import Table, concatenated
from sparsegrad_cli.data.text_files import is_text, read_text, unpacked_name
from sparsegrad_cli.errors import DataError, UsageError
from sparsegrad_cli.recipe.tasks import GLUE_TASKS, Examples, RawTask, TaskSpec

# Column names in the original files where they differ from the hub's.
_ORIGINAL_NAMES = {
    "mrpc": {"sentence1": "#1 String", "sentence2": "#2 String", "label": "Quality"},
    "stsb": {"label": "score"},
    "qqp": {"label": "is_duplicate"},
    "mnli": {"premise": "sentence1", "hypothesis": "sentence2", "label": "gold_label"},
}
_COLA_HEADER = ["source", "label", "mark", "sentence"]
_FOLDERS = {
    "cola": ("CoLA",),
    "sst2": ("SST-2", "SST2"),
    "mrpc": ("MRPC",),
    "stsb": ("STS-B", "STSB"),
    "qqp": ("QQP",),
    "mnli": ("MNLI",),
    "qnli": ("QNLI",),
    "rte": ("RTE",),
    "wnli": ("WNLI",),
}
_SUFFIXES = (".tsv", ".parquet", ".csv", ".jsonl", ".ndjson", ".json")  # the original layout first
_HIDDEN = -1
_IDS = {str(number): number for number in range(_HIDDEN, 3)}  # of the most classes that a task has
_NO_GOLD = "-"


def load_local_glue(task: str, path: Path) -> RawTask:
    """Read one GLUE task.

    Args:
        task: short name: ``cola``, ``rte``, ...
        path: the task's folder or the one above it.

    Raises:
        UsageError: the folder is that of another task.
        DataError: a file is missing or damaged, or a row does not fit.
    """
    spec = GLUE_TASKS[task]
    folder = _task_folder(task, path)
    notes: list[str] = []
    if task == "mrpc" and (found := mrpc.original_corpus(folder)) is not None:
        train = examples_from_table(spec, found.train, "train", notes)
        validation = examples_from_table(spec, found.validation, "validation", notes)
        notes.append(found.note)
        return RawTask(spec, train, {"validation": validation}, notes)
    read: list[Path] = []
    train = _read_split(task, folder, "train", ("train",), notes, read)
    parts = {}
    for split in spec.eval_splits:
        stems = (split.replace("validation", "dev"), split)
        parts[split] = _read_split(task, folder, split, stems, notes, read)
    notes += unread_note(folder, read, without=("test", "test_matched", "test_mismatched"))
    return RawTask(spec, train, parts, notes)


def _task_folder(task: str, path: Path) -> Path:
    if not path.is_dir():
        what = "is a file, not a folder" if path.exists() else "is not there"
        raise DataError(
            f"{path} {what}",
            where="task.path",
            fix=f"the folder of {_FOLDERS[task][0]}, or the one above it",
        )
    wanted = {name.lower() for name in _FOLDERS[task]}
    for child in sorted(path.iterdir()):
        if child.is_dir() and child.name.lower() in wanted:
            return child
    for other, names in _FOLDERS.items():
        if other != task and path.resolve().name.lower() in {name.lower() for name in names}:
            raise UsageError(
                f"the folder {path} is that of {names[0]}, not of {_FOLDERS[task][0]}",
                where="task.path",
                fix=f"task.name=glue/{other}, or another folder",
            )
    return path


def _read_split(
    task: str,
    folder: Path,
    split: str,
    stems: Sequence[str],
    notes: list[str],
    read: list[Path],
) -> Examples:
    """Read one split; ``notes`` and ``read`` get its notes and its files."""
    files = find_split(folder, stems, _SUFFIXES)
    read += files
    if not files:
        part = "training" if split == "train" else split.replace("_", " ")
        raise DataError(
            f"glue/{task} has no {part} file in {folder}",
            where="task.path",
            fix=f"looked for: {looked_for(stems, _SUFFIXES)}",
        )
    if Path(unpacked_name(files[0])).suffix == ".tsv":
        table = concatenated([read_original(task, file, split, notes) for file in files])
    else:
        table = read_table(files)
        notes.extend(table.notes)
    return examples_from_table(GLUE_TASKS[task], table, split, notes)


def read_original(task: str, path: Path, split: str, notes: list[str]) -> Table:
    """A file of the original layout as a table with its own column names.

    Raises:
        DataError: it holds no rows, or a row has the wrong number of columns.
    """
    rows = list(bare_rows(read_text(path)))
    if task == "cola" and (not rows or "sentence" not in rows[0][1]):
        header = _COLA_HEADER
    else:
        header = [name.strip() for name in rows[0][1]] if rows else []
        rows = rows[1:]
    whole, broken = [], 0
    for number, fields in rows:
        if len(fields) == len(header) or (task == "stsb" and len(fields) > len(header)):
            whole.append((number, fields))
        elif task == "qqp":
            # A line break inside a question tore some rows of the published file in two; the
            # hub's copy leaves them out as well.
            broken += 1
        else:
            raise column_count_error(path, number, len(fields), len(header))
    if broken:
        notes.append(f"{split}: {broken} broken lines of {path.name} left out, as in nyu-mll/glue")
    if not whole:
        raise DataError("the file holds no rows", where=str(path))
    columns = {name: [fields[i] for _, fields in whole] for i, name in enumerate(header)}
    return Table(columns, str(path), [number for number, _ in whole])


@dataclass
class _Dropped:
    hidden: int = 0
    no_gold: int = 0

    def notes(self, split: str) -> list[str]:
        found = []
        if self.hidden:
            found.append(f"{split}: {self.hidden} rows with the hidden label -1 left out")
        if self.no_gold:
            found.append(f"{split}: {self.no_gold} rows without a gold label ('-') left out")
        return found


def examples_from_table(spec: TaskSpec, table: Table, split: str, notes: list[str]) -> Examples:
    """Pick the columns, map labels to ids, leave out rows without a label."""
    originals = _ORIGINAL_NAMES.get(spec.name.removeprefix("glue/"), {})
    texts = [_column(table, name, originals) for name in spec.text_columns]
    label_column = _column(table, spec.label_column, originals)
    labels = table.columns[label_column]
    class_names = table.class_names.get(label_column, ())
    dropped = _Dropped()
    kept: list[int] = []
    values: list[Any] = []
    for row, raw in enumerate(labels):
        if isinstance(raw, int) and 0 <= raw < len(class_names):
            raw = class_names[raw]  # another file may number the classes in another way
        value = _parse_score(raw) if spec.regression else _parse_class(raw, spec)
        if value is None:
            raise DataError(
                f"{raw!r} is not a label of {spec.name}",
                where=table.place(row),
                fix="expected a number" if spec.regression else f"expected {_expected(spec)}",
            )
        if value == _HIDDEN:
            dropped.hidden += 1
        elif value == _NO_GOLD:
            dropped.no_gold += 1
        else:
            kept.append(row)
            values.append(value)
    notes.extend(dropped.notes(split))
    if not kept:
        raise DataError(f"no row of the {split} split has a label", where=table.source)
    columns = [[_text(table, name, row) for row in kept] for name in texts]
    return Examples(columns[0], columns[1] if len(columns) == 2 else None, values)


def _column(table: Table, name: str, originals: dict[str, str]) -> str:
    # The original name first: MNLI's own files have both a gold_label and other labels.
    for candidate in (originals.get(name, name), name):
        if candidate in table.columns:
            return candidate
    raise DataError(
        f"there is no column {originals.get(name, name)!r}: is this the right task?",
        where=table.source,
        fix=f"columns found: {', '.join(table.columns)}",
    )


def _text(table: Table, column: str, row: int) -> str:
    value = table.columns[column][row]
    if not isinstance(value, str):
        what = "is empty" if value is None else f"holds a {type(value).__name__}, expected text"
        raise DataError(f"column {column!r} {what}", where=table.place(row))
    if not is_text(value):
        what = "holds half of a character (a lone surrogate)"
        raise DataError(f"column {column!r} {what}", where=table.place(row))
    return value


def _parse_class(raw: Any, spec: TaskSpec) -> int | str | None:
    """A class id, -1, ``-``, or None for what is none of these."""
    names = spec.label_names or ()
    if isinstance(raw, str):
        word = raw.strip()
        if word.lower() in names:
            return names.index(word.lower())
        if word == _NO_GOLD and spec.name == "glue/mnli":
            return _NO_GOLD
        return _IDS.get(word) if _IDS.get(word, 0) < len(names) else None
    if isinstance(raw, bool) or not isinstance(raw, int | float) or raw != raw:
        return None
    return int(raw) if raw == _HIDDEN or raw in range(len(names)) else None


def _parse_score(raw: Any) -> float | None:
    if isinstance(raw, bool) or not isinstance(raw, str | int | float | Decimal):
        return None
    value = as_number(raw.strip()) if isinstance(raw, str) else float(raw)
    return value if value is not None and math.isfinite(value) else None


def _expected(spec: TaskSpec) -> str:
    names = spec.label_names or ()
    return ", ".join(f"{number} or {name}" for number, name in enumerate(names))
