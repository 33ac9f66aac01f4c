"""What the labels of a user's own files are: classes or scores, decided once over all files.

A class is the text of its label, as the file writes it; only spaces around it are left out. ``01``
and ``1`` are two classes, and so are two integers of any size. Values that are not text have one:

=================================  =========================================================
value                              its text
=================================  =========================================================
integer                            its digits
number in JSON                     as the file writes it: ``1.10`` stays ``1.10``
float in Parquet                   the shortest decimal that reads back as the same float64:
                                   ``1.0``, ``0.1``
decimal in Parquet                 all its digits: ``1.10``
true, false (JSON, Parquet)        ``true``, ``false``
class id of a ClassLabel column    the name in the file's metadata
=================================  =========================================================

``task.type`` says what the labels are. Without it ``task.metric`` does, and without both this
table, row by row; the first that fits decides:

===============================================  ==========================================
all labels of all files                          are
===============================================  ==========================================
ids of a ClassLabel column                       classes
words; or words and integers                     classes
integers                                         classes
numbers, of which some have a fraction           scores
===============================================  ==========================================

What can be read both ways is refused, and the error names ``task.type``: two spellings of one
number among fractions (``1.1`` and ``1.10``); whole numbers with a point or an exponent (``1.0``,
``1e5``); words among numbers with a fraction; a mark for a missing value (``NA``) among integers;
commas in numbers (``1,5``). An empty label is always an error.
"""

from __future__ import annotations

import math
import re
import struct
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any, NoReturn

from sparsegrad_cli.data.json_files import WrittenFloat
from sparsegrad_cli.data.table import Table
from sparsegrad_cli.data.text_files import is_text
from sparsegrad_cli.errors import DataError, UsageError
from sparsegrad_cli.recipe.tasks import TaskType, type_by_settings

_LARGEST = 3.4e38  # that float32 holds, in which scores are learnt
# ASCII digits only: float() would also take "1_000", "nan" and the digits of other scripts.
_INTEGER = re.compile(r"[+-]?[0-9]+")
_PLAIN_INTEGER = re.compile(r"0|-?[1-9][0-9]*")
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
_WITH_COMMAS = re.compile(r"[+-]?[0-9]+(,[0-9]+)+(\.[0-9]+)?")
# Compared in lower case. Infinity is no more a number here than NaN is.
_MISSING = re.compile(r"#?n/?a|<na>|nan|nil|null|none|missing|[+-]?inf(inity)?|--?|\?|\.")
_SCORES_KEPT = 0.9  # share of the scores that float32 tells apart, below which a note says so
_ROWS_OF_A_CLASS = 3  # fewer rows a class than this, and a note asks whether these are classes


@dataclass(frozen=True)
class Labels:
    """The labels of all files of a task.

    Attributes:
        names: class names by id; None for scores.
        values: class ids or scores, by table.
        notes: what a user should know of them.
    """

    names: tuple[str, ...] | None
    values: list[list[int]] | list[list[float]]
    notes: list[str]


def read_labels(
    tables: Sequence[Table], column: str, *, task_type: TaskType | None, metric: str | None
) -> Labels:
    """Read the label column of all files, training first, and decide what the labels are.

    Class ids follow the names of a ClassLabel column where there is one; else the numbers where
    every label is a plain integer, and the order of the texts (by code point) otherwise.

    Raises:
        UsageError: the labels can be read both ways, or are not what the settings say.
        DataError: an empty label, one class only, or a class that only validation has.
    """
    column_of_texts = _Texts(tables, column)
    wanted = type_by_settings(task_type, metric) or column_of_texts.guess()
    if wanted == "regression":
        reason = "task.type regression" if task_type else f"task.metric {metric}"
        return Labels(None, column_of_texts.scores(reason), column_of_texts.notes)
    names, ids = column_of_texts.classes()
    return Labels(names, ids, column_of_texts.notes)


