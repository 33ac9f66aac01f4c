"""Decide once, over all files of a task, whether its labels are classes or scores.

docs/reference/labels.md has the rules. A class is the text of its label (:mod:`.label_texts`).
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

from sparsegrad_cli.data.label_texts import (
    LabelValueError,
    by_number,
    in_id_order,
    is_integer,
    is_missing_mark,
    is_number,
    is_number_with_commas,
    is_plain_integer,
    label_text,
    look_alike_note,
    same_number,
    value_kind,
)
from sparsegrad_cli.data.tables import Table
from sparsegrad_cli.errors import DataError, UsageError
from sparsegrad_cli.io.suggest import listed
from sparsegrad_cli.recipe.task_section import TaskSection
from sparsegrad_cli.recipe.tasks import TaskType, type_by_settings

_MAX_SCORE = 3.4e38  # scores are learnt in float32
_DISTINCT_SHARE = 0.9  # a note follows if float32 keeps fewer of the scores distinct
_ROWS_PER_CLASS = 3  # a note follows if there are fewer training rows per class


@dataclass(frozen=True)
class Labels:
    """The labels of all files of a task.

    Attributes:
        names: class names by id; None for scores.
        values: by table, the class ids, the scores, or for several labels a row (see
            :mod:`.multilabel`) a 1 or 0 for each name.
        notes: what the user should know of them.
    """

    names: tuple[str, ...] | None
    values: list[list[int]] | list[list[float]] | list[list[list[float]]]
    notes: list[str]


def read_labels(
    tables: Sequence[Table], sets: Sequence[str], column: str, task: TaskSection
) -> Labels:
    """Read the label column of all files, training first, and decide what the labels are.

    ``task.type`` decides, else ``task.metric``, else the labels.

    Args:
        sets: name of the set of each table, for errors.

    Raises:
        UsageError: the labels can be read both ways, or do not fit the settings.
        DataError: a label is empty, there is only one class, or a class is not in training.
    """
    labels = _LabelColumn(tables, sets, column)
    kind = type_by_settings(task.type, task.metric) or labels.kind()
    if kind == "regression":
        reason = "task.type regression" if task.type else f"task.metric {task.metric}"
        return Labels(None, labels.scores(reason), labels.notes)
    names, ids = labels.classes()
    return Labels(names, ids, labels.notes)


class _LabelColumn:
    """The label column of all tables as texts.

    Attributes:
        declared: class names of a ClassLabel column; None if no file has one.
        parts: texts by table.
        counts: text -> number of rows.
        notes: filled while the labels are read.
    """

    def __init__(self, tables: Sequence[Table], sets: Sequence[str], column: str) -> None:
        self.tables, self.sets, self.column = tables, sets, column
        self.declared = declared_names(tables, column)
        self.notes: list[str] = []
        self.parts: list[list[str]] = []
        self._kinds: dict[str, set[str]] = {}  # text -> how the files hold it
        trimmed = 0
        for table in tables:
            names = table.class_names.get(column)
            part = []
            for row, value in enumerate(table.columns[column]):
                try:
                    text = label_text(value, names)
                except LabelValueError as error:
                    raise DataError(
                        f"the label in column {column!r} is {error}",
                        where=table.place(row),
                        fix="correct the label or remove the row; task.type: multilabel if a row "
                        "may have several labels, or none",
                    ) from None
                if self.declared is not None and names is None:
                    self._refuse_id_or_name(text, table, row)
                trimmed += isinstance(value, str) and text != value
                self._kinds.setdefault(text, set()).add(value_kind(value, names))
                part.append(text)
            self.parts.append(part)
        if trimmed:
            self.notes.append(f"spaces around {trimmed} labels are left out")
        self.counts = Counter(text for part in self.parts for text in part)

    def kind(self) -> TaskType:
        """Return what the labels are by their texts alone."""
        if self.declared is not None:
            return "classification"
        words = [text for text in self.counts if not is_number(text)]
        numbers = [text for text in self.counts if is_number(text)]
        fractions = [text for text in numbers if not is_integer(text)]
        if words and fractions:
            self._refuse_mixture(words, numbers)
        if words and all(map(is_number_with_commas, words)):
            self._refuse(
                f"Expected numbers such as 1234.5, or words, in column {self.column!r}, got "
                f"{words[0]!r}: it may be a number with a comma, or a class",
                words[0],
                "write numbers without commas; or task.type: classification makes every text a "
                "class",
            )
        if words and numbers and all(map(is_missing_mark, words)):
            self._refuse_mixture(words, numbers)
        if words or not fractions:
            return "classification"
        if all(float(text).is_integer() for text in fractions):
            self._refuse(
                f"every label in column {self.column!r} is a whole number, and {fractions[0]!r} is "
                "written with a point or an exponent: it may be a score or a class",
                fractions[0],
                "task.type: regression learns the numbers; task.type: classification makes every "
                "text a class ('1.0' and '1' are two)",
            )
        pair = same_number(numbers)
        if pair is not None:
            one, other = (f"{text!r} ({self._place(text)})" for text in pair)
            self._refuse(
                f"the labels {one} and {other} are one number and two texts: one score, or two "
                "classes",
                pair[0],
                "task.type: classification keeps them apart; task.type: regression learns the "
                "numbers",
            )
        return "regression"

    def scores(self, reason: str) -> list[list[float]]:
        """Return all labels as numbers, by table."""
        for text in self.counts:
            if not is_number(text):
                raise UsageError(
                    f"{reason} needs numbers, and the label in column {self.column!r} is {text!r}",
                    where=self._place(text),
                    fix="write a number such as 1234.5, or remove the row; for classes set "
                    "task.type: classification",
                )
            if abs(float(text)) > _MAX_SCORE:
                raise DataError(
                    f"the label in column {self.column!r} is too large for a number",
                    where=self._place(text),
                    fix="scale the scores, or set task.type: classification",
                )
        as_float32 = {text: _to_float32(text) for text in self.counts}
        in_training = {as_float32[text] for text in self.parts[0]}
        if len(in_training) == 1 and len(self.parts[0]) > 1:
            raise DataError(
                f"every training label is {next(iter(in_training)):g} as a float32, in which "
                "scores are learnt: there is nothing to learn",
                where=self.tables[0].source,
                fix="give scores that differ; subtract a large offset, or scale them",
            )
        written, distinct = len(by_number(self.counts)), len(set(as_float32.values()))
        if distinct < _DISTINCT_SHARE * written:
            self.notes.append(
                f"the {written} different scores are only {distinct} as float32, in which they are "
                "learnt: subtract a large offset, or scale them"
            )
        return [[float(text) for text in part] for part in self.parts]

    def classes(self) -> tuple[tuple[str, ...], list[list[int]]]:
        """Return class names by id, and all labels as ids, by table.

        Ids follow the names of a ClassLabel column if there is one; else the numbers if every
        label is a plain integer, and else the order of the texts by code point.
        """
        in_training = set(self.parts[0])
        names = self.declared or in_id_order(in_training)
        others = zip(self.tables[1:], self.sets[1:], self.parts[1:], strict=True)
        for table, set_name, part in others:
            row = next((row for row, text in enumerate(part) if text not in in_training), None)
            if row is not None:
                known = listed(sorted(in_training))
                raise DataError(
                    f"label {part[row]!r} occurs in {set_name} but not in training, row {row + 1}",
                    where=table.place(row),
                    fix=f"labels in training, which are compared as text: {known}",
                )
        if len(in_training) < 2:
            raise DataError(
                f"every training label is {next(iter(in_training))!r}: there is nothing to learn",
                where=self.tables[0].source,
                fix="give training rows of two classes or more",
            )
        self.notes += [*self._type_notes(), *look_alike_note(names), *self._few_rows_note()]
        ids = {name: number for number, name in enumerate(names)}
        return names, [[ids[text] for text in part] for part in self.parts]

    def _type_notes(self) -> list[str]:
        """Return notes on labels that some rows hold as text and others as another type."""
        notes = []
        mixed = [text for text, found in self._kinds.items() if len(found) > 1]
        if mixed:
            notes.append(
                "one class each: labels that are text in some rows, and a number or a boolean in "
                f"others ({listed(mixed)})"
            )
        if {"boolean", "number"} <= set().union(*self._kinds.values()):
            notes.append(
                "labels are booleans in some rows and numbers in others: true and 1 are two classes"
            )
        return notes

    def _few_rows_note(self) -> list[str]:
        classes, rows = set(self.parts[0]), len(self.parts[0])
        if len(classes) <= 2 or rows >= _ROWS_PER_CLASS * len(classes):
            return []
        note = f"{len(classes)} classes in {rows} training rows: few rows are left to learn from"
        if 2 * len([name for name in classes if is_number(name)]) > len(classes):
            note += "; if these are scores, set task.type: regression"
        return [note]

    def _place(self, text: str) -> str:
        """Return where a text occurs first."""
        for table, part in zip(self.tables, self.parts, strict=True):
            if text in part:
                return table.place(part.index(text))
        raise KeyError(text)

    def _refuse_id_or_name(self, text: str, table: Table, row: int) -> None:
        """Refuse an integer that is the name of one class and the id of another.

        A file without a ClassLabel column, beside files with one, may hold names or ids.
        """
        names = self.declared or ()
        if text not in names or not is_plain_integer(text):
            return
        by_id = names[int(text)] if int(text) < len(names) else text
        if by_id != text:
            raise DataError(
                f"Expected a ClassLabel column {self.column!r} as in the other files, got {text!r} "
                f"without class names: it may be class {text!r}, or the id of class {by_id!r}",
                where=table.place(row),
                fix="write all files with the same ClassLabel feature",
            )

    def _refuse_mixture(self, words: Sequence[str], numbers: Sequence[str]) -> NoReturn:
        """Refuse words among numbers; the error names a label of the rarer kind."""
        word_rows = sum(self.counts[word] for word in words)
        all_rows = self.counts.total()
        if 2 * word_rows <= all_rows:
            odd, what, count = words[0], "a number", all_rows - word_rows
        else:
            odd = next((text for text in numbers if not is_integer(text)), numbers[0])
            what, count = "a word", word_rows
        self._refuse(
            f"Expected {what} in column {self.column!r}, as in {count} of {all_rows} rows, got "
            f"{odd!r}",
            odd,
            f"correct the label or remove the row; or task.type: classification makes {odd!r} a "
            "class",
        )

    def _refuse(self, what: str, text: str, fix: str) -> NoReturn:
        raise UsageError(what, where=self._place(text), fix=fix)


def declared_names(tables: Sequence[Table], column: str) -> tuple[str, ...] | None:
    """Return the names of a ClassLabel column, which must be the same in all files."""
    found = {names: t.source for t in tables if (names := t.class_names.get(column)) is not None}
    if len(found) > 1 or any(len(set(names)) < len(names) for names in found):
        shown = "; ".join(f"{', '.join(names[:20])} in {source}" for names, source in found.items())
        raise DataError(
            f"Expected one list of different class names for column {column!r}, got {shown}",
            where=list(found.values())[-1],
            fix="write all files with the same ClassLabel feature",
        )
    return next(iter(found), None)


def _to_float32(text: str) -> float:
    number: float = struct.unpack("<f", struct.pack("<f", float(text)))[0]
    return number
