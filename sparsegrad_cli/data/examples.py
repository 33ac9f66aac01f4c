"""Texts with labels: as they are read, and as a data set that is ready to be tokenized."""

from __future__ import annotations

import hashlib
import random
import struct
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sparsegrad_cli.data.mixing import Mixture
from sparsegrad_cli.errors import DataError
from sparsegrad_cli.io.suggest import listed
from sparsegrad_cli.recipe.task_section import TaskSection
from sparsegrad_cli.recipe.tasks import POSITIVE_METRICS, TaskSpec, with_metric
from sparsegrad_cli.records.run import MixedSource

if TYPE_CHECKING:
    from datasets import Dataset

HOLDOUT, UNUSED = "holdout", "unused"
# A fixed seed, not the run's: the seeds of a comparison share the rows that are held out.
_HOLDOUT_SEED = 0


@dataclass(frozen=True)
class Examples:
    """One split as it was read.

    Attributes:
        text: the first text of every example, in file order.
        text_pair: the second text of every example; None for a task with one text.
        label: class ids, scores, or for several labels a row a 1 or 0 for each of them.
    """

    text: list[str]
    text_pair: list[str] | None
    label: list[Any]

    def __len__(self) -> int:
        return len(self.text)

    def first(self, count: int | None) -> Examples:
        """Return the first ``count`` examples, or all of them for None."""
        if count is None or count >= len(self):
            return self
        return self.select(range(count))

    def select(self, rows: Sequence[int]) -> Examples:
        """Return the examples at these positions, in this order."""
        pairs = [self.text_pair[row] for row in rows] if self.text_pair is not None else None
        labels: Any = [self.label[row] for row in rows]
        return Examples([self.text[row] for row in rows], pairs, labels)


def joined(parts: Sequence[Examples]) -> Examples:
    """Return the examples of several parts, one after another."""
    if len(parts) == 1:
        return parts[0]
    pairs = None
    if parts[0].text_pair is not None:
        pairs = [text for part in parts for text in part.text_pair or ()]
    labels: Any = [label for part in parts for label in part.label]
    return Examples([text for part in parts for text in part.text], pairs, labels)


@dataclass(frozen=True)
class RawTexts:
    """Texts with labels as they were read, before limits.

    Attributes:
        spec: texts, labels and metrics of the task.
        train: the training examples; of a mixture, in its order.
        validation: split name -> examples; the first split selects the best model.
        notes: what was left out.
        mixture: which source each training example is from, with ``task.mix``.
    """

    spec: TaskSpec
    train: Examples
    validation: dict[str, Examples]
    notes: list[str] = field(default_factory=list)
    mixture: Mixture | None = None


@dataclass(frozen=True)
class TextData:
    """Texts with labels that are ready to be tokenized.

    Attributes:
        spec: texts, labels and metrics of the task.
        train: columns ``text`` (str), ``text_pair`` (str, only if examples have two texts) and
            ``label`` (int64 class ids, float32 scores, or for several labels a row a list of
            float32 with a 1 or 0 for each of them).
        validation: split name -> the same columns; the first split selects the best model.
        test: split name -> the same columns, for the test after training; empty without
            ``task.holdout``.
        notes: what was left out or split off.
        data_hash: sha256 (hex) over every text and label used, in order.
        majority: metric -> its value on the first test split, or else the first validation split,
            for always answering the most frequent training class (the mean training score for
            regression, the most frequent labels for several labels a row).
        sources: the sources of a mixture, with the rows taken of each.
    """

    spec: TaskSpec
    train: Dataset
    validation: dict[str, Dataset]
    notes: tuple[str, ...]
    data_hash: str
    majority: dict[str, float]
    sources: tuple[MixedSource, ...] = ()
    test: dict[str, Dataset] = field(default_factory=dict)


