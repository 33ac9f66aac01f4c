"""Guess what the columns of a table are: texts, labels, ids, dates. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import mean
from typing import Any

from sparsegrad_cli.data.label_lists import has_label, label_list
from sparsegrad_cli.data.label_texts import LabelValueError, is_integer, is_number, label_text
from sparsegrad_cli.data.tables import Table

_SAMPLE = 2000  # Rows that a column is judged by.
_MOST_CLASSES = 50
_WORDS = 2.0  # Mean number of words from which a column may be the text.
_LABEL_NAMES = (
    *("label", "labels", "class", "category", "target", "sentiment", "intent", "topic", "tag"),
    *("stars", "rating", "score", "grade", "y", "is_duplicate", "gold_label", "answer"),
)
_TEXT_NAMES = (
    *("text", "sentence", "review", "content", "body", "comment", "message", "tweet", "question"),
    *("title", "description", "summary", "utterance", "query", "premise", "document"),
)
_PAIRS = (
    ("text", "text_pair"),
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("premise", "hypothesis"),
    ("question", "sentence"),
    ("question", "passage"),
    ("query", "document"),
)
_DATE = re.compile(r"\d{4}-\d\d?-\d\d?([T ]\d\d:\d\d.*)?|\d\d?[./]\d\d?[./]\d{2,4}")
_UUID = re.compile(r"[0-9a-fA-F]{8}-?([0-9a-fA-F]{4}-?){3}[0-9a-fA-F]{12}")


@dataclass(frozen=True)
class ColumnFacts:
    """What a column holds, judged by its first rows.

    Attributes:
        name: its name.
        kind: ``text``, ``label``, ``labels`` (a list of labels in every row), ``number``, ``id``,
            ``date``, ``list`` (of anything else), ``object`` (with fields of its own), ``words``
            (short texts of many values), ``mixed`` or ``empty``.
        distinct: number of its values, or of its labels.
        words: mean number of words of its texts.
        flags: whether it holds nothing but 0 and 1, or true and false.
        example: one of its values, for the user.
    """

    name: str
    kind: str
    distinct: int
    words: float
    example: str
    flags: bool = False

    @property
    def named_text(self) -> bool:
        """Whether its name is a usual one for the text."""
        return self.name.lower() in _TEXT_NAMES

    @property
    def named_label(self) -> bool:
        """Whether its name is a usual one for the label."""
        return self.name.lower() in _LABEL_NAMES

    @property
    def plain(self) -> bool:
        """Whether its cells are single values, which may be texts or labels."""
        return self.kind not in ("labels", "list", "object", "mixed", "empty")

    def described(self) -> str:
        """Return what it holds, for a table on the screen."""
        values = "1 value" if self.distinct == 1 else f"{self.distinct} values"
        flags = "true and false" if self.example.lower() in ("true", "false") else "0 and 1"
        return {
            "text": f"text, {self.words:.0f} words on average",
            "label": flags if self.flags and self.distinct == 2 else values,
            "number": f"numbers, {self.distinct:,} values",
            "id": "a different value in every row",
            "date": "dates",
            "labels": f"lists, {self.distinct} label{'s' if self.distinct > 1 else ''} in all",
            "list": "lists",
            "object": "objects with fields",
            "words": f"short texts, {self.distinct:,} values",
            "mixed": "values of several types",
            "empty": "empty",
        }[self.kind]


def describe_columns(table: Table) -> list[ColumnFacts]:
    """Return the facts of every column that can be read, in the order of the file."""
    return [_describe(name, table.columns[name][:_SAMPLE]) for name in table.columns]


def _describe(name: str, values: Sequence[Any]) -> ColumnFacts:
    given = [value for value in values if value is not None and value != ""]
    if not given:
        return ColumnFacts(name, "empty", 0, 0.0, "")
    example = str(given[0])
    if all(isinstance(value, dict) for value in given):
        return ColumnFacts(name, "object", len(given), 0.0, example)
    if all(isinstance(value, list | dict) or _in_brackets(value) for value in given):
        labels = _labels_in(given)
        kind, distinct = ("labels", len(labels)) if labels else ("list", len(given))
        return ColumnFacts(name, kind, distinct, 0.0, example)
    try:
        texts = [label_text(value, None) for value in given]
    except LabelValueError:
        return ColumnFacts(name, "mixed", len(given), 0.0, example)
    distinct = len(set(texts))
    words = mean(len(text.split()) for text in texts)
    kind = _kind(name, given, texts, distinct, words)
    flags = len(given) == len(values) and all(map(_is_flag, given))
    return ColumnFacts(name, kind, distinct, words, example, flags)


def _in_brackets(value: Any) -> bool:
    text = str(value).strip()
    return text.startswith("[") and text.endswith("]")


def _labels_in(values: Sequence[Any]) -> set[str]:
    """Return the labels in a column of lists; none if they are lists of something else."""
    try:
        found = {label for value in values for label in label_list(value, None)}
    except LabelValueError:
        return set()
    if any(is_number(label) and not is_integer(label) for label in found):
        return set()  # Lists of measured numbers, such as an embedding.
    return found if len(found) <= max(_MOST_CLASSES, len(values) // 3) else set()


def _is_flag(value: Any) -> bool:
    try:
        has_label(value)
    except LabelValueError:
        return False
    return True


def _kind(
    name: str, values: Sequence[Any], texts: Sequence[str], distinct: int, words: float
) -> str:
    unique = distinct == len(texts) and len(texts) > 3
    numeric = all(is_number(text) for text in texts)
    as_id = (
        name.lower() in ("id", "idx", "index", "uid", "guid", "key") or name.lower()[-3:] == "_id"
    )
    if all(_DATE.fullmatch(text) for text in texts):
        return "date"
    if unique and (as_id or all(_UUID.fullmatch(text) for text in texts)):
        return "id"
    if numeric and unique and _counts_up(texts):
        return "id"
    if numeric:
        return "label" if distinct <= _few(len(texts)) else "number"
    if words >= _WORDS and distinct > _few(len(texts)):
        return "text"
    if distinct <= _few(len(texts)) or (name.lower() in _LABEL_NAMES and distinct < len(texts)):
        return "label"
    return "text" if all(isinstance(value, str) for value in values) and unique else "words"


def _few(rows: int) -> int:
    """Return the number of values up to which a column may be a label."""
    return min(_MOST_CLASSES, max(2, rows // 3))


def _counts_up(texts: Sequence[str]) -> bool:
    if not all(text.isascii() and text.isdigit() for text in texts):
        return False
    numbers = [int(text) for text in texts]
    return all(after - before == 1 for before, after in pairwise(numbers))


def pair_in(columns: Sequence[ColumnFacts]) -> tuple[str, str] | None:
    """Return two columns that are usual names for a pair of texts, if both are there."""
    names = {column.name.lower(): column.name for column in columns if column.kind != "label"}
    for first, second in _PAIRS:
        if first in names and second in names:
            return names[first], names[second]
    return None


def text_candidates(columns: Sequence[ColumnFacts]) -> list[ColumnFacts]:
    """Return the columns that may be the text, the likeliest first."""
    texts = [column for column in columns if column.kind == "text"]
    texts = texts or [column for column in columns if column.kind == "words"]
    return sorted(texts, key=lambda column: (not column.named_text, -column.words))


def label_candidates(columns: Sequence[ColumnFacts]) -> list[ColumnFacts]:
    """Return the columns that may be the label, the likeliest first.

    A column with one value is the label only by its name, and if no other may be: reading it then
    says what is wrong.
    """
    order = {"label": 0, "labels": 1, "number": 2}
    found = [column for column in columns if column.kind in order and column.distinct > 1]
    if not found:
        return [column for column in columns if column.named_label]
    return sorted(
        found, key=lambda column: (not column.named_label, order[column.kind], column.distinct)
    )


def flag_columns(columns: Sequence[ColumnFacts]) -> list[ColumnFacts]:
    """Return columns of 0 and 1 that may each be one of several labels of a row.

    Empty if there are fewer than two, or if another column may be the label.
    """
    flags = [column for column in columns if column.kind == "label" and column.flags]
    others = [column for column in label_candidates(columns) if column not in flags]
    named = any(column.named_label for column in (*flags, *others))
    usual = any(column.kind != "number" for column in others)
    return [] if len(flags) < 2 or named or usual else flags
