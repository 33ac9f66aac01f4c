"""test.csv: the answers of a run's kept model to the rows of its test sets."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from sparsegrad_cli.errors import FileFormatError
from sparsegrad_cli.io.atomic import write_text_atomic

TEST = "test.csv"
_HEADER = ("set", "row", "label", "prediction")

Value = int | float | tuple[int, ...]


class Answer(NamedTuple):
    """The answer to one row: class numbers, scores, or the numbers of the labels of a row."""

    label: Value
    prediction: Value


def write_answers(folder: Path, sets: Iterable[tuple[str, Sequence[Answer]]]) -> None:
    """Write test.csv in a run's folder, with the rows of every set in their order.

    Raises:
        DiskError: the file cannot be written.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_HEADER)
    for name, answers in sets:
        for row, answer in enumerate(answers):
            writer.writerow((name, row, *map(_cell, answer)))
    write_text_atomic(folder / TEST, text.getvalue())


def read_answers(folder: Path) -> dict[str, list[Answer]]:
    """Return the answers of a run by test set, in the order of the rows.

    Classes are ints, scores floats; several labels a row are not read.

    Raises:
        FileFormatError: the file is missing or is not a test.csv of classes or scores.
    """
    path = folder / TEST
    found: dict[str, list[Answer]] = {}
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = csv.reader(file)
            if tuple(next(rows, ())) != _HEADER:
                raise ValueError(f"expected the columns {', '.join(_HEADER)}")
            for name, number, label, prediction in rows:
                answers = found.setdefault(name, [])
                if int(number) != len(answers):
                    raise ValueError(f"row {number} of {name} is out of order")
                answers.append(Answer(_number(label), _number(prediction)))
    except (OSError, ValueError) as error:
        what = f"the answers to the test sets cannot be read: {error}"
        raise FileFormatError(what, where=str(path), fix="train the run again") from error
    return found


def _cell(value: Value) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else repr(value)


def _number(text: str) -> int | float:
    return int(text) if text.lstrip("-").isdigit() else float(text)
