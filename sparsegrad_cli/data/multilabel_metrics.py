"""Metrics of rows with several labels, and the threshold from which a label is given.

A row gets every label whose probability is at least the threshold, which is one number for all
labels. It is the one with the highest micro F1 on validation rows. Scores on the same rows would be
optimistic, so training measures each half of the validation rows at the threshold of the other half
(cross-fitting): see :func:`cross_fitted`. The values come from scikit-learn.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from sparsegrad_cli.io.suggest import listed
from sparsegrad_cli.recipe.tasks import TaskSpec

DEFAULT_THRESHOLD = 0.5
_Array = np.ndarray[Any, Any]


def choose_threshold(probabilities_NL: _Array, true_NL: _Array) -> float:
    """Return the threshold with the highest micro F1.

    Of equally good thresholds it is the one nearest to 0.5. It lies halfway between two
    probabilities, so that rounding does not change an answer.

    Args:
        probabilities_NL: (rows, labels), from 0 to 1.
        true_NL: (rows, labels), 1 where the row has the label, else 0. Without any 1, the
            threshold is 0.5.
    """
    from sklearn.metrics import precision_recall_curve

    true, values = true_NL.ravel() > 0, probabilities_NL.ravel().astype(np.float64)
    if not true.any():
        return DEFAULT_THRESHOLD
    precision, recall, found = precision_recall_curve(true, values)
    total = precision[:-1] + recall[:-1]
    f1 = 2 * precision[:-1] * recall[:-1] / np.maximum(total, np.finfo(np.float64).tiny)
    below = np.concatenate(([0.0], found[:-1]))
    middle = (found + below) / 2
    # Between two equally good neighbours, 0.5 itself may be allowed.
    middle = np.where((below < DEFAULT_THRESHOLD) & (found > DEFAULT_THRESHOLD), 0.5, middle)
    best = np.flatnonzero(f1 >= f1.max() - 1e-12)
    return float(middle[best[np.abs(middle[best] - DEFAULT_THRESHOLD).argmin()]])


def cross_fitted(probabilities_NL: _Array, true_NL: _Array) -> _Array:
    """Return the answers of all rows, each half at the threshold of the other half.

    The halves are the even and the odd rows, so that a sorted file is divided evenly. Thus no row
    has a part in the threshold that it is answered with.

    Args:
        probabilities_NL, true_NL: as in :func:`choose_threshold`.

    Returns:
        (rows, labels), 1 where a label is given, else 0 (int64).
    """
    answers_NL = np.zeros(probabilities_NL.shape, dtype=np.int64)
    even = np.arange(len(true_NL)) % 2 == 0
    for own, other in ((even, ~even), (~even, even)):
        threshold = choose_threshold(probabilities_NL[other], true_NL[other])
        answers_NL[own] = probabilities_NL[own] >= threshold
    return answers_NL


def multilabel_values(
    spec: TaskSpec, probabilities_NL: _Array, answers_NL: _Array, true_NL: _Array
) -> tuple[dict[str, float], list[str]]:
    """Compute the metrics of a task with several labels a row.

    Args:
        spec: the task, which names the metrics.
        probabilities_NL: (rows, labels).
        answers_NL, true_NL: (rows, labels), 1 where the row has the label, else 0.

    Returns:
        Metric name -> value (a fraction), and notes on values that hold by definition.
    """
    from sklearn import metrics

    true_NL, notes = (true_NL > 0).astype(np.int64), []
    there = true_NL.sum(axis=0) > 0
    names = spec.label_names or ()
    absent = listed([names[number] for number in np.flatnonzero(~there)], 10)
    values: dict[str, float] = {}
    for name in spec.metrics:
        if name == "exact_match":
            value = metrics.accuracy_score(true_NL, answers_NL)
        elif name == "average_precision":
            value = _average_precision(probabilities_NL[:, there], true_NL[:, there])
        else:
            average = name.removeprefix("f1_")
            value = metrics.f1_score(true_NL, answers_NL, average=average, zero_division=0)
        values[name] = float(value)
    if absent and "average_precision" in values:
        notes.append(f"no row has the label {absent}: average_precision leaves it out")
    return values, notes


def _average_precision(probabilities_NL: _Array, true_NL: _Array) -> float:
    """Return the mean over labels; 0 without any label."""
    if not true_NL.shape[1]:
        return 0.0
    each = map(label_average_precision, probabilities_NL.T, true_NL.T)
    return float(np.mean(list(each)))


def label_average_precision(probabilities_N: _Array, true_N: _Array) -> float:
    """Return the average precision of one label, which some row has."""
    from sklearn.metrics import average_precision_score

    return float(average_precision_score(true_N, probabilities_N))
