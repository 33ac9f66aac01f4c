"""Show the answers of a study's models to the same questions side by side, with grades."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Protocol

from sparsegrad_cli.records.answers import AnswerLine, AnswersColumn, AnswersRecord, AskedQuestion
from sparsegrad_cli.records.study import StudyRecord
from sparsegrad_cli.report.document import (
    Answer,
    Column,
    ColumnHead,
    Question,
    SideBySide,
    Table,
    Turn,
)
from sparsegrad_cli.report.units import (
    NOT_RECORDED,
    NOTHING,
    format_count,
    status_words,
)

_CUT = {"length": "cut at the token limit", "full": "cut at the model's last position"}
_EMPTY = "(empty)"
_GIST = 90  # Characters of a question in its summary.

# (question, turn from 0) -> judge -> grade from 1 to 10.
Graded = Mapping[tuple[str, int], Mapping[str, float]]


class Grades(Protocol):
    """A lookup of the grades of answers."""

    def of(
        self, question_id: object, turns: Sequence[str], answers: Sequence[str], turn: int
    ) -> Mapping[str, float]:
        """Return judge -> grade of the answer to a turn, counted from 0."""


def side_by_side(
    record: AnswersRecord, study: StudyRecord, grades: Grades, notes: Sequence[str] = ()
) -> list[SideBySide]:
    """Return the answers to one set of questions, one object for each task.

    Args:
        record: the answers.
        study: tells whether a run was trained again after it answered.
        grades: looks up the grades.
        notes: more remarks to show.
    """
    ends = {cell.run_dir: cell.run.finished if cell.run else None for cell in study.cells}
    old = [
        f"{column_label(column)}: answered before the run was trained again; ask again"
        for column in record.columns
        if column.status == "done" and column.finished != ends.get(column.run_dir)
    ]
    tasks = dict.fromkeys(column.task for column in record.columns if column.task)
    return [_of_task(record, task, grades, (*old, *notes)) for task in tasks]


def column_label(column: AnswersColumn) -> str:
    """Return the column's label: ``base model builtin:smollm2``, or ``lora, seed 42``."""
    if column.method is None:
        return f"base model {column.model or '?'}"
    return f"{column.method}, seed {column.seed}"


def column_outcome(column: AnswersColumn) -> str:
    """Return the outcome: ``12 questions answered, 0 kept``, or the reason of a failure."""
    if column.status != "done":
        what = column.error.what if column.error else None
        return ": ".join(part for part in (status_words(column.status), what) if part)
    asked = column.asked or 0
    kept = format_count(len(column.answers) - asked)
    return f"{format_count(asked)} questions answered, {kept} kept"


def _of_task(record: AnswersRecord, task: str, grades: Grades, notes: Sequence[str]) -> SideBySide:
    bases = [c for c in record.columns if c.method is None and task in c.tasks]
    runs = [c for c in record.columns if c.task == task]
    first = [_first(runs, method) for method in dict.fromkeys(run.method for run in runs)]
    graded = [(column, _graded(column, record.asked, grades)) for column in (*bases, *runs)]
    judges = sorted({judge for _, found in graded for given in found.values() for judge in given})
    seeds = {column.seed for column in first}
    failed = [
        f"{column_label(column)}: {column_outcome(column)}"
        for column in record.columns
        if column.status != "done"
    ]
    shown = [(column, found) for column, found in graded if column in (*bases, *first)]
    return SideBySide(
        task,
        _subtitle(record, judges, sorted(seeds, key=str)),
        [_head(column, several=len(seeds) > 1) for column, _ in shown],
        [_question(asked, shown) for asked in record.asked],
        _grade_table(graded, judges) if judges else None,
        (*failed, *notes),
    )


def _first(runs: Sequence[AnswersColumn], method: str | None) -> AnswersColumn:
    """Return the method's first run that answered, or its first run."""
    own = [run for run in runs if run.method == method]
    return next((run for run in own if run.status == "done"), own[0])


def _head(column: AnswersColumn, *, several: bool) -> ColumnHead:
    if column.method is None:
        return ColumnHead("base model", column.model or "")
    return ColumnHead(column.method, f"seed {column.seed}" if several else "")