def as_number(text: str) -> float | None:
    """The number that a label writes in ASCII digits; None for anything else."""
    return float(text) if _NUMBER.fullmatch(text) else None


class _Texts:
    """The label column of every table as texts, and the first place of each text."""

    def __init__(self, tables: Sequence[Table], column: str) -> None:
        self.tables, self.column = tables, column
        self.declared = _declared_names(tables, column)
        self.notes: list[str] = []
        self.parts: list[list[str]] = []
        kinds: dict[str, set[str]] = {}
        trimmed = 0
        for table in tables:
            names = table.class_names.get(column)
            part = []
            for row, value in enumerate(table.columns[column]):
                text = _text_of(value, names, column, table, row)
                if self.declared is not None and names is None:
                    self._check_id_or_name(text, table, row)
                trimmed += isinstance(value, str) and text != value
                kinds.setdefault(text, set()).add(_kind_of(value, names))
                part.append(text)
            self.parts.append(part)
        if trimmed:
            self.notes.append(f"spaces around {trimmed} labels are left out")
        self._mixed = [text for text, found in kinds.items() if len(found) > 1]
        self._kinds = set().union(*kinds.values())
        self.counts = Counter(text for part in self.parts for text in part)

    def _check_id_or_name(self, text: str, table: Table, row: int) -> None:
        """Refuse an integer that names one class and is the id of another.

        A file without a ClassLabel feature, beside files with one, may hold names or ids.
        """
        names = self.declared or ()
        if text not in names or not _PLAIN_INTEGER.fullmatch(text):
            return
        by_id = names[int(text)] if int(text) < len(names) else text
        if by_id != text:
            raise DataError(
                f"Expected a ClassLabel column {self.column!r} as in the other files, got {text!r} "
                f"without class names: it may be class {text!r}, or the id of class {by_id!r}",
                where=table.place(row),
                fix="write all files with the same ClassLabel feature",
            )

    def place(self, text: str) -> str:
        """Where a text stands first."""
        for table, part in zip(self.tables, self.parts, strict=True):
            if text in part:
                return table.place(part.index(text))
        raise KeyError(text)

    def guess(self) -> TaskType:
        """What the labels are by their texts alone.

        Raises:
            UsageError: they can be read both ways.
        """
        words = [text for text in self.counts if not _NUMBER.fullmatch(text)]
        numbers = [text for text in self.counts if _NUMBER.fullmatch(text)]
        points = [text for text in numbers if not _INTEGER.fullmatch(text)]
        if self.declared is not None:
            return "classification"
        if words and points:
            self._refuse_mixture(words, numbers)
        if words and all(_WITH_COMMAS.fullmatch(word) for word in words):
            self._refuse(
                f"Expected numbers such as 1234.5, or words, in column {self.column!r}, got "
                f"{words[0]!r}: it may be a number with a comma, or a class",
                words[0],
                "write numbers without commas; or task.type: classification makes every text a "
                "class",
            )
        if words and numbers and all(_MISSING.fullmatch(word.lower()) for word in words):
            self._refuse_mixture(words, numbers)
        if words or not points:
            return "classification"
        if all(float(text).is_integer() for text in points):
            self._refuse(
                f"every label in column {self.column!r} is a whole number, and {points[0]!r} is "
                "written with a point or an exponent: it may be a score or a class",
                points[0],
                "task.type: regression learns the numbers; task.type: classification makes every "
                "text a class ('1.0' and '1' are two)",
            )
        twins = _one_number(numbers)
        if twins is not None:
            one, other = (f"{text!r} ({self.place(text)})" for text in twins)
            self._refuse(
                f"the labels {one} and {other} are one number and two texts: one score, or two "
                "classes",
                twins[0],
                "task.type: classification keeps them apart; task.type: regression learns the "
                "numbers",
            )
        return "regression"

    def scores(self, reason: str) -> list[list[float]]:
        """All labels as numbers."""
        for text in self.counts:
            number = as_number(text)
            if number is None:
                raise UsageError(
                    f"{reason} needs numbers, and the label in column {self.column!r} is {text!r}",
                    where=self.place(text),
                    fix="write a number such as 1234.5, or take the row out; for classes "
                    "task.type: classification",
                )
            if abs(number) > _LARGEST:
                raise DataError(
                    f"the label in column {self.column!r} is too large for a number",
                    where=self.place(text),
                    fix="scale the scores, or task.type: classification",
                )
        learnt = {text: _as_learnt(text) for text in self.counts}
        in_training = {learnt[text] for text in self.parts[0]}
        if len(in_training) == 1 and len(self.parts[0]) > 1:
            raise DataError(
                f"every training label is {next(iter(in_training)):g} as a float32, in which "
                "scores are learnt: there is nothing to learn",
                where=self.tables[0].source,
                fix="give scores that differ; subtract a large offset, or scale them",
            )
        written = len(_by_number(self.counts))
        if len(set(learnt.values())) < _SCORES_KEPT * written:
            self.notes.append(
                f"the {written} different scores are only {len(set(learnt.values()))} as float32, "
                "in which they are learnt: subtract a large offset, or scale them"
            )
        return [[float(text) for text in part] for part in self.parts]

    def classes(self) -> tuple[tuple[str, ...], list[list[int]]]:
        """Class names by id, and all labels as ids."""
        seen = set(self.parts[0])
        names = self.declared or _ordered(seen)
        for table, part in zip(self.tables[1:], self.parts[1:], strict=True):
            row = next((row for row, text in enumerate(part) if text not in seen), None)
            if row is not None:
                raise DataError(
                    f"label {part[row]!r} occurs in validation but not in training, row {row + 1}",
                    where=table.place(row),
                    fix=f"labels in training, which are compared as text: {_listed(sorted(seen))}",
                )
        if len(seen) < 2:
            raise DataError(
                f"every training label is {next(iter(seen))!r}: there is nothing to learn",
                where=self.tables[0].source,
                fix="give training rows of two classes or more",
            )
        if self._mixed:
            self.notes.append(
                f"one class each: labels that are text in some rows, and a number or a boolean in "
                f"others ({_listed(self._mixed)})"
            )
        if {"boolean", "number"} <= self._kinds:
            self.notes.append(
                "labels are booleans in some rows and numbers in others: true and 1 are two classes"
            )
        self.notes += _look_alike(names)
        rows = len(self.parts[0])
        if len(seen) > 2 and rows < _ROWS_OF_A_CLASS * len(seen):
            note = f"{len(seen)} classes in {rows} training rows: few rows are left to learn from"
            if 2 * sum(_NUMBER.fullmatch(text) is not None for text in seen) > len(seen):
                note += "; if these are scores, set task.type: regression"
            self.notes.append(note)
        ids = {name: number for number, name in enumerate(names)}
        return names, [[ids[text] for text in part] for part in self.parts]

    def _refuse_mixture(self, words: Sequence[str], numbers: Sequence[str]) -> NoReturn:
        """Words among numbers: name the rarer kind."""
        of_words = sum(self.counts[word] for word in words)
        all_rows = self.counts.total()
        if 2 * of_words <= all_rows:
            odd, what, count = words[0], "a number", all_rows - of_words
        else:
            points = (text for text in numbers if not _INTEGER.fullmatch(text))
            odd = next(points, numbers[0])
            what, count = "a word", of_words
        self._refuse(
            f"Expected {what} in column {self.column!r}, as in {count} of {all_rows} rows, got "
            f"{odd!r}",
            odd,
            f"correct the label or take the row out; or task.type: classification makes {odd!r} a "
            "class",
        )

    def _refuse(self, what: str, text: str, fix: str) -> NoReturn:
        raise UsageError(what, where=self.place(text), fix=fix)


