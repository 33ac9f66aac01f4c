"""Grades of answers, in words and as means."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sparsegrad_cli.io.untrusted_text import printable_line
from sparsegrad_cli.report.access import text
from sparsegrad_cli.report.tables import Cell, Table
from sparsegrad_cli.study.statistics import mean, std

Graded = Mapping[tuple[str, int], Mapping[str, float]]  # (question, turn) -> judge -> grade


def column_label(column: Any) -> str:
    """``base model builtin:smollm2``, or ``lora, seed 42``."""
    if text(column, "method") is None:
        return f"base model {text(column, 'model') or '?'}"
    return f"{text(column, 'method')}, seed {text(column, 'seed') or '?'}"


def grade_words(grades: Mapping[str, float] | None) -> str:
    """``grade 7``; with the judges' names where there are several."""
    if not grades:
        return ""
    if len(grades) == 1:
        return f"grade {next(iter(grades.values())):g}"
    return ", ".join(
        f"{printable_line(judge)} {grade:g}" for judge, grade in sorted(grades.items())
    )


def judges_of(graded: Mapping[int, Graded]) -> list[str]:
    """Everybody who gave a grade, by name."""
    given = (turn for found in graded.values() for turn in found.values())
    return sorted({judge for grades in given for judge in grades})


def grade_table(bases: Sequence[Any], runs: Sequence[Any], graded: Mapping[int, Graded]) -> Table:
    """Mean grades: of a column over its questions, of a method over its seeds.

    Args:
        bases, runs: columns of the record.
        graded: id of a column -> its grades.
    """
    judges = judges_of(graded)
    methods = dict.fromkeys(text(run, "method") for run in runs)
    groups = [(column_label(base), [base]) for base in bases]
    groups += [(m or "?", [r for r in runs if text(r, "method") == m]) for m in methods]
    rows: list[tuple[Cell, ...]] = []
    for name, columns in groups:
        cells = [_mean_cell([_mean(graded[id(c)], judge) for c in columns]) for judge in judges]
        rows.append((name, *cells))
    note = (
        "A question's grade is the mean over its turns, a run's the mean over its questions; ± is "
        "the standard deviation over seeds, n their number."
    )
    return Table("Mean grades", ("model", *map(printable_line, judges)), rows, notes=(note,))


def _mean(graded: Graded, judge: str) -> float | None:
    """Over questions, each the mean over its turns."""
    questions: dict[str, list[float]] = {}
    for (name, _), given in graded.items():
        if judge in given:
            questions.setdefault(name, []).append(given[judge])
    return mean([sum(values) / len(values) for values in questions.values()])


def _mean_cell(values: Sequence[float | None]) -> Cell:
    there = [value for value in values if value is not None]
    middle, spread = mean(there), std(there)
    if middle is None:
        return "–"
    return f"{middle:.2f}" if spread is None else f"{middle:.2f} ± {spread:.2f} (n {len(there)})"