def _subtitle(record: AnswersRecord, judges: Sequence[str], seeds: Sequence[int | None]) -> str:
    parts = [f"questions: {record.questions or NOT_RECORDED}"]
    heat = record.settings.temperature if record.settings else None
    limit = record.settings.max_new_tokens if record.settings else None
    if heat is not None:
        parts.append("greedy decoding" if heat == 0 else f"temperature {heat:g}")
    parts += [f"at most {limit} tokens per answer"] if limit is not None else []
    parts += [f"seed {seeds[0]}"] if len(seeds) == 1 else []
    parts += [f"graded from 1 to 10 by {', '.join(judges)}"] if judges else []
    return " · ".join(parts)


def _question(asked: AskedQuestion, columns: Sequence[tuple[AnswersColumn, Graded]]) -> Question:
    name = "?" if asked.question_id is None else str(asked.question_id)
    gist = " ".join(asked.turns[0].split()) if asked.turns else ""
    turns = [
        Turn(text, [_answer(column, asked, turn, graded) for column, graded in columns])
        for turn, text in enumerate(asked.turns)
    ]
    return Question(
        f"{name} ({asked.category})" if asked.category else name,
        gist if len(gist) <= _GIST else f"{gist[:_GIST].rstrip()}…",
        turns,
    )


def _line(column: AnswersColumn, asked: AskedQuestion) -> AnswerLine:
    """Return the answers of a column to a question."""
    found = (line for line in column.answers if line.question_id == asked.question_id)
    return next(found, AnswerLine())


def _answer(column: AnswersColumn, asked: AskedQuestion, turn: int, graded: Graded) -> Answer:
    line = _line(column, asked)
    if turn >= len(line.answers):
        why = NOT_RECORDED if column.status == "done" else column_outcome(column)
        return Answer(why, given=False)
    text = line.answers[turn]
    stopped = line.stopped[turn] if turn < len(line.stopped) else ""
    grade = _grade_words(graded.get((str(asked.question_id), turn), {}))
    empty = not text.strip()
    return Answer(_EMPTY if empty else text, not empty, _CUT.get(stopped, ""), grade)


# --- grades


def _graded(column: AnswersColumn, asked: Sequence[AskedQuestion], grades: Grades) -> Graded:
    """Return the grades of all answers of a column."""
    found = {}
    for question in asked:
        answers = _line(column, question).answers
        if len(answers) != len(question.turns):
            continue
        for turn in range(len(question.turns)):
            given = grades.of(question.question_id, question.turns, answers, turn)
            if given:
                found[str(question.question_id), turn] = given
    return found


def _grade_words(grades: Mapping[str, float]) -> str:
    """Return ``grade 7``, with the judges' names if there are several."""
    if len(grades) == 1:
        return f"grade {next(iter(grades.values())):g}"
    return ", ".join(f"{judge} {grade:g}" for judge, grade in sorted(grades.items()))


def _grade_table(graded: Sequence[tuple[AnswersColumn, Graded]], judges: Sequence[str]) -> Table:
    """Return the mean grade of each base model and method by each judge."""
    groups: dict[str, list[Graded]] = {}
    for column, found in graded:
        name = column_label(column) if column.method is None else column.method
        groups.setdefault(name, []).append(found)

    def by(judge: str) -> Column[tuple[str, list[Graded]]]:
        return Column(judge, lambda row: _mean_words([_mean(found, judge) for found in row[1]]))

    columns: list[Column[tuple[str, list[Graded]]]] = [
        Column("model", lambda row: row[0], words=True),
        *(by(judge) for judge in judges),
    ]
    note = (
        "The grade of a question is the mean over its turns, that of a run the mean over its "
        "questions; ± is the standard deviation over seeds, n their number."
    )
    return Table.of(list(groups.items()), columns, "Mean grades", [note])


def _mean(graded: Graded, judge: str) -> float | None:
    """Return the mean over questions; the grade of a question is the mean over its turns."""
    questions: dict[str, list[float]] = {}
    for (name, _), given in graded.items():
        if judge in given:
            questions.setdefault(name, []).append(given[judge])
    return fmean(map(fmean, questions.values())) if questions else None


def _mean_words(values: Sequence[float | None]) -> str:
    there = [value for value in values if value is not None]
    if not there:
        return NOTHING
    if len(there) == 1:
        return f"{there[0]:.2f}"
    return f"{fmean(there):.2f} ± {stdev(there):.2f} (n {len(there)})"
