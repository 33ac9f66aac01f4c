"""Read the labels of the rows of a file, by the classes of a trained model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from sparsegrad_cli.data.label_lists import flagged, label_list
from sparsegrad_cli.data.label_texts import LabelValueError, label_text
from sparsegrad_cli.errors import DataError, UsageError
from sparsegrad_cli.io.suggest import listed, suggest
from sparsegrad_cli.predict.classifier import Classifier
from sparsegrad_cli.predict.row_stream import Row
from sparsegrad_cli.recipe.task_section import ColumnsSection

_FIX = "correct the label or remove the row"


class Label(NamedTuple):
    """The label of a row.

    Attributes:
        value: a class id, a score, or a list of 1 and 0 for each of several labels.
        by_id: whether the file holds the id of a class, not its name.
    """

    value: Any
    by_id: bool = False


def label_reader(
    names: Sequence[str], classifier: Classifier, column: str | None, separator: str | None
) -> Callable[[Row], Label]:
    """Return a function that reads the label of a row.

    Args:
        names: columns of the file.
        classifier: the model, with the columns that it was trained on.
        column: column of the labels; None takes that of training, or ``label``.
        separator: text between several labels in a cell; None takes that of training.

    Raises:
        UsageError: the column is missing, or the model gives one label and has no separator.
            The function raises a DataError for a label that is missing or unknown.
    """
    task = classifier.task
    known = (task.columns if task is not None else None) or ColumnsSection()
    if separator is not None and not classifier.multilabel:
        raise UsageError(
            "the model gives one label a row, and --label-separator is for several",
            where="--label-separator",
            fix="leave it out",
        )
    chosen = column or known.label or "label"
    if classifier.multilabel and column is None and (known.labels or chosen not in names):
        flags = known.labels or classifier.label_names or ()
        if set(flags) <= set(names):
            return partial(_flags, flags)
    if chosen not in names:
        more = ""
        if classifier.multilabel:
            more = f", nor a column of 0 and 1 for each of {listed(classifier.label_names or ())}"
        raise UsageError(
            f"the file has no column {chosen!r} for the labels{more}",
            where="--label-column",
            fix=f"--label-column NAME; {suggest(chosen, list(names))}",
        )
    if classifier.multilabel:
        between = separator or (task.label_separator if task is not None else None)
        return partial(_labels, classifier.label_names or (), chosen, between)
    return partial(_label, classifier.label_names, chosen)


def _label(names: tuple[str, ...] | None, column: str, row: Row) -> Label:
    """Read the class or score of a row."""
    try:
        text = label_text(row.values.get(column), None)
    except LabelValueError as error:
        what = f"the label in column {column!r} is {error}"
        raise DataError(what, where=row.place, fix=_FIX) from None
    if names is None:
        try:
            score = float(text)
        except ValueError:
            score = float("nan")
        if not np.isfinite(score):
            what = f"expected a number in column {column!r}, got {text!r:.60}"
            raise DataError(what, where=row.place, fix=_FIX)
        return Label(score)
    if text in names:
        return Label(names.index(text))
    if text.isascii() and text.isdigit() and int(text) < len(names):
        return Label(int(text), by_id=True)
    raise _unknown(text, names, row)


def _labels(names: tuple[str, ...], column: str, separator: str | None, row: Row) -> Label:
    """Read several labels of a row from one cell."""
    try:
        found = label_list(row.values.get(column), separator)
    except LabelValueError as error:
        fix = "--label-separator TEXT if the cell holds labels with a text between them"
        what = f"the label in column {column!r} is {error}"
        raise DataError(what, where=row.place, fix=fix) from None
    for name in found:
        if name not in names:
            raise _unknown(name, names, row)
    return Label([int(name in found) for name in names])


def _flags(columns: tuple[str, ...], row: Row) -> Label:
    """Read several labels of a row from columns of 0 and 1, in the order of the model's labels."""
    try:
        found = flagged(row.values, columns)
    except LabelValueError as error:
        raise DataError(f"the label is {error}", where=row.place, fix=_FIX) from None
    return Label([int(name in found) for name in columns])


def _unknown(text: str, names: Sequence[str], row: Row) -> DataError:
    return DataError(
        f"the label {text!r:.60} is not a class of the model, which knows {listed(names)}",
        where=row.place,
        fix=_FIX,
    )
