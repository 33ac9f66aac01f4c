"""A table in a terminal: as wide as its figures, and in pieces where that is too wide.

No figure is ever cut short: 1,140… may be any number. What does not fit goes into a second table
below, its first column repeated.
"""

from __future__ import annotations

from dataclasses import replace

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table as RichTable
from rich.text import Text

from sparsegrad_cli.report.tables import Table

DASH = "–"
_GAP = 2  # characters between columns
_LEAST_WORDS = 24  # a column of words folds; narrower than this it cannot be read


def drawn(table: Table | None) -> RenderableType | None:
    """Caption, table and notes; nothing for None."""
    if table is None:
        return None
    parts: list[RenderableType] = [Text(), Text(table.caption, style="italic"), _Fitting(table)]
    if any(cell is None for row in table.rows for cell in row):
        parts.append(Text(f"{DASH} not recorded", style="dim"))
    parts += [Text(note, style="dim") for note in table.notes]
    return Group(*parts)


class _Fitting:
    """A table that knows its width only when it is drawn."""

    def __init__(self, table: Table) -> None:
        self._table = table

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for number, piece in enumerate(pieces(self._table, options.max_width)):
            if number:
                yield Text()
            yield _rich(piece)


def pieces(table: Table, width: int) -> list[Table]:
    """The table cut between columns into tables that fit, the first column in each.

    A column of words may fold, to 24 characters. One figure that is wider than the terminal by
    itself stays what it is.

    Args:
        table: any table.
        width: of the terminal, in characters.
    """
    widths = [_width(table, column) for column in range(len(table.header))]
    found: list[list[int]] = [[0]]
    used = widths[0]
    for column in range(1, len(widths)):
        if used + _GAP + widths[column] > width and len(found[-1]) > 1:
            found.append([0])
            used = widths[0]
        found[-1].append(column)
        used += _GAP + widths[column]
    return [table] if len(found) == 1 else [_columns(table, kept) for kept in found]


def _width(table: Table, column: int) -> int:
    """What a column needs: its longest cell, or word of its name; less where it may fold."""
    name = max((cell_len(word) for word in table.header[column].split()), default=0)
    cells = max((cell_len(row[column] or DASH) for row in table.rows), default=0)
    if column and table.is_words(column):
        cells = min(cells, _LEAST_WORDS)
    return max(name, cells)


def _columns(table: Table, kept: list[int]) -> Table:
    place = {old: new for new, old in enumerate(kept)}
    words = [table.is_words(column) for column in kept]
    left = words.index(False) if False in words else len(words)
    return replace(
        table,
        header=tuple(table.header[column] for column in kept),
        rows=[tuple(row[column] for column in kept) for row in table.rows],
        left=left,
        prose=sum(words[left:]),
        strong=frozenset((r, place[c]) for r, c in table.strong if c in place),
    )


def _rich(table: Table) -> RichTable:
    found = RichTable(
        box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False, show_edge=False, collapse_padding=True
    )
    for column, name in enumerate(table.header):
        words = table.is_words(column)
        justify, fold = ("left", "fold") if words else ("right", "ellipsis")
        found.add_column(
            Text(name.replace(" ", "\n"), justify=justify),  # type: ignore[arg-type]
            justify=justify,  # type: ignore[arg-type]
            overflow=fold,  # type: ignore[arg-type]
            no_wrap=column == 0 or not words,
        )
    for number, row in enumerate(table.rows):
        styles = ["bold" if (number, column) in table.strong else "" for column in range(len(row))]
        cells = [DASH if cell is None else cell for cell in row]
        found.add_row(*(Text(c, style=style) for c, style in zip(cells, styles, strict=True)))
    return found
