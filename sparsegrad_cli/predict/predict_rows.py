"""Label the rows of a file, or single texts, and say what was found."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from sparsegrad_cli.data.tables import type_words
from sparsegrad_cli.data.text_files import is_unicode
from sparsegrad_cli.errors import DataError, UsageError
from sparsegrad_cli.io.suggest import suggest
from sparsegrad_cli.predict.classifier import Classifier
from sparsegrad_cli.predict.output import PREDICTION, PROBABILITY
from sparsegrad_cli.predict.row_stream import Row
from sparsegrad_cli.progress import Observer

CHUNK = 2048  # Rows in memory at a time.


@dataclass
class Summary:
    """What was predicted.

    Attributes:
        rows: number of rows.
        cut: number of rows that were longer than the model reads.
        empty: number of rows with an empty text.
        labels: class -> number of rows; empty for a regressor.
        unlabelled: number of rows to which a model of several labels gave none.
        lowest, highest: range of the scores of a regressor.
    """

    rows: int = 0
    cut: int = 0
    empty: int = 0
    labels: Counter[str] = field(default_factory=Counter)
    unlabelled: int = 0
    lowest: float = float("inf")
    highest: float = float("-inf")

    def add(self, added: Sequence[dict[str, Any]], cut: int) -> None:
        """Count a chunk."""
        self.rows += len(added)
        self.cut += cut
        for row in added:
            found = row[PREDICTION]
            if isinstance(found, float):
                self.lowest = min(self.lowest, found)
                self.highest = max(self.highest, found)
            else:
                self.labels.update(found if isinstance(found, list) else [found])
                self.unlabelled += found == []


def added_columns(classifier: Classifier, *, all_probabilities: bool) -> list[str]:
    """Return the names of the columns that predictions add to a row."""
    if classifier.label_names is None:
        return [PREDICTION]
    more = [f"{PROBABILITY}_{name}" for name in classifier.label_names] if all_probabilities else []
    return [PREDICTION, PROBABILITY, *more]


def text_columns(
    names: Sequence[str], classifier: Classifier, text: str | None, pair: str | None
) -> list[str]:
    """Return the columns of a file that hold the texts.

    Args:
        names: columns of the file.
        classifier: knows the columns that it was trained on.
        text, pair: names that the user gave; they come first.

    Raises:
        UsageError: a column is missing, or it is not clear which one holds the text.
    """
    if pair is not None and not classifier.pair:
        raise UsageError(
            "the model reads one text of a row, and --text-pair-column names a second one",
            where="--text-pair-column",
            fix="leave it out",
        )
    given = [text, pair] if classifier.pair else [text]
    known = list(classifier.text_columns) or ["text"]
    wanted = [own or default for own, default in zip(given, known, strict=True)]
    for option, name in zip(("--text-column", "--text-pair-column"), wanted, strict=False):
        if name not in names:
            raise UsageError(
                f"the file has no column {name!r}",
                where=option,
                fix=f"{option} NAME; {suggest(name, list(names))}",
            )
    return wanted


def label_rows(
    classifier: Classifier,
    chunks: Iterable[list[Row]],
    columns: Sequence[str],
    *,
    batch_size: int,
    all_probabilities: bool,
    summary: Summary,
    observer: Observer,
) -> Iterator[tuple[list[Row], list[dict[str, Any]]]]:
    """Yield every chunk with the columns that predictions add to its rows.

    Args:
        classifier: the model.
        chunks: rows with the columns ``columns``.
        columns: names of the first and perhaps the second text.
        batch_size: rows of a batch.
        all_probabilities: whether to add the probability of every class.
        summary: counts what was predicted.
        observer: receives the number of rows after each batch.

    Raises:
        DataError: see :func:`texts_of`.
    """

    def done(rows: int) -> None:
        observer.step("predict", {"step": summary.rows + rows})

    for chunk in chunks:
        texts, empty = texts_of(chunk, columns, may_be_empty=classifier.reads_empty_texts)
        summary.empty += empty
        found = classifier.predict(texts, batch_size, done)
        added = [
            _columns(classifier, values, all_probabilities=all_probabilities)
            for values in found.probabilities.tolist()
        ]
        summary.add(added, len(found.cut))
        yield chunk, added


def texts_of(
    rows: Sequence[Row], columns: Sequence[str], *, may_be_empty: bool = True
) -> tuple[list[list[str]], int]:
    """Return the texts of every column, and the number of rows in which one is empty.

    A row keeps its place whatever it holds: a file with an empty cell is used to its end, and the
    empty texts are counted.

    Args:
        rows: rows with the columns ``columns``.
        columns: names of the columns that hold texts. A cell that is missing is an empty text.
        may_be_empty: whether the model can read an empty text.

    Raises:
        DataError: a cell does not hold text, or it is empty and the model cannot read that.
    """
    texts = [[_text(row, column, may_be_empty=may_be_empty) for row in rows] for column in columns]
    return texts, sum(not all(text.strip() for text in row) for row in zip(*texts, strict=True))


def _text(row: Row, column: str, *, may_be_empty: bool) -> str:
    value = row.values.get(column)
    value = "" if value is None else value
    fix = "correct or remove the row"
    if not isinstance(value, str):
        what = f"holds {type_words(value)}, expected text"
    elif not value.strip() and not may_be_empty:
        what = "is empty, and the model's tokenizer makes no token of an empty text"
        fix = "remove the row"
    elif not is_unicode(value):
        what = "holds half of a character (a lone surrogate)"
    else:
        return value
    raise DataError(f"column {column!r} {what}", where=row.place, fix=fix)


def empty_words(empty: int) -> str:
    """Return such as ``2 of them have an empty text``."""
    return f"{empty:,} of them {'has' if empty == 1 else 'have'} an empty text"


def _columns(
    classifier: Classifier, values: list[float], *, all_probabilities: bool
) -> dict[str, Any]:
    """Return the new columns of a row; six digits, which rounding does not reach."""
    names = classifier.label_names
    if names is None:
        return {PREDICTION: float(f"{values[0]:.6g}")}
    added: dict[str, Any]
    if classifier.threshold is not None:
        given = [at for at, value in enumerate(values) if value >= classifier.threshold]
        added = {
            PREDICTION: [names[at] for at in given],
            PROBABILITY: [round(values[at], 5) for at in given],
        }
    else:
        best = max(range(len(values)), key=values.__getitem__)
        added = {PREDICTION: names[best], PROBABILITY: round(values[best], 5)}
    if all_probabilities:
        added |= {f"{PROBABILITY}_{n}": round(v, 5) for n, v in zip(names, values, strict=True)}
    return added
