"""What a judge.json says, as tables. Grades are from 1 to 10, with two decimals."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparsegrad_cli.io.untrusted_text import printable_line
from sparsegrad_cli.report.access import dig, items, mappings, number, text
from sparsegrad_cli.report.tables import Cell, Table, escape_markdown, table_markdown
from sparsegrad_cli.report.units import format_count, format_share

_MOST_FAILURES = 20
_ALL = "all"
_NOTHING = "–"  # there is no mean of nothing, and no error of one


def judge_title(record: Any) -> str:
    """What was judged, by whom."""
    words = "Comparison" if _is_pairwise(record) else "Grades"
    return f"{words} by {text(record, 'judge') or 'an unnamed judge'}"


def judge_subtitle(record: Any) -> str:
    """Questions, endpoint, and how much of it was asked this time."""
    asked, kept = number(record, "requests", "asked"), number(record, "requests", "kept")
    counts = f"{format_count(asked)} verdicts asked for, {format_count(kept)} kept"
    parts = [text(record, "questions"), text(record, "endpoint"), counts]
    return " · ".join(part for part in parts if part)


def judge_scores(record: Any) -> Table:
    """Grades of each model, or wins of the first over the second; categories below the whole."""
    return _pair_table(record) if _is_pairwise(record) else _grade_table(record)


def _grade_table(record: Any) -> Table:
    rows = mappings(record, "rows")
    turns = max((len(items(row, "turn_means")) for row in rows), default=0)
    turn_names = tuple(f"turn {n + 1}" for n in range(turns)) if turns > 1 else ()
    cells: list[tuple[Cell, ...]] = []
    for row in rows:
        means = (items(row, "turn_means") + [None] * turns)[: len(turn_names)]
        cells.append(
            (
                text(row, "model"),
                text(row, "category") or _ALL,
                _grade(number(row, "mean")),
                _grade(number(row, "standard_error")),
                *(_grade(number(mean)) for mean in means),
                format_count(number(row, "questions")),
                *_wrong(row),
            )
        )
    header = ("model", "category", "grade", "std error", *turn_names, "n")
    whole = frozenset((r, 2) for r, row in enumerate(rows) if text(row, "category") is None)
    return Table(
        "Grades from 1 to 10",
        (*header, "no verdict", "failed"),
        cells,
        left=2,
        strong=whole,
        notes=("A question's grade is the mean over its turns; n and the error count questions.",),
    )


def _pair_table(record: Any) -> Table:
    rows = mappings(record, "rows")
    models = [text(name) or "?" for name in items(dig(rows[0], "models"))] if rows else []
    cells: list[tuple[Cell, ...]] = [
        (
            text(row, "category") or _ALL,
            format_count(number(row, "wins")),
            format_count(number(row, "ties")),
            format_count(number(row, "losses")),
            _share(number(row, "share")),
            _share(number(row, "standard_error")),
            format_count(number(row, "flips")),
            format_count(number(row, "one_order")),
            *_wrong(row),
        )
        for row in rows
    ]
    first = number(rows[0], "first_flips") if rows else None
    header = ("category", "wins", "ties", "losses", "share", "std error", "flips", "one order")
    return Table(
        " against ".join(models),
        (*header, "no verdict", "failed"),
        cells,
        strong=frozenset({(0, 4)}) if rows else frozenset(),
        notes=(
            "Every pair is shown in both orders. A flip is a pair whose winner changes with the "
            f"order; {format_count(first)} of them went to the answer shown first. One order: "
            "preferred in one order, neither in the other. Both count as ties, and a tie as half "
            "in the share.",
        ),
    )


def judge_markdown(record: Mapping[str, Any]) -> str:
    """judge.md."""
    parts = [f"# {escape_markdown(judge_title(record))}"]
    parts += [escape_markdown(judge_subtitle(record)), table_markdown(judge_scores(record))]
    failures, notes = judge_failures(record), [n for n in map(text, items(record, "notes")) if n]
    for name, lines in (("Failed", failures), ("Notes", notes)):
        if lines:
            listed = [f"- {escape_markdown(line)}" for line in lines]
            parts.append("\n".join([f"## {name}", "", *listed]))
    answers = [
        (text(a, "model"), text(a, "file"), (text(a, "digest") or "")[:16] or None, _settings(a))
        for a in mappings(record, "answers")
    ]
    made = Table("Answers", ("model", "file", "weights", "settings"), answers, left=4)
    return "\n\n".join([*parts, table_markdown(made)]) + "\n"


def judge_failures(record: Any) -> list[str]:
    """A line for each prompt without a reply, the first of them."""
    found = [line for line in map(text, items(record, "failures")) if line]
    more = len(found) - _MOST_FAILURES
    return found[:_MOST_FAILURES] + ([f"and {more} more in judge.json"] if more > 0 else [])


def _settings(answers: Any) -> str | None:
    found = dig(answers, "settings")
    if not isinstance(found, Mapping):
        return None
    shown = [
        f"{printable_line(key)} {text(value)}" for key, value in found.items() if value is not None
    ]
    return ", ".join(shown) or None


def _wrong(row: Any) -> tuple[str, str]:
    return format_count(number(row, "unreadable")), format_count(number(row, "failed"))


def _grade(value: float | None) -> str:
    return _NOTHING if value is None else f"{value:.2f}"


def _share(value: float | None) -> str:
    return _NOTHING if value is None else format_share(value)


def _is_pairwise(record: Any) -> bool:
    return text(record, "mode") == "pairwise"
