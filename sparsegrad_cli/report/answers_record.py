"""The answers of a comparison's models to the same questions, with their grades, as content.

What generate/side_by_side.py says lies in a comparison's folder is read here; pages draw it. As
everywhere in reports, a value that is missing or damaged is shown as such and stops nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsegrad_cli.errors import SparsegradError
from sparsegrad_cli.generate.side_by_side import FOLDER, read_side_by_side
from sparsegrad_cli.io.untrusted_text import printable_line, printable_text
from sparsegrad_cli.judge.grades import Grades
from sparsegrad_cli.report.access import dig, items, mappings, number, text
from sparsegrad_cli.report.answers_grades import Graded, column_label, grade_table
from sparsegrad_cli.report.labels import reason, status_of, status_words
from sparsegrad_cli.report.tables import Table
from sparsegrad_cli.report.units import format_count

_STOPPED = {"length": "cut at the limit of tokens", "full": "cut where the positions end"}
_EMPTY = "(nothing)"


@dataclass(frozen=True)
class Answer:
    """One answer as it is shown.

    Attributes:
        text: of several lines, without anything that a terminal obeys; or why there is none.
        there: there is an answer.
        remark: that it was cut, or nothing.
        grades: judge -> grade, from 1 to 10.
    """

    text: str
    there: bool = True
    remark: str = ""
    grades: Mapping[str, float] | None = None


@dataclass(frozen=True)
class Asked:
    """One turn of a question, with one answer a column."""

    question: str
    answers: tuple[Answer, ...]


@dataclass(frozen=True)
class Question:
    """One question: its name, and its turns."""

    name: str
    turns: tuple[Asked, ...]


@dataclass(frozen=True)
class SideBySide:
    """The answers to some questions by the models of one task.

    Attributes:
        task: of the comparison.
        subtitle: which questions, asked how, graded by whom.
        columns: (name, what it is) of every column: base models, then methods by their first seed.
        questions: in the order asked.
        grades: mean grades by column, over all seeds; None where nobody graded.
        notes: what is odd about them.
    """

    task: str
    subtitle: str
    columns: tuple[tuple[str, str], ...]
    questions: tuple[Question, ...]
    grades: Table | None
    notes: tuple[str, ...]


def load_answers(study: Path, compare: Mapping[str, Any]) -> list[SideBySide]:
    """What lies in a comparison's folder: a set for every file of questions and task.

    Args:
        study: the folder.
        compare: its compare.json, which says whether a run is still the one that answered.
    """
    files = sorted((study / FOLDER).glob("*.json"))
    if not files:
        return []
    grades = Grades([study])
    found: list[SideBySide] = []
    for file in files:
        try:
            found += side_by_side(read_side_by_side(file), compare, grades)
        except SparsegradError as error:
            note = f"{error.where}: {error.what}"
            found.append(SideBySide(file.stem, "", (), (), None, (note,)))
    return found


def side_by_side(
    record: Mapping[str, Any], compare: Mapping[str, Any], grades: Grades
) -> list[SideBySide]:
    """One for every task that the record's columns belong to."""
    columns = mappings(record, "columns")
    tasks = [task for column in columns if (task := text(column, "task"))]
    ends = {text(c, "run_dir"): text(c, "run", "finished") for c in mappings(compare, "cells")}
    old = tuple(
        f"{column_label(column)}: answered before it was trained again; ask anew"
        for column in columns
        if status_of(column) == "done"
        and text(column, "finished") != ends.get(text(column, "run_dir"))
    )
    return [_of_task(record, columns, task, grades, old) for task in dict.fromkeys(tasks)]


def column_outcome(column: Any) -> str:
    """``12 questions answered, 0 kept``, or why not."""
    if status_of(column) != "done":
        return printable_line(
            ": ".join(p for p in (status_words(status_of(column)), _why(column)) if p)
        )
    asked, there = number(column, "asked") or 0, len(items(column, "answers"))
    return f"{format_count(asked)} questions answered, {format_count(there - asked)} kept"


def _why(column: Any) -> str:
    return reason(column.get("error")) or ""


