"""What a report says, independent of how it is drawn: facts, tables, figures and sections.

The modules beside this one turn a record into these types. render.py writes them as HTML, Markdown
and LaTeX, terminal.py prints them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Generic, NamedTuple, TypeVar

from sparsegrad_cli.report.units import NOT_RECORDED

Record = TypeVar("Record")


@dataclass(frozen=True)
class Fact:
    """One headline figure: its label, its value, and what to read it against."""

    label: str
    value: str
    detail: str = ""


@dataclass(frozen=True)
class Facts:
    """Headline figures, under a caption where the form needs one."""

    caption: str
    facts: Sequence[Fact]


@dataclass(frozen=True)
class Column(Generic[Record]):
    """How one column of a table is made from a record.

    Attributes:
        name: the header.
        cell: the text of the cell; ``not recorded`` where the record has no value.
        words: the column holds words, aligned left; otherwise figures, aligned right.
        strong: whether the cell stands out.
    """

    name: str
    cell: Callable[[Record], str]
    words: bool = False
    strong: Callable[[Record], bool] | None = None


@dataclass(frozen=True)
class Table:
    """A table of text.

    Attributes:
        caption: one line above.
        header: one name a column.
        rows: one cell a column.
        words: for each column, whether it holds words (aligned left) or figures (aligned right).
        strong: (row, column) of the cells that stand out.
        notes: lines below.
        folded: the summary under which a page folds the table. Folded tables are left out of LaTeX.
    """

    caption: str
    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    words: tuple[bool, ...]
    strong: frozenset[tuple[int, int]] = frozenset()
    notes: Sequence[str] = ()
    folded: str = ""

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
class Figure:
    """A drawing, made when a page is rendered.

    Attributes:
        draw: returns SVG, or None where the record has nothing to draw.
        caption: what the figure shows and how to read it.
        missing: a line in place of a figure that has nothing to draw.
    """

    draw: Callable[[], str | None]
    caption: str
    missing: str = ""


@dataclass(frozen=True)
class Paragraph:
    """Plain text; dim for remarks."""

    text: str
    dim: bool = False


@dataclass(frozen=True)
class Labelled:
    """A value after its label on one line."""

    label: str
    value: str
    bad: bool = False


@dataclass(frozen=True)
class Bullets:
    """A list of remarks."""

    lines: Sequence[str]


@dataclass(frozen=True)
class Verdict:
    """The conclusions of a study, set apart."""

    lines: Sequence[str]


class Check(NamedTuple):
    """A sentence about fairness: True it held, False it did not, None not known."""

    held: bool | None
    sentence: str


@dataclass(frozen=True)
class Checks:
    """The fairness checks of a study."""

    checks: Sequence[Check]


@dataclass(frozen=True)
class Answer:
    """One answer as it is shown.

    Attributes:
        text: several lines; or why there is no answer.
        given: whether there is an answer.
        remark: whether it was cut.
        grade: in words, with the judges' names if there are several.
    """

    text: str
    given: bool = True
    remark: str = ""
    grade: str = ""


@dataclass(frozen=True)
class Turn:
    """One turn of a question, with one answer a column."""

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
    """The name of a column and, where columns differ in it, the model or the seed."""

    name: str
    detail: str = ""


@dataclass(frozen=True)
class SideBySide:
    """The answers to one set of questions by the models of one task.

    Attributes:
        task: of the study.
        subtitle: which questions, how they were asked, who graded the answers.
        columns: base models first, then each method by its first seed.
        questions: in the order in which they were asked.
        grades: mean grades over all seeds; None where nothing was graded.
        notes: columns without answers, and answers of runs that were trained again since.
    """

    task: str
    subtitle: str = ""
    columns: Sequence[ColumnHead] = ()
    questions: Sequence[Question] = ()
    grades: Table | None = None
    notes: Sequence[str] = ()


Block = Facts | Table | Figure | Paragraph | Labelled | Bullets | Verdict | Checks | SideBySide


@dataclass(frozen=True)
class Section:
    """Blocks under a heading.

    Attributes:
        title: the heading.
        blocks: None is left out, and so is a section without blocks.
        in_paper: whether LaTeX has the section.
    """

    title: str
    blocks: Sequence[Block | None]
    in_paper: bool = True


@dataclass(frozen=True)
class Document:
    """A whole report.

    Attributes:
        title, subtitle: the name of what is reported, and one line about it.
        status: a key of :data:`~sparsegrad_cli.report.units.STATUSES`.
        error: (label, text) of what went wrong.
        lead: blocks before the first section.
        sections: in order.
        refresh_s: seconds after which a browser loads the page again; 0 never.
        finished: when it finished, as recorded.
    """

    title: str
    status: str
    subtitle: str = ""
    error: Sequence[tuple[str, str]] = ()
    lead: Sequence[Block | None] = ()
    sections: Sequence[Section] = ()
    refresh_s: int = 0
    finished: str = ""
