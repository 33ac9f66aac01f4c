"""Measure a trained classifier on a file of texts with labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sparsegrad_cli.data.metrics import Scores, metric_values
from sparsegrad_cli.data.multilabel_metrics import label_average_precision, multilabel_values
from sparsegrad_cli.io.suggest import listed
from sparsegrad_cli.predict.classifier import Classifier
from sparsegrad_cli.predict.label_reader import label_reader
from sparsegrad_cli.predict.predict_rows import CHUNK, cell_text, text_columns
from sparsegrad_cli.predict.row_stream import Row, count_rows, open_rows
from sparsegrad_cli.progress import Observer
from sparsegrad_cli.recipe.tasks import MULTILABEL_METRICS, SCORE_METRICS, TaskSpec
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
        label_separator: text between several labels in a cell; by default that of training.
        batch_size: rows of a batch.
        resamples: of the bootstrap; 0 for no intervals.
        seed: of the bootstrap.
        worst: number of wrong examples to keep.
    """

    file: Path
    text_column: str | None = None
    text_pair_column: str | None = None
    label_column: str | None = None
    label_separator: str | None = None
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
    predicted = _predicted(classifier, outputs)
    found = _values(spec, outputs, predicted, answers.labels)
    intervals = _bootstrap(spec, outputs, predicted, answers.labels, options)
    single = spec.kind == "classification"
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
        threshold=classifier.threshold,
        classes=[] if spec.regression else _classes(spec, outputs, predicted, answers.labels),
        confusion=_confusion(spec, predicted, answers.labels) if single else [],
        worst=answers.worst,
        notes=[*answers.notes, *found.notes],
    )


def _spec(classifier: Classifier) -> TaskSpec:
    regression = classifier.label_names is None
    metrics: tuple[str, ...] = SCORE_METRICS if regression else _CLASS_METRICS
    if classifier.multilabel:
        metrics = MULTILABEL_METRICS
    return TaskSpec(
        name="the file",
        text_columns=("text",),
        label_column="label",
        label_names=classifier.label_names,
        regression=regression,
        metric=metrics[0],
        metrics=metrics,
        multilabel=classifier.multilabel,
    )


def _predicted(classifier: Classifier, outputs: np.ndarray) -> np.ndarray:
    """Return scores, class ids, or (rows, labels) of 1 and 0."""
    if classifier.label_names is None:
        return outputs[:, 0]
    if classifier.threshold is not None:
        return (outputs >= classifier.threshold).astype(np.int64)
    ids: np.ndarray = outputs.argmax(axis=1)
    return ids


def _values(
    spec: TaskSpec, outputs: np.ndarray, predicted: np.ndarray, labels: np.ndarray
) -> Scores:
    if not spec.multilabel:
        return metric_values(spec, predicted, labels)
    values, notes = multilabel_values(spec, outputs, predicted, labels)
    return Scores(values, tuple(notes))


def _answers(classifier: Classifier, options: EvaluateOptions, observer: Observer) -> _Answers:
    stream = open_rows(options.file)
    columns = text_columns(stream.names, classifier, options.text_column, options.text_pair_column)
    read = label_reader(stream.names, classifier, options.label_column, options.label_separator)
    outputs, labels, losses = [], [], []
    worst: list[tuple[float, int, WrongExample]] = []
    rows = cut = ids = 0
    observer.total_steps("evaluate", count_rows(options.file), unit="rows")

    def done(labelled: int) -> None:
        observer.step("evaluate", {"step": rows + labelled})

    for chunk in stream.chunks(CHUNK):
        texts = [[cell_text(row, column) for row in chunk] for column in columns]
        given = [read(row) for row in chunk]
        ids += sum(by_id for _, by_id in given)
        found = classifier.predict(texts, options.batch_size, done)
        true = np.asarray([label for label, _ in given])
        loss = _loss(classifier, found.probabilities, true)
        outputs.append(found.probabilities)
        labels.append(true)
        losses.append(loss)
        cut += len(found.cut)
        worst += _wrong(classifier, chunk, texts, found.probabilities, true, loss, rows)
        worst = sorted(worst, key=lambda each: (-each[0], each[1]))[: options.worst]
        rows += len(chunk)
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


def _loss(classifier: Classifier, outputs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    if classifier.label_names is None:
        squared: np.ndarray = (outputs[:, 0] - labels) ** 2
        return squared
    if classifier.multilabel:
        right = np.where(labels > 0, outputs, 1 - outputs)
        mean: np.ndarray = -np.log(np.maximum(right, np.finfo(np.float64).tiny)).mean(axis=1)
        return mean
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
    names, predicted = classifier.label_names, _predicted(classifier, outputs)
    found = []
    for at, row in enumerate(chunk):
        if names is None:
            label, prediction = f"{labels[at]:.6g}", f"{outputs[at, 0]:.6g}"
        elif classifier.multilabel:
            label, prediction = (_listed_labels(names, each[at]) for each in (labels, predicted))
        else:
            label, prediction = names[labels[at]], names[int(predicted[at])]
        if names is not None and label == prediction:
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


def _listed_labels(names: Sequence[str], flags: np.ndarray) -> str:
    return ", ".join(name for name, flag in zip(names, flags, strict=True) if flag) or "-"


def _bootstrap(
    spec: TaskSpec,
    outputs: np.ndarray,
    predicted: np.ndarray,
    labels: np.ndarray,
    options: EvaluateOptions,
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
        found = _values(spec, outputs[rows], predicted[rows], labels[rows])
        for name, value in found.values.items():
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


def _classes(
    spec: TaskSpec, outputs: np.ndarray, predicted: np.ndarray, labels: np.ndarray
) -> list[ClassScores]:
    found = []
    for number, name in enumerate(spec.label_names or ()):
        if spec.multilabel:
            true_N, given_N = labels[:, number] > 0, predicted[:, number] > 0
        else:
            true_N, given_N = labels == number, predicted == number
        hits, rows, answers = (int(each.sum()) for each in (true_N & given_N, true_N, given_N))
        more = {}
        if spec.multilabel and rows:
            more = {"average_precision": label_average_precision(outputs[:, number], true_N)}
        found.append(
            ClassScores(
                name=name,
                rows=rows,
                predicted=answers,
                precision=hits / answers if answers else None,
                recall=hits / rows if rows else None,
                f1=2 * hits / (rows + answers) if rows + answers else None,
                **more,
            )
        )
    return found