def _declared_names(tables: Sequence[Table], column: str) -> tuple[str, ...] | None:
    """The names of a ClassLabel column, which must be the same in all files."""
    found = {names: t.source for t in tables if (names := t.class_names.get(column)) is not None}
    if len(found) > 1 or any(len(set(names)) < len(names) for names in found):
        shown = "; ".join(f"{', '.join(names[:20])} in {source}" for names, source in found.items())
        raise DataError(
            f"Expected one list of different class names for column {column!r}, got {shown}",
            where=list(found.values())[-1],
            fix="write all files with the same ClassLabel feature",
        )
    return next(iter(found), None)


def _text_of(value: Any, names: tuple[str, ...] | None, column: str, table: Table, row: int) -> str:
    """The text of one label; see the module's table."""
    what = None
    if value is None or (isinstance(value, str) and not value.strip()):
        what = "empty"
    elif isinstance(value, bool):
        return "true" if value else "false"
    elif isinstance(value, int):
        if names is None:
            return str(value)
        if 0 <= value < len(names):
            return names[value]
        what = f"{value}, and the file names the classes 0 to {len(names) - 1}"
    elif isinstance(value, WrittenFloat):
        return value.written
    elif isinstance(value, float | Decimal):
        finite = math.isfinite(value) if isinstance(value, float) else value.is_finite()
        if finite:
            return str(value)  # of a float, the shortest decimal that reads back equal
        what = str(value)
    elif isinstance(value, str):
        text = value.strip()
        if is_text(text):
            return text
        what = "half of a character (a lone surrogate)"
    else:
        what = f"a {type(value).__name__}: expected a word or a number"
    raise DataError(
        f"the label in column {column!r} is {what}",
        where=table.place(row),
        fix="correct the label or take the row out",
    )


