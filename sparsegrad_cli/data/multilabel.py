"""Read the labels of rows that may have several, for training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from sparsegrad_cli.data.label_lists import flagged, label_list
from sparsegrad_cli.data.label_texts import LabelValueError, in_id_order, look_alike_note
from sparsegrad_cli.data.labels import Labels, declared_names
from sparsegrad_cli.data.tables import Table
from sparsegrad_cli.errors import DataError
from sparsegrad_cli.io.suggest import listed

_FIX = "correct the labels or remove the row"


def read_label_lists(
    tables: Sequence[Table], sets: Sequence[str], column: str, separator: str | None
) -> Labels:
    """Read a column of label lists from all files, training first.

    Args:
        tables: the training table, then those of validation and evaluation.
        sets: name of the set of each table, for errors.
        column: holds a list in every row (:func:`~.label_lists.label_list`).
        separator: text between two labels of a cell.

    Raises:
        DataError: a cell holds no list, there are fewer than two labels, or a label is not in
            training.
    """
    parts = [list(_lists(table, column, separator)) for table in tables]
    known = {name for row in parts[0] for name in row}
    if not known:
        raise _no_labels(tables[0])
    names = declared_names(tables, column) or in_id_order(known)
    for table, set_name, part in zip(tables[1:], sets[1:], parts[1:], strict=True):
        for number, row in enumerate(part):
            unknown = next((name for name in row if name not in names), None)
            if unknown is not None:
                raise DataError(
                    f"label {unknown!r} occurs in {set_name} but not in training",
                    where=table.place(number),
                    fix=f"labels in training, which are compared as text: {listed(sorted(known))}",
                )
    return _labels(tables, names, parts)


def read_label_columns(tables: Sequence[Table], columns: Sequence[str]) -> Labels:
    """Read columns of 0 and 1 from all files, training first; the labels are their names.

    Raises:
        DataError: a cell is neither 0 nor 1, or no training row has a label.
    """
    parts = []
    for table in tables:
        cells = {column: table.columns[column] for column in columns}
        part = []
        for row in range(len(table)):
            try:
                part.append(flagged({name: cells[name][row] for name in columns}, columns))
            except LabelValueError as error:
                what = f"the label is {error}"
                raise DataError(what, where=table.place(row), fix=_FIX) from None
        parts.append(part)
    return _labels(tables, tuple(columns), parts)


def _lists(table: Table, column: str, separator: str | None) -> Iterator[list[str]]:
    names = table.class_names.get(column)
    for row, value in enumerate(table.columns[column]):
        try:
            yield label_list(value, separator, names)
        except LabelValueError as error:
            fix = _FIX
            if isinstance(value, str) and separator is None:
                fix = (
                    'write a list such as ["a", "b"], or set task.label_separator to the text '
                    "between two labels, such as ';'"
                )
            raise DataError(
                f"the label in column {column!r} is {error}", where=table.place(row), fix=fix
            ) from None


def _no_labels(training: Table) -> DataError:
    return DataError(
        "no training row has a label: expected two different labels or more",
        where=training.source,
        fix="add training rows with labels",
    )


def _vector(labels: list[str], names: tuple[str, ...]) -> list[float]:
    """Return 1 for each of the names that a row has, and 0 for the others."""
    row = set(labels)
    return [float(name in row) for name in names]


def _labels(
    tables: Sequence[Table], names: tuple[str, ...], parts: Sequence[Sequence[list[str]]]
) -> Labels:
    """Return the labels of all rows as vectors of 0 and 1, with notes."""
    counts = Counter(name for row in parts[0] for name in row)
    if not counts:
        raise _no_labels(tables[0])
    if len(names) < 2:
        raise DataError(
            f"every label is {names[0]!r}: expected two different labels or more",
            where=tables[0].source,
            fix="add rows with another label; or give every row one class, such as yes and no in "
            "place of the lists, and leave task.type out",
        )
    values = [[_vector(row, names) for row in part] for part in parts]
    rows = [row for part in parts for row in part]
    most = max(map(len, rows))
    notes = [*look_alike_note(names)]
    if bare := sum(not row for row in rows):
        notes.append(f"{bare} of {len(rows)} rows have none of the labels")
    if most <= 1:
        notes.append(
            "no row has more than one label: leave task.type out to learn one class a row, "
            "if every row has one"
        )
    always = [name for name in names if counts[name] == len(parts[0])]
    if always:
        notes.append(f"every training row has the label {listed(always)}: it cannot be learnt")
    return Labels(names, values, notes)
