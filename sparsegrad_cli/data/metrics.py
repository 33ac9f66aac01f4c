"""Metrics of classes and scores as an ``evaluate`` module that works offline.

The values come from scikit-learn and scipy.
All values are fractions (0.59, not 59). A metric that its formula leaves undefined gets the value
below and a note, never NaN:

==================================  ====================  ======================================
case                                value                 why
==================================  ====================  ======================================
one class predicted, or true        matthews 0            chance level; as in scikit-learn
no positive predicted and none true f1 0 (precision and   scikit-learn's ``zero_division=0``
                                    recall likewise)
constant predictions or references  pearson, spearman 0   the predictions rank nothing
NaN or infinite logits anywhere     the lowest: 0, or -1  the model is broken, so no checkpoint
                                    of a correlation      of it may be selected
==================================  ====================  ======================================

``f1``, ``precision`` and ``recall`` of two classes are those of the positive class:
``task.positive_label``, by default the class with id 1. With ``_macro`` they are the plain mean,
and with ``_weighted`` the mean weighted by rows, over the classes that are true or predicted
(scikit-learn's default). Accuracy and the Matthews correlation do not depend on the positive
class. Several labels a row have metrics of their own (:mod:`.multilabel_metrics`).

``evaluate`` takes seconds to import, so it is imported when the first score is computed.
"""

from __future__ import annotations

import functools
import tempfile
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from sparsegrad_cli.data.multilabel_metrics import (
    choose_threshold,
    cross_fitted,
    multilabel_values,
)
from sparsegrad_cli.errors import DataError
from sparsegrad_cli.recipe.tasks import (
    CLASS_METRICS,
    MULTILABEL_METRICS,
    SCORE_METRICS,
    TaskSpec,
)

LOWEST = {
    **dict.fromkeys((*CLASS_METRICS, *MULTILABEL_METRICS), 0.0),
    "matthews_correlation": -1.0,
    "pearson": -1.0,
    "spearmanr": -1.0,
}
# Below this relative spread, numbers differ by rounding only (scipy's own threshold).
_CONSTANT = 1e-13


@dataclass(frozen=True)
class Scores:
    """The metrics of one set of rows.

    Attributes:
        values: metric name -> value (a fraction).
        notes: one for each value that holds by definition.
        threshold: for several labels a row, the one that was given, or else the best one for
            these rows (:func:`~.multilabel_metrics.choose_threshold`); the values are then
            cross-fitted.
    """

    values: dict[str, float]
    notes: tuple[str, ...]
    threshold: float | None = None


def score(
    spec: TaskSpec,
    logits: npt.ArrayLike,
    references: npt.ArrayLike,
    threshold: float | None = None,
) -> Scores:
    """Compute all metrics of a task.

    Args:
        spec: task, which names the metrics.
        logits: (N, C) class logits, whose largest is the answer; (N, L) logits of labels; or (N,)
            or (N, 1) scores.
        references: (N,) class ids or scores, or (N, L) with 1 for each label that a row has.
        threshold: for several labels a row, the probability from which a label is given; by
            default it is chosen on these rows.

    Raises:
        DataError: N is 0.
        ValueError: the shapes do not fit each other or the task.
    """
    outputs = np.asarray(logits, dtype=np.float64)
    true = np.asarray(references)
    if spec.regression and outputs.ndim == 2 and outputs.shape[1] == 1:
        outputs = outputs[:, 0]
    rows = outputs.shape if spec.multilabel else outputs.shape[:1]
    if outputs.ndim != (1 if spec.regression else 2) or true.shape != rows:
        raise ValueError(f"{spec.name}: logits {outputs.shape} do not fit labels {true.shape}")
    if len(true) == 0:
        raise DataError("there are no examples to score", where=spec.name)
    finite = np.isfinite(outputs).reshape(len(true), -1).all(axis=1)
    if not finite.all():
        note = (
            f"{np.count_nonzero(~finite)} of {len(true)} examples have NaN or infinite logits: "
            "every metric is given its lowest value"
        )
        return Scores({name: LOWEST[name] for name in spec.metrics}, (note,))
    if spec.multilabel:
        return _multilabel(spec, outputs, true, threshold)
    predictions = outputs if spec.regression else outputs.argmax(axis=1)
    metric = task_metric()(spec)
    values = metric.compute(predictions=predictions, references=true)
    return Scores(values, metric.notes)