def finish(raw: RawTexts, task: TaskSection) -> TextData:
    """Apply the limits and the metric of a recipe, and make data sets.

    Raises:
        UsageError: the metric or the positive label does not fit the labels.
        DataError: a split is empty, or too few rows are left to hold out so many.
    """
    spec = with_metric(raw.spec, task.metric, task.positive_label)
    parts = _parts(raw, task)
    train = parts.train.first(task.train_limit)
    validation = {split: part.first(task.eval_limit) for split, part in parts.validation.items()}
    test = {split: part.first(task.eval_limit) for split, part in parts.test.items()}
    if task.test_unused is not None:
        unused = parts.train.select(range(len(train), len(parts.train))).first(task.test_unused)
        test[UNUSED] = unused
    for split, part in (("training", train), *validation.items(), *test.items()):
        if not len(part):
            raise DataError(f"the {split} split of {spec.name} is empty", where="task")
    notes = [
        *raw.notes,
        *parts.notes,
        *_limit_notes(parts, spec, train, validation, test),
        *_missing_class_notes(spec, train, {**validation, **test}),
        *_metric_notes(spec, task, {**validation, **test}),
    ]
    return TextData(
        spec=spec,
        train=_dataset(spec, train),
        validation={split: _dataset(spec, part) for split, part in validation.items()},
        notes=tuple(notes),
        data_hash=_hash({"train": train, **validation, **test}),
        majority=_majority(spec, train, next(iter((test or validation).values()))),
        sources=tuple(raw.mixture.sources(range(len(train)))) if raw.mixture else (),
        test={split: _dataset(spec, part) for split, part in test.items()},
    )


@dataclass(frozen=True)
class _Parts:
    """The rows of a task by what they are for, before limits.

    Attributes:
        train: the rows to train on.
        validation: split name -> rows; the first split selects the best model.
        test: split name -> rows for the test after training.
        notes: what was held out.
    """

    train: Examples
    validation: dict[str, Examples]
    test: dict[str, Examples]
    notes: list[str] = field(default_factory=list)


def _parts(raw: RawTexts, task: TaskSection) -> _Parts:
    """Hold out rows of training if the recipe says so; the validation data is then for the test."""
    if task.holdout is None:
        return _Parts(raw.train, raw.validation, {})
    rows = len(raw.train)
    count = task.holdout if isinstance(task.holdout, int) else round(task.holdout * rows)
    if not 0 < count < rows:
        raise DataError(
            f"expected 1 to {rows - 1} of the {rows} training rows to hold out, got {count}",
            where="task.holdout",
            fix="a smaller number, or a share such as 0.1",
        )
    held = set(random.Random(_HOLDOUT_SEED).sample(range(rows), count))
    further = task.evaluation or {}
    watched = {name: part for name, part in raw.validation.items() if name in further}
    test = {name: part for name, part in raw.validation.items() if name not in further}
    note = (
        f"{count} of {rows} training rows are held out at random to choose the best model; "
        f"{' and '.join(test)} data is the test set, measured after training"
    )
    return _Parts(
        raw.train.select([row for row in range(rows) if row not in held]),
        {HOLDOUT: raw.train.select(sorted(held)), **watched},
        test,
        [note],
    )


def _limit_notes(
    parts: _Parts,
    spec: TaskSpec,
    train: Examples,
    validation: Mapping[str, Examples],
    test: Mapping[str, Examples],
) -> list[str]:
    notes = []
    if len(train) < len(parts.train):
        notes.append(f"training uses the first {len(train)} of {len(parts.train)} rows")
        if spec.kind == "classification" and len(set(train.label)) == 1:
            notes.append("all of these rows have one label: the file seems to be sorted by label")
    whole = {**parts.validation, **parts.test}
    for split, part in {**validation, **test}.items():
        if split in whole and len(part) < len(whole[split]):
            notes.append(f"{split} uses the first {len(part)} of {len(whole[split])} rows")
    return notes


def _missing_class_notes(
    spec: TaskSpec, train: Examples, validation: Mapping[str, Examples]
) -> list[str]:
    """Return a note on classes or labels without a training row: they cannot be learnt."""
    names = spec.label_names or ()
    missing = set(range(len(names))) - {label for row in train.label for label in _ids(spec, row)}
    if not missing:
        return []
    shown = listed([names[label] for label in sorted(missing)], 10)
    one, more = ("label", "labels") if spec.multilabel else ("class", "classes")
    labels = (_ids(spec, label) for part in validation.values() for label in part.label)
    rows = sum(not missing.isdisjoint(ids) for ids in labels)
    word = one if len(missing) == 1 else more
    return [f"no training row has the {word} {shown} (validation rows: {rows})"]


