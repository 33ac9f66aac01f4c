"""The weight of each class in the loss (models/label_loss.py). Imports no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from sparsegrad_cli.errors import UsageError
from sparsegrad_cli.io.suggest import suggest
from sparsegrad_cli.recipe.checks import WEIGHTED_SCORES
from sparsegrad_cli.recipe.tasks import TaskSpec


def class_weights(
    given: str | Mapping[str, float] | Sequence[float] | None,
    spec: TaskSpec,
    labels: Sequence[Any],
    where: str = "train.class_weights",
) -> tuple[float, ...] | None:
    """Return the weight of each class.

    ``balanced`` gives a class rows / (classes x rows of the class), as scikit-learn does. With
    several labels a row, it gives a label rows without it / rows with it. A class of no row and a
    label of every row have 1.

    Args:
        given: ``train.class_weights`` of a recipe.
        spec: the task, with names of classes.
        labels: of the training rows: class ids, or a list of 1 and 0 for each label.
        where: the key, for errors.

    Raises:
        UsageError: the labels are scores, a name is not a class of the task, or the list has
            another length.
    """
    names = spec.label_names or ()
    if given is None:
        return None
    if spec.regression:
        raise UsageError(WEIGHTED_SCORES, where=where, fix="leave it out")
    if isinstance(given, str):
        return _balanced(spec, labels)
    if isinstance(given, Mapping):
        for name in given:
            if name not in names:
                raise UsageError(
                    f"{name!r} is not a class of {spec.name}",
                    where=where,
                    fix=suggest(name, names),
                )
        return tuple(float(given.get(name, 1.0)) for name in names)
    if len(given) != len(names):
        raise UsageError(
            f"expected a weight for each of the {len(names)} classes, got {len(given)}",
            where=where,
            fix=f"in this order: {', '.join(names[:20])}; or give a mapping of names to weights",
        )
    return tuple(float(weight) for weight in given)


def _balanced(spec: TaskSpec, labels: Sequence[Any]) -> tuple[float, ...]:
    rows, count = len(labels), len(spec.label_names or ())
    if spec.multilabel:
        having = [int(sum(column)) for column in zip(*labels, strict=True)]
        return tuple((rows - n) / n if 0 < n < rows else 1.0 for n in having)
    counts = Counter(labels)
    return tuple(rows / (len(counts) * counts[c]) if counts[c] else 1.0 for c in range(count))
