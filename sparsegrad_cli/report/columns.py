"""Columns of a comparison's tables: a name, and what a row says under it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sparsegrad_cli.report.access import number, text
from sparsegrad_cli.report.compare_record import Row, best_rows
from sparsegrad_cli.report.tables import Cell, Table
from sparsegrad_cli.report.units import format_count, format_mib, format_number


@dataclass(frozen=True)
class Column:
    """One column: its name, its cell in a row, and whether the best row's cell stands out."""

    name: str
    cell: Callable[[Row], Cell]
    ranks: bool = False


def method_name(row: Row) -> str:
    """The label of a row."""
    return text(row, "method") or "?"


METHOD = Column("method", method_name)


def count_cell(*keys: str) -> Callable[[Row], Cell]:
    """A whole number; of a mean, the nearest."""

    def cell(row: Row) -> Cell:
        value = number(row, *keys)
        return None if value is None else format_count(round(value))

    return cell


def mib_cell(*keys: str) -> Callable[[Row], Cell]:
    """Bytes as MiB."""
    return lambda row: format_mib(number(row, *keys))


def number_cell(key: str, digits: int) -> Callable[[Row], Cell]:
    """A number with so many decimals."""

    def cell(row: Row) -> Cell:
        value = number(row, key)
        return None if value is None else f"{value:,.{digits}f}"

    return cell


def speed_cell(row: Row) -> Cell:
    """Steps a second, with half the distance from the fastest seed to the slowest."""
    rate, spread = number(row, "steps_per_s"), number(row, "steps_per_s_iqr")
    if rate is None:
        return None
    return format_number(rate) if spread is None else f"{rate:.3g} ± {spread / 2:.2g}"


def rate_cell(row: Row) -> Cell:
    """Steps a second."""
    rate = number(row, "steps_per_s")
    return None if rate is None else format_number(rate)


def rows_table(
    rows: Sequence[Row], columns: Sequence[Column], caption: str, notes: Sequence[str] = ()
) -> Table:
    """A table of rows; the best row stands out in the columns that rank."""
    best = best_rows(rows)
    ranking = [at for at, column in enumerate(columns) if column.ranks]
    strong = frozenset((row, column) for row in best for column in ranking)
    cells = [tuple(column.cell(row) for column in columns) for row in rows]
    header = tuple(column.name for column in columns)
    return Table(caption, header, cells, strong=strong, notes=notes)