def _multilabel(
    spec: TaskSpec,
    logits_NL: npt.NDArray[Any],
    true_NL: npt.NDArray[Any],
    threshold: float | None,
) -> Scores:
    from scipy.special import expit

    probabilities_NL = expit(logits_NL)
    if threshold is None:
        answers_NL = cross_fitted(probabilities_NL, true_NL)
        threshold = choose_threshold(probabilities_NL, true_NL)
    else:
        answers_NL = (probabilities_NL >= threshold).astype(np.int64)
    values, notes = multilabel_values(spec, probabilities_NL, answers_NL, true_NL)
    return Scores(values, tuple(notes), threshold)


def mean_loss(
    spec: TaskSpec,
    logits: npt.ArrayLike,
    references: npt.ArrayLike,
    *,
    smoothing: float = 0.0,
    weights: npt.ArrayLike | None = None,
) -> float:
    """Compute the mean training loss per example: cross-entropy (nats), or the squared error.

    For several labels a row, it is the mean of the binary cross-entropy over rows and labels. It is
    computed in float64 from all logits, so it does not depend on batches or processes.

    Args:
        spec: the task.
        logits: as in :func:`score`.
        references: as in :func:`score`.
        smoothing: share of a label that is spread over all classes, as in transformers.
        weights: (C,) weights of the classes, as in training (models/label_loss.py).

    Returns:
        The loss; NaN if a logit is NaN or infinite.
    """
    outputs = np.asarray(logits, dtype=np.float64)
    true = np.asarray(references)
    if not np.isfinite(outputs).all():
        return float("nan")
    if spec.regression:
        return float(np.mean((outputs.reshape(len(true)) - true) ** 2))
    from scipy.special import log_expit, log_softmax

    weights_C = np.ones(outputs.shape[1]) if weights is None else np.asarray(weights, np.float64)
    if spec.multilabel:
        losses_NL = weights_C * true * log_expit(outputs) + (1 - true) * log_expit(-outputs)
        return float(-np.mean(losses_NL))
    logs_NC = weights_C * log_softmax(outputs, axis=1)
    own_N = logs_NC[np.arange(len(true)), true]
    return float(-np.mean((1 - smoothing) * own_N + smoothing * logs_NC.mean(axis=1)))


def metric_values(
    spec: TaskSpec, predictions: npt.NDArray[Any], references: npt.NDArray[Any]
) -> Scores:
    """Compute all metrics from answers: class ids or finite scores, both (N,), N >= 1."""
    values: dict[str, float] = {}
    notes: list[str] = []
    for name in spec.metrics:
        if name in SCORE_METRICS:
            value, note = _correlation(name, predictions, references)
        else:
            value, note = _classification(name, predictions, references, spec)
        values[name] = value
        if note:
            notes.append(note)
    return Scores(values, tuple(notes))


