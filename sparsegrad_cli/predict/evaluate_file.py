"""Measure a trained classifier on a file of texts with labels."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sparsegrad_cli.data.label_texts import LabelValueError, label_text
from sparsegrad_cli.data.metrics import metric_values
from sparsegrad_cli.errors import DataError, UsageError
from sparsegrad_cli.io.suggest import listed, suggest
from sparsegrad_cli.predict.classifier import Classifier
from sparsegrad_cli.predict.predict_rows import CHUNK, cell_text, text_columns
from sparsegrad_cli.predict.row_stream import Row, open_rows
from sparsegrad_cli.progress import Observer
from sparsegrad_cli.recipe.tasks import SCORE_METRICS, TaskSpec
from sparsegrad_cli.records.evaluation import (
    ClassScores,
    EvaluationRecord,
    MetricValue,
    WrongExample,
)

_CLASS_METRICS = ("accuracy", "f1_macro", "matthews_correlation")
_SHOWN = 2000  # Characters of a text that are kept of a wrong example.


@dataclass(frozen=True)
class EvaluateOptions:
    """What to measure.

    Attributes:
        file: the labelled rows.
        text_column, text_pair_column, label_column: columns; by default those of training.
        batch_size: rows of a batch.
        resamples: of the bootstrap; 0 for no intervals.
        seed: of the bootstrap.
        worst: number of wrong examples to keep.
    """

    file: Path
    text_column: str | None = None
    text_pair_column: str | None = None
    label_column: str | None = None
    batch_size: int = 64
    resamples: int = 1000
    seed: int = 0
    worst: int = 20


@dataclass
class _Answers:
    """Rows with their labels and outputs; the texts of the worst rows alone."""

    outputs: np.ndarray
    labels: np.ndarray
    losses: np.ndarray
    worst: list[WrongExample]
    cut: int
    notes: list[str]


def evaluate_file(
    classifier: Classifier,
    options: EvaluateOptions,
    model: str,
    observer: Observer | None = None,
) -> EvaluationRecord:
    """Return the record of an evaluation.

    Args:
        classifier: the model.
        options: what to measure.
        model: the model as the user named it.
        observer: receives the number of rows that are read.

    Raises:
        UsageError: a column is missing.
        DataError: a text or label is missing, or a label is not a class of the model.
    """
    answers = _answers(classifier, options, observer or Observer())
    spec = _spec(classifier)
    outputs = answers.outputs
    predicted = outputs[:, 0] if spec.regression else outputs.argmax(axis=1)
    found = metric_values(spec, predicted, answers.labels)
    intervals = _bootstrap(spec, predicted, answers.labels, options)
    return EvaluationRecord(
        model=model,
        about=classifier.about,
        file=str(options.file),
        rows=len(answers.labels),
        cut=answers.cut,
        loss=float(answers.losses.mean()),
        metrics={
            name: MetricValue(value=value, interval=intervals.get(name))
            for name, value in found.values.items()
        },
        resamples=options.resamples,
        seed=options.seed,
        classes=[] if spec.regression else _classes(spec, predicted, answers.labels),
        confusion=[] if spec.regression else _confusion(spec, predicted, answers.labels),
        worst=answers.worst,
        notes=[*answers.notes, *found.notes],
    )


def _spec(classifier: Classifier) -> TaskSpec:
    regression = classifier.label_names is None
    metrics = SCORE_METRICS if regression else _CLASS_METRICS
    return TaskSpec(
        name="the file",
        text_columns=("text",),
        label_column="label",
        label_names=classifier.label_names,
        regression=regression,
        metric=metrics[0],
        metrics=metrics,
    )


def _answers(classifier: Classifier, options: EvaluateOptions, observer: Observer) -> _Answers:
    stream = open_rows(options.file)
    columns = text_columns(stream.names, classifier, options.text_column, options.text_pair_column)
    label_column = options.label_column or "label"
    if label_column not in stream.names:
        raise UsageError(
            f"the file has no column {label_column!r} for the labels",
            where="--label-column",
            fix=f"--label-column NAME; {suggest(label_column, stream.names)}",
        )
    read = functools.partial(_read_label, classifier.label_names, label_column)
    outputs, labels, losses = [], [], []
    worst: list[tuple[float, int, WrongExample]] = []
    rows = cut = ids = 0
    observer.total_steps("evaluate", None, unit="rows")
    for chunk in stream.chunks(CHUNK):
        texts = [[cell_text(row, column) for row in chunk] for column in columns]
        given = [read(row) for row in chunk]
        ids += sum(by_id for _, by_id in given)
        found = classifier.predict(texts, options.batch_size)
        true = np.asarray([label for label, _ in given])
        loss = _loss(classifier, found.probabilities, true)
        outputs.append(found.probabilities)
        labels.append(true)
        losses.append(loss)
        cut += len(found.cut)
        worst += _wrong(classifier, chunk, texts, found.probabilities, true, loss, rows)
        worst = sorted(worst, key=lambda each: (-each[0], each[1]))[: options.worst]
        rows += len(chunk)
        observer.step("evaluate", {"step": rows})
    names = classifier.label_names or ()
    note = f"{ids:,} labels are read as ids of the classes 0 to {len(names) - 1}: {listed(names)}"
    return _Answers(
        np.concatenate(outputs),
        np.concatenate(labels),
        np.concatenate(losses),
        [example for _, _, example in worst],
        cut,
        [note] if ids else [],
    )


def _read_label(names: tuple[str, ...] | None, column: str, row: Row) -> tuple[float | int, bool]:
    """Return the class id or score of a row, and whether the file holds the id itself."""
    fix = "correct the label or remove the row"
    try:
        text = label_text(row.values.get(column), None)
    except LabelValueError as error:
        what = f"the label in column {column!r} is {error}"
        raise DataError(what, where=row.place, fix=fix) from None
    if names is None:
        try:
            score = float(text)
        except ValueError:
            score = float("nan")
        if not np.isfinite(score):
            what = f"expected a number in column {column!r}, got {text!r:.60}"
            raise DataError(what, where=row.place, fix=fix)
        return score, False
    if text in names:
        return names.index(text), False
    if text.isascii() and text.isdigit() and int(text) < len(names):
        return int(text), True
    raise DataError(
        f"the label {text!r:.60} is not a class of the model, which knows {listed(names)}",
        where=row.place,
        fix=fix,
    )


def _loss(classifier: Classifier, outputs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    if classifier.label_names is None:
        squared: np.ndarray = (outputs[:, 0] - labels) ** 2
        return squared
    own = outputs[np.arange(len(labels)), labels]
    nats: np.ndarray = -np.log(np.maximum(own, np.finfo(np.float64).tiny))
    return nats


def _wrong(
    classifier: Classifier,
    chunk: Sequence[Row],
    texts: Sequence[list[str]],
    outputs: np.ndarray,
    labels: np.ndarray,
    losses: np.ndarray,
    before: int,
) -> list[tuple[float, int, WrongExample]]:
    """Return (loss, number of the row, example) of the rows whose prediction is not the label."""
    names = classifier.label_names
    found = []
    for at, row in enumerate(chunk):
        if names is None:
            label, prediction = f"{labels[at]:.6g}", f"{outputs[at, 0]:.6g}"
        else:
            label, prediction = names[labels[at]], names[int(outputs[at].argmax())]
            if label == prediction:
                continue
        example = WrongExample(
            place=row.place,
            texts=[part[at][:_SHOWN] for part in texts],
            label=label,
            prediction=prediction,
            loss=float(losses[at]),
        )
        found.append((float(losses[at]), before + at, example))
    return found


def _bootstrap(
    spec: TaskSpec, predicted: np.ndarray, labels: np.ndarray, options: EvaluateOptions
) -> dict[str, list[float]]:
    """Return metric -> 95 % percentile interval over resampled rows (Efron 1979).

    A resample in which a metric is set by definition counts with that value.
    """
    if not options.resamples or len(labels) < 2:
        return {}
    draw = np.random.default_rng(options.seed)
    values: dict[str, list[float]] = {name: [] for name in spec.metrics}
    for _ in range(options.resamples):
        rows = draw.integers(len(labels), size=len(labels))
        for name, value in metric_values(spec, predicted[rows], labels[rows]).values.items():
            values[name].append(value)
    return {
        name: [float(end) for end in np.quantile(drawn, (0.025, 0.975))]
        for name, drawn in values.items()
    }


def _confusion(spec: TaskSpec, predicted: np.ndarray, labels: np.ndarray) -> list[list[int]]:
    count = len(spec.label_names or ())
    flat = np.bincount(labels.astype(int) * count + predicted, minlength=count * count)
    table: list[list[int]] = flat.reshape(count, count).tolist()
    return table


def _classes(spec: TaskSpec, predicted: np.ndarray, labels: np.ndarray) -> list[ClassScores]:
    found = []
    for number, name in enumerate(spec.label_names or ()):
        hits = int(((labels == number) & (predicted == number)).sum())
        rows, answers = int((labels == number).sum()), int((predicted == number).sum())
        found.append(
            ClassScores(
                name=name,
                rows=rows,
                predicted=answers,
                precision=hits / answers if answers else None,
                recall=hits / rows if rows else None,
                f1=2 * hits / (rows + answers) if rows + answers else None,
            )
        )
    return found
