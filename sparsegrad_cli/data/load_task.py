"""Load a task by name: GLUE (hub or local), the built-in one, or the user's own files."""

from __future__ import annotations

import hashlib
import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sparsegrad_cli.data.glue import load_local_glue
from sparsegrad_cli.data.hub import load_hub_glue
from sparsegrad_cli.data.labelled_files import load_tabular
from sparsegrad_cli.errors import DataError, UsageError
from sparsegrad_cli.io.suggest import suggest
from sparsegrad_cli.recipe.tasks import (
    BUILTIN_TASKS,
    FILE_TASKS,
    GLUE_TASKS,
    POSITIVE_METRICS,
    Examples,
    RawTask,
    TaskSpec,
    TaskType,
    check_settings,
    known_task_names,
    with_metric,
)

if TYPE_CHECKING:
    from datasets import Dataset

_BUILTIN_SEED = 0  # of the generator; not the training seed, so that every run has the same data
_MOST_NAMES = 10  # of classes in a note
_BUILTIN_SIZES: dict[Literal["train", "validation"], int] = {"train": 4000, "validation": 1000}


@dataclass(frozen=True)
class LoadedTask:
    """A task ready to be tokenized.

    Attributes:
        spec: what it is.
        train: columns ``text`` (str), ``text_pair`` (str, only in a pair task) and ``label``
            (int64 class ids, or float32 scores).
        validation: split name -> the same columns; the first split selects.
        notes: what was left out or split off, for the user to know.
        data_hash: sha256 (hex) over every text and label used, in order.
        majority: metric -> its value on the first validation split for always answering the
            commonest training class (the mean training score for regression).
    """

    spec: TaskSpec
    train: Dataset
    validation: dict[str, Dataset]
    notes: tuple[str, ...]
    data_hash: str
    majority: dict[str, float]


def load_task(
    name: str,
    *,
    path: str | Path | None = None,
    columns: Mapping[str, str | None] | None = None,
    train_limit: int | None = None,
    eval_limit: int | None = None,
    validation_fraction: float = 0.1,
    task_type: TaskType | None = None,
    metric: str | None = None,
    positive_label: str | None = None,
    seed: int = 0,
    separator: str | None = None,
) -> LoadedTask:
    """Load the task ``name`` as data sets.

    Args:
        name, path, columns, validation_fraction, task_type, metric, positive_label, seed,
            separator: as :func:`load_raw`.
        train_limit: use the FIRST n training rows, in file order; None uses all.
        eval_limit: use the first n rows of every validation split; None uses all.

    Raises:
        SparsegradError: as :func:`load_raw`.
        UsageError: a limit below 1.
        DataError: an empty split.
    """
    raw = load_raw(
        name,
        path=path,
        columns=columns,
        validation_fraction=validation_fraction,
        task_type=task_type,
        metric=metric,
        positive_label=positive_label,
        seed=seed,
        separator=separator,
    )
    return _finish(raw, train_limit, eval_limit, metric, positive_label)


def load_raw(
    name: str,
    *,
    path: str | Path | None = None,
    columns: Mapping[str, str | None] | None = None,
    validation_fraction: float = 0.1,
    task_type: TaskType | None = None,
    metric: str | None = None,
    positive_label: str | None = None,
    seed: int = 0,
    separator: str | None = None,
) -> RawTask:
    """Read the task ``name``, all of it.

    Args:
        name: one of known_task_names().
        path: local folder (GLUE), or file or folder (csv, json, parquet). GLUE without a path
            comes from the hub or its local cache.
        columns: names of the text, text_pair and label columns; only for csv, json, parquet.
        validation_fraction: share split off at random where the user's files have no validation.
        task_type: what the labels are; only for csv, json, parquet.
        metric: the selecting metric; None takes the task's own.
        positive_label: the class that f1, precision and recall of two classes are of; None takes
            the second in the order of class ids.
        seed: of that split; nothing else here is random.
        separator: what separates the columns of CSV and TSV files: one character, or ``tab``; None
            finds it out. Only for csv, json, parquet.

    Raises:
        UsageError: unknown task, metric or column, or an argument that does not go with the task.
        DataError: missing or damaged files, empty splits, rows that do not fit.
        DownloadError: GLUE is neither cached nor reachable.
    """
    if not 0 < validation_fraction < 1:
        raise UsageError(
            f"validation_fraction is {validation_fraction:g}, it must lie between 0 and 1",
            where="task.validation_fraction",
        )
    check_settings(name, task_type=task_type, metric=metric, positive_label=positive_label)
    folder = Path(path).expanduser() if path is not None else None
    if name in FILE_TASKS:
        mark = "\t" if separator == "tab" else separator
        raw = _tabular(name, folder, columns, validation_fraction, task_type, metric, seed, mark)
    elif columns and any(columns.values()):
        raise UsageError(
            f"columns cannot be chosen for {name}: they are known",
            where="task.columns",
            fix=f"leave them out, or use task.name: {', '.join(FILE_TASKS)}",
        )
    elif name.removeprefix("glue/") in GLUE_TASKS and name.startswith("glue/"):
        short = name.removeprefix("glue/")
        raw = load_local_glue(short, folder) if folder is not None else load_hub_glue(short)
    elif name in BUILTIN_TASKS:
        if folder is not None:
            raise UsageError(f"{name} is generated and takes no path", where="task.path")
        raw = _builtin(name)
    else:
        fix = suggest(name, known_task_names())
        raise UsageError(f"unknown task {name!r}", where="task.name", fix=fix)
    return raw


