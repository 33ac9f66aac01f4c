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
from sparsegrad_cli.predict.predict_rows import (
    CHUNK,
    empty_words,
    text_columns,
    texts_of,
)
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
_SHARES = ("accuracy", "exact_match")  # Metrics that are a share of the rows.
_SHOWN = 2000  # Characters of a text that are kept of a wrong example.


@dataclass(frozen=True)
class EvaluateOptions:
    """What to measure.

    Attributes:
        file: the labelled rows.
        text_column, text_pair_column, label_column: columns; by default those of training.
        label_separator: text between several labels in a cell; by default that of training.
        batch_size: rows of a batch.
        resamples: of the bootstrap; 0 for no intervals at all.
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
        DataError: a label is missing or not a class of the model, or a cell does not hold text.
    """
    answers = _answers(classifier, options, observer or Observer())
    spec = _spec(classifier)
    outputs = answers.outputs
    predicted = _predicted(classifier, outputs)
    found = _values(spec, outputs, predicted, answers.labels)
    intervals, note = _intervals(spec, outputs, predicted, answers.labels, options)
    single = spec.kind == "classification"
    return EvaluationRecord(
        model=model,
        about=classifier.about,
        file=str(options.file),
        rows=len(answers.labels),
        cut=answers.cut,
        loss=float(answers.losses.mean()),
        metrics={
            name: MetricValue(
                value=value,
                interval=intervals.get(name),
                interval_by="wilson" if name in _SHARES else "bootstrap",
            )
            for name, value in found.values.items()
        },
        resamples=options.resamples,
        seed=options.seed,
        threshold=classifier.threshold,
        classes=[] if spec.regression else _classes(spec, outputs, predicted, answers.labels),
        confusion=_confusion(spec, predicted, answers.labels) if single else [],
        worst=answers.worst,
        notes=[*answers.notes, *found.notes, *([note] if note else [])],
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
    rows = cut = ids = empty = 0
    observer.total_steps("evaluate", count_rows(options.file), unit="rows")

    def done(labelled: int) -> None:
        observer.step("evaluate", {"step": rows + labelled})

    for chunk in stream.chunks(CHUNK):
        texts, without = texts_of(chunk, columns, may_be_empty=classifier.reads_empty_texts)
        empty += without
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
    notes = []
    if ids:
        read_as = "label is read as an id" if ids == 1 else "labels are read as ids"
        classes = f"of the classes 0 to {len(names) - 1}: {listed(names)}"
        notes.append(f"{ids:,} {read_as} {classes}")
    if empty:
        notes.append(f"{rows:,} rows are measured; {empty_words(empty)}")
    return _Answers(
        np.concatenate(outputs),
        np.concatenate(labels),
        np.concatenate(losses),
        [example for _, _, example in worst],
        cut,
        notes,
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


def _intervals(
    spec: TaskSpec,
    outputs: np.ndarray,
    predicted: np.ndarray,
    labels: np.ndarray,
    options: EvaluateOptions,
) -> tuple[dict[str, list[float]], str | None]:
    """Return metric -> 95 % interval, and a note on metrics without one.

    A share of the rows has Wilson's score interval (Wilson 1927), the other metrics a bootstrap. If
    no row is wrong, every resample is like the file: a bootstrap then shows no uncertainty, however
    few rows there are, so its interval is left out.
    """
    if not options.resamples:
        return {}, None
    right = predicted == labels
    right = right.all(axis=1) if spec.multilabel else right
    found = {} if right.all() else _bootstrap(spec, outputs, predicted, labels, options)
    found |= {name: _wilson(right) for name in spec.metrics if name in _SHARES}
    without = " and ".join(name for name in spec.metrics if name not in found)
    if not without:
        return found, None
    reason = "every resample gives the same value"
    if len(labels) < 2 or right.all():
        reason = "there is one row" if len(labels) < 2 else "no row is wrong"
    return found, f"{reason}: a bootstrap gives no interval for {without}"


def _wilson(right: np.ndarray) -> list[float]:
    from scipy.stats import binomtest

    interval = binomtest(int(right.sum()), len(right)).proportion_ci(method="wilson")
    return [float(interval.low), float(interval.high)]


def _bootstrap(
    spec: TaskSpec,
    outputs: np.ndarray,
    predicted: np.ndarray,
    labels: np.ndarray,
    options: EvaluateOptions,
) -> dict[str, list[float]]:
    """Return metric -> 95 % percentile interval over resampled rows (Efron 1979).

    A resample in which a metric is set by definition counts with that value. A metric with one
    value in all resamples has no interval.
    """
    if len(labels) < 2:
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
        if min(drawn) < max(drawn)
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