def _kind_of(value: Any, names: tuple[str, ...] | None) -> str:
    if names is not None or isinstance(value, str):
        return "text"
    return "boolean" if isinstance(value, bool) else "number"


def _one_number(texts: Sequence[str]) -> list[str] | None:
    """The first two texts that write the same number."""
    return next((same[:2] for same in _by_number(texts).values() if len(same) > 1), None)


def _by_number(texts: Iterable[str]) -> dict[Decimal | str, list[str]]:
    """Group texts by the number that they write, which is compared exactly."""
    same: dict[Decimal | str, list[str]] = {}
    for text in texts:
        value: Decimal | str
        try:
            value = Decimal(text)
        except InvalidOperation:  # an exponent of twenty digits
            value = text
        same.setdefault(value, []).append(text)
    return same


def _as_learnt(text: str) -> float:
    """Return the score in the precision in which it is learnt."""
    number: float = struct.unpack("<f", struct.pack("<f", float(text)))[0]
    return number


def _look_alike(names: Sequence[str]) -> list[str]:
    """Return a note on classes that a reader may take for one class."""
    same: dict[str | Decimal, list[str]] = {}
    for name in names:
        key: str | Decimal = unicodedata.normalize("NFKC", name).casefold()
        if _NUMBER.fullmatch(str(key)):
            key = next(iter(_by_number([str(key)])))
        else:
            visible = (c for c in str(key) if unicodedata.category(c) not in ("Cc", "Cf"))
            key = " ".join("".join(visible).split())
        same.setdefault(key, []).append(name)
    twins = [" and ".join(map(ascii, found)) for found in same.values() if len(found) > 1]
    if not twins:
        return []
    return [
        "classes that differ only in case, spaces, invisible characters or the way a number is "
        f"written: {_listed(twins)}"
    ]


def _ordered(texts: set[str]) -> tuple[str, ...]:
    numeric = all(map(_PLAIN_INTEGER.fullmatch, texts))
    return tuple(sorted(texts, key=Decimal if numeric else None))


def _listed(texts: Sequence[str]) -> str:
    more = f" and {len(texts) - 20} more" if len(texts) > 20 else ""
    return ", ".join(texts[:20]) + more