def _classification(
    name: str, predictions: npt.NDArray[Any], references: npt.NDArray[Any], spec: TaskSpec
) -> tuple[float, str | None]:
    from sklearn import metrics

    predicted, true = predictions.astype(np.int64), references.astype(np.int64)
    if name == "accuracy":
        return float(metrics.accuracy_score(true, predicted)), None
    if name == "matthews_correlation":
        for what, ids in (("predictions", predicted), ("references", true)):
            if (ids == ids[0]).all():
                which = f"class {_named(spec, ids[0])}"
                return 0.0, f"{_all(len(ids), what, which)}: {name} is 0 by definition"
        return float(metrics.matthews_corrcoef(true, predicted)), None
    classes = len(spec.label_names or ()) or int(max(predicted.max(), true.max(), 1)) + 1
    kind, _, average = name.partition("_")
    score_of = {
        "f1": metrics.f1_score,
        "precision": metrics.precision_score,
        "recall": metrics.recall_score,
    }[kind]
    if average or classes > 2:
        value = score_of(true, predicted, average=average or "macro", zero_division=0)
        absent = sorted(set(range(classes)) - set(predicted.tolist()) - set(true.tolist()))
        named = ", ".join(_named(spec, label) for label in absent)
        note = f"class {named} is neither predicted nor true: it is left out of {name}"
        return float(value), note if absent and average != "weighted" else None
    positive = spec.positive_id
    value = score_of(true, predicted, labels=[positive], average="macro", zero_division=0)
    absent_here = not (predicted == positive).any() and not (true == positive).any()
    note = f"class {_named(spec, positive)} is neither predicted nor true: its {name} is 0 by"
    return float(value), f"{note} definition" if absent_here else None


def _all(count: int, what: str, equal: str) -> str:
    """Return why a metric is undefined: ``all 3 predictions are equal``."""
    return "there is one row" if count == 1 else f"all {count} {what} are {equal}"


def _named(spec: TaskSpec, label: int) -> str:
    """Return ``1 (acceptable)``, or the id alone if the classes have no names."""
    return f"{label} ({spec.label_names[label]})" if spec.label_names else str(label)


def _correlation(
    name: str, predictions: npt.NDArray[Any], references: npt.NDArray[Any]
) -> tuple[float, str | None]:
    from scipy import stats

    predicted, true = predictions.astype(np.float64), references.astype(np.float64)
    for what, numbers in (("predictions", predicted), ("references", true)):
        if _is_constant(numbers):
            return 0.0, f"{_all(len(numbers), what, 'equal')}: {name} is 0 by definition"
    correlation = stats.pearsonr if name == "pearson" else stats.spearmanr
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        value = float(correlation(predicted, true)[0])
    if not np.isfinite(value):
        return 0.0, f"{name} cannot be computed in double precision: it is given the value 0"
    return value, None


def _is_constant(numbers: npt.NDArray[np.float64]) -> bool:
    spread = float(numbers.max()) - float(numbers.min())
    return spread <= _CONSTANT * float(np.abs(numbers).max())


@functools.cache
def task_metric() -> type[Any]:
    """Return the ``evaluate.Metric`` of a task's metrics: a class whose argument is the TaskSpec.

    After ``compute(predictions=ids_or_scores, references=...)``, its attribute ``notes`` says which
    values hold by definition only.
    """
    import datasets
    import evaluate

    class TaskMetric(evaluate.Metric):
        def __init__(self, spec: TaskSpec) -> None:
            self.spec = spec
            self.notes: tuple[str, ...] = ()
            super().__init__(keep_in_memory=True, seed=0)

        def _build_data_dir(self) -> str:
            # evaluate would make a folder in the user's cache that nothing in memory needs.
            return tempfile.gettempdir()

        def _info(self) -> Any:
            dtype = "float64" if self.spec.regression else "int64"
            return evaluate.MetricInfo(
                description=f"Metrics of {self.spec.name}: {', '.join(self.spec.metrics)}.",
                citation="",
                inputs_description="predictions, references: (N,) class ids, or scores.",
                features=datasets.Features(
                    {"predictions": datasets.Value(dtype), "references": datasets.Value(dtype)}
                ),
            )

        def _compute(self, predictions: Any = None, references: Any = None) -> dict[str, float]:
            # Lists, not evaluate's numpy format: that one casts scores to float32.
            scores = metric_values(self.spec, np.asarray(predictions), np.asarray(references))
            self.notes = scores.notes
            return scores.values

    return TaskMetric
