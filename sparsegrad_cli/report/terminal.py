"""Print documents on a terminal, complete and readable at 80 columns.

All text of a record becomes ``Text``, because Rich reads ``[bold]`` in a string as markup.
"""

from __future__ import annotations

from dataclasses import replace

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table as RichTable
from rich.text import Text

from sparsegrad_cli.io.untrusted_text import printable_line, printable_text
from sparsegrad_cli.report.document import (
    Block,
    Bullets,
    Checks,
    Commands,
    Document,
    Facts,
    Labelled,
    Paragraph,
    Table,
    Verdict,
)
from sparsegrad_cli.report.units import (
    NOT_RECORDED,
    status_words,
)

DASH = "–"
_STATUS_STYLE = {"done": "green", "checked": "green", "failed": "red", "out_of_memory": "red"}
_CHECKS = {True: ("✓", "green"), False: ("✗", "bold red"), None: ("·", "dim")}
_GAP = 2  # Characters between columns.
_NARROWEST_WORDS = 24  # Characters below which a column of words does not fold.


def plain_line(raw: str, style: str = "") -> Text:
    """Return one line without markup or control characters; it may contain file names."""
    return Text(printable_text(raw).replace("\n", "\N{SYMBOL FOR NEWLINE}"), style=style)


def screen(document: Document) -> RenderableType:
    """Return the heading and the blocks of a document, ready to print."""
    status = Text(
        printable_line(status_words(document.status)),
        style=_STATUS_STYLE.get(document.status, "yellow"),
    )
    heading = Text.assemble((printable_line(document.title), "bold"), "  ", status)
    lines: list[RenderableType] = [Text(), heading] if document.title else []
    if document.subtitle:
        lines.append(_line(document.subtitle, "dim"))
    for label, text in document.error:
        lines.append(_labelled(label, text, "red" if label == "what" else ""))
    if document.title:
        lines.append(Text())
    sections = [block for section in document.sections for block in section.blocks]
    return Group(*lines, *(_drawn(block) for block in (*document.lead, *sections) if block))


def _drawn(block: Block) -> RenderableType:
    match block:
        case Table():
            return _table(block)
        case Facts():
            return _facts(block)
        case Labelled():
            return _labelled(block.label, block.value, "red" if block.bad else "")
        case Paragraph():
            return _line(block.text, "dim" if block.dim else "")
        case Bullets():
            return Group(*(_line(f"- {line}", "dim") for line in block.lines))
        case Verdict():
            headline = [_line(block.headline, "bold")] if block.headline else []
            return Group(Text(), *headline, *(_line(line) for line in block.lines), Text())
        case Commands():
            return Group(*(_to_copy(each.purpose, each.line) for each in block.commands))
        case Checks():
            marks = ((*_CHECKS[check.held], check.sentence) for check in block.checks)
            return Group(*(_line(f"{mark} {sentence}", style) for mark, style, sentence in marks))
        case _:  # Figures and answers are shown on pages only.
            return Group()


def _line(raw: str, style: str = "") -> Text:
    return Text(printable_line(raw), style=style)


def _labelled(label: str, value: str, style: str = "") -> Text:
    return Text.assemble((f"{printable_line(label)}  ", "dim"), (printable_line(value), style))


def _to_copy(label: str, line: str) -> Text:
    """Return a line that is not broken: a terminal's own break is not copied with it."""
    text = _labelled(label, line)
    text.no_wrap, text.overflow = True, "ignore"
    return text


def _facts(block: Facts) -> RenderableType:
    grid = RichTable.grid(padding=(0, 2))
    grid.add_column(no_wrap=True)
    grid.add_column(no_wrap=True, justify="right")
    grid.add_column(style="dim", overflow="fold")
    for fact in block.facts:
        grid.add_row(_line(fact.label), _line(fact.value, "bold"), _line(fact.detail))
    return grid


def _table(table: Table) -> RenderableType:
    rows = [
        tuple(DASH if cell == NOT_RECORDED else printable_line(cell) for cell in row)
        for row in table.rows
    ]
    shown = replace(table, header=tuple(map(printable_line, table.header)), rows=rows)
    parts: list[RenderableType] = [Text(), _line(table.caption, "italic"), _Fitted(shown)]
    if any(cell == NOT_RECORDED for row in table.rows for cell in row):
        parts.append(_line(f"{DASH} {NOT_RECORDED}", "dim"))
    return Group(*parts, *(_line(note, "dim") for note in table.notes))


class _Fitted:
    """A table that is cut to the width of the terminal when it is printed."""

    def __init__(self, table: Table) -> None:
        self._table = table

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for number, part in enumerate(cut_to_width(self._table, options.max_width)):
            if number:
                yield Text()
            yield _rich(part, options.max_width)


def cut_to_width(table: Table, width: int) -> list[Table]:
    """Cut a table between columns into tables that fit, each with the first column.

    Figures are never shortened, because 1,140… could be any number. A column of words may fold down
    to 24 characters. A figure that is wider than the terminal stays whole.

    Args:
        table: any table.
        width: the width of the terminal, in characters.
    """
    widths = [_width(table, column) for column in range(len(table.header))]
    parts: list[list[int]] = [[0]]
    used = widths[0]
    for column in range(1, len(widths)):
        if used + _GAP + widths[column] > width and len(parts[-1]) > 1:
            parts.append([0])
            used = widths[0]
        parts[-1].append(column)
        used += _GAP + widths[column]
    return [table.select(columns) for columns in parts]


def _width(table: Table, column: int) -> int:
    """Return the width that a column needs: its longest cell or header line; less if it folds."""
    name = max(map(cell_len, _broken(table.header[column]).split("\n")))
    cells = max((cell_len(row[column]) for row in table.rows), default=0)
    if column and table.words[column]:
        cells = min(cells, _NARROWEST_WORDS)
    return max(name, cells)


def _broken(header: str) -> str:
    """Return a header with a line for each word; a number keeps its unit: ``95 %``."""
    return header.replace(" %", "\N{NO-BREAK SPACE}%").replace(" ", "\n")


def _rich(table: Table, width: int) -> RichTable:
    """Return the table, with headers on one line if it then fits."""
    whole = [max(_width(table, at), cell_len(name)) for at, name in enumerate(table.header)]
    fits = sum(whole) + _GAP * (len(whole) - 1) <= width
    found = RichTable(
        box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False, show_edge=False, collapse_padding=True
    )
    for column, (name, words) in enumerate(zip(table.header, table.words, strict=True)):
        found.add_column(
            Text(name if fits else _broken(name), justify="left" if words else "right"),
            justify="left" if words else "right",
            overflow="fold" if words else "ellipsis",
            no_wrap=column == 0 or not words,
        )
    for number, row in enumerate(table.rows):
        found.add_row(
            *(
                Text(cell, style="bold" if (number, column) in table.strong else "")
                for column, cell in enumerate(row)
            )
        )
    return found