def _tabular(
    name: str,
    path: Path | None,
    columns: Mapping[str, str | None] | None,
    validation_fraction: float,
    task_type: TaskType | None,
    metric: str | None,
    seed: int,
    separator: str | None,
) -> RawTask:
    if path is None:
        raise UsageError(
            f"task {name} needs a path",
            where="task.path",
            fix=f"the {name} file, or a folder with train and validation files",
        )
    return load_tabular(
        name,
        path,
        columns,
        validation_fraction=validation_fraction,
        task_type=task_type,
        metric=metric,
        seed=seed,
        separator=separator,
    )


def _builtin(name: str) -> RawTask:
    from sparsegrad_cli.data.builtin.acceptability import generate

    parts: dict[str, Examples] = {}
    for split, size in _BUILTIN_SIZES.items():
        made = generate(split, size, seed=_BUILTIN_SEED)
        parts[split] = Examples([j.sentence for j in made], None, [int(j.label) for j in made])
    return RawTask(BUILTIN_TASKS[name], parts["train"], {"validation": parts["validation"]})


def _finish(
    raw: RawTask,
    train_limit: int | None,
    eval_limit: int | None,
    metric: str | None,
    positive_label: str | None,
) -> LoadedTask:
    for key, limit in (("train_limit", train_limit), ("eval_limit", eval_limit)):
        if limit is not None and limit < 1:
            raise UsageError(f"{key} is {limit}, it must be at least 1", where=f"task.{key}")
    spec = with_metric(raw.spec, metric, positive_label)
    train = raw.train.first(train_limit)
    validation = {split: part.first(eval_limit) for split, part in raw.validation.items()}
    for split, part in (("training", train), *validation.items()):
        if not len(part):
            raise DataError(f"the {split} split of {spec.name} is empty", where="task")
    notes = list(raw.notes)
    if train_limit is not None and len(train) < len(raw.train):
        notes.append(f"training uses the first {len(train)} of {len(raw.train)} rows")
        if not spec.regression and len(set(train.label)) == 1:
            notes.append("all of these rows have one label: the file seems to be sorted by label")
    for split, part in validation.items():
        if len(part) < len(raw.validation[split]):
            notes.append(f"{split} uses the first {len(part)} of {len(raw.validation[split])} rows")
    notes += _absent_classes(spec, train, validation)
    if spec.metric in POSITIVE_METRICS and positive_label is None:
        notes.append(
            f"{spec.metric} is that of class {spec.positive_label!r}, the second of "
            f"{', '.join(spec.label_names or ())}; task.positive_label chooses another"
        )
    for split, part in validation.items():
        if spec.positive_label is not None and spec.positive_id not in part.label:
            notes.append(
                f"{split} has no row of class {spec.positive_label!r}: f1, precision and recall "
                "are 0 there whatever the model answers"
            )
    if metric is not None and metric != spec.metric:
        notes.append(
            f"{metric} of {len(spec.label_names or ())} classes is their plain mean: {spec.metric}"
        )
    return LoadedTask(
        spec=spec,
        train=_dataset(spec, train),
        validation={split: _dataset(spec, part) for split, part in validation.items()},
        notes=tuple(notes),
        data_hash=_hash({"train": train, **validation}),
        majority=_majority(spec, train, next(iter(validation.values()))),
    )


def _absent_classes(
    spec: TaskSpec, train: Examples, validation: Mapping[str, Examples]
) -> list[str]:
    """A note on classes that no training row has: they cannot be learnt."""
    present = set(train.label)
    absent = [name for i, name in enumerate(spec.label_names or ()) if i not in present]
    if not absent:
        return []
    ids = set(range(len(spec.label_names or ()))) - present
    rows = sum(label in ids for part in validation.values() for label in part.label)
    shown = ", ".join(absent[:_MOST_NAMES]) + (" ..." if len(absent) > _MOST_NAMES else "")
    many = "class" if len(absent) == 1 else "classes"
    return [f"no training row has the {many} {shown} (validation rows: {rows})"]


def _dataset(spec: TaskSpec, examples: Examples) -> Dataset:
    from datasets import Dataset, Features, Value

    # Arrow's string holds 2 GiB in all.
    features = {"text": Value("large_string")}
    columns: dict[str, Any] = {"text": examples.text}
    if examples.text_pair is not None:
        features["text_pair"] = Value("large_string")
        columns["text_pair"] = examples.text_pair
    features["label"] = Value("float32" if spec.regression else "int64")
    columns["label"] = examples.label
    return Dataset.from_dict(columns, features=Features(features))


def _hash(parts: Mapping[str, Examples]) -> str:
    sha = hashlib.sha256()

    def add(text: str) -> None:
        # The length first, so that no two sequences of texts read alike when joined.
        data = text.encode("utf-8", "surrogatepass")
        sha.update(struct.pack("<q", len(data)) + data)

    for split, part in parts.items():
        add(split)
        sha.update(struct.pack("<q?", len(part), part.text_pair is not None))
        for row in range(len(part)):
            add(part.text[row])
            if part.text_pair is not None:
                add(part.text_pair[row])
            sha.update(struct.pack("<d", part.label[row]))
    return sha.hexdigest()


def _majority(spec: TaskSpec, train: Examples, validation: Examples) -> dict[str, float]:
    import numpy as np

    from sparsegrad_cli.data.metrics import metric_values

    answer: float
    if spec.regression:
        answer = float(np.mean(train.label))
    else:
        counts = Counter(train.label)
        answer = min(counts, key=lambda label: (-counts[label], label))
    predictions = np.full(len(validation), answer)
    return metric_values(spec, predictions, np.asarray(validation.label)).values
