"""The content of a report, independent of its format: facts, tables, figures and sections.

The other modules of this package turn a record into these types. render.py writes them as HTML,
Markdown and LaTeX, and terminal.py prints them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Generic, NamedTuple, TypeVar

from sparsegrad_cli.report.units import NOT_RECORDED

Record = TypeVar("Record")


@dataclass(frozen=True)
class Fact:
    """One headline figure: its label, its value, and a value to compare it with."""

    label: str
    value: str
    detail: str = ""


@dataclass(frozen=True)
class Facts:
    """Headline figures, with a caption if the format needs one."""

    caption: str
    facts: Sequence[Fact]


@dataclass(frozen=True)
class Column(Generic[Record]):
    """One column of a table, made from a record.

    Attributes:
        name: the header.
        cell: returns the text of the cell; ``not recorded`` if the record has no value.
        words: whether the column holds words (aligned left) or figures (aligned right).
        strong: whether the cell is bold.
    """

    name: str
    cell: Callable[[Record], str]
    words: bool = False
    strong: Callable[[Record], bool] | None = None


@dataclass(frozen=True)
class Table:
    """A table of text.

    Attributes:
        caption: one line above the table.
        header: one name per column.
        rows: one cell per column.
        words: for each column, whether it holds words (aligned left) or figures (aligned right).
        strong: (row, column) of the bold cells.
        notes: lines below the table.
        folded: the summary line of a folded table. LaTeX leaves out folded tables.
        links: (row, column) of a cell -> address that it links to, relative to the page.
    """

    caption: str
    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    words: tuple[bool, ...]
    strong: frozenset[tuple[int, int]] = frozenset()
    notes: Sequence[str] = ()
    folded: str = ""
    links: Mapping[tuple[int, int], str] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        records: Sequence[Record],
        columns: Sequence[Column[Record]],
        caption: str,
        notes: Sequence[str] = (),
        folded: str = "",
    ) -> Table:
        """Make one row from each record."""
        strong = {
            (row, at)
            for row, record in enumerate(records)
            for at, column in enumerate(columns)
            if column.strong is not None and column.strong(record)
        }
        return cls(
            caption,
            tuple(column.name for column in columns),
            [tuple(column.cell(record) for column in columns) for record in records],
            tuple(column.words for column in columns),
            frozenset(strong),
            notes,
            folded,
        )

    def select(self, kept: Sequence[int]) -> Table:
        """Return the table with the columns at these positions only."""
        place = {old: new for new, old in enumerate(kept)}
        return replace(
            self,
            header=tuple(self.header[c] for c in kept),
            rows=[tuple(row[c] for c in kept) for row in self.rows],
            words=tuple(self.words[c] for c in kept),
            strong=frozenset((row, place[c]) for row, c in self.strong if c in place),
            links={(row, place[c]): to for (row, c), to in self.links.items() if c in place},
        )

    def without(self, *names: str) -> Table:
        """Return the table without the columns of these names."""
        return self.select([c for c, name in enumerate(self.header) if name not in names])

    def without_empty(self) -> Table:
        """Return the table without the columns, after the first, in which no row has a value."""
        empty = ("", NOT_RECORDED)
        columns = range(len(self.header))
        return self.select(
            [c for c in columns if c == 0 or any(row[c] not in empty for row in self.rows)]
        )


@dataclass(frozen=True)
class Key:
    """One entry of a legend: its label, and a small SVG that shows how the series is drawn."""

    label: str
    swatch: str


@dataclass(frozen=True)
class Drawing:
    """A figure as an SVG element, with its legend."""

    svg: str
    legend: Sequence[Key] = ()


@dataclass(frozen=True)
class Figure:
    """A drawing, made when a page is rendered.

    Attributes:
        title: what the figure shows.
        draw: returns the drawing, or None if the record has nothing to draw.
        caption: what the data in the figure say, and how to read it.
        alt: the result in words, for readers who do not see the figure.
        missing: a line that replaces a figure with nothing to draw.
    """

    title: str
    draw: Callable[[], Drawing | None]
    caption: str
    alt: str
    missing: str = ""


@dataclass(frozen=True)
class Paragraph:
    """Plain text; dim for remarks."""

    text: str
    dim: bool = False


@dataclass(frozen=True)
class Labelled:
    """A label and its value on one line."""

    label: str
    value: str
    bad: bool = False


@dataclass(frozen=True)
class Bullets:
    """A list of remarks."""

    lines: Sequence[str]


@dataclass(frozen=True)
class Verdict:
    """The result in one sentence, and what supports it.

    Attributes:
        headline: the sentence; empty if there is no result.
        lines: more sentences.
    """

    headline: str
    lines: Sequence[str] = ()


class Command(NamedTuple):
    """A command line, and what it does."""

    line: str
    purpose: str


@dataclass(frozen=True)
class Commands:
    """Commands to copy."""

    commands: Sequence[Command]


class Check(NamedTuple):
    """A sentence about fairness. True: it held. False: it did not. None: it is unknown."""

    held: bool | None
    sentence: str


@dataclass(frozen=True)
class Checks:
    """The fairness checks of a study."""

    checks: Sequence[Check]


@dataclass(frozen=True)
class Answer:
    """One answer.

    Attributes:
        text: the answer, in several lines, or the reason why there is none.
        given: whether there is an answer.
        remark: a remark if it was cut.
        grade: the grade in words, with the judges' names if there are several.
    """

    text: str
    given: bool = True
    remark: str = ""
    grade: str = ""


@dataclass(frozen=True)
class Turn:
    """One turn of a question, with one answer per column."""

    question: str
    answers: Sequence[Answer]


@dataclass(frozen=True)
class Question:
    """One question: its name and category, its first words, and its turns."""

    name: str
    gist: str
    turns: Sequence[Turn]


@dataclass(frozen=True)
class ColumnHead:
    """The name of a column, with the model or the seed if these differ between columns."""

    name: str
    detail: str = ""


@dataclass(frozen=True)
class SideBySide:
    """The answers to one set of questions by the models of one task.

    Attributes:
        task: a task of the study.
        subtitle: the questions, the generation settings, and the judges.
        columns: base models first, then each method by its first seed.
        questions: in the order in which they were asked.
        grades: mean grades over all seeds; None if nothing was graded.
        notes: columns without answers, and answers of runs that were trained again later.
    """

    task: str
    subtitle: str = ""
    columns: Sequence[ColumnHead] = ()
    questions: Sequence[Question] = ()
    grades: Table | None = None
    notes: Sequence[str] = ()


Block = (
    Facts
    | Table
    | Figure
    | Paragraph
    | Labelled
    | Bullets
    | Verdict
    | Commands
    | Checks
    | SideBySide
)


@dataclass(frozen=True)
class Section:
    """Blocks under a heading.

    Attributes:
        title: the heading.
        blocks: the content. None and sections without blocks are left out.
        in_paper: whether LaTeX includes the section.
    """

    title: str
    blocks: Sequence[Block | None]
    in_paper: bool = True


@dataclass(frozen=True)
class Document:
    """A report.

    Attributes:
        title, subtitle: the name of the run or study, and one line about it.
        status: a key of :data:`~sparsegrad_cli.report.units.STATUSES`.
        error: (label, text) of the error.
        lead: blocks before the first section.
        sections: the sections, in order.
        refresh_s: seconds after which a browser reloads the page; 0 for never.
        finished: the recorded end time.
    """

    title: str
    status: str
    subtitle: str = ""
    error: Sequence[tuple[str, str]] = ()
    lead: Sequence[Block | None] = ()
    sections: Sequence[Section] = ()
    refresh_s: int = 0
    finished: str = ""