def _of_task(
    record: Mapping[str, Any],
    columns: Sequence[Mapping[str, Any]],
    task: str,
    grades: Grades,
    old: Sequence[str],
) -> SideBySide:
    bases = [c for c in columns if text(c, "method") is None and task in items(c, "tasks")]
    runs = [c for c in columns if text(c, "task") == task]
    first = [_first(runs, name) for name in dict.fromkeys(text(run, "method") for run in runs)]
    shown = [*bases, *first]
    asked = mappings(record, "asked")
    graded = {id(c): _graded(c, asked, grades) for c in (*bases, *runs)}
    judges = sorted(
        {judge for found in graded.values() for turn in found.values() for judge in turn}
    )
    seeds = {text(column, "seed") for column in first}
    notes = [f"{column_label(c)}: {column_outcome(c)}" for c in columns if status_of(c) != "done"]
    return SideBySide(
        task,
        _subtitle(record, judges, seeds),
        tuple(_heading(column, several=len(seeds) > 1) for column in shown),
        tuple(_question(one, shown, graded) for one in asked),
        grade_table(bases, runs, graded) if judges else None,
        (*notes, *old, *grades.notes),
    )


def _first(runs: Sequence[Mapping[str, Any]], method: str | None) -> Mapping[str, Any]:
    """The method's first run that answered, or its first."""
    own = [run for run in runs if text(run, "method") == method]
    return next((run for run in own if status_of(run) == "done"), own[0])


def _heading(column: Any, *, several: bool) -> tuple[str, str]:
    """Name and detail; the seed is worth saying where columns differ in it."""
    if text(column, "method") is None:
        return "base model", text(column, "model") or ""
    return text(column, "method") or "?", f"seed {text(column, 'seed')}" if several else ""


def _subtitle(record: Any, judges: Sequence[str], seeds: set[str | None]) -> str:
    parts = [f"questions: {text(record, 'questions') or 'not recorded'}"]
    heat, limit = (
        number(record, "settings", "temperature"),
        number(record, "settings", "max_new_tokens"),
    )
    if heat is not None:
        parts.append("likeliest token every time" if heat == 0 else f"temperature {heat:g}")
    if limit is not None:
        parts.append(f"at most {limit:.0f} tokens an answer")
    if len(seeds) == 1:
        parts.append(f"seed {next(iter(seeds)) or '?'}")
    if judges:
        parts.append(f"graded from 1 to 10 by {', '.join(map(printable_line, judges))}")
    return " · ".join(parts)


# --- answers


def _turns(asked: Any) -> list[str]:
    return [turn if isinstance(turn, str) else "?" for turn in items(asked, "turns")]


def _line(column: Any, asked: Any) -> Mapping[str, Any]:
    """What a column answered to a question."""
    name = dig(asked, "question_id")
    lines = (line for line in mappings(column, "answers") if line.get("question_id") == name)
    return next(lines, {})


def _graded(column: Any, asked: Sequence[Any], grades: Grades) -> Graded:
    """The grades of all answers of a column that have any."""
    found = {}
    for one in asked:
        turns, answers = _turns(one), items(_line(column, one), "answers")
        if len(answers) != len(turns) or not all(isinstance(answer, str) for answer in answers):
            continue
        name = dig(one, "question_id")
        for turn in range(len(turns)):
            given = grades.of(name, turns, answers, turn)
            if given:
                found[str(name), turn] = given
    return found


def _question(asked: Any, columns: Sequence[Any], graded: Mapping[int, Graded]) -> Question:
    name, category = text(asked, "question_id") or "?", text(asked, "category")
    turns = tuple(
        Asked(
            printable_text(turn),
            tuple(_answer(column, asked, number, graded[id(column)]) for column in columns),
        )
        for number, turn in enumerate(_turns(asked))
    )
    return Question(f"{name} ({category})" if category else name, turns)


def _answer(column: Any, asked: Any, turn: int, graded: Graded) -> Answer:
    line = _line(column, asked)
    answers, stopped = items(line, "answers"), items(line, "stopped")
    said = answers[turn] if turn < len(answers) else None
    if not isinstance(said, str):
        return Answer(
            column_outcome(column) if status_of(column) != "done" else "not recorded", False
        )
    why = stopped[turn] if turn < len(stopped) else None
    remark = _STOPPED.get(why, "") if isinstance(why, str) else ""
    given = graded.get((str(dig(asked, "question_id")), turn), {})
    return Answer(
        printable_text(said) if said.strip() else _EMPTY, bool(said.strip()), remark, given
    )
