"""Answers side by side: a column a model in HTML (cards on a phone) and in Markdown.

Answers are written by models, and questions by anybody: all of it is escaped.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from sparsegrad_cli.report.answers_grades import grade_words
from sparsegrad_cli.report.answers_record import Answer, Asked, Question, SideBySide
from sparsegrad_cli.report.page import bullets, html_table, paragraph
from sparsegrad_cli.report.tables import escape_markdown, table_markdown

_OPEN = 3  # questions that are unfolded at first
_GIST = 90  # characters of a question in its summary


def heading(found: SideBySide, *, alone: bool) -> str:
    """``Answers``; with task and questions where there are several sets."""
    return "Answers" if alone else f"Answers: {found.task}"


def answers_section(found: SideBySide, *, alone: bool) -> tuple[str, str]:
    """(heading, HTML) of a page's section."""
    body = paragraph(found.subtitle, dim=True) + bullets(found.notes)
    body += html_table(found.grades) if found.grades else ""
    body += "".join(
        _question(question, found.columns, unfolded=number < _OPEN)
        for number, question in enumerate(found.questions)
    )
    return heading(found, alone=alone), body


def _question(question: Question, columns: Sequence[tuple[str, str]], *, unfolded: bool) -> str:
    gist = " ".join(question.turns[0].question.split()) if question.turns else ""
    gist = gist if len(gist) <= _GIST else f"{gist[:_GIST].rstrip()}…"
    turns = "".join(_turn(turn, columns) for turn in question.turns)
    return (
        f'<details class="asked"{" open" if unfolded else ""}><summary>'
        f'<b>{escape(question.name)}</b> <span class="gist">{escape(gist)}</span></summary>'
        f"{turns}</details>\n"
    )


def _turn(turn: Asked, columns: Sequence[tuple[str, str]]) -> str:
    cards = "".join(
        _card(name, detail, answer)
        for (name, detail), answer in zip(columns, turn.answers, strict=True)
    )
    question = f'<div class="question" dir="auto">{escape(turn.question)}</div>'
    return f'{question}<div class="answers">{cards}</div>'


def _card(name: str, detail: str, answer: Answer) -> str:
    said = "said" if answer.there else "said none"
    grade, remark = grade_words(answer.grades), answer.remark
    return (
        f'<div class="answer"><h4>{escape(name)}'
        + (f" <small>{escape(detail)}</small>" if detail else "")
        + (f'<span class="grade">{escape(grade)}</span>' if grade else "")
        + f'</h4><div class="{said}" dir="auto">{escape(answer.text)}</div>'
        + (f'<div class="remark">{escape(remark)}</div>' if remark else "")
        + "</div>"
    )


def answers_markdown(found: SideBySide, *, alone: bool) -> str:
    """A section with one table: a row a turn, a column a model."""
    parts = [f"## {escape_markdown(heading(found, alone=alone))}"]
    parts += [escape_markdown(found.subtitle)] if found.subtitle else []
    parts += ["\n".join(f"- {escape_markdown(n)}" for n in found.notes)] if found.notes else []
    parts += [table_markdown(found.grades)] if found.grades else []
    names = [f"{name} {detail}" if detail else name for name, detail in found.columns]
    lines = [
        _row(["question", *map(escape_markdown, names)]),
        _row([":--"] * (len(names) + 1)),
    ]
    for question in found.questions:
        for number, turn in enumerate(question.turns):
            name = f"**{escape_markdown(question.name)}**<br>" if number == 0 else ""
            cells = [name + _cell(turn.question), *(_answer_cell(a) for a in turn.answers)]
            lines.append(_row(cells))
    return "\n\n".join([*parts, *(["\n".join(lines)] if found.questions else [])])


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _answer_cell(answer: Answer) -> str:
    said = _cell(answer.text)
    below = [w for w in (answer.remark, grade_words(answer.grades)) if w]
    shown = said if answer.there else f"*{said}*"
    return "<br>".join([shown, *(f"*{escape_markdown(w)}*" for w in below)])


def _cell(raw: str) -> str:
    """Text of several lines in one cell of a table; indentation is kept."""
    return "<br>".join(
        "&nbsp;" * (len(line) - len(line.lstrip())) + escape_markdown(line)
        for line in raw.split("\n")
    )