def _ids(spec: TaskSpec, label: Any) -> list[int]:
    """Return the ids of the classes of a row; none for a score."""
    if spec.multilabel:
        return [number for number, value in enumerate(label) if value]
    return [] if spec.regression else [label]


def _metric_notes(
    spec: TaskSpec, task: TaskSection, validation: Mapping[str, Examples]
) -> list[str]:
    """Return notes on the positive class and on a metric that was replaced by its mean."""
    notes = []
    names = spec.label_names or ()
    if spec.metric in POSITIVE_METRICS and task.positive_label is None:
        notes.append(
            f"{spec.metric} is that of class {spec.positive_label!r}, the second of "
            f"{', '.join(names)}; set task.positive_label to choose the other class"
        )
    for split, part in validation.items():
        if spec.positive_label is not None and spec.positive_id not in part.label:
            notes.append(
                f"{split} has no row of class {spec.positive_label!r}: f1, precision and recall "
                "are 0 there whatever the model answers"
            )
    if spec.multilabel:
        notes.append(
            "a label is given from one probability on, the one with the highest micro F1 on all "
            f"rows of {next(iter(validation))}; scores are cross-fitted in two halves of the rows"
        )
    if task.metric is not None and task.metric != spec.metric:
        notes.append(f"{task.metric} of {len(names)} classes is their plain mean: {spec.metric}")
    return notes


def _dataset(spec: TaskSpec, examples: Examples) -> Dataset:
    from datasets import Dataset, Features, List, Value

    # An Arrow string column holds at most 2 GiB; a large_string column has no such limit.
    features: dict[str, Any] = {"text": Value("large_string")}
    columns: dict[str, Any] = {"text": examples.text}
    if examples.text_pair is not None:
        features["text_pair"] = Value("large_string")
        columns["text_pair"] = examples.text_pair
    kinds = {"classification": Value("int64"), "regression": Value("float32")}
    features["label"] = kinds.get(spec.kind, List(Value("float32")))
    columns["label"] = examples.label
    return Dataset.from_dict(columns, features=Features(features))


def _hash(parts: Mapping[str, Examples]) -> str:
    sha = hashlib.sha256()

    def add(text: str) -> None:
        # Hash the length first, so that two different sequences of texts never read the same.
        data = text.encode("utf-8", "surrogatepass")
        sha.update(struct.pack("<q", len(data)) + data)

    for split, part in parts.items():
        add(split)
        sha.update(struct.pack("<q?", len(part), part.text_pair is not None))
        for row in range(len(part)):
            add(part.text[row])
            if part.text_pair is not None:
                add(part.text_pair[row])
            label = part.label[row]
            values = label if isinstance(label, list) else [label]
            sha.update(struct.pack(f"<{len(values)}d", *values))
    return sha.hexdigest()


def _majority(spec: TaskSpec, train: Examples, validation: Examples) -> dict[str, float]:
    import numpy as np

    from sparsegrad_cli.data.metrics import metric_values

    answer: float
    if spec.multilabel:
        return _usual_labels(spec, np.asarray(train.label), np.asarray(validation.label))
    if spec.regression:
        answer = float(np.mean(train.label))
    else:
        counts = Counter(train.label)
        answer = min(counts, key=lambda label: (-counts[label], label))
    predictions = np.full(len(validation), answer)
    return metric_values(spec, predictions, np.asarray(validation.label)).values


def _usual_labels(spec: TaskSpec, train_NL: Any, validation_NL: Any) -> dict[str, float]:
    """Return the metrics of giving every row the same labels: those that are frequent enough."""
    import numpy as np

    from sparsegrad_cli.data.multilabel_metrics import choose_threshold, multilabel_values

    shares_L = train_NL.mean(axis=0)
    threshold = choose_threshold(np.broadcast_to(shares_L, train_NL.shape), train_NL)
    shares_NL = np.broadcast_to(shares_L, validation_NL.shape)
    values, _ = multilabel_values(spec, shares_NL, shares_NL >= threshold, validation_NL)
    return values
