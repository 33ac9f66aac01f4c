"""Read GLUE from a local folder or from the hub.

A folder holds the original TSV files or Parquet, CSV or JSON files. Class ids are those of the
hub's nyu-mll/glue. The original files are tab-separated, with quotes as text: CoLA has no header,
QQP has rows that a line break tore in two, STS-B has rows with extra columns, and MRPC's training
and development parts are cut from one file of Microsoft's corpus.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

from sparsegrad_cli.data.delimited import check_width, unquoted_rows
from sparsegrad_cli.data.examples import Examples, RawTexts
from sparsegrad_cli.data.hub import hub_table, load_hub_splits
from sparsegrad_cli.data.label_texts import is_number
from sparsegrad_cli.data.read_table import file_format, read_table
from sparsegrad_cli.data.split_files import find_split, tried_names, unread_notes
from sparsegrad_cli.data.tables import Table, concatenated, read_text_cell
from sparsegrad_cli.data.text_files import read_text
from sparsegrad_cli.errors import DataError, UsageError
from sparsegrad_cli.recipe.tasks import GLUE_TASKS, TaskSpec

HUB_ID = "nyu-mll/glue"
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
# Column names of the original files that differ from the hub's.
ORIGINAL_NAMES = {
    "mrpc": {"sentence1": "#1 String", "sentence2": "#2 String", "label": "Quality"},
    "stsb": {"label": "score"},
    "qqp": {"label": "is_duplicate"},
    "mnli": {"premise": "sentence1", "hypothesis": "sentence2", "label": "gold_label"},
}
SUFFIXES = (".tsv", ".parquet", ".csv", ".jsonl", ".ndjson", ".json")  # the original files first
_COLA_HEADER = ["source", "label", "mark", "sentence"]
_MRPC_TRAIN = "msr_paraphrase_train.txt"
_MRPC_TEST = "msr_paraphrase_test.txt"
_MRPC_DEV_IDS = ("mrpc_dev_ids.tsv", "dev_ids.tsv")
_MRPC_ID_COLUMNS = ("#1 ID", "#2 ID")
_HIDDEN = -1  # label of test rows
_NO_GOLD = "-"  # label of MNLI rows on which the annotators did not agree
_IDS = {str(number): number for number in range(_HIDDEN, 3)}  # no GLUE task has more classes


def load_local_glue(task: str, path: Path) -> RawTexts:
    """Read one GLUE task from files.

    Args:
        task: short name: ``cola``, ``rte``, ...
        path: the folder of the task, or its parent.

    Raises:
        UsageError: the folder is that of another task.
        DataError: a file is missing or damaged, or a row does not fit.
    """
    spec = GLUE_TASKS[task]
    folder = task_folder(task, path)
    notes: list[str] = []
    corpus = _mrpc_corpus(folder) if task == "mrpc" else None
    if corpus is not None:
        train = _examples(spec, corpus[0], "train", notes)
        validation = _examples(spec, corpus[1], "validation", notes)
        return RawTexts(spec, train, {"validation": validation}, [*notes, corpus[2]])
    tables, files = {}, []
    for split in ("train", *spec.eval_splits):
        stems = (split.replace("validation", "dev"), split)
        found = find_split(folder, stems, SUFFIXES)
        if not found:
            part = "training" if split == "train" else split.replace("_", " ")
            raise DataError(
                f"glue/{task} has no {part} file in {folder}",
                where="task.path",
                fix=f"tried: {tried_names(stems, SUFFIXES)}",
            )
        files += found
        tables[split] = read_split(task, found, split)
    parts = {}
    for split, table in tables.items():
        notes += table.notes
        parts[split] = _examples(spec, table, split, notes)
    notes += unread_notes(folder, files, ignored=("test", "test_matched", "test_mismatched"))
    return RawTexts(spec, parts.pop("train"), parts, notes)


def load_hub_glue(task: str) -> RawTexts:
    """Read one GLUE task from the hub's nyu-mll/glue, or from the local cache.

    Args:
        task: short name: ``cola``, ``rte``, ...

    Raises:
        DownloadError: it is neither cached nor reachable; says how to use local files.
    """
    spec = GLUE_TASKS[task]
    fix = (
        f"set task.path to a local folder with {task}'s train and dev files (the original TSV "
        "files, or Parquet, CSV or JSON lines), or connect once to fill the cache"
    )
    splits = ("train", *spec.eval_splits)
    loaded, notes = load_hub_splits(HUB_ID, splits, config=task, called=spec.name, fix=fix)
    parts = {}
    for split, data in loaded.items():
        table = hub_table(data, f"{HUB_ID} {task} {split}")
        parts[split] = _examples(spec, table, split, notes)
    return RawTexts(spec, parts.pop("train"), parts, notes)


def task_folder(task: str, path: Path) -> Path:
    """Return the folder of a task: a folder of its name in ``path``, or ``path`` itself.

    Raises:
        UsageError: the folder is that of another task.
        DataError: there is no such folder.
    """
    if not path.is_dir():
        what = "is a file, not a folder" if path.exists() else "does not exist"
        raise DataError(
            f"{path} {what}",
            where="task.path",
            fix=f"the folder of {_FOLDERS[task][0]}, or its parent",
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
                fix=f"set task.name=glue/{other}, or another folder",
            )
    return path


def read_split(task: str, files: Sequence[Path], split: str) -> Table:
    """Read the files of one split, of the original layout or of another format."""
    if file_format(files[0], "csv") == ".tsv":
        return concatenated([_read_original(task, file, split) for file in files])
    return read_table(files)


def _examples(spec: TaskSpec, table: Table, split: str, notes: list[str]) -> Examples:
    """Take the columns of a task, map labels to ids, and leave out rows without a label.

    ``notes`` gets the numbers of rows that are left out.
    """
    originals = ORIGINAL_NAMES.get(spec.name.removeprefix("glue/"), {})
    texts = [original_column(table, name, originals) for name in spec.text_columns]
    label_column = original_column(table, spec.label_column, originals)
    class_names = table.class_names.get(label_column, ())
    dropped: Counter[str] = Counter()
    rows: list[int] = []
    labels: list[Any] = []
    for row, raw in enumerate(table.columns[label_column]):
        if isinstance(raw, int) and 0 <= raw < len(class_names):
            raw = class_names[raw]  # files may number the classes in different orders
        value = _parse_score(raw) if spec.regression else _parse_class(raw, spec)
        if value is None:
            raise DataError(
                f"{raw!r} is not a label of {spec.name}",
                where=table.place(row),
                fix="expected a number" if spec.regression else f"expected {_class_list(spec)}",
            )
        if value == _HIDDEN:
            dropped["with the hidden label -1"] += 1
        elif value == _NO_GOLD:
            dropped["without a gold label ('-')"] += 1
        else:
            rows.append(row)
            labels.append(value)
    notes.extend(f"{split}: {count} rows {what} left out" for what, count in dropped.items())
    if not rows:
        raise DataError(f"no row of the {split} split has a label", where=table.source)
    columns = [[read_text_cell(table, name, row, blank=True) for row in rows] for name in texts]
    return Examples(columns[0], columns[1] if len(columns) == 2 else None, labels)


def original_column(table: Table, name: str, originals: Mapping[str, str]) -> str:
    """Return the name of a column in a table, which may have the original layout.

    Raises:
        DataError: there is no such column.
    """
    # The original name first: MNLI's own files have a gold_label and other labels.
    for candidate in (originals.get(name, name), name):
        if candidate in table.columns:
            return candidate
    raise DataError(
        f"there is no column {originals.get(name, name)!r}: is this the right task?",
        where=table.source,
        fix=f"columns found: {', '.join(table.columns)}",
    )


def _parse_class(raw: Any, spec: TaskSpec) -> int | str | None:
    """Return a class id, -1 or ``-``; None for anything else."""
    names = spec.label_names or ()
    if isinstance(raw, str):
        word = raw.strip()
        if word.lower() in names:
            return names.index(word.lower())
        if word == _NO_GOLD and spec.name == "glue/mnli":
            return _NO_GOLD
        return _IDS.get(word) if _IDS.get(word, 0) < len(names) else None
    if isinstance(raw, bool) or not isinstance(raw, int | float) or math.isnan(raw):
        return None
    return int(raw) if raw == _HIDDEN or raw in range(len(names)) else None


def _parse_score(raw: Any) -> float | None:
    if isinstance(raw, bool) or not isinstance(raw, str | int | float | Decimal):
        return None
    if isinstance(raw, str) and not is_number(raw.strip()):
        return None
    return float(raw) if math.isfinite(float(raw)) else None


def _class_list(spec: TaskSpec) -> str:
    return ", ".join(f"{number} or {name}" for number, name in enumerate(spec.label_names or ()))


def _read_original(task: str, path: Path, split: str = "") -> Table:
    """Read a file of the original layout as a table with its own column names."""
    rows = list(unquoted_rows(read_text(path)))
    if task == "cola" and (not rows or "sentence" not in rows[0][1]):
        header = _COLA_HEADER
    else:
        header = [name.strip() for name in rows[0][1]] if rows else []
        rows = rows[1:]
    # A line break inside a question tore some rows of the published QQP file in two. The hub's
    # copy leaves them out as well.
    torn = [line for line, cells in rows if task == "qqp" and len(cells) != len(header)]
    rows = [(line, cells) for line, cells in rows if line not in set(torn)]
    for line, cells in rows:
        if task != "stsb" or len(cells) < len(header):
            check_width(cells, len(header), path, line)
    if not rows:
        raise DataError("the file holds no rows", where=str(path))
    notes: tuple[str, ...] = ()
    if torn:
        notes = (f"{split}: {len(torn)} torn lines of {path.name} left out, as in nyu-mll/glue",)
    columns = {name: [cells[at] for _, cells in rows] for at, name in enumerate(header)}
    return Table(columns, str(path), [line for line, _ in rows], notes=notes)


def _mrpc_corpus(folder: Path) -> tuple[Table, Table, str] | None:
    """Read MRPC from the files that Microsoft published; None if the folder lacks them.

    Returns training, validation, and a note that says how they were told apart.
    Validation is, in this order: dev.tsv, whose rows are removed from training; the training rows
    that mrpc_dev_ids.tsv or dev_ids.tsv names; the test part of the corpus.
    """
    source = folder / _MRPC_TRAIN
    if (folder / "train.tsv").is_file() or not source.is_file():
        return None
    table = _read_mrpc(source)
    if (folder / "dev.tsv").is_file():
        validation = _read_mrpc(folder / "dev.tsv")
        train = _select(table, set(_mrpc_ids(validation)), inside=False)
        return train, validation, f"training is {_MRPC_TRAIN} without the rows of dev.tsv"
    for name in _MRPC_DEV_IDS:
        if (folder / name).is_file():
            rows = unquoted_rows(read_text(folder / name))
            ids: set[tuple[str, ...]] = {(cells[0], cells[-1]) for _, cells in rows}
            train, validation = (_select(table, ids, inside=inside) for inside in (False, True))
            return train, validation, f"validation is the rows of {_MRPC_TRAIN} in {name}"
    if (folder / _MRPC_TEST).is_file():
        note = (
            f"validation is {_MRPC_TEST}, the test part of the corpus: no GLUE dev part was found"
        )
        return table, _read_mrpc(folder / _MRPC_TEST), note
    raise DataError(
        f"glue/mrpc has no validation file in {folder}",
        where="task.path",
        fix=f"tried: dev.tsv, {', '.join(_MRPC_DEV_IDS)}, {_MRPC_TEST}",
    )


def _read_mrpc(path: Path) -> Table:
    table = _read_original("mrpc", path)
    for name in _MRPC_ID_COLUMNS:
        if name not in table.columns:
            raise DataError(
                f"there is no column {name!r}",
                where=str(path),
                fix=f"columns found: {', '.join(table.columns)}",
            )
    return table


def _mrpc_ids(table: Table) -> list[tuple[str, ...]]:
    return list(zip(*(table.columns[name] for name in _MRPC_ID_COLUMNS), strict=True))


def _select(table: Table, ids: set[tuple[str, ...]], *, inside: bool) -> Table:
    """Return the rows whose ids are among ``ids``, or those whose ids are not."""
    rows: Sequence[int] = [at for at, key in enumerate(_mrpc_ids(table)) if (key in ids) is inside]
    columns = {name: [values[row] for row in rows] for name, values in table.columns.items()}
    lines = table.lines or []
    return Table(columns, table.source, [lines[row] for row in rows])
