"""Show the record of a judge: grades from 1 to 10 with two decimals, or wins of one model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparsegrad_cli.records.answers import JudgedAnswers, JudgeRecord, JudgeRow
from sparsegrad_cli.report.document import (
    Bullets,
    Column,
    Document,
    Labelled,
    Section,
    Table,
)
from sparsegrad_cli.report.units import NOT_RECORDED, NOTHING, format_count, format_share, words

_MAX_FAILURES = 20


def judge_document(record: JudgeRecord) -> Document:
    """Return the report that is written next to judge.json."""
    return _document(
        record,
        Section("Failed", [Bullets(_failures(record))] if record.failures else []),
        Section("Notes", [Bullets(record.notes)] if record.notes else []),
        Section("Answers", [_answers_table(record)]),
    )


def judge_screen(record: JudgeRecord) -> Document:
    """Return the scores and the failed prompts for the terminal."""
    failures = [Labelled("failed", line, bad=True) for line in _failures(record)]
    return _document(record, Section("", failures))


def _document(record: JudgeRecord, *sections: Section) -> Document:
    kind = "Comparison" if record.mode == "pairwise" else "Grades"
    requests = record.requests
    counts = (
        f"{format_count(requests.asked)} verdicts requested, {format_count(requests.kept)} kept"
        if requests
        else None
    )
    return Document(
        title=f"{kind} by {record.judge or 'an unnamed judge'}",
        status=record.status,
        subtitle=" · ".join(p for p in (record.questions, record.endpoint, counts) if p),
        lead=[_pair_table(record) if record.mode == "pairwise" else _grade_table(record)],
        sections=sections,
    )


def _failures(record: JudgeRecord) -> list[str]:
    """Return a line for each prompt without a reply, up to a limit."""
    more = len(record.failures) - _MAX_FAILURES
    shown = record.failures[:_MAX_FAILURES]
    return [*shown, f"and {more} more in judge.json"] if more > 0 else shown


_CATEGORY: Column[JudgeRow] = Column("category", lambda row: row.category or "all", words=True)
_WRONG: list[Column[JudgeRow]] = [
    Column("no verdict", lambda row: format_count(row.unreadable)),
    Column("failed", lambda row: format_count(row.failed)),
]


def _grade_table(record: JudgeRecord) -> Table:
    turns = max((len(row.turn_means) for row in record.rows), default=0)

    def turn_column(turn: int) -> Column[JudgeRow]:
        return Column(
            f"turn {turn + 1}",
            lambda row: _grade(row.turn_means[turn] if turn < len(row.turn_means) else None),
        )

    columns: list[Column[JudgeRow]] = [
        Column("model", lambda row: words(row.model), words=True),
        _CATEGORY,
        Column("grade", lambda row: _grade(row.mean), strong=lambda row: row.category is None),
        Column("std error", lambda row: _grade(row.standard_error)),
        *(turn_column(turn) for turn in range(turns if turns > 1 else 0)),
        Column("n", lambda row: format_count(row.questions)),
        *_WRONG,
    ]
    note = "The grade of a question is the mean over its turns; n and the error count questions."
    return Table.of(record.rows, columns, "Grades from 1 to 10", [note])


def _pair_table(record: JudgeRecord) -> Table:
    columns: list[Column[JudgeRow]] = [
        _CATEGORY,
        Column("wins", lambda row: format_count(row.wins)),
        Column("ties", lambda row: format_count(row.ties)),
        Column("losses", lambda row: format_count(row.losses)),
        Column("share", lambda row: _share(row.share), strong=lambda row: row.category is None),
        Column("std error", lambda row: _share(row.standard_error)),
        Column("flips", lambda row: format_count(row.flips)),
        Column("one order", lambda row: format_count(row.one_order)),
        *_WRONG,
    ]
    first = record.rows[0] if record.rows else JudgeRow()
    note = (
        "Every pair is shown in both orders. A flip is a pair whose winner changes with the "
        f"order; {format_count(first.first_flips)} of them went to the answer shown first. One "
        "order: preferred in one order, neither in the other. Both count as ties, and a tie "
        "counts half in the share."
    )
    return Table.of(record.rows, columns, " against ".join(first.models), [note])


def _answers_table(record: JudgeRecord) -> Table:
    columns: list[Column[JudgedAnswers]] = [
        Column("model", lambda made: made.model, words=True),
        Column("file", lambda made: words(made.file), words=True),
        Column("weights", lambda made: words((made.digest or "")[:16]), words=True),
        Column("settings", lambda made: _settings(made.settings), words=True),
    ]
    return Table.of(record.answers, columns, "Answers")


def _settings(settings: Mapping[str, Any] | None) -> str:
    found = settings or {}
    shown = [f"{key} {words(value)}" for key, value in found.items() if value is not None]
    return ", ".join(shown) or NOT_RECORDED


def _grade(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.2f}"


def _share(value: float | None) -> str:
    return NOTHING if value is None else format_share(value)
