"""A table and a fact, as content: the terminal, Markdown and HTML each draw the same ones."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from sparsegrad_cli.report.units import NOT_RECORDED

Cell = str | None


@dataclass(frozen=True)
class Fact:
    """One figure worth a line: what it is, its value, and what it should be read against."""

    label: str
    value: str
    detail: str = ""


@dataclass(frozen=True)
class Table:
    """Cells of text; None is a figure that was not recorded.

    Attributes:
        caption: one line above.
        header: one word or two a column.
        rows: as many cells each as the header.
        left: how many leading columns hold words; the others hold figures, aligned right.
        prose: columns of words after the figures, counted from the end.
        strong: (row, column) of cells that stand out.
        notes: lines below.
    """

    caption: str
    header: tuple[str, ...]
    rows: Sequence[tuple[Cell, ...]]
    left: int = 1
    prose: int = 0
    strong: frozenset[tuple[int, int]] = frozenset()
    notes: Sequence[str] = field(default=())

    def is_words(self, column: int) -> bool:
        """Whether a column holds words, aligned left."""
        return column < self.left or column >= len(self.header) - self.prose

    def without_empty(self) -> Table:
        """The same table less the columns in which no row has anything."""
        return self._with(
            [c for c in range(len(self.header)) if c < self.left or any(r[c] for r in self.rows)]
        )

    def without(self, name: str) -> Table:
        """The same table less the columns of that name."""
        return self._with([c for c, title in enumerate(self.header) if title != name])

    def _with(self, kept: Sequence[int]) -> Table:
        place = {old: new for new, old in enumerate(kept)}
        total = len(self.header)
        return Table(
            self.caption,
            tuple(self.header[c] for c in kept),
            [tuple(row[c] for c in kept) for row in self.rows],
            sum(c < self.left for c in kept),
            sum(c >= total - self.prose for c in kept),
            frozenset((r, place[c]) for r, c in self.strong if c in place),
            self.notes,
        )


def table_markdown(table: Table) -> str:
    """A GitHub table with its caption above and its notes below."""
    marks = [":--" if table.is_words(c) else "--:" for c in range(len(table.header))]
    lines = [f"**{escape_markdown(table.caption)}**", ""]
    lines.append(_line([escape_markdown(name) for name in table.header]))
    lines.append(_line(marks))
    for number, row in enumerate(table.rows):
        cells = [escape_markdown(cell if cell is not None else NOT_RECORDED) for cell in row]
        for column, cell in enumerate(cells):
            if (number, column) in table.strong:
                cells[column] = f"**{cell}**"
        lines.append(_line(cells))
    if table.notes:
        lines += ["", *(f"- {escape_markdown(note)}" for note in table.notes)]
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def escape_markdown(raw: str) -> str:
    """Text that stays text in a GitHub table: no cell, tag, link, emphasis or formula begins."""
    one_line = " ".join(raw.split()).replace("&", "&amp;").replace("<", "&lt;")
    # An underscore inside a word is no emphasis on GitHub, and names are full of them.
    return re.sub(r"([\\`*|~$\[\]]|(?<!\w)_|_(?!\w))", r"\\\1", one_line)
